import pytest
import torch

import generate
import grpo
import rewards
from training import checks
from training.files import ROOT
from training.prompts import load_prompts


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
