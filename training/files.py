"""What every script needs: errors of usage, and files that appear whole.

Three promises. A file appears whole or not at all. File names come from numbers and ids, never from
prompts. Wrong input costs one line that says the rule, the value and the remedy, and exit code 2.

Read next: prompts.py
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import sys
import time
import zlib
from pathlib import Path

ROOT = Path(__file__).parents[1]  # of the repository
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
WRONG = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENOENT)
WRONG += (errno.EEXIST, errno.ENAMETOOLONG)


def lock(folder, flag, name=".lock"):
    """Keep this folder for this process, or what else the file `name` in it stands for. The system
    releases the lock when the process ends, however it ends. Returns the open file, which is the
    lock. flag: names another folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / name, "w")
    except OSError as problem:
        usage_error(f"--output-dir: {folder} cannot be written ({problem.strerror}); give another")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        usage_error(f"{folder}: another command is writing there; wait, or choose another {flag}")
    except OSError as problem:  # a shared disk may have no locks
        print(f"{folder} cannot be locked ({problem.strerror}): use it once only", file=sys.stderr)
    return file


def usage_error(message):
    """Wrong usage: print one line with the rule, the value and the remedy; exit with code 2."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(2)  # usually the first process says the same, and torchrun then ends the others
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def fingerprint(folder):
    """Eight digits that change with the files of a checkpoint: their names, sizes, and sixteen
    samples of each, since reading all of it can take minutes. Of one file: with that; of nothing:
    00000000."""
    value = 0
    for path in sorted(path for path in [Path(folder), *Path(folder).rglob("*")] if path.is_file()):
        size = path.stat().st_size
        value = zlib.crc32(f"{path.name} {size}".encode(), value)
        with open(path, "rb") as file:
            for part in range(16):
                file.seek(size * part // 16)
                value = zlib.crc32(file.read(2**16), value)
    return f"{value:08x}"


def without_password(text):
    """A text, such as a URL or a command, without user:password@ in its URLs: it is saved."""
    return re.sub("//[^/@\\s]*@", "//", str(text))


@contextlib.contextmanager
def atomic(path, mode="w"):
    """Open a file that appears whole or not at all: written under another name, then renamed. The
    other name is unique, as two commands may write the same file at once."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    # A text may hold the name of a file that is not UTF-8.
    text = {} if "b" in mode else {"encoding": "utf-8", "errors": "backslashreplace"}
    try:
        with naming(path), open(partial, mode, **text) as file:
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
    """For sys.excepthook: Ctrl-C, and a file that cannot be read or written, cost one line."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped; every file that is there is whole", file=sys.stderr)
    elif issubclass(kind, OSError) and error.errno in FULL + WRONG:
        where = error.filename or "writing failed"
        remedy = "free some space, or write elsewhere," if error.errno in FULL else "name another"
        print(f"error: {where}: {error.strerror}; {remedy} and repeat the command", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = one_line
if hasattr(sys.stdout, "reconfigure"):  # a name of a file may hold bytes that are no UTF-8
    sys.stdout.reconfigure(errors="backslashreplace")
