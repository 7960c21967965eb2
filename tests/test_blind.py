"""The key of the blind test says where the trained policy's pictures are."""

import json

import numpy as np
import pytest
from PIL import Image

from studies import blind
from training.pictures import save_sheet
from training.records import write_jsonl


def test_the_key_says_on_which_side_the_trained_policy_is(tmp_path):
    for run, red in (("a", 0), ("b", 255)):  # each run has its own red, the trained one more green
        write_jsonl(tmp_path / run / "tests/step_000000.jsonl", [{"id": "x"}] * 60)
        for name, green in (("first", 0), ("last", 200)):
            pictures = [Image.new("RGB", (8, 8), (red, green, 4 * i)) for i in range(60)]
            save_sheet(pictures, tmp_path / run / f"tests/{name}.png")
    out = tmp_path / "out"
    blind.main(blind.Config((str(tmp_path / "a"), str(tmp_path / "b")), str(out), seed=3))
    key = json.loads((out / "key.json").read_text())
    assert sorted(entry["run"] for entry in key.values()) == ["a", "a", "b", "b"]
    assert {entry["trained"] for entry in key.values()} == {"left", "right"}
    for name, entry in key.items():
        pair = np.asarray(Image.open(out / f"{name}.png"))[24:]
        side = blind.SIDE + 4
        left, right = (pair[30::side, x : x + 6 * side : side] for x in (30, 30 + 6 * side + 40))
        assert (left[..., 2] == right[..., 2]).all()  # the same prompts on both sides
        greener = "left" if left[..., 1].mean() > right[..., 1].mean() else "right"
        assert greener == entry["trained"]
        assert {"a": 0, "b": 255}[entry["run"]] == left[..., 0].max() == left[..., 0].min()


def test_answers_are_counted_by_the_key(tmp_path, capsys):
    sides = {"a_seed1": "left", "b_seed1": "right", "b_seed2": "left"}
    key = {
        f"pair_{i}": {"run": run, "trained": side} for i, (run, side) in enumerate(sides.items())
    }
    (tmp_path / "key.json").write_text(json.dumps(key))
    blind.main(blind.Config(answers="LRR", output_dir=str(tmp_path)))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("chosen in ")[1] for line in lines] == ["1 of 1 pairs", "1 of 2 pairs"]
    with pytest.raises(SystemExit):
        blind.main(blind.Config(answers="LR", output_dir=str(tmp_path)))
    assert "each of the 3 pairs" in capsys.readouterr().err


def test_a_refused_command_leaves_the_earlier_pairs(tmp_path, capsys):
    (tmp_path / "pair_01.png").write_text("mine")
    with pytest.raises(SystemExit):
        blind.main(blind.Config((str(tmp_path / "mistyped"),), str(tmp_path)))
    assert (tmp_path / "pair_01.png").exists()


def test_a_blind_test_needs_runs(capsys):
    with pytest.raises(SystemExit):
        blind.main(blind.Config(()))
    assert "give run folders" in capsys.readouterr().err


def test_a_run_with_too_few_pictures_is_named(tmp_path, capsys):
    write_jsonl(tmp_path / "a/tests/step_000000.jsonl", [{"id": "x"}] * 40)
    with pytest.raises(SystemExit):
        blind.main(blind.Config((str(tmp_path / "a"),), str(tmp_path / "out")))
    assert "must hold 60 pictures or more" in capsys.readouterr().err
