"""Evaluation: pictures are scored once and counted honestly; runs are compared in pairs."""

import csv
import io
import json
import math
import os
import shutil

import pytest
import torch
import tyro
from conftest import TEXTS, picture

import evaluate
import generate
import rewards
from training import files
from training.files import ROOT
from training.records import read_jsonl, write_jsonl


def run(*args):
    evaluate.main(tyro.cli(evaluate.Config, args=[str(arg) for arg in args]))


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "photo.txt"
    path.write_text("\n".join(TEXTS) + "\n")
    return path


# --- scores


class Counting:
    """A reward that counts what it is asked: the red channel."""

    identity = "red"

    def __init__(self):
        self.asked = 0

    def __call__(self, prompts, images, metadata=None):
        self.asked += len(images)
        return torch.tensor([image.getpixel((0, 0))[0] / 255 for image in images])


@pytest.fixture
def counting(monkeypatch):
    reward = Counting()
    monkeypatch.setattr(rewards, "load", lambda *_, **__: reward)
    return reward


def test_a_folder_is_scored_once(generated, prompts, counting, capsys, tmp_path):
    for _ in range(2):
        with pytest.raises(SystemExit) as stop:
            run("--images", generated, "--prompts", prompts, "--rewards", "hps")
        assert stop.value.code == 0
    assert counting.asked == 12
    assert "| hps | all | 0.235 | 0.136 | 12 | 0 |" in capsys.readouterr().out
    picture((250, 0, 0)).save(
        generated / "00000/samples/0000.png"
    )  # a picture made again is scored again
    with pytest.raises(SystemExit):
        run("--images", generated, "--prompts", prompts, "--rewards", "hps")
    assert counting.asked == 13 and len(read_jsonl(tmp_path / "out-scores-tiny.jsonl")) == 12


@pytest.mark.parametrize("change", ["checkpoint", "other reward"])
def test_scores_of_another_checkpoint_are_not_taken_for_these(
    change, generated, prompts, counting, capsys
):
    def score(name="hps"):
        with pytest.raises(SystemExit):
            run("--images", generated, "--prompts", prompts, "--rewards", name)
        return counting.asked

    assert score() == 12
    if change == "checkpoint":
        counting.identity = "redder"
        assert score() == 24
    else:
        assert score("pickscore") == 24 and score("hps") == 24  # both are kept


def test_scores_do_not_go_into_another_file(generated, prompts, counting, capsys, tmp_path):
    other = tmp_path / "metrics.jsonl"
    other.write_text('{"step": 0}\n')
    with pytest.raises(SystemExit, match="2"):
        run("--images", generated, "--prompts", prompts, "--rewards", "hps", "--output", other)
    assert "another file of this name" in capsys.readouterr().err
    assert other.read_text() == '{"step": 0}\n'


def test_scores_are_beside_the_folder_that_dot_means(
    generated, prompts, counting, monkeypatch, tmp_path
):
    monkeypatch.chdir(generated)
    with pytest.raises(SystemExit, match="0"):
        run("--images", ".", "--prompts", prompts, "--rewards", "hps")
    assert (tmp_path / "out-scores-tiny.jsonl").is_file() and not list(generated.glob(".*"))


def test_a_corrected_prompt_is_scored_again(tmp_path):
    picture().save(tmp_path / "p.png")
    reward, known = Counting(), []
    for prompt, asked in (("a red star", 1), ("a red star", 1), ("a red circle", 2)):
        row = {"id": "0", "prompt": prompt, "tag": ""}
        matched = [(row, 0, tmp_path / "p.png")]
        known = evaluate.score_images(matched, {"hps": reward}, known, lambda _: None)
        assert reward.asked == asked and known[0]["prompt"] == prompt


