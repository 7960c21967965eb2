"""Evaluation: pictures are found wherever benchmarks keep them, counted honestly, and never twice."""

import csv
import io
import json
import math
import os
import random
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import tyro
from PIL import Image

import evaluate
import generate
import rewards
from evaluation import hacking, layouts, wise
from evaluation import pages as report
from training import files

ROOT = evaluate.files.HERE
TEXTS = ["a red circle", "two blue stars", "a cross above a square"]


def picture(color=(200, 10, 10), side=8):
    return Image.new("RGB", (side, side), color)


def run(*args):
    evaluate.main(tyro.cli(evaluate.Config, args=[str(arg) for arg in args]))


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "photo.txt"
    path.write_text("\n".join(TEXTS) + "\n")
    return path


@pytest.fixture
def painted(tmp_path, prompts):
    """Four pictures for each of three prompts, as generate.py writes them."""
    out, entries = tmp_path / "out", []
    for i, text in enumerate(TEXTS):
        (out / f"{i:05d}/samples").mkdir(parents=True)
        (out / f"{i:05d}/metadata.jsonl").write_text(json.dumps({"prompt": text}))
        for k in range(4):
            path = f"{i:05d}/samples/{k:04d}.png"
            picture((60 * i, 60 * k, 0)).save(out / path)
            entries.append({"path": path, "id": str(i), "prompt": text, "sample": k})
    (out / "manifest.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    return out


# --- where benchmarks keep their pictures. The official scorers' own matching, restated.


def official(layout, root):
    """What the official scorer of this layout would read: {file: prompt number}."""
    if (
        layout == "t2i-compbench"
    ):  # BLIP_vqa.py: every file of samples/, ordered by number; 3_in_1.py slices by num
        names = sorted(
            os.listdir(root / "samples"), key=lambda name: int(name.split("_")[-1].split(".")[0])
        )
        assert [int(n.split("_")[-1].split(".")[0]) for n in names] == list(range(len(names)))
        return {f"samples/{name}": TEXTS.index(name.split("_")[0]) for name in names}
    if layout == "wise":  # gpt_eval.py: {image_dir}/{prompt_id}.png
        return {f"{i}.png": i for i in range(3) if os.path.exists(root / f"{i}.png")}
    if layout == "dpg":  # compute_dpg_bench.py: every file, its name up to the first dot
        return {name: int(os.path.basename(name).split(".")[0]) for name in os.listdir(root)}
    assert os.listdir(root) == [
        "photo"
    ]  # hpsv2.evaluate: the styles and nothing else, then idx:05d.jpg
    return {
        f"photo/{i:05d}.jpg": i for i in range(3) if os.path.exists(root / f"photo/{i:05d}.jpg")
    }


@pytest.mark.parametrize(
    "layout, n", [("t2i-compbench", 12), ("wise", 3), ("dpg", 3), ("hpdv2", 3)]
)
def test_the_official_scorer_finds_every_exported_picture(layout, n, painted, tmp_path):
    assert layouts.export(painted, layout, tmp_path / layout) == n
    read = official(layout, tmp_path / layout)
    assert len(read) == n and set(read.values()) == {0, 1, 2}
    for name in read:
        Image.open(tmp_path / layout / name).verify()


def test_dpg_tiles_are_cut_where_the_scorer_cuts(painted, tmp_path):
    layouts.export(painted, "dpg", tmp_path / "dpg")
    tile = Image.open(tmp_path / "dpg/1.png")
    boxes = [(0, 0, 8, 8), (8, 0, 16, 8), (0, 8, 8, 16), (8, 8, 16, 16)]
    assert [tile.crop(box).getpixel((3, 3)) for box in boxes] == [(60, 60 * k, 0) for k in range(4)]


def test_geneval_reads_our_folder_as_it_is(painted):
    for folder in sorted(os.listdir(painted)):  # evaluate_images.py
        if not folder.isdigit():
            continue
        metadata = json.load(open(painted / folder / "metadata.jsonl"))
        found = [n for n in os.listdir(painted / folder / "samples") if re.match(r"\d+\.png", n)]
        assert metadata["prompt"] in TEXTS and len(found) == 4


@pytest.mark.parametrize("layout", ["geneval", "t2i-compbench", "wise", "dpg", "hpdv2", "released"])
def test_pictures_are_found_in_every_layout(layout, painted, tmp_path, prompts):
    rows, root = files.load_prompts(prompts), painted
    if layout == "released":
        root = tmp_path / "released"
        root.mkdir()
        for i, text in enumerate(TEXTS):
            picture().save(root / f"ID{i}_{text[:100]}_0.jpg")
    elif layout != "geneval":
        root = tmp_path / layout
        layouts.export(painted, layout, root)
    _, matched, missing, extra = layouts.find_images(root, rows)
    assert {row["prompt"] for row, _, _ in matched} == set(TEXTS) and not missing and not extra
    assert len(matched) == (12 if layout in ("geneval", "t2i-compbench") else 3)


def test_pictures_of_other_prompts_are_extra_and_never_taken_for_these(painted, prompts):
    rows = files.load_prompts(prompts)
    rows[1]["prompt"] = "something else"
    _, matched, missing, extra = layouts.find_images(painted, rows)
    assert len(matched) == 8 and [r["id"] for r in missing] == ["1"] and len(extra) == 4


def test_nothing_matched_is_an_error(painted, tmp_path, capsys):
    (tmp_path / "other.txt").write_text("a house\n")
    with pytest.raises(SystemExit) as stop:
        run("--images", painted, "--prompts", tmp_path / "other.txt")
    assert stop.value.code == 2 and "none of its 12 pictures" in capsys.readouterr().err


def test_a_prompt_that_is_no_file_name_is_refused_before_anything_is_written(
    painted, tmp_path, capsys
):
    manifest = painted / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace("a red circle", "a red/circle"))
    with pytest.raises(SystemExit):
        layouts.export(painted, "t2i-compbench", tmp_path / "no")
    assert "no file name" in capsys.readouterr().err and not (tmp_path / "no").exists()


