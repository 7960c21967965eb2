"""Prompts: read from any benchmark's file, and dealt out to the steps and processes of a run.

Read next: records.py
"""

import json
import random
from pathlib import Path

from training.files import usage_error
from training.processes import rank, world_size
from training.prompt_files import (
    ID_NAMES,
    PROMPT_NAMES,
    TAG_NAMES,
    UnreadableError,
    no_prompt_field,
    read_rows,
)

ALIASES = {  # our field -> what the benchmarks call it, in any case; first match wins
    "prompt": PROMPT_NAMES,
    "id": ID_NAMES,
    "tag": TAG_NAMES,
}


def load_prompts(path, flag="--prompts"):
    """Read the prompt file of any benchmark: a list of dicts with `id`, `prompt`, `tag` and every
    other column of the file. flag: for messages.

    JSONL, a JSON list of objects or strings, a JSON object id -> prompt, a table whose header names
    a prompt column, plain lines, or a folder of .txt files (DPG-Bench). Wrong input: exit code 2.
    """
    try:
        rows = read_rows(Path(path))
        if not rows:
            raise UnreadableError("no prompts in it; one per line is enough")
        prompts = [normalize_row(row, number) for number, row in enumerate(rows)]
    except UnreadableError as problem:
        usage_error(f"{flag} {path}: {problem}")
    except RecursionError:
        usage_error(f"{flag} {path}: its JSON is nested too deeply; keep only what is needed")
    except OSError as problem:  # no permission, a name too long, a broken disk
        usage_error(f"{flag} {str(path)[:200]}: {problem.strerror}; give a file or a folder")
    seen = set()
    for number, row in enumerate(prompts, 1):
        if row["id"] in seen:
            usage_error(
                f"{flag} {path}, entry {number}: id {row['id']!r} is taken; ids name files, give "
                "each prompt its own (one without an id gets its place in the file, from 0)"
            )
        seen.add(row["id"])
    return prompts


def normalize_row(row, number):
    """One entry of a prompt file, with the three fields that every script relies on."""
    row = {"prompt": row} if isinstance(row, str) else row
    where = f"entry {number + 1}"
    if not isinstance(row, dict):
        raise UnreadableError(f"{where}: a prompt is a text or an object, not {str(row)[:60]!r}")
    fields = {name.strip().lower(): value for name, value in row.items()} | row
    present = [fields[name] for name in ALIASES["prompt"] if name in fields]
    if not present:
        raise UnreadableError(f"{where}: {no_prompt_field(row)}")
    prompt = present[0]  # never another column because this one is empty
    if not isinstance(prompt, str) or "\0" in prompt or not has_letters(prompt):
        raise UnreadableError(f"{where}: a prompt is a visible text, not {str(prompt)[:80]!r}")
    id_, tag = (
        next((fields[name] for name in ALIASES[field] if fields.get(name) not in (None, "")), "")
        for field in ("id", "tag")
    )
    if isinstance(id_, bool) or not isinstance(id_, (str, int, float)):
        raise UnreadableError(f"{where}: an id is a text or a number, not {str(id_)[:60]!r}")
    tag = tag if isinstance(tag, str) else json.dumps(tag)
    row = {**row, "prompt": prompt.strip(), "id": str(id_).strip() or str(number), "tag": tag}
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as problem:
        letter = problem.object[problem.start]
        raise UnreadableError(f"{where}: {letter!r} is half a character; write all of it") from None
    return row


def has_letters(prompt):
    """Whether there is anything to see: blanks and zero-width characters are nothing."""
    return any(letter.isprintable() and not letter.isspace() for letter in prompt)


# --- the prompts of a training step -------------------------------------------------------------


def prompts_of_step(num_prompts, step, per_step, seed):
    """Indices of the prompts of a step: each epoch has an order that only the seed decides."""
    order, chosen = {}, []
    for n in range(step * per_step, (step + 1) * per_step):
        epoch, place = divmod(n, num_prompts)
        if epoch not in order:
            rng = random.Random(f"{seed} {epoch}")
            order[epoch] = rng.sample(range(num_prompts), num_prompts)
        chosen.append(order[epoch][place])
    return chosen


def jobs_of_step(rows, step, cfg):
    """This process' rollouts of a step: (prompt index, sample number), group after group. A group
    stays on one process, which can then compute its mean alone.

    Where one epoch ends and the next begins a prompt may come twice. Its second group has other
    sample numbers, so other random numbers: it is no copy of the first."""
    G = cfg.num_generations
    indices = prompts_of_step(len(rows), step, cfg.prompts_per_step, cfg.seed)
    groups = [(i, G * indices[:n].count(i)) for n, i in enumerate(indices)]
    return [(i, first + k) for i, first in groups[rank() :: world_size()] for k in range(G)]
