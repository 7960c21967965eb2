"""ArtifactReward: ask a vision-language model whether the picture is broken.

The cure of "Understanding Reward Hacking in Text-to-Image Reinforcement Learning"
(arXiv:2601.03468) is one yes/no question to a judge that sees the picture and nothing else, not
even the prompt. The reward is read from the distribution of the first token of the answer:

    artifact = P(no) / (P(yes) + P(no)),   P(yes) = sum over spellings "yes", "Yes", " YES", ...

Two pictures whose answer is "no" still differ in its probability, so a group of rollouts has
something to learn from. The question is the only parameter of the method. The paper finds it by
automatic prompt optimisation, and so does apo.py.

Run:   python artifact_reward.py picture.png                  the tiny judge, in this process
       vllm serve Qwen/Qwen2.5-VL-7B-Instruct --port 8000     the real one, in another terminal
       python artifact_reward.py --judge-url http://127.0.0.1:8000/v1 picture.png

You should see:  a number in [0, 1] for each picture: how sure the judge is that nothing is broken.

Left out: any invented score. A judge that does not answer, or answers neither yes nor no, gives no
score: NaN. (The released code gives such a picture 1.0, a perfect score.) The judge itself, in this
process or on a server, is in reward_models/judge.py.   Read next: apo.py
"""

import math
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from evaluation import pages
from reward_models import guards
from reward_models.judge import DEFAULT_URL, START, LocalJudge, ServedJudge, sanity_images
from training.decode import open_picture
from training.files import ROOT, atomic, usage_error
from training.flags import JudgeUrls
from training.processes import pick_device

MIN_SHARE = 0.01  # of yes and no together in the first token; the tiny judge gives them > 0.9999
SANITY_SHARE, SANITY_MARGIN = 0.1, 0.02  # what the sanity check demands


def spellings(top_logprobs):
    """[(token, logprob)] -> those that mean yes or no, as [("yes" or "no", logprob)].

    Blanks (also as tokenizers write them: "\u2581", "\u0120", "\u010a") and signs around the word
    do not count: "No," and "**No" mean no, "Yes/No" means neither."""
    edge = "[\\W_\u0120\u010a]+"
    answers = [(re.sub(f"^{edge}|{edge}$", "", t).lower(), p) for t, p in top_logprobs]
    return [(word, p) for word, p in answers if word in ("yes", "no") and math.isfinite(p)]


def answer_share(top_logprobs):
    """P(yes) + P(no): how much of the first token is an answer at all."""
    return sum(math.exp(min(logprob, 0.0)) for _, logprob in spellings(top_logprobs))


def prob_no(top_logprobs):
    """The scoring rule: [(token, logprob)] of the first answer token -> score in [0, 1].

    >>> top = [("No", math.log(.6)), (" no", math.log(.2)), ("Yes", math.log(.2)), ("Maybe", -9.0)]
    >>> round(prob_no(top), 6)
    0.8
    >>> prob_no([("The", -0.1), ("Yes", -13.0)])
    nan

    All spellings are added up. (The released code keeps one of them, the least likely.) NaN where
    they have less than MIN_SHARE together: their ratio is noise then."""
    share = answer_share(top_logprobs)
    if share < MIN_SHARE:
        return math.nan
    return sum(math.exp(min(p, 0.0)) for word, p in spellings(top_logprobs) if word == "no") / share


def judge_answers(judge, question, images):
    """(prob_no, first answer tokens) of each picture, by either kind of judge. The first is NaN for
    None (a damaged file), and for a picture without an answer; the reason of the latter is counted
    in judge.failures."""
    readable, found = [image for image in images if image is not None], []
    answers = iter(judge.answers(question, readable) if readable else ())
    for image in images:
        answer = [] if image is None else next(answers)
        found.append((prob_no(answer), answer))
        if answer and math.isnan(found[-1][0]):
            share = f"yes and no have less than {MIN_SHARE:.0%}"
            judge.failures[f"neither yes nor no, but {answer[0][0]!r} ({share})"] += 1
    return found


def judge_images(judge, question, images):
    """The prob_no of each picture."""
    return [score for score, _ in judge_answers(judge, question, images)]


def read_question(text):
    """A question, or the name of a file that holds one (apo.py writes them); None stays None."""
    if text is None:
        return None
    is_file = os.path.isfile(text)  # Path.is_file raises on a long text
    try:
        question = Path(text).read_text(encoding="utf-8-sig") if is_file else text
    except UnicodeDecodeError:
        usage_error(f"--question {text}: this file is no text (UTF-8)")
    words = question.split()
    a_path = len(words) == 1 and "?" not in question or question.endswith(".txt")
    if not words or (a_path and not is_file):
        usage_error(
            f"--question {question[:200]!r}: an empty file, none of this name, or no question; "
            "write one that yes or no answers"
        )
    return question.strip()


