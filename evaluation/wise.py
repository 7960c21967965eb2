"""WISE: a vision-language model judges whether a picture shows what its prompt implies.

A prompt of WISE (arXiv:2503.07265) says "the animal that is the symbol of Australia" and means a
kangaroo; its explanation tells the judge so. There are two protocols, not comparable:

    legacy     consistency, realism, aesthetics, each 0, 1 or 2:  (.7 c + .2 r + .1 a) / 2
    verified   about 200 prompts changed; one score, 0 or 1

If an answer cannot be parsed, we ask again, at most three times in all; then the picture has failed
and enters no mean. (The code released with ArtifactReward counts it as 0, at temperature .7.) The
instructions, wise_legacy.txt and wise_verified.txt, are our wording of the published criteria:
expect small differences from the official scores. Calculate.py of WISE can read our score file.

Read next: best_arm.py
"""

import functools
import math
import re
from pathlib import Path

from tqdm import tqdm

from evaluation.official_scores import HIGHEST, WEIGHTS
from training import waiting
from training.decode import file_digest, open_picture
from training.files import usage_error

# What a judgement depends on: an earlier one with the same is kept.
KEY = ("prompt_id", "prompt", "sha256", "judge")


def instruction(protocol, prompt, explanation):
    """The text that the judge gets with the picture."""
    text = Path(__file__).with_name(f"wise_{protocol}.txt").read_text(encoding="utf-8")
    return text.strip().format(prompt=prompt, explanation=explanation)


def read_scores(text, protocol):
    """The scores in an answer, as lines or as JSON: dict name -> int, or None.

    None if one is missing, out of range, or given twice with different values. What a model thinks
    aloud first, in <think>, does not count.

    >>> read_scores("Consistency: 2\\n**Realism**: 1\\nAesthetic Quality: 0", "legacy")
    {'consistency': 2, 'realism': 1, 'aesthetic_quality': 0}
    >>> read_scores('<think>Score: 0?</think> {"score": 1.0}', "verified")
    {'score': 1}
    >>> read_scores("Score: 0? No.</think>1", "verified")
    {'score': 1}
    >>> read_scores("Score: 8/10", "verified") is read_scores("I cannot say.", "verified") is None
    True"""
    text = text.rpartition("</think>")[2].partition("<think>")[0].strip()
    scores, highest = {}, HIGHEST[f"WISE {protocol}"]
    names = WEIGHTS[f"WISE {protocol}"]
    if len(names) == 1 and text.isdecimal():
        text = f"Score: {text}"
    for name in names:
        sign = r"[\s\"'*]*"
        number = r"(-?\d+(?:\.\d+)?)(?:\s*/\s*(\d+))?"
        pattern = rf"\b{name.replace('_', '[ _]')}{sign}[:=]{sign}{number}"
        found = set(re.findall(pattern, text, re.IGNORECASE))
        values = {float(value) for value, _ in found}
        if {of for _, of in found} - {"", str(highest)}:  # of another number
            return None
        if len(values) != 1 or not values <= set(range(highest + 1)):
            return None
        scores[name] = int(values.pop())
    return scores


def judge_folder(judge, protocol, matched, known=(), save=lambda records: None, attempts=3):
    """The score records of a folder in the official format, for the first picture of each prompt.

    judge: a ServedJudge. matched: [(row, k, path)] from layouts.find_images. known: records of an
    earlier call by this judge; those of the same picture and prompt are kept, and those of prompts
    that are not in `matched`. save(records) is called now and then. The scores of a failed picture
    are NaN. An id that is no number, or records of another judge: exit code 2."""
    firsts = {}
    for row, _, path in sorted(matched, key=lambda match: match[1]):
        firsts.setdefault(row["id"], (row, path))
    firsts = list(firsts.values())
    for row, _ in firsts:
        if not row["id"].isdecimal():
            usage_error(
                f"--wise: id {row['id']!r} is no number; WISE numbers its prompts from 1 on"
            )
    others = {str(record.get("judge")) for record in known} - {judge.model}
    if others:
        usage_error(
            f"--wise: the score file has judgements by {', '.join(others)}, not by {judge.model}; "
            "give another file as --output"
        )
    names = WEIGHTS[f"WISE {protocol}"]
    judged = {}
    for record in known:
        if all(math.isfinite(record.get(name, math.nan)) for name in names):
            judged[tuple(record.get(key) for key in KEY)] = record
    records = []
    for start in tqdm(range(0, len(firsts), 64), desc=f"WISE, {protocol}, 64 at a time"):
        heads = [head(row, path, judge.model) for row, path in firsts[start : start + 64]]
        new = [judged.pop(tuple(record[key] for key in KEY), None) for record in heads]
        todo = [i for i, record in enumerate(new) if record is None]
        calls = [
            functools.partial(judge_picture, judge, protocol, *firsts[start + i], attempts)
            for i in todo
        ]
        what, each = f"the judge at {judge.address}", judge.each * attempts
        found = waiting.outcomes(waiting.start(calls), what, each, each * len(calls))
        for i, result in zip(todo, found):
            failed = {**dict.fromkeys(names, math.nan), "evaluation": str(result)}
            new[i] = heads[i] | (failed if isinstance(result, waiting.Unanswered) else result)
        records += new
        new_ids = {record["prompt_id"] for record in records}
        others = [record for record in known if record["prompt_id"] not in new_ids]
        save([*records, *others])
    return [*records, *others] if records else list(known)


def head(row, path, model):
    """What a record says of its picture, prompt and judge."""
    record = {"prompt_id": int(row["id"]), "Subcategory": row["tag"], "prompt": row["prompt"]}
    return record | {"sha256": file_digest(path), "judge": model}


def judge_picture(judge, protocol, row, path, attempts):
    """The scores of one picture, and the judge's words."""
    image, answer = open_picture(path), "no readable picture"
    text = instruction(protocol, row["prompt"], row.get("Explanation", ""))
    for attempt in range(attempts if image else 0):
        # Not at temperature 0 again: a deterministic server would repeat itself.
        try:
            answer = judge.write(text, [image], temperature=0.7 * bool(attempt), seed=attempt)
        except waiting.CutOff as problem:
            answer = str(problem)
        scores = read_scores(answer, protocol)
        if scores:
            return scores | {"evaluation": answer}
    return dict.fromkeys(WEIGHTS[f"WISE {protocol}"], math.nan) | {"evaluation": answer}
