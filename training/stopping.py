"""When a run must end early: it was asked to, or it cannot go on. It saves a checkpoint first.

Read next: run_folder.py
"""

import signal
import sys
import time
from collections import Counter

from training.processes import end_processes, gather, rank

PATIENCE = 5  # steps in a row with a gradient that is not finite, until the run gives up


class StopSignal:
    """Remembers SIGTERM, so that the run can end between two steps. A second signal more than
    ten seconds later ends it at once, without saving. Sooner, it is the same request: a cluster
    sends it to the process and to its launcher, which passes it on."""

    def __init__(self):
        self.times = []
        signal.signal(signal.SIGTERM, self.receive)

    def receive(self, number, frame):
        if self.times and time.monotonic() - self.times[0] > 10:
            raise SystemExit(143)
        self.times.append(time.monotonic())

    def stop_if_requested(self, save):
        """End the run if any process was asked to stop; all processes decide alike."""
        if any(gather([bool(self.times)])):
            save()
            give_up("asked to stop", 143)


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


def give_up(reason, code):
    """End the run after its checkpoint: exit code 143 if asked to stop, 3 if it cannot go on."""
    if rank() == 0:
        print(
            f"{reason}; stopped after saving a checkpoint; continue with --resume latest",
            file=sys.stderr,
        )
    end_processes(code)
