"""What is asked of every reward: whose scores are these, and can they be scores at all?

Read next: pixels.py
"""

import math
import sys
from collections import Counter
from pathlib import Path

import torch

from training.files import ROOT, fingerprint, usage_error


def identity(reward, name, checkpoint):
    """What a score depends on besides prompt and picture, in words: scores of another checkpoint,
    judge or question are others, and must not be taken for these."""
    parts = [name, str(checkpoint or reward.checkpoint) if reward.checkpoint else ""]
    if checkpoint and Path(checkpoint).is_dir():  # the same folder may hold other weights today
        parts[1] = f"{Path(checkpoint).name} {fingerprint(checkpoint)}"
    elif not checkpoint and hasattr(reward, "downloaded"):  # a file in the working directory
        parts[1] = f"{reward.downloaded} {fingerprint(reward.downloaded)}"
    parts.append(getattr(reward, "question", ""))
    if getattr(reward, "remote", False):
        parts.append(reward.judge.model)
    return " | ".join(filter(None, parts))


def scored_by(reward):
    """Its identity, and where it is served."""
    address = getattr(reward, "address", "")
    return f"{reward.identity} at {address}" if address else reward.identity


def check_scores(name, reward, values, number):
    """What a reward returned -> (N,) float32, with NaN, and a count in reward.failures, for a score
    out of the reward's range. ValueError if there are not N scores."""
    values = torch.as_tensor(values, dtype=torch.float32).cpu()
    if values.shape != (number,):
        raise ValueError(f"reward {name!r} gave {tuple(values.shape)} scores for {number} pictures")
    low, high = getattr(reward, "range", (-math.inf, math.inf))
    outside = (values < low - 1e-3) | (values > high + 1e-3) | values.isinf()  # not NaN
    if outside.any():
        if not hasattr(reward, "failures"):
            reward.failures = Counter()
        reason = f"{values[outside][0]:g} is not from {low:g} to {high:g}, the range of {name}"
        reward.failures[reason] += int(outside.sum())
    return values.masked_fill(outside, math.nan)


def say_failures(rewards):
    """Say why pictures have no score."""
    for name, reward in rewards.items():
        for reason, count in getattr(reward, "failures", {}).items():
            print(f"{name}: {count} without a score: {reason}", file=sys.stderr)


def say_cut(rewards, prompts):
    """Say for how many prompts a reward does not read the end: its text model has a length."""
    prompts = list(dict.fromkeys(prompts))
    for name, reward in rewards.items():
        length = getattr(reward, "length", math.inf)
        ids = reward.tokenizer(prompts).input_ids if length < math.inf and reward.needs else []
        longer = sum(len(row) > length for row in ids)
        if longer:
            which = f"{longer} of {len(prompts)} prompts are longer"
            print(f"{name} reads the first {length} tokens of a prompt; {which}", file=sys.stderr)


def is_tiny(checkpoint):
    """Is this a shipped checkpoint of the tiny world? It may be named by its folder."""
    return ROOT / "tiny_world/checkpoints" in Path(checkpoint or "").resolve().parents


def refuse_photographs(rewards, images):
    """Exit code 2 if a tiny reward model is to score what is not of the tiny world: it would give a
    number, which means nothing. An image that is None, a damaged file, does not count."""
    side = max((max(image.size) for image in images if image is not None), default=0)
    tiny = ", ".join(name for name, reward in rewards.items() if getattr(reward, "tiny", False))
    if tiny and side > 64:
        usage_error(
            f"{tiny}: the checkpoint of the tiny world knows pictures of 32 x 32, these have "
            f"{side} pixels; use --model real, a --checkpoint of your own, or --judge-url"
        )
