import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the scripts are flat files, not a package

import generate
import rewards


@pytest.fixture(scope="session", autouse=True)
def two_threads():
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def policy():
    return generate.load_policy("tiny")


@pytest.fixture(scope="session")
def test_prompts():
    return generate.load_prompts(generate.HERE / "tiny_world/prompts/test.jsonl")


@pytest.fixture(scope="session")
def hps():
    return rewards.load("hps", checkpoint="tiny")


@pytest.fixture(scope="session")
def artifact():
    return rewards.load("artifact", checkpoint="tiny")
