"""Makes the whole tiny world from nothing: prompts, policy, reward models, artifact pairs.

Run:   python -m tiny_world.train                  two hours on two slow cores
       python -m tiny_world.train --only dino      one checkpoint

You should see:  a progress bar for each checkpoint, then a line that says how good it is.

Read next: artifact_reward.py
"""

import shutil
import subprocess
import sys
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

import generate
from reward_models.clip import HPS, PickScore
from tiny_world.pairs import sample_with_gold, save_pairs
from tiny_world.train_dino import train_dino
from tiny_world.train_judge import train_judge
from tiny_world.train_policy import train_policy, train_vq
from tiny_world.train_preferences import train_preference
from tiny_world.world import make_pictures, prompt_rows
from training.files import ROOT
from training.records import ARTIFACT_FREE, write_jsonl


@dataclass
class Config:
    out: str = "tiny_world"  # checkpoints/, prompts/ and pairs/ go here
    only: str = "prompts,policy,hps,pickscore,dino,artifact,pairs,question"  # run in this order
    seed: int = 0  # of every random choice


def main(cfg):
    out, stages = Path(cfg.out), cfg.only.split(",")
    checkpoints = out / "checkpoints"
    rows = {"train": prompt_rows("train", 100), "test": prompt_rows("test", 40)}
    if "prompts" in stages:
        for split in rows:
            write_jsonl(out / "prompts" / f"{split}.jsonl", rows[split])
    if "policy" in stages:
        learned, scenes, pixels, _, _ = make_pictures(40000, 0.25, cfg.seed)
        vq = train_vq(pixels[:24000], cfg.seed)
        train_policy(vq, learned, scenes, pixels, cfg.seed).save(checkpoints / "policy")
    for name, kind, seed in (("hps", HPS, cfg.seed), ("pickscore", PickScore, cfg.seed + 100)):
        if name in stages:
            accuracy = train_preference(kind, checkpoints / name, seed)
            print(f"{name}: {accuracy:.3f} of held-out preferences predicted")
    if "dino" in stages:
        pixels = make_pictures(6000, 0.3, cfg.seed + 77)[2]
        train_dino(checkpoints / "dino", pixels, cfg.seed)
    if "artifact" in stages or "pairs" in stages:
        policy = generate.load_policy(str(checkpoints / "policy"))
        train = sample_with_gold(policy, rows["train"], 12, seed=1)
        test = sample_with_gold(policy, rows["test"], 8, seed=2)
        free = np.mean([sample.clean >= ARTIFACT_FREE for sample in test])
        aligned = np.mean([sample.aligned for sample in test])
        print(f"policy: {free:.3f} of its test pictures artifact-free, {aligned:.3f} aligned")
    if "artifact" in stages:
        drawn = make_pictures(16000, 0.5, cfg.seed + 2)[2:]
        sampled = [s.image for s in train], [s.clean >= ARTIFACT_FREE for s in train]
        train_judge(checkpoints / "artifact", drawn, sampled, cfg.seed)
    if "pairs" in stages:
        heldout = [s for s in train if zlib.crc32(s.prompt.encode()) % 3 == 0]
        kept = [s for s in train if zlib.crc32(s.prompt.encode()) % 3 != 0]
        save_pairs(out / "pairs", "train", kept, 200, cfg.seed)
        save_pairs(out / "pairs", "validation", heldout, 100, cfg.seed)
        save_pairs(out / "pairs", "test", test, 200, cfg.seed)
    if "question" in stages:
        find_question(out / "pairs", checkpoints / "artifact", cfg.seed)


def find_question(pairs, judge, seed):
    """Search the judge's question among its mistakes, as in the paper; save it as artifact.txt."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "apo.py", "--data", pairs, "--checkpoint", judge]
        command += ["--writer", "scripted", "--select", "successive-rejects"]
        command += ["--seeds", str(seed), "--output-dir", folder]
        subprocess.run(command, check=True)
        found = Path(folder) / f"successive-rejects_seed{seed}" / "question.txt"
        shutil.copy(found, judge / "artifact.txt")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
