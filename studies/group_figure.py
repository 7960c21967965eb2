"""GRPO in one picture: the same group, drawn from the same noise, before and after training.

Each row is a policy. Its pictures of one prompt are ranked, with rewards and advantages below.

Run:   python -m studies.group_figure runs/tiny_hps_seed1 "runs/tiny_hps+artifact_seed1"

You should see:  docs/group.png: after training on hps alone the objects of the best pictures are
large and broken; with the judge they are whole.

Read next: explain.py
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from PIL import Image

import generate
import grpo
import rewards as reward_lib
from training.files import atomic, usage_error
from training.policy import load_policy
from training.run_folder import checkpoints


@dataclass
class Config:
    runs: Annotated[tuple[str, ...], tyro.conf.Positional]  # run folders, a row for each
    prompt: str = "a red star and a blue circle"
    pictures: int = 8  # of the group
    seed: int = 1
    figure: str = "docs/group.png"


def ranked_group(checkpoint, weights, how, cfg):
    """[(picture, {reward: score}, advantage)] of one policy, best first. weights, how: the rewards
    that it was trained on and --combine, of which the advantages are made."""
    keys = [(cfg.seed, 0, 0, k) for k in range(cfg.pictures)]
    rollouts = generate.sample(load_policy(checkpoint), [cfg.prompt] * cfg.pictures, keys)
    names = dict.fromkeys([*weights, "hps", "artifact", "gold-clean"])
    loaded = {name: reward_lib.load(name, checkpoint="tiny") for name in names}
    metadata = [{"id": "0", "prompt": cfg.prompt}] * cfg.pictures
    scores = reward_lib.score(loaded, rollouts.prompts, rollouts.images, metadata)
    multipliers = dict.fromkeys(weights, 1.0)
    total = reward_lib.combine(scores, weights, cfg.pictures, how, multipliers)
    advantages = grpo.group_advantages(total, cfg.pictures)
    return [
        (rollouts.images[i], {name: scores[name][i].item() for name in names}, advantages[i].item())
        for i in advantages.argsort(descending=True).tolist()
    ]


def group_figure(groups, cfg):
    """groups: [(title, what `ranked_group` returns)], a row for each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (1.45 * cfg.pictures, 2.45 * len(groups))
    figure, axes = plt.subplots(len(groups), cfg.pictures, figsize=size, squeeze=False)
    title = f'"{cfg.prompt}", the same noise; a row is a group, the best first'
    figure.suptitle(title, fontsize=11)
    for row, (title, group) in zip(axes, groups):
        row[0].set_title(title, fontsize=10, loc="left")
        for axis, (picture, scores, advantage) in zip(row, group):
            axis.imshow(picture.resize((128, 128), Image.NEAREST))
            named = {name.replace("gold-clean", "whole"): value for name, value in scores.items()}
            lines = [f"{name} {value:.2f}" for name, value in named.items()]
            axis.set_xlabel("\n".join([*lines, f"A {advantage:+.2f}"]), fontsize=8)
            axis.set(xticks=[], yticks=[])
    figure.tight_layout()
    with atomic(cfg.figure, "wb") as file:
        figure.savefig(file, format="png", dpi=80)
    plt.close(figure)


def main(cfg):
    before = ranked_group("tiny", {"hps": 1.0}, "sum", cfg)
    groups = [("before training; advantages by hps", before)]
    for run in map(Path, cfg.runs):
        if not checkpoints(run):
            usage_error(f"{run}: no checkpoints/step-* in it; give run folders of grpo.py")
        flags = json.loads((run / "config.json").read_text())["flags"]
        weights, last = reward_lib.parse(flags["rewards"]), str(checkpoints(run)[-1])
        group = ranked_group(last, weights, flags["combine"], cfg)
        groups.append((f"after GRPO on {flags['rewards']}", group))
    group_figure(groups, cfg)
    print(f"look at {cfg.figure}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
