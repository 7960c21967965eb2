import json
import os

# Before torch is imported. Waiting threads would otherwise keep a core busy: beside another program
# on two cores, these tests took twenty times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from faults import shows_a_fault
from PIL import Image

import generate
import grpo
import rewards
from training import checks
from training.files import ROOT
from training.prompts import load_prompts
from training.records import write_jsonl

TEXTS = ["a red circle", "two blue stars", "a cross above a square"]


def picture(color=(200, 10, 10), side=8):
    return Image.new("RGB", (side, side), color)


def tensor(*values):
    return torch.tensor(values)


def pytest_collection_modifyitems(items):
    for item in items:
        if shows_a_fault(item.originalname if hasattr(item, "originalname") else item.name):
            item.add_marker(pytest.mark.faults)


@pytest.fixture(scope="session", autouse=True)
def two_threads():
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def policy():
    return generate.load_policy("tiny")


@pytest.fixture(scope="session")
def test_prompts():
    return load_prompts(ROOT / "tiny_world/prompts/test.jsonl")


@pytest.fixture(scope="session")
def hps():
    return rewards.load("hps", checkpoint="tiny")


@pytest.fixture(scope="session")
def artifact():
    return rewards.load("artifact", checkpoint="tiny")


@pytest.fixture
def config():
    """Flags of a small run, with the presets filled in."""

    def make(**changes):
        small = {"rewards": "hps", "num_generations": 4, "prompts_per_step": 2, "max_thought": 40}
        cfg = grpo.Config(**small | {"device": "cpu"} | changes)
        checks.fill_presets(cfg)
        return cfg

    return make


@pytest.fixture
def generated(tmp_path):
    """Four pictures for each prompt of TEXTS, as generate.py writes them."""
    out, entries = tmp_path / "out", []
    for i, text in enumerate(TEXTS):
        (out / f"{i:05d}/samples").mkdir(parents=True)
        (out / f"{i:05d}/metadata.jsonl").write_text(json.dumps({"prompt": text}))
        for k in range(4):
            path = f"{i:05d}/samples/{k:04d}.png"
            picture((60 * i, 60 * k, 0)).save(out / path)
            entries.append({"path": path, "id": str(i), "prompt": text, "sample": k})
    write_jsonl(out / "manifest.jsonl", entries)
    return out
