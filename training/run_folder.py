"""The run folder: what a run leaves behind, and how it goes on after a stop.

    runs/<name>/  config.json            flags, command, versions
                  metrics.jsonl          a line for each step;  test.jsonl  a line for each test
                  rollouts/, tests/      every picture's scores
                  samples/               the fixed prompts through training
                  checkpoints/step-*/    the policy, for from_pretrained (with LoRA: for peft),
                                         and what a resume needs

Read next: model_card.py
"""

import datetime
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import zlib
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from training.files import ROOT, atomic, fingerprint, lock, usage_error, without_password
from training.flags import cure_flags
from training.model_card import model_card
from training.processes import broadcast, end_processes, gather, pick_device, rank, world_size
from training.records import read_json, read_jsonl, write_jsonl
from training.sharding import full_model_state, full_optimizer_state, load_optimizer_state

# What may differ when a run goes on: where it runs and what it writes, not what it computes (but
# for rounding). With another --max-steps the learning rate falls along another line: that is what
# extending a run means.
MAY_DIFFER = set(
    "resume output_dir run_name max_steps save_steps save_total_limit eval_steps best_of judge_url "
    "device max_failures micro_batch rollout_batch cuda_graph shard gradient_checkpointing "
    "report_to world_size gpu_memory push_to_hub".split()
)


def checkpoints(folder):
    """The checkpoints of a run, by step. Other names, such as step-best, are the user's own."""
    place = Path(folder) / "checkpoints"
    for old in place.glob(".step-*.old"):  # killed while one took the place of another: see save
        if not (final := place / old.name[1:-4]).exists():
            os.replace(old, final)
    found = place.glob("step-*")
    return sorted(path for path in found if re.fullmatch(r"step-\d{6,}", path.name))


def checkpoint_folder(name):
    """Where the weights of --model are: in a run folder the last checkpoint, else as named."""
    path = ROOT / "tiny_world/checkpoints/policy" if name == "tiny" else Path(name)
    return [path, *checkpoints(path)][-1]


def crc32(path):
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(2**24):
            value = zlib.crc32(chunk, value)
    return value


def damaged_file(checkpoint):
    """The name of a file that is not as it was saved, or None."""
    try:
        sums = json.loads((checkpoint / "state.json").read_text())["crc32"]
    except (OSError, ValueError, LookupError, TypeError):
        return "state.json"
    for name, value in sums.items():
        if not (checkpoint / name).is_file() or crc32(checkpoint / name) != value:
            return name


def whole_checkpoint(folder):
    """The newest checkpoint of a run all of whose files are as they were saved; each damaged one
    costs a line. Exit code 2 if there is none."""
    for checkpoint in reversed(checkpoints(folder)):
        damaged = damaged_file(checkpoint)
        if not damaged:
            return checkpoint
        print(f"{checkpoint}: {damaged} is damaged; taking the one before it", file=sys.stderr)
    no_checkpoint(folder)


def no_checkpoint(folder):
    usage_error(
        f"--resume {folder}: no whole checkpoints/step-* in it; give a run folder, 'latest', or "
        "start anew with 'never'"
    )


# --- opening ------------------------------------------------------------------------------------


def open_run(cfg):
    """(run folder, checkpoint to resume from or None, lock), the same on all processes."""
    folder = checkpoint = held = None
    if rank() == 0:
        folder, goes_on = choose_folder(cfg)
        # First: a run that is alive may delete a checkpoint that we read.
        held = lock(folder, "--run-name")
        checkpoint = whole_checkpoint(folder) if goes_on else None
        if checkpoint:
            step = int(checkpoint.name.split("-")[1])
            if step > cfg.max_steps:
                usage_error(f"--max-steps {cfg.max_steps}: {folder} is at step {step} already")
            print(f"resuming {folder} from {checkpoint.name}", flush=True)
            check_same_run(folder, cfg)
    return *broadcast((folder, checkpoint)), held


def choose_folder(cfg):
    """(run folder, whether a run goes on there). A name that is taken gets a number: nothing is
    overwritten. A folder with a .lock alone is of a start that was refused."""
    root = Path(cfg.output_dir)
    trained = re.sub("@https?://[^,:]+:[0-9]+", "", cfg.rewards)
    trained = trained.replace(",", "+").replace(":", "=")
    name = cfg.run_name or f"{Path(cfg.model).name}_{trained}_seed{cfg.seed}"
    if Path(name).name != name or name == "..":
        usage_error(f"--run-name {name}: a name, not a path; the folder is made in {root}")
    if cfg.resume not in ("never", "latest"):
        if not checkpoints(cfg.resume):
            no_checkpoint(cfg.resume)
        return Path(cfg.resume), True
    latest = latest_run(root, name, cfg.max_steps) if cfg.resume == "latest" else None
    if latest:
        return latest, True
    if cfg.resume == "latest":
        print(f"no checkpoint of {name} in {root}/: starting anew", file=sys.stderr)
    folder, number = root / name, 2
    while folder.exists() and [path.name for path in folder.iterdir()] != [".lock"]:
        folder, number = root / f"{name}-{number}", number + 1
    return folder, False


