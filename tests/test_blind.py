"""The key of the blind test says where the trained policy's pictures are."""

import json

import numpy as np
import pytest
from PIL import Image

from studies import blind
from training.pictures import save_sheet
from training.records import write_jsonl


def test_the_key_says_on_which_side_the_trained_policy_is(tmp_path):
    for run in ("a", "b"):
        write_jsonl(tmp_path / run / "tests/step_000000.jsonl", [{"id": "x"}] * 60)
        for name, color in (("first", "white"), ("last", "black")):
            pictures = [Image.new("RGB", (8, 8), color)] * 60
            save_sheet(pictures, tmp_path / run / f"tests/{name}.png")
    out = tmp_path / "out"
    blind.main(blind.Config((str(tmp_path / "a"), str(tmp_path / "b")), str(out), seed=3))
    key = json.loads((out / "key.json").read_text())
    assert sorted(entry["run"] for entry in key.values()) == ["a", "a", "b", "b"]
    assert {entry["trained"] for entry in key.values()} == {"left", "right"}
    for name, entry in key.items():
        pair = np.asarray(Image.open(out / f"{name}.png").convert("L"), float)[24:]
        half = pair.shape[1] // 2
        darker = "left" if pair[:, :half].mean() < pair[:, half:].mean() else "right"
        assert darker == entry["trained"]


def test_a_blind_test_needs_runs(capsys):
    with pytest.raises(SystemExit):
        blind.main(blind.Config(()))
    assert "give run folders" in capsys.readouterr().err
