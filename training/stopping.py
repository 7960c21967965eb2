"""When a run must end early: it was asked to, or it cannot go on. It saves a checkpoint first.

Read next: run_folder.py
"""

import os
import signal
import sys
import time
from collections import Counter

from training.processes import end_processes, gather, rank
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
            raise SystemExit(code)
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
            lost.rename(lost.with_name(f"{lost.name}.diverged"))
        good = checkpoints(folder)
        kept = f"{good[-1]} is from before it" if good else "no checkpoint is from before it"
        print(
            f"step {step} has {what}: the policy has diverged, and is not saved; {kept}. Start a "
            "new run with a lower --learning-rate, or a higher --beta",
            file=sys.stderr,
        )
    end_processes(3)


def what_is_wrong(metrics, skipped, rewards, max_failures):
    """Why this run must not go on, or "". skipped: steps in a row that were not taken."""
    if metrics["failed"] > max_failures:
        reasons = Counter()
        for reward in rewards.values():
            reasons |= getattr(reward, "failures", Counter())
        return f"{metrics['failed']:.0%} of the rollouts had no score: {dict(reasons)}"
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