def parse_rubric(text):
    """A question, or a rubric: lines "0.62 question", as `apo.py --rubric` writes them ->
    [(weight, question)]; the weights sum to 1.

    >>> parse_rubric("1.5 Is it torn? yes or no\\n0.5 Is it noisy? yes or no")
    [(0.75, 'Is it torn? yes or no'), (0.25, 'Is it noisy? yes or no')]"""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) > 1 and all(re.match(r"\d+\s", line) for line in lines):
        usage_error(f"--question {text[:200]!r}: write the weights of a rubric as 1.0, not as 1")
    lines = [re.fullmatch(r"(\d*\.\d+)\s+(.+)", line) for line in lines]
    if not any(lines):
        return [(1.0, text)]
    if not all(lines):
        usage_error(f"--question {text[:200]!r}: a rubric needs a weight before each question")
    total = sum(float(line[1]) for line in lines)
    if not total:
        usage_error(f"--question {text[:200]!r}: all weights of this rubric are 0")
    return [(float(line[1]) / total, line[2]) for line in lines]


class ArtifactReward:
    """P(no artifact) by a vision-language judge; it sees the picture, never the prompt. With a
    rubric, the weighted mean over its questions (AutoRubric-T2I, arXiv:2605.17602).

    checkpoint: a Qwen2.5-VL to load into this process. Without it, or with judge_urls, an
    OpenAI-compatible server is asked."""

    range = (0.0, 1.0)
    needs = ("judge",)
    checkpoint = "Qwen/Qwen2.5-VL-7B-Instruct"
    reference = "ArtifactReward, arXiv:2601.03468"
    how = START

    def __init__(
        self, device="cpu", checkpoint=None, judge_urls=(), judge_model=None, question=None
    ):
        if checkpoint and not judge_urls:
            self.judge = LocalJudge(checkpoint, device)
        else:
            self.judge = ServedJudge(list(judge_urls) or [DEFAULT_URL], judge_model)
        self.address = self.judge.address if self.remote else ""
        own = Path(checkpoint or "") / "artifact.txt"  # of a judge in this process, not on a server
        default = own if own.is_file() and not self.remote else ROOT / "prompts/artifact.txt"
        self.question = read_question(question) or default.read_text(encoding="utf-8").strip()

    @property
    def failures(self):
        """Why pictures got no score: a Counter of reasons, for each question of a rubric."""
        return self.judge.failures

    @property
    def remote(self):
        """Does a server do the work, so that this process can do something else meanwhile?"""
        return isinstance(self.judge, ServedJudge)

    def __call__(self, prompts, images, metadata=None):
        """(N,) float32 in [0, 1]; NaN where the judge gave no answer."""
        return torch.tensor([score for score, _ in self.answers(list(images))])

    def answers(self, images):
        """(score, [first answer tokens to each question]) of each picture."""
        weights, questions = zip(*parse_rubric(self.question))
        found = [judge_answers(self.judge, question, images) for question in questions]
        return [
            (sum(weight * score for weight, (score, _) in zip(weights, own)), [a for _, a in own])
            for own in zip(*found)
        ]

    def check(self, prompts=()):
        """Before anything is trained on this judge, it must answer yes or no, and score a picture
        that is obviously broken below a clean one. This finds a wrong model, one that thinks aloud
        first, or a server that ignores pictures, at once."""
        (clean, answers), (broken, others) = self.answers(sanity_images())
        share = min(map(answer_share, answers + others))
        if clean - broken >= SANITY_MARGIN and share >= SANITY_SHARE:
            return
        usage_error(
            f"the judge gives a clean picture {clean:.3f} and a broken one {broken:.3f}, which is "
            f"the wrong way round or less than {SANITY_MARGIN} apart, or its first word is seldom "
            f"yes or no ({share:.3f} of it, at least {SANITY_SHARE} is needed); look with `python "
            "artifact_reward.py PICTURE --explain PAGE`, or change --question "
            f"({dict(self.failures) or self.question!r})"
        )


# --- command line -------------------------------------------------------------------------------


@dataclass
class Config:
    images: Annotated[tuple[str, ...], tyro.conf.Positional]  # picture files
    explain: str = ""  # also write a page here: picture, question, token probabilities, score
    judge_url: JudgeUrls = ()  # judge server; again for more [the judge runs in this process]
    judge_model: str | None = None  # the served model's name [the first that is served]
    checkpoint: str = "tiny"  # judge in this process: "tiny", a folder, or a hub name
    question: str | None = None  # a text or a file [artifact.txt of the judge, or of prompts/]


def main(cfg):
    if not cfg.images:
        usage_error("name pictures: python artifact_reward.py outputs/*/samples/*.png")
    tiny = str(ROOT / "tiny_world/checkpoints/artifact")
    checkpoint = tiny if cfg.checkpoint == "tiny" else cfg.checkpoint
    source = (None if cfg.judge_url else checkpoint, cfg.judge_url, cfg.judge_model)
    reward = ArtifactReward(pick_device("auto")[0], *source, cfg.question)
    rows = []
    for path in cfg.images:
        image = open_picture(path)
        guards.refuse_photographs({"artifact": reward.judge}, [image])
        ((score, answers),) = reward.answers([image])
        print(f"{score:.4f}  {path}")
        shown = [", ".join(f"{t!r} {math.exp(p):.3f}" for t, p in answer[:6]) for answer in answers]
        said = "; ".join(shown)
        row = {"picture": image or "", "file": path, "first answer tokens": said, "score": score}
        rows.append(row)
    for reason, count in reward.failures.items():
        print(f"{count} without a score: {reason}", file=sys.stderr)
    if cfg.explain:
        with atomic(cfg.explain) as file:
            file.write(pages.page(reward.question, pages.table(rows)))
    sys.exit(3 if any(math.isnan(row["score"]) for row in rows) else 0)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
