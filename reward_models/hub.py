"""Checkpoints: from a folder or from the Hugging Face hub, with the weight names of any code.

Published checkpoints have the weight names of their original code. The tables in names.json
translate them to those of transformers.   Read next: clip.py
"""

import json
import re
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download

from training.files import usage_error

NAMES = json.loads(Path(__file__).with_name("names.json").read_text(encoding="utf-8"))


def download(name, file):
    """Path of one file of a checkpoint. name: a folder, or a repository of the hub."""
    if Path(name).is_dir():
        return Path(name) / file
    return from_hub(hf_hub_download, str(name), file)


def snapshot(name):
    """Folder of a whole checkpoint. name: a folder, or a repository of the hub."""
    return Path(name) if Path(name).is_dir() else from_hub(snapshot_download, str(name))


def from_hub(get, *what):
    try:
        return Path(get(*what))
    except Exception as problem:  # many kinds: no network, no such file, no permission
        reason, what = type(problem).__name__, " ".join(what)
        usage_error(f"cannot download {what} ({reason}); with a network: hf download {what}")


# --- state dicts: name -> tensor ----------------------------------------------------------------


def rename(state, table):
    """Apply a table of (pattern, replacement), in order, to the names of a state dict."""
    for pattern, replacement in table:
        state = {re.sub(pattern, replacement, name): value for name, value in state.items()}
    return state


def submodule(state, prefix):
    """The part of a state dict whose names begin with the prefix, without the prefix."""
    kept = {name: value for name, value in state.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): value for name, value in kept.items()}


def count(state, pattern):
    """Number of layers: 1 + the largest number that the pattern's group finds in the names."""
    return 1 + max(int(found[1]) for name in state if (found := re.match(pattern, name)))
