"""Makes the whole tiny world from nothing: prompts, policy, reward models, artifact pairs.

Run:   python -m tiny_world.train                  about 3.5 hours on one core; a stopped training
                                                   goes on when the command is repeated
       python -m tiny_world.train --only dino      one checkpoint

You should see:  a progress bar for each checkpoint; of most a line that says how good it is.

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
from tiny_world.train_policy import make_examples, train_policy, train_vq
from tiny_world.train_preferences import train_preference
from tiny_world.world import make_pictures, prompt_rows
from training.files import ROOT, atomic, usage_error
from training.records import ARTIFACT_FREE, write_jsonl


def make_prompts(cfg, out, unfinished):
    for split, rows in splits().items():
        write_jsonl(out / "prompts" / f"{split}.jsonl", rows)


def splits():
    return {"train": prompt_rows("train", 100), "test": prompt_rows("test", 40)}


def make_policy(cfg, out, unfinished):
    good = make_pictures(100000, 0.12, cfg.seed)
    worse = make_pictures(40000, 0.2, cfg.seed + 1, forgotten=0.14)
    vq, typical = train_vq(good[2], cfg.seed, unfinished=unfinished)
    examples = (make_examples(typical, *pictures[:3]) for pictures in (good, worse))
    policy = train_policy(vq, *examples, cfg.seed, unfinished=unfinished)
    policy.save(out / "checkpoints" / "policy")
    test = policy_samples(out, "test")
    free = np.mean([sample.clean >= ARTIFACT_FREE for sample in test])
    aligned = np.mean([sample.aligned for sample in test])
    print(f"policy: {free:.3f} of its test pictures artifact-free, {aligned:.3f} aligned")


def make_hps(cfg, out, unfinished):
    make_preference(HPS, out / "checkpoints" / "hps", cfg.seed, unfinished)


def make_pickscore(cfg, out, unfinished):
    make_preference(PickScore, out / "checkpoints" / "pickscore", cfg.seed + 100, unfinished)


def make_preference(kind, folder, seed, unfinished):
    accuracy = train_preference(kind, folder, seed, unfinished=unfinished)
    print(f"{folder.name}: {accuracy:.3f} of held-out preferences predicted")


def make_dino(cfg, out, unfinished):
    pixels = make_pictures(6000, 0.3, cfg.seed + 77)[2]
    train_dino(out / "checkpoints" / "dino", pixels, cfg.seed, unfinished=unfinished)


def policy_samples(out, split):
    """The policy's own pictures with gold: for training and validation, or for the test."""
    policy = generate.load_policy(str(out / "checkpoints" / "policy"))
    per_prompt, seed = {"train": (12, 1), "test": (8, 2)}[split]
    return sample_with_gold(policy, splits()[split], per_prompt, seed)


def make_judge(cfg, out, unfinished):
    train = policy_samples(out, "train")
    drawn = make_pictures(16000, 0.5, cfg.seed + 2)[2:]
    sampled = [s.image for s in train], [s.clean >= ARTIFACT_FREE for s in train]
    folder = out / "checkpoints" / "artifact"
    train_judge(folder, drawn, sampled, cfg.seed, unfinished=unfinished)


def make_pairs(cfg, out, unfinished):
    train, test = policy_samples(out, "train"), policy_samples(out, "test")
    heldout = [s for s in train if zlib.crc32(s.prompt.encode()) % 3 == 0]
    kept = [s for s in train if zlib.crc32(s.prompt.encode()) % 3 != 0]
    save_pairs(out / "pairs", "train", kept, 200, cfg.seed)
    save_pairs(out / "pairs", "validation", heldout, 100, cfg.seed)
    save_pairs(out / "pairs", "test", test, 200, cfg.seed)


def find_question(cfg, out, unfinished):
    """Search the judge's question among its mistakes, as in the paper; save it as artifact.txt."""
    judge = out / "checkpoints" / "artifact"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "apo.py", "--data", out / "pairs", "--checkpoint", judge]
        command += ["--writer", "scripted", "--select", "successive-rejects"]
        command += ["--seeds", str(cfg.seed), "--output-dir", folder]
        subprocess.run(command, check=True)
        found = Path(folder) / f"successive-rejects_seed{cfg.seed}" / "question.txt"
        shutil.copy(found, judge / "artifact.txt")


STAGES = {
    "prompts": make_prompts,
    "policy": make_policy,
    "hps": make_hps,
    "pickscore": make_pickscore,
    "dino": make_dino,
    "artifact": make_judge,
    "pairs": make_pairs,
    "question": find_question,
}


@dataclass
class Config:
    out: str = "tiny_world"  # checkpoints/, prompts/ and pairs/ go here
    only: str = ",".join(STAGES)  # these stages
    seed: int = 0  # of every random choice


def main(cfg):
    out, stages = Path(cfg.out), cfg.only.split(",")
    unknown = set(stages) - STAGES.keys()
    if unknown:
        usage_error(f"--only {', '.join(unknown)}: stages are {', '.join(STAGES)}")
    # A stage in work has a folder here; a finished one has a file, until the command has ended.
    unfinished = out / f"unfinished-seed{cfg.seed}"
    done = {stage: unfinished / f"{stage}.done" for stage in stages}
    for stage, mark in done.items():
        if not mark.is_file():
            STAGES[stage](cfg, out, unfinished / stage)
            with atomic(mark):
                pass
    for stage, mark in done.items():  # another command's unfinished stages stay
        mark.unlink()
        shutil.rmtree(unfinished / stage, ignore_errors=True)
    if not any(unfinished.iterdir()):
        unfinished.rmdir()


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
