"""Labelled pictures, clean or broken, and how well a judge tells them apart.

Read next: best_arm.py
"""

import math
import zlib
from collections import Counter
from pathlib import Path

import numpy as np

from evaluation.best_arm import log_likelihoods
from evaluation.tables import bootstrap
from training.decode import SUFFIXES, open_picture
from training.files import usage_error
from training.records import read_jsonl

SPLITS = ("train", "validation", "test")


def load_examples(path):
    """Labelled pictures -> {"train", "validation", "test"}: lists of {"path", "prompt", "broken"}.

    * a folder with train.jsonl, validation.jsonl and test.jsonl, or one JSONL file, whose lines are
      pairs {"prompt", "clean": file, "broken": file} or labelled pictures {"prompt", "path": file,
      "label": 0 or 1};
    * a folder with clean/ and broken/: a file's name, up to "__", counts as its prompt.

    Data in one piece are split by prompt, 5 : 2 : 3. Wrong input: exit code 2."""
    path = Path(path)
    if (path / "train.jsonl").is_file():
        splits = {name: read_labels(path / f"{name}.jsonl") for name in SPLITS}
    elif path.is_file():
        splits = split_by_prompt(read_labels(path))
    elif (path / "clean").is_dir():
        files = [(k, f) for k in ("clean", "broken") for f in pictures_in(path / k)]
        splits = split_by_prompt(
            {"path": file, "prompt": file.stem.split("__")[0], "broken": kind == "broken"}
            for kind, file in files
        )
    else:
        usage_error(f"--data {path}: no train.jsonl, no JSONL file, no clean/ and broken/")
    check_splits(splits, path)
    return splits


def pictures_in(folder):
    """The picture files of a folder; what else lies there (.DS_Store, notes) is counted aloud."""
    files = sorted(path for path in folder.glob("*") if path.is_file())
    found = [f for f in files if f.suffix.lower() in SUFFIXES and not f.name.startswith(".")]
    if len(found) < len(files):
        others = ", ".join(sorted({f.name for f in files} - {f.name for f in found})[:3])
        print(f"{folder}: {len(files) - len(found)} files are no pictures ({others})")
    return found


def split_by_prompt(examples):
    splits = {name: [] for name in SPLITS}
    for example in examples:
        place = zlib.crc32(example["prompt"].encode()) % 10
        splits["train" if place < 5 else "validation" if place < 7 else "test"].append(example)
    return splits


def check_splits(splits, path):
    """Each split needs both kinds of pictures, and no prompt may be in two splits."""
    for name, examples in splits.items():
        if {example["broken"] for example in examples} != {True, False}:
            usage_error(
                f"--data {path}: the {name} split needs clean pictures and broken ones; it has "
                f"{len(examples)} pictures, and not both kinds"
            )
    prompts = {name: {e["prompt"] for e in examples} for name, examples in splits.items()}
    for a, b in (("train", "test"), ("validation", "test"), ("train", "validation")):
        shared = prompts[a] & prompts[b]
        if shared:
            usage_error(
                f"--data {path}: {len(shared)} prompts are in {a} and in {b}, such as "
                f"{min(shared)!r}; results on data that were optimised on are no evidence, split "
                "by prompt"
            )


def read_labels(path):
    examples = []
    for number, row in enumerate(read_jsonl(path), 1):
        pair, label = [("clean", False), ("broken", True)], row.get("label")
        if not isinstance(row.get("prompt", ""), str):
            usage_error(f"{path}, line {number}: prompt {row['prompt']!r} is no text")
        if "clean" not in row and label not in (0, 1):  # True and False are 0 and 1
            usage_error(f"{path}, line {number}: label {label!r}; 0 for clean, 1 for broken")
        for field, broken in pair if "clean" in row else [("path", bool(label))]:
            if not isinstance(row.get(field), str) or not (path.parent / row[field]).is_file():
                usage_error(
                    f"{path}, line {number}: no picture {row.get(field)!r}; a line needs clean and "
                    "broken, or path and label; files lie relative to it"
                )
            file = path.parent / row[field]
            examples.append({"path": file, "prompt": row.get("prompt", ""), "broken": broken})
    return examples