def test_a_reward_is_known_by_its_checkpoint_and_its_question(tmp_path, hps):
    tiny = rewards.load("hps", checkpoint="tiny").identity
    assert tiny == rewards.load("hps", checkpoint="tiny").identity and "hps" in tiny
    questions = ("Is it broken?", "Is it whole?")
    judges = {rewards.load("artifact", checkpoint="tiny", question=q).identity for q in questions}
    assert len(judges) == 2
    shutil.copytree(ROOT / "tiny_world/checkpoints/hps", tmp_path / "hps")
    before = rewards.load("hps", checkpoint=tmp_path / "hps").identity
    file = tmp_path / "hps/HPS_v2.1_compressed.pt"
    os.utime(file, (1, 1))  # the same weights
    assert rewards.load("hps", checkpoint=tmp_path / "hps").identity == before
    saved = torch.load(file, weights_only=True)
    torch.save({"state_dict": {k: v + 0.001 for k, v in saved["state_dict"].items()}}, file)
    assert rewards.load("hps", checkpoint=tmp_path / "hps").identity != before


def test_the_standard_error_counts_prompts_not_pictures():
    records = [
        {"id": i, "tag": "", "s": float(s)}
        for i, s in (("a", 0), ("a", 0), ("a", 0), ("b", 1), ("b", 1), ("b", 1))
    ]
    (row,) = evaluate.score_table(records, ["s"])
    assert row["mean"] == 0.5 and row["standard error"] == pytest.approx(
        0.5
    )  # of two opinions, not of six


def test_a_prompt_with_many_pictures_counts_as_one_with_few():
    records = [{"id": i, "tag": "", "s": s} for i, s in (("a", 0.0), ("a", 0.0), ("b", 1.0))]
    assert evaluate.score_table(records, ["s"])[0]["mean"] == 0.5


def test_a_tag_may_be_called_all():
    records = [{"id": i, "tag": tag, "s": s} for i, tag, s in (("a", "all", 0.0), ("b", "x", 1.0))]
    table = evaluate.score_table(records, ["s"], by_tag=True)
    assert [(row["prompts"], row["n"]) for row in table] == [("all", 2), ("all", 1), ("x", 1)]


def test_a_corrupt_picture_costs_one_score(generated, prompts, counting, capsys):
    (generated / "00001/samples/0002.png").write_bytes(b"\x89PNG no more")
    with pytest.raises(SystemExit) as stop:
        run("--images", generated, "--prompts", prompts, "--rewards", "hps")
    out = capsys.readouterr()
    assert (
        stop.value.code == 3
        and "| 11 | 1 |" in out.out
        and "0002.png: not a readable picture" in out.err
    )


def test_ten_thousand_pictures_take_bounded_memory(tmp_path, counting):
    """Pictures are opened a batch at a time: the most that are alive at once is a batch."""
    path, rows = (
        tmp_path / "p.png",
        [{"id": str(i), "prompt": "x", "tag": ""} for i in range(10_000)],
    )
    picture().save(path)
    alive = []

    class Watched(Counting):
        def __call__(self, prompts, images, metadata=None):
            alive.append(len(images))
            return super().__call__(prompts, images)

    records = evaluate.score_images(
        [(row, 0, path) for row in rows], {"hps": Watched()}, [], lambda _: None
    )
    assert len(records) == 10_000 and max(alive) == 64


# --- pairs


def test_a_tie_is_half_right():
    assert evaluate.pair_accuracy(
        [(1.0, 0.0), (0.5, 0.5), (0.2, 0.9), (math.nan, 0.1)]
    ) == pytest.approx(0.5)


def test_the_papers_table_for_the_tiny_rewards(capsys):
    run("--pairs", ROOT / "tiny_world/pairs")
    table = list(csv.reader(io.StringIO(capsys.readouterr().out), delimiter="|"))
    accuracy = {row[1].strip(): float(row[6]) for row in table if row[1].strip() in rewards.REWARDS}
    assert accuracy["hps"] < 0.7 and accuracy["artifact"] > 0.9


# --- one against another


