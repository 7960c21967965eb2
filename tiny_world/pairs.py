"""Artifact pairs: a clean and a broken picture of the same prompt, to measure judges and rewards.

Up to half of the pairs are the policy's own pictures, labelled by gold: as many as it draws of both
kinds for a prompt. The others are drawn.

Read next: train.py
"""

import random
from typing import NamedTuple

from PIL.Image import Image
from tqdm import trange

import generate
from tiny_world.gold import gold
from tiny_world.world import CORRUPTIONS, corrupt, draw, parse_prompt, sample_scene, to_image
from training.records import write_jsonl


class Sample(NamedTuple):
    """A picture of the policy with its gold scores."""

    prompt: str
    image: Image
    aligned: float
    clean: float


def sample_with_gold(policy, rows, per_prompt, seed):
    """A list of Samples, `per_prompt` of them for each row."""
    jobs = [(i, k) for i in range(len(rows)) for k in range(per_prompt)]
    samples = []
    for start in trange(0, len(jobs), 64, desc="sampling"):
        keys = [(seed, 0, i, k) for i, k in jobs[start : start + 64]]
        prompts = [rows[i]["prompt"] for _, _, i, _ in keys]
        images = generate.sample(policy, prompts, keys).images
        aligned, clean = gold(prompts, images)
        samples += map(Sample, prompts, images, aligned.tolist(), clean.tolist())
    return samples


def save_pairs(folder, split, samples, n, seed):
    """Save n pairs: one line each in <split>.jsonl, the pictures beside it in <split>/."""
    rng, pairs = random.Random(f"{split} {seed}"), []
    by_prompt = {}
    for sample in samples:
        by_prompt.setdefault(sample.prompt, []).append(sample)
    prompts = list(by_prompt)
    rng.shuffle(prompts)
    for prompt in prompts:
        group = sorted(by_prompt[prompt], key=lambda sample: sample.clean)
        worst, best = group[0], group[-1]
        if worst.clean < 0.4 and best.clean > 0.7 and len(pairs) < n // 2:
            pairs.append((prompt, "policy", best.image, worst.image))
    while len(pairs) < n:
        prompt, kind = rng.choice(prompts), rng.choice(CORRUPTIONS)
        scene = sample_scene(*parse_prompt(prompt), rng)
        broken = corrupt(scene, kind, rng.uniform(0.4, 1), rng)
        pairs.append((prompt, f"drawn, {kind}", to_image(draw(scene)), to_image(broken)))
    (folder / split).mkdir(parents=True, exist_ok=True)
    lines = []
    for i, (prompt, source, *pictures) in enumerate(pairs):
        names = {side: f"{split}/{i:04d}_{side}.png" for side in ("clean", "broken")}
        for name, image in zip(names.values(), pictures):
            image.save(folder / name)
        lines.append({"id": f"{split}-{i:04d}", "prompt": prompt, "source": source, **names})
    write_jsonl(folder / f"{split}.jsonl", lines)
