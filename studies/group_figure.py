"""GRPO in one picture: the same group, drawn from the same noise, before and after training.

Each row is a policy. Its pictures of one prompt are ranked, with reward and advantage below. The
frame says what gold says: orange is broken, or not what the prompt asks for.

Run:   python -m studies.group_figure runs/tiny_hps_seed42 "runs/tiny_hps+artifact_seed42"

You should see:  docs/group.png: before training some objects are missing; after training on hps
alone some are superfluous or broken; with the judge fewer are.

Read next: explain.py
"""

import math
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
from training.records import mean, read_json
from training.run_folder import checkpoints

# Flags that change how a group is sampled or its advantages are made, as in grpo.py's default.
PLAIN = {"model": "tiny", "cot": True, "cfg_weight": None, "guidance": "guided", "max_thought": 64}
PLAIN |= {"question": None, "advantage": "group", "combine": "sum"}
RIGHT = 0.8  # gold of a picture that shows all of what the prompt says, and is whole


@dataclass
class Config:
    runs: Annotated[tuple[str, ...], tyro.conf.Positional]  # run folders, a row for each
    prompt: str = "a red cross and a purple cross"
    pictures: int = 8  # of the group
    seed: int = 1
    figure: str = "docs/group.png"


def ranked_group(checkpoint, weights, cfg):
    """[(picture, {reward: score}, advantage)] of one policy, best first. weights: of the rewards
    that it was trained on, of which the advantages are made."""
    keys = [(cfg.seed, 0, 0, k) for k in range(cfg.pictures)]
    rollouts = generate.sample(load_policy(checkpoint), [cfg.prompt] * cfg.pictures, keys)
    names = dict.fromkeys([*weights, "hps", "artifact", "gold"])
    loaded = {name: reward_lib.load(name, checkpoint="tiny") for name in names}
    metadata = [{"id": "0", "prompt": cfg.prompt}] * cfg.pictures
    scores = reward_lib.score(loaded, rollouts.prompts, rollouts.images, metadata)
    total = reward_lib.combine(scores, weights, cfg.pictures)
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

    size = (1.3 * cfg.pictures, 1.9 * len(groups) + 0.4)
    figure, axes = plt.subplots(len(groups), cfg.pictures, figsize=size, squeeze=False)
    title = f'"{cfg.prompt}": each row is a group from the same noise, the best first'
    figure.suptitle(title, fontsize=12, x=0.01, ha="left", y=0.985)
    for row, (title, group) in zip(axes, groups):
        scores = [scores for _, scores, _ in group]
        known = [score["gold"] for score in scores if math.isfinite(score["gold"])]
        right = sum(gold >= RIGHT for gold in known)
        means = [f"{name} {mean(s[name] for s in scores):.2f}" for name in ("hps", "artifact")]
        text = f"{title}:  {right} of {len(known)} right,  {',  '.join(means)}"
        row[0].set_title(text, fontsize=11, loc="left")
        for axis, (picture, score, advantage) in zip(row, group):
            axis.imshow(picture.resize((128, 128), Image.NEAREST))
            axis.set_xlabel(f"hps {score['hps']:.2f}\nA {advantage:+.1f}", fontsize=9)
            axis.set(xticks=[], yticks=[])
            # The frame is the truth: thin and blue around a right picture, orange around others.
            # Without gold (another prompt than the tiny world's) it is gray.
            is_right, is_known = score["gold"] >= RIGHT, math.isfinite(score["gold"])
            color = "#0072B2" if is_right else "#D55E00" if is_known else "#767676"
            for side in axis.spines.values():
                side.set(color=color, linewidth=4 if is_known and not is_right else 1)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.87, bottom=0.09, hspace=0.6, wspace=0.12)
    with atomic(cfg.figure, "wb") as file:
        figure.savefig(file, format="png", dpi=90)
    plt.close(figure)


def main(cfg):
    if not cfg.runs:
        usage_error("give run folders of grpo.py, such as runs/tiny_hps_seed42")
    if cfg.pictures < 2:
        usage_error(f"--pictures {cfg.pictures}: a group has 2 or more")
    before = ranked_group("tiny", {"hps": 1.0}, cfg)
    groups = [("before training; advantages by hps", before)]
    for run in map(Path, cfg.runs):
        if not checkpoints(run):
            usage_error(f"{run}: no checkpoints/step-* in it; give run folders of grpo.py")
        flags = read_json(run / "config.json")["flags"]
        for name, value in PLAIN.items():
            if flags.get(name, value) != value:
                usage_error(f"{run}: has {name} {flags[name]}; the figure shows runs with {value}")
        weights, last = reward_lib.parse(flags["rewards"]), str(checkpoints(run)[-1])
        reward_lib.refuse_learners(weights)
        group = ranked_group(last, weights, cfg)
        groups.append((f"after GRPO on {flags['rewards']}", group))
    group_figure(groups, cfg)
    print(f"look at {cfg.figure}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
