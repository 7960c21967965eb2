"""Did the policy adopt the style of its reference pictures? Before and after training.

The adversarial reward pulls the policy towards everything that sets the references apart, their
style included. Here the references have only cool colours, whatever the prompt says.

Run:   python -m studies.style runs/style_cool      a run with --references in another style

You should see:  for the first and the last test the share of objects in cool colours, by gold, and
the share of pixels that are drawn on; docs/style.png shows the fixed prompts before and after.

Read next: adversarial_reward.py
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from evaluation.figures import training_grid
from tiny_world.gold import fit_scene
from tiny_world.world import COOL, GROUND
from training.files import usage_error
from training.pictures import cut_sheet
from training.records import mean, read_jsonl


@dataclass
class Config:
    run: Annotated[str, tyro.conf.Positional]  # a run folder
    figure: str = "docs/style.png"  # the fixed prompts, before and after


def main(cfg):
    tests = Path(cfg.run) / "tests"
    if not (tests / "last.png").is_file():
        usage_error(f"{cfg.run}: no tests/last.png; give a run folder of grpo.py, tested twice")
    n = len(read_jsonl(sorted(tests.glob("step_*.jsonl"))[0]))
    for name in ("first", "last"):
        pictures = [image for image in cut_sheet(tests / f"{name}.png", n) if image]
        if not pictures:
            usage_error(f"{tests}/{name}.png: damaged; train the run again")
        drawn = [(abs(np.asarray(image) - GROUND).max(-1) > 40).mean() for image in pictures]
        found, _ = fit_scene(pictures)
        colors = [thing.color for things in found for thing in things]
        cool = mean(color in COOL for color in colors)
        print(
            f"{name} test: {cool:.3f} of {len(colors)} objects are {', '.join(COOL)}; "
            f"{np.mean(drawn):.3f} of the pixels are drawn"
        )
    training_grid(cfg.run, cfg.figure, rows=2)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
