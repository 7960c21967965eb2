"""The large judges, each against what its original computed on small random weights: numbers in tests/data, with a
note of what made them; none of the originals' code is needed, or here."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import maniqa
import rewards

DATA = rewards.HERE / "tests" / "data"


def recorded(name):
    """(what was recorded, the pictures as the original saw them)"""
    known = json.loads((DATA / name / "expected.json").read_text())
    images = [Image.open(rewards.HERE / path).convert("RGB").resize(known["resized to"], Image.LANCZOS)
              for path in known["pictures"]]
    return known, images


# --- MANIQA


@pytest.fixture(scope="module")
def small_maniqa():
    return rewards.load("maniqa", checkpoint=DATA / "maniqa", vit_heads=4)


def test_maniqa_computes_what_the_original_computed(small_maniqa):
    known, images = recorded("maniqa")
    expected = torch.tensor(known["scores"])
    assert (small_maniqa([""] * len(images), images) - expected).abs().max() < 5e-5
    assert expected.std() > 1e-2
    per_crop = small_maniqa.model(small_maniqa.crops(images[0]))
    assert (per_crop - torch.tensor(known["per crop"])).abs().max() < 5e-5


def test_maniqa_of_full_size_has_the_names_and_shapes_of_the_published_checkpoint():
    listed = dict(line.split("\t") for line in (DATA / "maniqa" / "names.txt").read_text().splitlines())
    with torch.device("meta"):
        state = maniqa.MANIQA().state_dict()
    assert {name: str(list(value.shape)) for name, value in state.items()} == listed


def test_crops_go_from_edge_to_edge_and_a_small_picture_is_enlarged(small_maniqa):
    assert maniqa.corners(80, 64, 3) == [0, 8, 16] and maniqa.corners(64, 64, 3) == [0]
    assert len(small_maniqa.crops(Image.new("RGB", (32, 40)))) == 3  # 64 x 80: one column of crops
    assert small_maniqa([""], [Image.new("RGB", (32, 40))]).isfinite().all()


def test_a_missing_maniqa_is_named_with_the_command_that_fetches_it(capsys, tmp_path):
    with pytest.raises(SystemExit):
        rewards.load("maniqa", checkpoint=tmp_path)
    assert "curl -LO" in capsys.readouterr().err
