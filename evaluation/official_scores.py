"""Read the result files of the official scorers, and give the published numbers beside them.

The published numbers are in published_scores.json. GenEval and DPG-Bench: the Janus-Pro report
(arXiv:2501.17811, Tables 4 and 5). WISE: the benchmark's own leaderboard (arXiv:2503.07265), except
T2I-R1, as reported in its paper (arXiv:2505.00703).

Read next: wise.py
"""

import json
import math
import re
from collections import defaultdict
from pathlib import Path

from training.files import usage_error
from training.records import mean

# WISE: the last prompt id of each category, from 1 on, and how the criteria of a picture make its
# score. The weight of a category in the overall score is its share of the 1000 ids.
CATEGORIES = ("Cultural", "Time", "Space", "Biology", "Physics", "Chemistry")
LAST_IDS = {
    "WISE legacy": (400, 567, 700, 800, 900, 1000),
    "WISE verified": (400, 520, 640, 760, 880, 1000),
}
WEIGHTS = {
    "WISE legacy": {"consistency": 0.35, "realism": 0.1, "aesthetic_quality": 0.05},
    "WISE verified": {"score": 1.0},
}
TASKS = 6  # of GenEval
HIGHEST = {"WISE legacy": 2, "WISE verified": 1}  # value of a criterion; the lowest is 0


def published(benchmark):
    """The published rows of a benchmark: dict model -> dict column -> score; {} if none."""
    file = Path(__file__).with_name("published_scores.json")
    return json.loads(file.read_text()).get(benchmark, {})


def summarize(path):
    """An official result file -> (benchmark, dict column -> score, ids without a score). Another
    file: exit code 2."""
    try:
        return read_results(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as problem:
        usage_error(
            f"--summarize {path}: not a result file of GenEval, T2I-CompBench, WISE or DPG-Bench "
            f"({str(problem)[:100]})"
        )


def read_results(text):
    """The same for the text of the file. Another text: one of many kinds of errors."""
    if "DPG-Bench score:" in text:
        first = text[text.index("L1 category") : text.index("L2 category")]
        columns = {name.title(): float(v) for name, v in re.findall(r"\t(.+): ([\d.]+)", first)}
        columns["overall"] = float(re.search(r"DPG-Bench score: ([\d.]+)", text)[1])
        return "DPG-Bench", columns, []
    if text.lstrip().startswith("["):
        rows = json.loads(text)
    else:
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    fields = rows[0].keys() if rows else set()
    if {"tag", "correct"} <= fields:
        tags = defaultdict(list)
        for row in rows:
            tags[row["tag"]].append(float(row["correct"]))
        failed = [row.get("filename") for row in rows if not math.isfinite(float(row["correct"]))]
        columns = {tag: mean(values) for tag, values in tags.items()}
        # The mean of the tasks, not of the pictures.
        columns["overall"] = mean(columns.values()) if len(columns) >= TASKS else math.nan
        return "GenEval", columns, failed
    if {"question_id", "answer"} <= fields:
        failed = [row["question_id"] for row in rows if not math.isfinite(float(row["answer"]))]
        return "T2I-CompBench", {"overall": mean(float(row["answer"]) for row in rows)}, failed
    if "prompt_id" in fields and fields & {"consistency", "score"}:
        return wise_table(rows)
    raise ValueError(f"its lines have {', '.join(map(str, fields)) or 'no fields'}")


def wise_table(rows):
    """Records of WISE -> (protocol, dict column -> score, ids without a score).

    Legacy: (.7 consistency + .2 realism + .1 aesthetics) / 2, each 0, 1 or 2. Verified: 0 or 1.
    Another value (the official scorer writes 999) is no score and enters no mean. "overall" is NaN
    unless all 1000 prompts are there."""
    protocols = {"WISE verified" if "score" in row else "WISE legacy" for row in rows}
    if len(protocols) > 1:
        usage_error(
            "scores of both protocols of WISE in one file: they are not comparable; use one of them"
        )
    (protocol,) = protocols
    weights, scores, failed = WEIGHTS[protocol], {}, []
    for row in rows:
        values = [row.get(name) for name in weights]
        if all(v in range(HIGHEST[protocol] + 1) for v in values):
            scores[int(row["prompt_id"])] = sum(w * v for w, v in zip(weights.values(), values))
        else:
            failed.append(row["prompt_id"])
    bounds, columns, shares = (0, *LAST_IDS[protocol]), {}, []
    for name, low, high in zip(CATEGORIES, bounds, bounds[1:]):
        columns[name] = mean(score for id_, score in scores.items() if low < id_ <= high)
        shares.append((high - low) / 1000 * columns[name])
    complete = len({int(row["prompt_id"]) for row in rows}) >= LAST_IDS[protocol][-1]
    return protocol, columns | {"overall": sum(shares) if complete else math.nan}, failed