# --- official scores


def test_geneval_overall_is_the_mean_of_tasks_not_of_pictures(tmp_path):
    rows = [{"tag": "colors", "correct": c} for c in (True, True, True, False)] + [
        {"tag": "counting", "correct": False}
    ]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    benchmark, columns, _ = layouts.summarize(tmp_path / "r.jsonl")
    assert benchmark == "GenEval" and columns == {"colors": 0.75, "counting": 0.0, "overall": 0.375}


def wise_rows(protocol, value):
    names = (
        ("score",)
        if protocol == "WISE verified"
        else ("consistency", "realism", "aesthetic_quality")
    )
    return [{"prompt_id": i, **dict.fromkeys(names, value)} for i in range(1, 1001)]


@pytest.mark.parametrize("protocol, best", [("WISE legacy", 2), ("WISE verified", 1)])
def test_a_perfect_wise_is_one_and_its_weights_add_up(protocol, best):
    name, columns, failed = layouts.wise_table(wise_rows(protocol, best))
    assert (
        name == protocol
        and not failed
        and columns["overall"] == pytest.approx(1)
        and len(columns) == 7
    )


def test_an_unparsed_wise_answer_is_listed_and_not_counted_as_zero():
    rows = wise_rows("WISE legacy", 2)
    rows[450] |= {"realism": 999}
    _, columns, failed = layouts.wise_table(rows)
    assert failed == [451] and columns["overall"] == pytest.approx(1)


def test_wiscore_by_hand():
    rows = wise_rows("WISE legacy", 0)
    for row in rows[800:900]:  # physics
        row |= {"consistency": 2, "realism": 1, "aesthetic_quality": 0}
    _, columns, _ = layouts.wise_table(rows)
    assert columns["Physics"] == pytest.approx(0.8) and columns["overall"] == pytest.approx(0.08)


