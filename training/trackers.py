"""--report-to: the numbers and pictures of a run, also sent to TensorBoard, wandb or trackio.

The run folder has everything in any case. A tracker only shows it elsewhere, while the run goes on.

Read next: log.py
"""

import importlib.util
import secrets
import shutil

from training.files import atomic, usage_error
from training.run_folder import checkpoints, flags_of

PROJECT = "artifact-reward"


def check_installed(name):
    """Exit code 2 if the library behind --report-to is missing."""
    if name != "none" and importlib.util.find_spec(name) is None:
        usage_error(f"--report-to {name}: not installed; pip install {name}, or drop the flag")


def start_tracker(cfg, folder, start=0):
    """The tracker of --report-to, of a run that begins at step `start`. Each kind has two methods:
    send(step, numbers, pictures), with name -> number and name -> PNG file; and finish(). Exit code
    2 if its library does not start."""
    if cfg.report_to == "none":
        return Nowhere()
    kind = TensorBoard if cfg.report_to == "tensorboard" else Session
    try:
        return kind(cfg.report_to, folder, flags_of(cfg), start)
    except Exception as problem:  # no account, no network, no room: each library raises its own
        reason = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        if not checkpoints(folder):  # a new run: its folder holds its flags, and nothing else
            shutil.rmtree(folder, ignore_errors=True)
        usage_error(
            f"--report-to {cfg.report_to}: it does not start ({reason}); fix it, or drop the flag"
        )


def run_id(folder):
    """The folder's name and a few random letters, kept there: a resumed run is the same run, and a
    new folder of an old name is another one."""
    file = folder / ".run_id"
    if not file.exists():
        with atomic(file) as target:
            target.write(f"{folder.name}-{secrets.token_hex(3)}")
    return file.read_text()


class Nowhere:
    def send(self, step, numbers, pictures):
        pass

    def finish(self):
        pass


class TensorBoard:
    """tensorboard --logdir runs"""

    def __init__(self, name, folder, flags, start):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(folder / "tensorboard", purge_step=start)
        self.writer.add_text("flags", "\n".join(f"    {k} {v}" for k, v in flags.items()))

    def send(self, step, numbers, pictures):
        import numpy as np
        from PIL import Image

        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        for name, file in pictures.items():
            pixels = np.asarray(Image.open(file).convert("RGB"))
            self.writer.add_image(name, pixels, step, dataformats="HWC")
        self.writer.flush()  # it would keep two minutes of numbers in memory

    def finish(self):
        self.writer.close()


class Session:
    """wandb, or trackio, which has the same functions. Steps that a resumed run repeats are there
    twice; the run folder has them once."""

    def __init__(self, name, folder, flags, start):
        self.library, self.is_wandb = importlib.import_module(name), name == "wandb"
        label = run_id(folder)
        where = {"id": label, "dir": folder} if self.is_wandb else {}
        self.run = self.library.init(
            project=PROJECT, name=label, config=flags, resume="allow", **where
        )
        if self.is_wandb:  # its own counter of steps refuses to go back, as a resumed run does
            self.run.define_metric("*", step_metric="step")

    def send(self, step, numbers, pictures):
        images = {name: self.library.Image(str(file)) for name, file in pictures.items()}
        if self.is_wandb:
            self.run.log(numbers | images | {"step": step})
        else:
            self.run.log(numbers | images, step)

    def finish(self):
        self.run.finish()
