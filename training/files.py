"""What every script needs: errors of usage, and files that appear whole.

Three promises. A file appears whole or not at all. File names come from numbers and ids, never from
prompts. Wrong input costs one line that says the rule, the value and the remedy, and exit code 2.

Read next: prompts.py
"""

import contextlib
import errno
import os
import secrets
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]  # of the repository
CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def usage_error(message):
    """Wrong usage: print one line with the rule, the value and the remedy; exit with code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def atomic(path, mode="w"):
    """Open a file that appears whole or not at all: written under another name, then renamed. The
    other name is unique, as two commands may write the same file at once."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with naming(path), open(partial, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path):
    """Give an error of writing the name of the file; a full disk does not know it."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)  # it may be about another file
        raise


def one_line(kind, error, trace):
    """For sys.excepthook: Ctrl-C and a disk that is full cost one line, and no traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped; every file that is there is whole", file=sys.stderr)
    elif issubclass(kind, OSError) and error.errno in CANNOT_WRITE:
        where = error.filename or "writing failed"
        print(
            f"error: {where}: {error.strerror}; free some space, or write elsewhere and repeat "
            "the command",
            file=sys.stderr,
        )
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = one_line