def test_dpg_and_compbench_results_are_read(tmp_path, capsys):
    (tmp_path / "dpg.txt").write_text(
        "x.png, 1.0, 1.0\nModel: m\nL1 category scores:\n\tentity: 88.0\n\tglobal: 90.5\n"
        "L2 category scores:\n\tentity - whole: 1.0\nDPG-Bench score: 82.5\n"
    )
    assert layouts.summarize(tmp_path / "dpg.txt")[1] == {
        "Entity": 88.0,
        "Global": 90.5,
        "overall": 82.5,
    }
    (tmp_path / "vqa_result.json").write_text(
        '[{"question_id": 0, "answer": "0.5"}, {"question_id": 1, "answer": "1.0"}]'
    )
    assert layouts.summarize(tmp_path / "vqa_result.json")[1] == {"overall": 0.75}
    with pytest.raises(SystemExit) as stop:
        run("--summarize", tmp_path / "dpg.txt")
    assert stop.value.code == 0
    assert "Janus-Pro-7B (published)" in capsys.readouterr().out


class Oracle:
    """Answers by script: the number of each call -> text. Stands in for a served model."""

    def __init__(self, texts):
        self.texts, self.pool, self.model = list(texts), ThreadPoolExecutor(1), "oracle"

    def write(self, content, seed=0):
        return self.texts.pop(0)


def wise_records(texts, protocol, tmp_path):
    picture().save(tmp_path / "1.png")
    rows = [
        ({"id": str(i), "prompt": "p", "Explanation": "e", "tag": "t"}, 0, tmp_path / "1.png")
        for i in (1, 2)
    ]
    return wise.judge_folder(Oracle(texts), protocol, rows, evaluate.open_picture)


def test_an_answer_that_cannot_be_read_is_asked_for_again_and_then_given_up(tmp_path):
    got = wise_records(["no idea", "Score: 1", "?", "Score: 7", "refused"], "verified", tmp_path)
    assert (
        got[0]["score"] == 1 and math.isnan(got[1]["score"]) and got[1]["evaluation"] == "refused"
    )
    path = tmp_path / "x_scores_results.jsonl"
    path.write_text("".join(map(files.json_line, got)))
    benchmark, columns, failed = layouts.summarize(path)
    assert benchmark == "WISE verified" and columns["Cultural"] == 1 and failed == [2]


def test_the_two_protocols_of_wise_are_never_mixed(tmp_path):
    legacy = wise_records(
        ["Consistency: 2\nRealism: 1\nAesthetic Quality: 1"] * 2, "legacy", tmp_path
    )
    assert layouts.wise_table(legacy)[0] == "WISE legacy" and layouts.wise_table(legacy)[1][
        "Cultural"
    ] == pytest.approx(0.85)
    with pytest.raises(SystemExit):
        layouts.wise_table(legacy + [{"prompt_id": 3, "score": 1}])


# --- scores


class Counting:
    """A reward that counts what it is asked: the red channel."""

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


def test_a_folder_is_scored_once(painted, prompts, counting, capsys, tmp_path):
    for _ in range(2):
        with pytest.raises(SystemExit) as stop:
            run("--images", painted, "--prompts", prompts, "--rewards", "hps")
        assert stop.value.code == 0
    assert counting.asked == 12
    assert "| hps | all | 0.235 | 0.136 | 12 | 0 |" in capsys.readouterr().out
    picture((250, 0, 0)).save(
        painted / "00000/samples/0000.png"
    )  # a picture made again is scored again
    with pytest.raises(SystemExit):
        run("--images", painted, "--prompts", prompts, "--rewards", "hps")
    assert counting.asked == 13 and len(files.read_jsonl(tmp_path / "out-scores-tiny.jsonl")) == 12


