"""A blind test: does a viewer who knows nothing of the project see what is broken?

From each run, two samples of test pictures before training and after it, side by side in random
order, without a word about which is which. Somebody who knows nothing of the project gets the
pairs and the question, and chooses a side of each pair. Give control runs as well: there a viewer
should be right as often as a coin.

Run:   python -m studies.blind runs/contest/no_cure_seed1 runs/contest/control_seed1
       python -m studies.blind --answers LRRL    compare these answers with the key

You should see:  runs/blind/pair_01.png, two for each run, the question, and runs/blind/key.json.

Read next: docs/results.md
"""

import json
import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from PIL import Image, ImageDraw

from evaluation.hacking import read_test
from training.files import atomic, usage_error
from training.pictures import cut_sheet, save_png
from training.records import read_json

COLUMNS, ROWS, SIDE = 6, 5, 64  # pictures of one half, and pixels of each
QUESTION = """Each image has two halves, LEFT and RIGHT, of 30 small computer drawings each.
On which side are more drawings broken or badly drawn? Look at the shapes only: torn, melted,
dented or unfinished ones are broken. Answer every image with L or R, guess if you cannot
decide, in one line of letters without spaces."""


@dataclass
class Config:
    runs: Annotated[tuple[str, ...], tyro.conf.Positional] = ()  # run folders
    output_dir: str = "runs/blind"
    seed: int = 0  # of the order
    answers: str = ""  # the viewer's, an L or R for each pair: print how often it was right


def half(pictures):
    """A grid of pictures."""
    grid = Image.new("RGB", (COLUMNS * (SIDE + 4), ROWS * (SIDE + 4)), "white")
    for i, picture in enumerate(pictures):
        place = (i % COLUMNS * (SIDE + 4), i // COLUMNS * (SIDE + 4))
        filter = Image.NEAREST if picture.width < SIDE else Image.LANCZOS
        grid.paste(picture.resize((SIDE, SIDE), filter), place)
    return grid


def side_by_side(left, right, number):
    pair = Image.new("RGB", (2 * left.width + 40, left.height + 24), "white")
    for x, title, grid in ((0, "LEFT", left), (left.width + 40, "RIGHT", right)):
        pair.paste(grid, (x, 24))
        ImageDraw.Draw(pair).text((x, 4), f"pair {number}, {title}", fill="black")
    return pair


def count_right(key, answers):
    """Name of a run without its seed -> (how often the trained side was chosen, of how many)."""
    right, pairs = Counter(), Counter()
    for entry, answer in zip(key.values(), answers):
        name = re.sub(r"_seed\d+$", "", entry["run"])
        pairs[name] += 1
        right[name] += answer == entry["trained"][0].upper()
    return {name: (right[name], pairs[name]) for name in pairs}


def main(cfg):
    if cfg.answers:
        key = read_json(Path(cfg.output_dir) / "key.json")
        if len(cfg.answers) != len(key) or set(cfg.answers) - set("LR"):
            usage_error(f"--answers {cfg.answers}: give an L or R for each of the {len(key)} pairs")
        for name, (right, pairs) in count_right(key, cfg.answers).items():
            print(f"{name}: the trained side was chosen in {right} of {pairs} pairs")
        return
    if not cfg.runs:
        usage_error("give run folders of grpo.py, such as runs/tiny_hps_seed42")
    folder, rng, key, couples = Path(cfg.output_dir), random.Random(cfg.seed), {}, []
    for run in map(Path, cfg.runs):
        count, needed = len(read_test(run, "first")), 2 * COLUMNS * ROWS
        sheets = [cut_sheet(run / f"tests/{name}.png", count) for name in ("first", "last")]
        if count < needed or None in sheets[0] + sheets[1]:
            usage_error(f"{run}: tests/first.png and last.png must hold {needed} pictures or more")
        chosen = rng.sample(range(count), needed)
        for part in (chosen[::2], chosen[1::2]):
            couples.append((run.name, *([sheet[i] for i in part] for sheet in sheets)))
    rng.shuffle(couples)
    for old in [folder / "key.json", *folder.glob("pair_*.png")]:  # of another command
        old.unlink(missing_ok=True)
    for number, (run, before, after) in enumerate(couples, 1):
        trained_left = rng.random() < 0.5
        halves = (after, before) if trained_left else (before, after)
        save_png(side_by_side(*map(half, halves), number), folder / f"pair_{number:02d}.png")
        key[f"pair_{number:02d}"] = {"run": run, "trained": "left" if trained_left else "right"}
    with atomic(folder / "key.json") as file:
        json.dump(key, file, indent=1)
    print(f"{len(couples)} pairs in {folder}/, and the key. The viewer's question:\n\n{QUESTION}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
