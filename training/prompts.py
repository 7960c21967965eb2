"""Prompts: read from any benchmark's file, and dealt out to the steps and processes of a run.

Read next: records.py
"""

import csv
import io
import json
import random
from pathlib import Path

from training.files import usage_error
from training.processes import rank, world_size

ALIASES = {  # our field -> what the benchmarks call it, first match wins
    "prompt": ("prompt", "Prompt", "Prompts", "caption", "text"),
    "id": ("id", "prompt_id", "item_id"),
    "tag": ("tag", "task_type", "Subcategory", "Category", "Challenge"),
}


def load_prompts(path):
    """Read the prompt file of any benchmark: a list of dicts with `id`, `prompt`, `tag` and every
    other column of the file.

    The content decides, never the extension (T2I-R1's training file is JSONL named .json): JSONL, a
    JSON list of objects or strings, a table (TSV or CSV whose header names a prompt column), plain
    lines, or a folder of .txt files (DPG-Bench). Wrong input: exit code 2."""
    path = Path(path)
    if path.is_dir():
        texts = sorted(path.glob("*.txt"))
        rows = [{"id": text.stem, "prompt": text.read_text(encoding="utf-8")} for text in texts]
    elif path.is_file():
        rows = parse_prompts(path.read_text(encoding="utf-8-sig"), path)
    else:
        usage_error(f"--prompts {path}: no such file or folder")
    if not rows:
        usage_error(f"{path}: no prompts in it; one per line is enough")
    prompts, seen = [], set()
    for number, row in enumerate(rows):
        row = normalize_row(row, number, path)
        if row["id"] in seen:
            usage_error(
                f"{path}, entry {number + 1}: id {row['id']!r} occurs twice; ids name files"
            )
        seen.add(row["id"])
        prompts.append(row)
    return prompts


def normalize_row(row, number, path):
    """One entry of a prompt file, with the three fields that every script relies on."""
    row = {"prompt": row} if isinstance(row, str) else row
    where = f"{path}, entry {number + 1}"
    if not isinstance(row, dict):
        usage_error(f"{where}: a prompt is a text or an object, not {str(row)[:60]!r}")
    known = {
        field: next((row[name] for name in names if row.get(name) not in (None, "")), None)
        for field, names in ALIASES.items()
    }
    prompt = known["prompt"]
    if not isinstance(prompt, str) or not prompt.strip():
        fields = ", ".join(ALIASES["prompt"])
        usage_error(f"{where}: no prompt; it needs one of the fields {fields}: {str(row)[:100]}")
    id_ = str(known["id"] if known["id"] is not None else number)
    return {**row, "prompt": prompt.strip(), "id": id_, "tag": known["tag"] or ""}


def parse_prompts(text, path):
    """The rows of one prompt file, not yet checked: dicts or strings."""
    lines = [line for line in text.splitlines() if line.strip()]
    if text.lstrip()[:1] in ("{", "["):
        try:  # the whole file is one JSON value
            value = json.loads(text)
            return value if isinstance(value, list) else [value]
        except json.JSONDecodeError:
            return parse_jsonl(text, path)
    delimiter = "\t" if lines and "\t" in lines[0] else ","
    header = next(csv.reader(lines[:1], delimiter=delimiter), [])
    if set(header) & set(ALIASES["prompt"]):
        return list(csv.DictReader(io.StringIO(text), delimiter=delimiter))
    return [line.split("\t")[0] for line in lines]


def parse_jsonl(text, path):
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as problem:
                usage_error(f"{path}, line {number}: not JSON ({problem.msg}): {line[:80]!r}")
    return rows


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
    stays on one process, which can then compute its mean alone."""
    indices = prompts_of_step(len(rows), step, cfg.prompts_per_step, cfg.seed)
    local = indices[rank() :: world_size()]
    return [(i, k) for i in local for k in range(cfg.num_generations)]