def test_the_standard_error_counts_prompts_not_pictures():
    records = [
        {"id": i, "tag": "", "s": float(s)}
        for i, s in (("a", 0), ("a", 0), ("a", 0), ("b", 1), ("b", 1), ("b", 1))
    ]
    (row,) = evaluate.score_table(records, ["s"])
    assert row["mean"] == 0.5 and row["standard error"] == pytest.approx(
        0.5
    )  # of two opinions, not of six


def test_a_corrupt_picture_costs_one_score(painted, prompts, counting, capsys):
    (painted / "00001/samples/0002.png").write_bytes(b"\x89PNG no more")
    with pytest.raises(SystemExit) as stop:
        run("--images", painted, "--prompts", prompts, "--rewards", "hps")
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
    assert evaluate.pair_accuracy([1.0, 0.5, 0.2, math.nan], [0.0, 0.5, 0.9, 0.1]) == pytest.approx(
        0.5
    )


def test_the_papers_table_for_the_tiny_rewards(capsys):
    run("--pairs", ROOT / "tiny_world/pairs")
    table = list(csv.reader(io.StringIO(capsys.readouterr().out), delimiter="|"))
    accuracy = {row[1].strip(): float(row[6]) for row in table if row[1].strip() in rewards.REWARDS}
    assert accuracy["hps"] < 0.62 and accuracy["artifact"] > 0.8


# --- numbers


def test_the_bootstrap_covers_the_truth_about_as_often_as_it_says():
    rng, hits = np.random.default_rng(0), 0
    for trial in range(100):
        values = rng.normal(size=40).repeat(4)  # four pictures of a prompt, all alike
        low, high = report.bootstrap(
            lambda pick, v=values: v[pick].mean(), np.arange(40).repeat(4), 200, trial
        )
        hits += low < 0 < high
    assert 88 <= hits <= 99  # drawing pictures instead of prompts would give about 67


def records(values, name="gold"):
    return [{"id": str(i), "sample": 0, name: float(v)} for i, v in enumerate(values)]


def test_paired_differences_take_the_prompts_difficulty_out():
    rng = np.random.default_rng(0)
    hard = rng.normal(size=200)
    gain, error = hacking.paired(
        records(hard), records(hard + 0.1 + 0.01 * rng.normal(size=200)), "gold"
    )
    assert gain == pytest.approx(0.1, abs=0.005) and error < 0.001


def make_run(folder, gold, proxy, noise=0.05):
    rng = random.Random(0)
    (folder / "tests").mkdir(parents=True)
    config = {
        "flags": {"rewards": "hps", "eval_rewards": "gold", "num_generations": 2},
        "command": "grpo.py",
    }
    (folder / "config.json").write_text(json.dumps(config))
    with open(folder / "test.jsonl", "w") as file:
        for step, (g, p) in enumerate(zip(gold, proxy)):
            file.write(json.dumps({"step": step, "hps": p, "gold": g, "kl": float(step)}) + "\n")
            rows = [
                {"id": str(i), "sample": 0, "gold": g + rng.gauss(0, noise)} for i in range(100)
            ]
            (folder / f"tests/step_{step:06d}.jsonl").write_text(
                "".join(json.dumps(r) + "\n" for r in rows)
            )
    return folder


@pytest.mark.parametrize(
    "gold, proxy, expected",
    [
        ([0.3, 0.4, 0.35, 0.2], [0.1, 0.2, 0.3, 0.4], 1),  # up, then down, while the proxy rises
        ([0.3, 0.4, 0.5, 0.6], [0.1, 0.2, 0.3, 0.4], None),  # both rise
        ([0.3, 0.4, 0.35, 0.2], [0.1, 0.2, 0.1, 0.1], None),  # both fall: bad luck, but no hacking
        ([0.3, 0.4, 0.399, 0.399], [0.1, 0.2, 0.3, 0.4], None),  # a fall within the error
    ],
)
def test_the_onset_of_hacking_by_its_rule(gold, proxy, expected, tmp_path):
    assert hacking.onset(make_run(tmp_path / "run", gold, proxy)) == expected