# --- how good is a judge? -----------------------------------------------------------------------


def measures(p_broken, examples):
    """P(broken) of N examples -> dict of numbers.

    accuracy: share of pictures on the right side of 1/2 (no answer counts as wrong). pairs: how
    often, of two pictures of one prompt, the broken one has the higher P(broken), ties half (the
    paper's Table 2). auroc: the same for any two pictures. calibration error: mean distance of
    P(broken) from the frequency, 10 bins."""
    broken = np.array([example["broken"] for example in examples])
    known = np.isfinite(p_broken)
    p, y = p_broken[known], broken[known]
    prompts = np.array([hash(example["prompt"]) for example in examples])[known]
    order = np.sign(p[y][:, None] - p[~y][None]) / 2 + 0.5  # (broken, clean): 1, 1/2 or 0
    same_prompt = prompts[y][:, None] == prompts[~y][None]
    bins = np.minimum((p * 10).astype(int), 9)
    distance = sum(abs(p[bins == b].sum() - y[bins == b].sum()) for b in range(10))
    return {
        "accuracy": float(((p > 0.5) == y).sum() / len(broken)),
        "pairs": float(order[same_prompt].mean()) if same_prompt.any() else math.nan,
        "auroc": float(order.mean()) if order.size else math.nan,
        "log-likelihood": float(log_likelihoods(p_broken, broken).mean()),
        "calibration error": float(distance / max(len(p), 1)),
        "unanswered": float((~known).mean()),
    }


def with_intervals(p_broken, examples):
    """measures, each with its 95 % interval over prompts: name -> (value, low, high)."""

    def resampled(pick):
        # A prompt that is drawn twice is two prompts: its copies are not compared with each other.
        drawn, seen = [], Counter()
        for i in pick:
            drawn.append(examples[i] | {"prompt": (examples[i]["prompt"], seen[i])})
            seen[i] += 1
        return list(measures(p_broken[pick], drawn).values())

    low, high = bootstrap(resampled, [example["prompt"] for example in examples], draws=200)
    values = measures(p_broken, examples).items()
    return {name: (value, low[i], high[i]) for i, (name, value) in enumerate(values)}


def compare(before, after, examples):
    """The measures of two questions on the same pictures, with intervals, and the gain in accuracy
    with its own: paired, because a picture that is hard for one is hard for the other. The gain is
    over pictures with both answers: else a judge that sometimes fails seems to change its mind."""
    first, last = with_intervals(before, examples), with_intervals(after, examples)
    rows = {}
    for name in ("accuracy", "pairs", "auroc", "calibration error"):
        rows |= {f"{name} before": first[name], f"{name} after": last[name]}

    both = np.flatnonzero(np.isfinite(before) & np.isfinite(after))
    if not len(both):
        return rows | {"gain": (math.nan,) * 3}

    def gain(pick):
        chosen = [examples[i] for i in both[pick]]
        accuracy = [measures(p[both[pick]], chosen)["accuracy"] for p in (before, after)]
        return accuracy[1] - accuracy[0]

    low, high = bootstrap(gain, [examples[i]["prompt"] for i in both], draws=200)
    return rows | {"gain": (gain(np.arange(len(both))), low, high)}


def mistakes(p_broken, examples, n=40):
    """Tables of the test pictures: confusion, and the worst mistakes."""
    broken, known = np.array([e["broken"] for e in examples]), np.isfinite(p_broken)
    called = np.where(known, p_broken > 0.5, -1)
    names = {0: "called clean", 1: "called broken", -1: "no answer"}
    confusion = [
        {"test pictures": truth}
        | {name: int((called[mask] == value).sum()) for value, name in names.items()}
        for truth, mask in (("clean", ~broken), ("broken", broken))
    ]
    wrong = [i for i in np.argsort(-abs(p_broken - broken)) if known[i] and called[i] != broken[i]]
    worst = []
    for i in wrong[:n]:
        row = {"picture": open_picture(examples[i]["path"]), "prompt": examples[i]["prompt"]}
        row["it is"] = "broken" if broken[i] else "clean"
        worst.append(row | {"P(broken)": float(p_broken[i])})
    return {"Confusion": confusion, "Still judged wrongly, worst first": worst}
