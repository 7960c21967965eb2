"""What every script needs: errors of usage, and files that appear whole.

Three promises. A file appears whole or not at all. File names come from numbers and ids, never from
prompts. Wrong input costs one line that says the rule, the value and the remedy, and exit code 2.

Read next: prompts.py
"""

import contextlib
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]  # of the repository


def usage_error(message):
    """Wrong usage: print one line with the rule, the value and the remedy; exit with code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def atomic(path, mode="w"):
    """Open a file that appears whole or not at all: written under another name, then renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, mode, encoding=None if "b" in mode else "utf-8") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