def test_the_reward_with_the_largest_spread_drives(tmp_path):
    folder = make_run(tmp_path / "run", [0.3], [0.1])
    (folder / "rollouts").mkdir()
    loud, quiet = [0.0, 1.0, 0.2, 0.9], [0.51, 0.50, 0.5, 0.5]
    rows = [
        {"hps": a, "gold": b, "advantage": a + b - (0.755 if i < 2 else 1.05)}
        for i, (a, b) in enumerate(zip(loud, quiet))
    ]
    (folder / "rollouts/step_000000.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    first = {row["reward"]: row for row in hacking.drivers(folder)[:2]}
    assert first["hps"]["correlation with the advantage"] > 0.9 and first["hps"]["ties"] == 0
    assert first["gold"]["ties"] == 0.5 and first["gold"]["role"] == "only watched"


def test_a_group_of_one_picture_has_no_diversity():
    assert hacking.diversity([picture()] * 4, 4) == [0.0]
    black_white = [picture((0, 0, 0)), picture((255, 255, 255))]
    assert hacking.diversity(black_white, 2) == pytest.approx([1.0])


def test_a_sheet_gives_its_pictures_back(tmp_path):
    images = [picture((i, 2 * i, 0)) for i in range(21)]
    hacking.save_sheet(images, tmp_path / "sheet.png")
    assert [im.getpixel((4, 4)) for im in hacking.cut_sheet(tmp_path / "sheet.png", 21)] == [
        (i, 2 * i, 0) for i in range(21)
    ]


# --- one against another


def test_two_score_files_are_compared_picture_by_picture(tmp_path, capsys):
    for name, shift in (("a", 0.0), ("b", 0.25)):
        rows = [
            {
                "path": f"{tmp_path}/none.png",
                "id": str(i),
                "sample": 0,
                "prompt": f"<b>{i}</b>",
                "hps": i / 10 + shift,
            }
            for i in range(10)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    run("--compare", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--output", tmp_path / "c.html")
    assert "| hps | 0.450 | 0.700 | 0.250 | +0.250 to +0.250 | 10 |" in capsys.readouterr().out
    assert "<b>0</b>" not in (tmp_path / "c.html").read_text()


def test_what_has_nothing_in_common_is_not_compared(tmp_path, capsys):
    for name, text in (("a", "x"), ("b", "y")):
        (tmp_path / f"{name}.jsonl").write_text(
            json.dumps({"path": "p", "id": "0", "sample": 0, "prompt": text, "hps": 0.5})
        )
    with pytest.raises(SystemExit):
        run("--compare", tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert "in common" in capsys.readouterr().err


# --- pages


def test_every_text_in_a_page_is_escaped():
    evil = "<script>alert(1)</script>"
    body = report.table([{evil: evil, "n": 1.0}]) + report.word_diff(evil, evil + " x")
    assert "<script>alert" not in report.page(evil, body)


def test_a_page_loads_nothing_and_runs_one_script():
    page = report.page("t", report.table([{"a": 1.0, "picture": picture()}]))
    assert (
        "default-src 'none'" in page
        and page.count("<script") == 1
        and "http://" not in page
        and "https://" not in page
    )


def test_a_word_diff_shows_what_left_and_what_came():
    assert (
        report.word_diff("Do you see noise ?", "Do you see stains ?")
        == "Do you see <del>noise</del> <ins>stains</ins> ?"
    )


def test_generate_exports_for_an_official_scorer(tmp_path, prompts):
    args = [
        "--prompts",
        str(prompts),
        "--num-images",
        "1",
        "--layout",
        "wise",
        "--output-dir",
        str(tmp_path / "made"),
    ]
    generate.main(tyro.cli(generate.Config, args=args))
    assert sorted(p.name for p in (tmp_path / "made-wise").iterdir()) == ["0.png", "1.png", "2.png"]
