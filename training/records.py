"""Records: one dict for each picture, with its prompt and every score, kept as lines of JSON.

A score that failed is NaN in memory, null on disk (JSON has no NaN), and enters no mean.

Read next: log.py, which writes them; evaluation/hacking.py, which reads them
"""

import json
import math
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from training.files import atomic, naming, usage_error

ARTIFACT_FREE = 0.5  # a picture counts as artifact-free when its gold-clean reaches this


def read_jsonl(path):
    """Lines of JSON objects -> a list of dicts; null becomes NaN. A last line that is cut off, as a
    power cut or a full disk leaves it, is left out. Another line that is no object: exit code 2."""
    lines = Path(path).read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line or b"{}")
            rows.append({key: math.nan if value is None else value for key, value in row.items()})
        except (ValueError, AttributeError):
            if number < len(lines):
                usage_error(f"{path}, line {number}: no JSON object; mend or delete this line")
            print(f"{path}: its last line is cut off, and left out", file=sys.stderr)
    return [row for row in rows if row]


def read_json(path):
    """A file with one JSON object -> a dict. Anything else: exit code 2."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    except (OSError, ValueError):
        pass
    usage_error(f"{path}: missing, or no JSON object; restore it, or use another folder")


def without_nan(value):
    """NaN and infinity become None, at any depth: JSON has neither."""
    if isinstance(value, dict):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_line(record):
    """One record as a line of JSON."""
    return json.dumps(without_nan(record)) + "\n"


def write_jsonl(path, records):
    with atomic(path) as file:
        file.writelines(map(json_line, records))


def write_json(path, record):
    with atomic(path) as file:
        json.dump(without_nan(record), file, indent=2)


def append_jsonl(path, record):
    with naming(path), open(path, "a", encoding="utf-8") as file:
        file.write(json_line(record))


def mean(values):
    """Mean of the finite values; NaN if there are none."""
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan


def artifact_free(record):
    """1.0 or 0.0; NaN where gold gave no score."""
    clean = record["gold-clean"]
    return math.nan if math.isnan(clean) else float(clean >= ARTIFACT_FREE)


def mean_over_prompts(values, prompts):
    """(mean, its standard error; NaN below two prompts) of the means of the prompts. Pictures of
    one prompt resemble each other; the prompts are independent."""
    by_prompt = defaultdict(list)
    for value, prompt in zip(values, prompts):
        by_prompt[prompt].append(value)
    means = [m for m in map(mean, by_prompt.values()) if math.isfinite(m)]
    error = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else math.nan
    return mean(means), error


def test_means(records):
    """The records of one test -> the mean of every score, KL, and the artifact-free share; and
    "<name>/se", the standard error of each, but for image statistics."""
    names = [name for name, value in records[0].items() if isinstance(value, float)]
    columns = {name: [record[name] for record in records] for name in names}
    if "gold-clean" in columns:
        columns["artifact-free"] = [artifact_free(record) for record in records]
    ids = [record["id"] for record in records]
    errors = {f"{n}/se": mean_over_prompts(v, ids)[1] for n, v in columns.items() if "/" not in n}
    return {name: mean(values) for name, values in columns.items()} | errors
