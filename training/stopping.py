"""When a run must end early: it was asked to, or it cannot go on. It saves a checkpoint first.

Read next: run_folder.py
"""

import contextlib
import math
import os
import shutil
import signal
import sys
import time
from collections import Counter

import torch
from tqdm import tqdm

from training.processes import end_processes, gather, rank, world_size
from training.records import mean
from training.run_folder import checkpoints

MAX_KL = 2.0  # nats per token; the longest runs that made sense stayed below 0.7
PATIENCE = 5  # steps in a row with a gradient that is not finite, until the run gives up


class StopSignal:
    """Remembers SIGTERM or Ctrl-C, so that the run can end between two steps. A second signal more
    than ten seconds later ends it at once, without saving. Sooner, it is the same request: a
    terminal or a cluster sends it to the process and to its launcher, which passes it on."""

    def __init__(self):
        self.time, self.code = None, 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        code = 128 + number  # what a shell reports for this signal
        if self.time and time.monotonic() - self.time > 10:
            os._exit(code)  # without waiting for threads, servers or other processes
        if rank() == 0 and not self.time:
            os.write(2, b"\nstopping after this step; repeat it in ten seconds to stop at once\n")
        self.time, self.code = self.time or time.monotonic(), self.code or code

    def stop_if_requested(self, save):
        """End the run if any process was asked to stop; all processes decide alike."""
        code = max(gather([self.code]))
        if code:
            give_up("asked to stop", code, save())


def stop_if_diverged(metrics, step, folder):
    """End the run, with code 3, if the policy is lost; it is not saved. The KL is that of the
    policy that sampled this step, so a checkpoint of this step is lost, too, and is set aside."""
    close = metrics["kl_per_token"] <= MAX_KL  # False for NaN
    if close and metrics["weights_finite"]:
        return
    if rank() == 0:
        what = "NaN weights" if close else f"a KL of {metrics['kl']:.3g} nats"
        lost = folder / "checkpoints" / f"step-{step:06d}"
        if not close and lost.exists():
            aside = lost.with_name(f"{lost.name}.diverged")
            shutil.rmtree(aside, ignore_errors=True)  # of an earlier try
            lost.rename(aside)
        good = checkpoints(folder)
        kept = f"{good[-1]} is from before it" if good else "no checkpoint is from before it"
        print(
            f"step {step} has {what}: the policy has diverged, and is not saved; {kept}. Start a "
            "new run with a lower --learning-rate, or a higher --beta",
            file=sys.stderr,
        )
    end_processes(3)


class NoScores(Exception):
    """So many rollouts of a step have no score that training on it would follow the KL alone."""


def check_scores(scores, rewards, max_failures):
    """Raise NoScores, on all processes alike, if a larger share of a step's rollouts than
    max_failures has no score. Nothing has been trained then, apart from an adversary, which will
    have learned twice from these pictures."""
    failed = torch.stack([scores[name].isnan() for name in rewards]).any(0)
    share = mean(gather(failed.tolist()))
    if share > max_failures:
        reasons = Counter()
        for reward in rewards.values():
            reasons |= getattr(reward, "failures", Counter())
        raise NoScores(f"{share:.0%} of the rollouts had no score: {dict(reasons)}")


@contextlib.contextmanager
def rescued(save=None, updates=1):
    """Around a step: if its rollouts have no scores, or memory runs out, save what was before it
    and end the run with code 3. The step is repeated when the run goes on. Around a test, without
    `save`: if memory runs out, end the run with the same advice; the last checkpoint stays. So it
    does in a step of several updates, of which some may have been taken."""
    try:
        yield
    except NoScores as reason:
        give_up(reason, 3, save())
    except torch.OutOfMemoryError as problem:
        reason = f"out of memory ({str(problem).splitlines()[0]}); lower --micro-batch, or use "
        reason += "--rollout-batch, --gradient-checkpointing, --lora-rank or --shard"
        if save and updates == 1 and world_size() == 1:
            give_up(reason, 3, save())
        print(reason, file=sys.stderr)  # the other processes are in the middle of the step
        end_processes(3, alone=True)


def in_batches(function, items, size):
    """[function(items[:size]), function(items[size : 2 * size]), ...]. A batch that does not fit
    into memory is tried again in halves: a rollout is the same in any batch."""
    results = []
    for batch in (items[i : i + size] for i in range(0, len(items), size)):
        try:
            results.append(function(batch))
            continue
        except torch.OutOfMemoryError:
            if len(batch) < 2:
                raise
        # Outside of `except`, so that the exception no longer holds the memory.
        torch.cuda.empty_cache()
        message = f"out of memory with {len(batch)} rollouts at a time: trying half as many"
        tqdm.write(message, file=sys.stderr)
        results += in_batches(function, batch, math.ceil(len(batch) / 2))
    return results


def stop_if_wrong(metrics, skipped, save):
    """Save and end the run with code 3 if it must not go on."""
    reason = what_is_wrong(metrics, skipped)
    if reason:
        give_up(reason, 3, save())


def what_is_wrong(metrics, skipped):
    """Why this run must not go on, or "". skipped: steps in a row that were not taken."""
    if not metrics["processes_agree"]:
        return "the processes train different policies: their weights are no longer the same"
    if skipped >= PATIENCE:
        return (
            f"{PATIENCE} steps in a row had gradients that are not finite, and were skipped; lower "
            "--learning-rate"
        )
    return ""


def give_up(reason, code, saved):
    """End the run after its checkpoint: exit code 143 or 130 if asked to stop, 3 if it cannot go
    on."""
    if rank() == 0:
        print(f"{reason}; saved {saved}; continue with --resume latest", file=sys.stderr)
    end_processes(code)
