"""WISE: does the picture show what the prompt implies? Asked of a vision-language model.

A prompt of WISE (arXiv:2503.07265) says "the animal that is the symbol of Australia" and means a
kangaroo; its explanation says so to the judge. Two protocols exist, and their numbers are not comparable:

    legacy     consistency, realism, aesthetics, each 0, 1 or 2:  (.7 c + .2 r + .1 a) / 2
    verified   about 200 prompts changed; one verdict, 0 or 1

An answer that cannot be read is asked for again, twice, and is then listed as failed: it is in no mean.
(The code released with ArtifactReward counts it as 0, at temperature .7.) The instructions here are our
wording of the published criteria, so expect small differences from scores of the official script; the
score file has the official format, and its Calculate.py reads it.

Run:   python evaluate.py --wise verified --images outputs --prompts cultural_common_sense.json \\
           --judge-url http://127.0.0.1:8000/v1

Read next: layouts.py (the table)
"""

import math
import re

from tqdm import tqdm

from artifact_reward import picture_part

CRITERIA = {
    "legacy": {
        "consistency": "does it show what the prompt asks for, in the sense that the explanation gives? "
        "0: a key element is missing or contradicted; 1: in part; 2: completely",
        "realism": "could it be real: materials, light, proportions, physics? 0: plainly impossible or "
        "artificial; 1: small inconsistencies; 2: like a photograph",
        "aesthetic_quality": "composition, colour, appeal. 0: poor; 1: acceptable; 2: outstanding",
    },
    "verified": {
        "score": "does the picture show what the prompt asks for, in the sense that the explanation gives? "
        "0: something required is missing or wrong; 1: everything required is there and right"
    },
}


def instruction(protocol, prompt, explanation):
    asked = "\n".join(
        f"{name.replace('_', ' ').capitalize()}: {text}."
        for name, text in CRITERIA[protocol].items()
    )
    return (
        f"Judge strictly whether a generated picture meets these criteria; when in doubt, give the lower value.\n"
        f"{asked}\n\nPrompt: {prompt}\nExplanation: {explanation}\n\n"
        "Answer with one line for each criterion, its name, a colon and the number, and nothing else."
    )


def read_scores(text, protocol):
    """The numbers of an answer: dict name -> int, or None if one is missing, out of range or said twice.

    >>> read_scores("Consistency: 2\\n**Realism**: 1\\nAesthetic Quality: 0", "legacy")
    {'consistency': 2, 'realism': 1, 'aesthetic_quality': 0}
    >>> read_scores("Score: 10", "verified") is read_scores("I cannot say.", "verified") is None
    True"""
    scores, highest = {}, 2 if protocol == "legacy" else 1
    for name in CRITERIA[protocol]:
        found = re.findall(
            rf"\b{name.replace('_', '[ _]')}\**\s*:\s*\**\s*(-?\d+(?:\.\d+)?)", text, re.IGNORECASE
        )
        if len(set(found)) != 1 or not found[0].isdigit() or not int(found[0]) <= highest:
            return None
        scores[name] = int(found[0])
    return scores


def judge_one(judge, protocol, row, image, attempts=3):
    """(scores or None, what was said last)."""
    text = instruction(protocol, row["prompt"], row.get("Explanation", ""))
    for attempt in range(attempts):
        said = judge.write([{"type": "text", "text": text}, picture_part(image)], seed=attempt)
        scores = read_scores(said, protocol)
        if scores:
            return scores, said
    return None, said


def judge_folder(judge, protocol, matched, open_picture):
    """Score records in the official format, one a prompt (its first picture); failed ones have null scores."""
    firsts = [(row, path) for row, k, path in matched if k == 0]

    def one(entry):
        row, path = entry
        image = open_picture(path)
        scores, said = (
            judge_one(judge, protocol, row, image) if image else (None, "no readable picture")
        )
        scores = scores or dict.fromkeys(CRITERIA[protocol], math.nan)
        return {
            "prompt_id": int(row["id"]),
            "Subcategory": row["tag"],
            **scores,
            "evaluation": said,
        }

    return list(tqdm(judge.pool.map(one, firsts), total=len(firsts), desc=f"WISE, {protocol}"))