def latest_run(root, name, max_steps):
    """Of the runs of this name (name, name-2, ...) with a checkpoint: the unfinished one that saved
    last, or else the finished one that did; None if there is none. A run without a checkpoint is
    not continued: it would have to start again, over its own log."""
    numbered = re.compile(re.escape(name) + r"(-\d+)?")
    runs = [folder for folder in root.glob("*") if numbered.fullmatch(folder.name)]

    def order(run):
        last = checkpoints(run)[-1]
        return int(last.name.split("-")[1]) < max_steps, last.stat().st_mtime

    return max((run for run in runs if checkpoints(run)), key=order, default=None)


def check_same_run(folder, cfg):
    """A resumed run keeps its flags; otherwise its log would mix two experiments."""
    if not (folder / "config.json").is_file():
        return
    then = read_json(folder / "config.json").get("flags")
    if not isinstance(then, dict):
        usage_error(f"{folder}/config.json: has no flags, so it cannot be resumed; start anew")
    now, then = json.loads(json.dumps(flags_of(cfg))), cure_flags() | then
    for name in sorted(then.keys() - MAY_DIFFER):
        if then[name] != now.get(name):
            usage_error(
                f"--resume: {folder} was started with --{name.replace('_', '-')} {then[name]}, "
                f"this is {now.get(name)}; start a new run under another --run-name, or use the "
                "flags it had"
            )


