"""Several processes, started by torchrun, or just one: the same code runs on both.

Read next: sharding.py
"""

import atexit
import contextlib
import datetime
import math
import os
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from training.files import usage_error


def pick_device(device, dtype="auto"):
    """("auto", "auto") -> the best there is: (device name, torch dtype). One that is not there:
    exit code 2."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        device = next((name for name, usable in there.items() if usable), "cpu")
    if not there.get(device, True):
        usage_error(f"--device {device}: this machine has none that torch can use; drop the flag")
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    return device, getattr(torch, dtype)


def start_processes(device="auto", most=math.inf):
    """Join the process group if torchrun started this process (it sets RANK).

    `most` processes have work; those beyond end here, such as 48 of the 64 that torchrun
    --nproc-per-node auto starts on 64 cores when a step has 16 prompts."""
    cuda = torch.cuda.is_available() and device in ("auto", "cuda")
    if "RANK" in os.environ and not dist.is_initialized():
        if "TORCHELASTIC_RUN_ID" in os.environ:
            end_with_launcher()
        number, started = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if number >= most:
            raise SystemExit(0)
        if number == 0 and started > most:
            print(f"{most} of {started} processes have a prompt in each step; the others end")
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        # The others wait while the first one writes a checkpoint: 85 GB for Janus-Pro-7B.
        patience = datetime.timedelta(hours=2)
        size = min(started, most)
        dist.init_process_group(backend, rank=number, world_size=size, timeout=patience)
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))


def end_with_launcher():
    """If torchrun is killed, end this process at once: it would wait for the others for hours, and
    keep its GPU and its run folder."""
    launcher = os.getppid()

    def watch():
        while os.getppid() == launcher and not orphan:
            time.sleep(0.5)
        os.write(2, b"\ntorchrun is gone; ending without saving, go on with --resume latest\n")
        os._exit(137)  # as of SIGKILL

    # It may be gone already, and then this process is a child of process 1. In a container process
    # 1 may be torchrun itself.
    orphan = launcher == 1
    with contextlib.suppress(OSError):  # no such file on a Mac, or no permission
        orphan = orphan and b"torch" not in Path("/proc/1/cmdline").read_bytes()
    threading.Thread(target=watch, daemon=True).start()


def end_processes(code=0, alone=False):
    """Leave the process group, if there is one, and end the process with this exit code. alone: the
    other processes do not end now. Leaving their group would wait for them, and they for us
    (pytorch/torchtitan#1342); without leaving it, torchrun sees this process end, and ends them.

    os._exit, because the interpreter's own shutdown can abort a process that has sharded a model:
    DTensor's caches keep the group, and gloo's threads, alive after destroy_process_group. If such
    a thread is late to release the tensors of the last gather, it asks for an interpreter that is
    gone ("terminate called without an active exception", pytorch/pytorch#190489)."""
    if dist.is_initialized():
        if not alone:
            dist.destroy_process_group()
        atexit._run_exitfuncs()  # what libraries have registered, such as the end of a wandb run
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        raise SystemExit(code)


def launched():
    """Is this one of torchrun's processes, even if the only one?"""
    return dist.is_initialized()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def bar(items, name):
    """A progress bar on the first process' screen, gone at the end; none for a single item."""
    return tqdm(items, name, leave=False, disable=rank() != 0 or len(items) < 2)


def gather(items):
    """A list from each process -> one list, in the order of the ranks, on all of them."""
    if not dist.is_initialized():
        return items
    parts = [None] * world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def broadcast(value):
    """The value that rank 0 has, on all processes."""
    return gather([value])[0]


def sum_over_processes(numbers):
    """Sum a list of numbers, one by one, over all processes (float64)."""
    return torch.tensor(gather([numbers]), dtype=torch.float64).sum(0).tolist()
