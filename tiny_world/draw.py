"""Draws clean pictures for a prompt file: reference pictures for the adversarial reward.

The output folder has the layout of generate.py (GenEval's, with manifest.jsonl). A picture depends
only on its key (seed, 0, prompt index, sample index).

Run:   python -m tiny_world.draw --style cool --num-images 8 --output-dir outputs-cool

You should see:  a folder for each prompt, and the number of pictures drawn.

Read next: train.py
"""

from dataclasses import dataclass
from typing import Literal

import tyro

from tiny_world.world import STYLES, parse_prompt, reference_picture
from training.files import ROOT, usage_error
from training.pictures import write_pictures
from training.prompts import load_prompts


@dataclass
class Config:
    style: Literal[STYLES] = "plain"  # outline: rims only; cool: cool colours
    prompts: str = str(ROOT / "tiny_world" / "prompts" / "train.jsonl")  # a prompt file
    num_images: int = 4  # pictures for each prompt
    output_dir: str = "outputs"  # pictures go to <output-dir>/00000/samples/0000.png
    seed: int = 42  # of every random choice


def main(cfg):
    if cfg.num_images < 1:
        usage_error(f"--num-images {cfg.num_images}: must be 1 or more")

    def sample_batch(prompts, keys):
        images = [reference_picture(p, key, cfg.style) for p, key in zip(prompts, keys)]
        return images, [""] * len(prompts)  # no thoughts

    settings = {"seed": cfg.seed, "model": f"drawn-{cfg.style}", "cfg_weight": None, "cot": True}
    rows, batch_size = load_prompts(cfg.prompts), 32
    for row in rows:
        try:
            parse_prompt(row["prompt"])
        except ValueError as problem:
            usage_error(f"--prompts {cfg.prompts}: {problem}")
    write_pictures(rows, sample_batch, settings, cfg.output_dir, cfg.num_images, batch_size)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
