"""Calls to servers: many at a time, and never for ever.

The time-out of an HTTP client is for each read. A server that sends a byte now and then never
exceeds it. So every call runs in a thread, and whoever wants its result waits for a stated time
only. The threads are daemons: a server that never answers cannot keep the program from ending.

Imports only what an environment of 2023 has, for serving.py.   Read next: stopping.py
"""

import contextlib
import math
import queue
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, wait

EACH, ALL = 120.0, 300.0  # seconds for one request with its repetitions, and for those of one step
SAY_AFTER, SAY_EVERY = 10.0, 30.0  # seconds until the screen says what is waited for


class Unanswered(Exception):
    """A call that has no result. Its text is the reason."""


class CutOff(Unanswered):
    """A model's answer that was longer than it may be."""


def start(calls, workers=16):
    """Run functions without arguments in daemon threads; a Future for each."""
    futures, waiting = [Future() for _ in calls], queue.SimpleQueue()
    for pair in zip(futures, calls):
        waiting.put(pair)

    def work():
        with contextlib.suppress(queue.Empty):
            while True:
                future, call = waiting.get_nowait()
                if future.set_running_or_notify_cancel():
                    future.began = time.monotonic()
                    try:
                        future.set_result(call())
                    except BaseException as problem:  # raised again where the result is wanted
                        future.set_exception(problem)

    for _ in range(min(workers, len(calls))):
        threading.Thread(target=work, daemon=True).start()
    return futures


def outcomes(futures, what, each, total):
    """The result of each call, in order, or the Unanswered that it raised, or that it deserves:
    for one that took more than `each` seconds, and for what is left after `total` seconds."""
    begin, late, pending = time.monotonic(), {}, set(futures)
    say_at = begin + SAY_AFTER
    while pending:
        pending = wait(pending, timeout=min(1.0, each, total), return_when=FIRST_COMPLETED)[1]
        now = time.monotonic()
        for future in pending:
            if now - getattr(future, "began", math.inf) > each:
                late[future] = Unanswered(f"no answer within {each:g} s")
            elif now - begin > total:
                late[future] = Unanswered(f"not answered {total:g} s after the first was asked")
                future.cancel()
        pending -= late.keys()
        if pending and now > say_at:
            say_at = now + SAY_EVERY
            print(
                f"waiting for {what}: {len(pending)} of {len(futures)} not answered after "
                f"{now - begin:.0f} s; for {total:.0f} s at most",
                file=sys.stderr,
            )
    return [late.get(future) or outcome(future) for future in futures]


def outcome(future):
    try:
        return future.result()
    except Unanswered as problem:
        return problem
