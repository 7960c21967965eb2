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

import math
import re
from pathlib import Path

from tqdm import tqdm

from evaluation.official_scores import HIGHEST, WEIGHTS
from training.decode import open_picture


def instruction(protocol, prompt, explanation):
    """The text that the judge gets with the picture."""
    text = Path(__file__).with_name(f"wise_{protocol}.txt").read_text(encoding="utf-8")
    return text.strip().format(prompt=prompt, explanation=explanation)


def read_scores(text, protocol):
    """The scores in an answer: dict name -> int, or None.

    None if one is missing, out of range, or given twice with different values.

    >>> read_scores("Consistency: 2\\n**Realism**: 1\\nAesthetic Quality: 0", "legacy")
    {'consistency': 2, 'realism': 1, 'aesthetic_quality': 0}
    >>> read_scores("Score: 10", "verified") is read_scores("I cannot say.", "verified") is None
    True"""
    scores, highest = {}, HIGHEST[f"WISE {protocol}"]
    for name in WEIGHTS[f"WISE {protocol}"]:
        pattern = rf"\b{name.replace('_', '[ _]')}\**\s*:\s*\**\s*(-?\d+(?:\.\d+)?)"
        found = re.findall(pattern, text, re.IGNORECASE)
        if len(set(found)) != 1 or not found[0].isdigit() or int(found[0]) > highest:
            return None
        scores[name] = int(found[0])
    return scores


def judge_folder(judge, protocol, matched, attempts=3):
    """The score records of a folder in the official format, for the first picture of each prompt.

    judge: has write(text, images, seed) and pool, a thread pool. matched: [(row, k, path)] from
    layouts.find_images. The scores of a failed picture are NaN."""

    def record_of(first):
        row, path = first
        image, scores, answer = open_picture(path), None, "no readable picture"
        text = instruction(protocol, row["prompt"], row.get("Explanation", ""))
        for attempt in range(attempts if image else 0):
            answer = judge.write(text, [image], seed=attempt)
            scores = read_scores(answer, protocol)
            if scores:
                break
        scores = scores or dict.fromkeys(WEIGHTS[f"WISE {protocol}"], math.nan)
        ids = {"prompt_id": int(row["id"]), "Subcategory": row["tag"]}
        return {**ids, **scores, "evaluation": answer}

    firsts = [(row, path) for row, k, path in matched if k == 0]
    records = judge.pool.map(record_of, firsts)
    return list(tqdm(records, total=len(firsts), desc=f"WISE, {protocol}"))