def begin_log(folder, start, cfg, rewards):
    """Write config.json. Drop the lines and files of steps that will be repeated, so that the log
    of a resumed run equals that of an uninterrupted one."""
    inputs = inputs_of(cfg, rewards)
    if start:
        check_same_inputs(folder, inputs)
    drop_repeated(folder, start)
    made = provenance(cfg)
    if start:  # the beginning stays, and each resume is added
        old = read_json(folder / "config.json")
        first = {name: old.get(name, "unknown") for name in made}
        made = first | {"resumed": [*old.get("resumed", []), made]}
    config = {
        "flags": flags_of(cfg),
        "inputs": inputs,
        "command": without_password(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])),
        **made,
        "processes": world_size(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    with atomic(folder / "config.json") as file:
        json.dump(config, file, indent=2)


def drop_repeated(folder, start):
    """Remove what a run that goes on from step `start` writes again. Everything is read before
    anything is removed."""
    first_test, kept = start + 1 if start else 0, {}
    for name, first in (("metrics.jsonl", start), ("test.jsonl", first_test)):
        rows = read_jsonl(folder / name) if (folder / name).exists() else []
        if not all(isinstance(row.get("step"), int) for row in rows):
            usage_error(f"{folder / name}: a line has no step; mend or delete this line")
        kept[folder / name] = [row for row in rows if row["step"] < first]
    for path, rows in kept.items():
        if path.exists():
            write_jsonl(path, rows)
    for place, first in (("rollouts", start), ("tests", first_test), ("samples", first_test)):
        for path in (folder / place).glob("step_*"):
            step = re.fullmatch(r"step_(\d{6,})", path.stem)  # other names are the user's own
            if step and int(step[1]) >= first:
                path.unlink()
                # last.png shows a test that has just been removed.
                path.with_name("last.png").unlink(missing_ok=True)


def provenance(cfg):
    """When, with which code and on what: the commit, with "+" if files were changed since."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=10"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):  # no git
        commit = ""
    gpu = torch.cuda.get_device_name() if pick_device(cfg.device)[0] == "cuda" else ""
    cpu = f"{os.cpu_count()} x {platform.processor() or platform.machine()}"
    date = datetime.datetime.now(datetime.UTC).isoformat(" ", "minutes")
    return {"date": date, "commit": commit or "unknown", "hardware": gpu or cpu}


def flags_of(cfg):
    """The flags as they may be written down: without passwords. A prompt file of this project goes
    by its path inside it, so that runs made in two copies of the project have the same flags."""
    flags = asdict(cfg) | {"judge_url": [without_password(url) for url in cfg.judge_url]}
    for name in ("prompts", "test_prompts"):
        if flags[name] and Path(flags[name]).is_relative_to(ROOT):
            flags[name] = str(Path(flags[name]).relative_to(ROOT))
    del flags["cures"]
    return flags | cure_flags(cfg.cures)


def inputs_of(cfg, rewards):
    """What a run reads besides its flags, as texts that change with the contents."""
    inputs = {name: reward.identity for name, reward in rewards.items()}
    inputs["model"] = fingerprint(checkpoint_folder(cfg.model))  # of a hub name always the same
    if cfg.references:
        manifest = Path(cfg.references) / "manifest.jsonl"  # has the sha256 of each picture
        inputs["references"] = fingerprint(manifest if manifest.is_file() else cfg.references)
    for flag in ("prompts", "test_prompts"):
        path = Path(getattr(cfg, flag))
        inputs[flag] = f"crc32 {crc32(path):08x}" if path.is_file() else str(path)
    return inputs


def check_same_inputs(folder, inputs):
    """A resumed run has the same prompts, reward models, judge and question."""
    then = read_json(folder / "config.json").get("inputs", {})
    for name in then.keys() & inputs.keys():
        if then[name] != inputs[name]:
            usage_error(
                f"--resume: {folder} was started with {name} = {then[name]!r}, which now is "
                f"{inputs[name]!r}; restore it, or start a new run under another --run-name"
            )


# --- checkpoints --------------------------------------------------------------------------------


class Run:
    """What a checkpoint holds: the policy, the optimizer, the rewards that learn, the cures' copies
    of the weights, the counters."""

    def __init__(self, folder, policy, rewards, optimizer, cure, keep):
        self.folder, self.cure, self.keep = folder, cure, keep
        self.policy, self.rewards, self.optimizer = policy, rewards, optimizer
        self.step = 0  # the next one
        self.skipped = 0  # steps in a row that were not taken

    def finish_step(self, skipped):
        self.step += 1
        self.skipped = (self.skipped + 1) * skipped

    def is_due(self, every, last):
        """Is it time for what happens every so many steps, and after the last one?"""
        return self.step % every == 0 or self.step == last

    def load(self, checkpoint):
        """Restore what `save` wrote; load_policies has read the weights already."""
        if checkpoint is None:
            return

        def load(name):
            # mmap: the processes of a node share the file's 55 GB (7B) instead of reading it each.
            file = checkpoint / f"{name}.pt"
            return torch.load(file, weights_only=True, map_location="cpu", mmap=True)

        load_optimizer_state(self.policy, self.optimizer, load("optimizer"))
        for name, reward in self.rewards.adversaries.items():
            reward.load_state_dict(load(name))
        for name, copy in self.cure.copies.items():
            for now, saved in zip(copy, load(name), strict=True):
                now.copy_(saved)
        state = json.loads((checkpoint / "state.json").read_text())
        self.step, self.skipped = state["step"], state["skipped"]
        self.rewards.multipliers = state["multipliers"]

    def save(self):
        """checkpoints/step-000100: the policy in the Hugging Face format with a model card, and all
        that an exact resume needs. Written under another name and renamed when complete, so that a
        kill leaves the previous checkpoint whole. All processes must call it. Returns its path. If
        it cannot be written, the run ends with exit code 3."""
        weights = None if self.policy.adapter else full_model_state(self.policy)
        tensors = {"optimizer": full_optimizer_state(self.policy, self.optimizer)}
        tensors |= {name: r.state_dict() for name, r in self.rewards.adversaries.items()}
        tensors |= self.cure.copies
        final = self.folder / "checkpoints" / f"step-{self.step:06d}"
        if rank() == 0:
            partial = final.with_name(f".{final.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            try:
                self.write(partial, weights, tensors)
            except Exception as error:  # of a full disk, torch and safetensors have their own kinds
                shutil.rmtree(partial, ignore_errors=True)
                print(
                    f"error: {final} cannot be saved ({error}); free some space, then continue "
                    "from the checkpoint before it with --resume latest",
                    file=sys.stderr,
                )
                end_processes(3, alone=True)
            if final.exists():  # this step was saved before; until the new one is there, keep it
                os.replace(final, final.with_name(f".{final.name}.old"))
            os.replace(partial, final)
            shutil.rmtree(final.with_name(f".{final.name}.old"), ignore_errors=True)
            for old in checkpoints(self.folder)[: -self.keep]:
                shutil.rmtree(old)
        gather([None])  # no process may end before it is written: torchrun would stop the others
        return final

    def write(self, folder, weights, tensors):
        folder.mkdir(parents=True)
        self.policy.save(folder, weights)
        if "average" in self.cure.copies:
            with self.cure.tested(self.policy):
                self.policy.save(folder / "average")
        for name, value in tensors.items():
            torch.save(value, folder / f"{name}.pt")
        (folder / "README.md").write_text(model_card(self.folder, self.step))
        files = [path for path in folder.rglob("*") if path.is_file()]
        state = {"step": self.step, "skipped": self.skipped}
        state["multipliers"] = self.rewards.multipliers
        state["crc32"] = {str(path.relative_to(folder)): crc32(path) for path in files}
        (folder / "state.json").write_text(json.dumps(state))
        keep_on_disk(folder)


def keep_on_disk(folder):
    """Wait until all files of a folder are on the disk: a rename can be there before them."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