def test_two_score_files_are_compared_picture_by_picture(tmp_path, capsys):
    for name, shift in (("a", 0.0), ("b", 0.25)):
        rows = [
            {
                "path": f"{tmp_path}/none.png",
                "sha256": "00",
                "id": str(i),
                "sample": 0,
                "prompt": f"<b>{i}</b>",
                "hps": i / 10 + shift,
            }
            for i in range(10)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    run("--compare", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--output", tmp_path / "c.html")
    said = capsys.readouterr()
    assert "| hps | 0.450 | 0.700 | 0.250 | +0.250 to +0.250 | 10 |" in said.out
    assert "not the picture that was scored" in said.err
    assert "<b>0</b>" not in (tmp_path / "c.html").read_text()


def test_two_lines_of_one_picture_are_not_compared(tmp_path, capsys):
    line = json.dumps({"path": "p", "sha256": "", "id": "0", "sample": 0, "prompt": "x", "hps": 1})
    (tmp_path / "a.jsonl").write_text(f"{line}\n{line}\n")
    with pytest.raises(SystemExit, match="2"):
        run("--compare", tmp_path / "a.jsonl", tmp_path / "a.jsonl")
    assert "two lines of one prompt and sample" in capsys.readouterr().err


def test_the_largest_changes_come_first_although_scores_are_missing(tmp_path):
    for name, values in (("a", [0.0] * 6), ("b", [0.1, math.nan, 0.9, 0.2, math.nan, 0.5])):
        lines = [
            {"path": "p", "sha256": "", "id": str(i), "sample": 0, "prompt": f"p{i}", "hps": value}
            for i, value in enumerate(values)
        ]
        write_jsonl(tmp_path / f"{name}.jsonl", lines)
    run("--compare", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--output", tmp_path / "c.html")
    page = (tmp_path / "c.html").read_text()
    places = [page.index(f"p{i}<") for i in (2, 5, 3, 0)]
    assert places == sorted(places) and "p1<" not in page


def test_scores_of_pictures_that_are_gone_or_redrawn_are_forgotten(
    generated, prompts, counting, tmp_path
):
    args = ("--images", generated, "--prompts", prompts, "--rewards", "hps")
    with pytest.raises(SystemExit, match="0"):
        run(*args)
    (generated / "00001/samples/0001.png").unlink()
    with pytest.raises(SystemExit, match="0"):
        run(*args)
    rows = read_jsonl(tmp_path / "out-scores-tiny.jsonl")
    assert len(rows) == 11 and counting.asked == 12
    # The same folder by another name: the same pictures.
    (tmp_path / "link").symlink_to(generated)
    place = ("--output", tmp_path / "out-scores-tiny.jsonl")
    with pytest.raises(SystemExit, match="0"):
        run("--images", tmp_path / "link", *args[2:], *place)
    assert len(read_jsonl(place[1])) == 11


@pytest.mark.parametrize("flag", ["--audit", ""])
def test_a_mistyped_run_is_not_left_out_silently(flag, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(*filter(None, [flag, tmp_path / "nosuchrun"]))
    assert "nosuchrun: no such folder" in capsys.readouterr().err


def test_a_run_before_its_first_test_is_left_out(tmp_path, capsys):
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/config.json").write_text("{}")
    with pytest.raises(SystemExit, match="2"):
        run("--audit", tmp_path / "begun")
    assert "begun: no run that was tested, and left out" in capsys.readouterr().err


def test_two_commands_do_not_write_one_file_of_scores(generated, prompts, counting, capsys):
    with files.lock(generated.parent, "--output", f".{generated.name}-scores-tiny.jsonl.lock"):
        with pytest.raises(SystemExit, match="2"):
            run("--images", generated, "--prompts", prompts, "--rewards", "jpeg")
    assert "another command is writing there" in capsys.readouterr().err


def test_a_judge_that_nothing_asks_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        run("--pairs", "x", "--rewards", "hps", "--judge-url", "http://127.0.0.1:9/v1")
    assert "no reward `artifact` here uses it" in capsys.readouterr().err


def test_what_has_nothing_in_common_is_not_compared(tmp_path, capsys):
    for name, text in (("a", "x"), ("b", "y")):
        (tmp_path / f"{name}.jsonl").write_text(
            json.dumps(
                {"path": "p", "sha256": "", "id": "0", "sample": 0, "prompt": text, "hps": 0.5}
            )
        )
    with pytest.raises(SystemExit):
        run("--compare", tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert "no pictures of the same prompts" in capsys.readouterr().err


def test_generate_exports_for_an_official_scorer(tmp_path, prompts):
    args = [
        "--prompts",
        str(prompts),
        "--num-images",
        "1",
        "--layout",
        "wise",
        "--output-dir",
        str(tmp_path / "made") + "/",
    ]
    generate.main(tyro.cli(generate.Config, args=args))
    assert sorted(p.name for p in (tmp_path / "made-wise").iterdir()) == ["0.png", "1.png", "2.png"]
