"""The prompt optimiser: it learns from mistakes, spends few calls, and never sees the test split."""

import json
import math
import random

import numpy as np
import pytest
import tyro
from PIL import Image

import apo
from evaluation import labels
from training.files import ROOT
from training.records import read_jsonl

PAIRS = ROOT / "tiny_world" / "pairs"
PLAIN = "Are there artifacts in this picture? Answer yes or no."


@pytest.fixture(scope="module")
def data():
    return labels.load_examples(PAIRS)


class Judge:
    """Knows the truth about a picture, if the question contains the word; counts what it is asked."""

    def __init__(self, magic="noise"):
        self.magic, self.asked = magic, 0

    def answers(self, question, images):
        self.asked += len(images)
        whole = [image.getpixel((0, 0))[0] == 0 or self.magic not in question for image in images]
        return [
            [("no", math.log(0.9 if w else 0.1)), ("yes", math.log(0.1 if w else 0.9))]
            for w in whole
        ]


def examples(n, folder):
    """n pairs of pictures, black is clean and red is broken."""
    rows = []
    for i in range(n):
        for broken in (False, True):
            path = folder / f"{i}_{broken}.png"
            Image.new("RGB", (2, 2), (255 * broken, i % 256, i // 256)).save(path)
            rows.append({"path": path, "prompt": str(i), "broken": broken})
    return rows


def test_a_damaged_picture_costs_its_own_answer_and_is_named_once(tmp_path, capsys):
    rows = examples(3, tmp_path)
    rows[0]["path"].write_bytes(rows[0]["path"].read_bytes()[:40])
    rows[1]["path"].unlink()
    judge = apo.CachedJudge(tmp_path / "answers.sqlite", Judge(), "judge")
    for question in ("Any noise?", "Is there noise?"):
        scores = judge(question, rows)
        assert np.isnan(scores[:2]).all() and np.isfinite(scores[2:]).all()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all("not a readable picture" in line for line in lines)


# --- data and measures


def test_no_prompt_is_in_two_splits(data):
    prompts = [{e["prompt"] for e in data[name]} for name in ("train", "validation", "test")]
    assert not (prompts[0] & prompts[1] or prompts[0] & prompts[2] or prompts[1] & prompts[2])


def test_a_folder_of_labelled_pictures_is_split_by_prompt(tmp_path):
    for kind in ("clean", "broken"):
        (tmp_path / kind).mkdir()
        for i in range(30):
            Image.new("RGB", (2, 2)).save(tmp_path / kind / f"scene{i}__1.png")
    splits = labels.load_examples(tmp_path)
    assert sum(map(len, splits.values())) == 60
    assert all(
        len(examples) == 2 * len({e["prompt"] for e in examples}) for examples in splits.values()
    )


@pytest.mark.parametrize(
    "line, rule",
    [
        ('{"prompt": "a", "path": "nowhere.png", "label": 1}', "no picture"),
        ('{"prompt": "a", "label": 1}', "no picture"),
    ],
)
def test_bad_data_are_one_clear_error(line, rule, tmp_path, capsys):
    (tmp_path / "data.jsonl").write_text(line + "\n")
    with pytest.raises(SystemExit) as stop:
        labels.load_examples(tmp_path / "data.jsonl")
    assert stop.value.code == 2 and rule in capsys.readouterr().err


def test_measures_by_hand():
    rows = [{"prompt": p, "broken": b} for p in "ab" for b in (False, True)]
    got = labels.measures(
        np.array([0.2, 0.8, 0.6, 0.4]), rows
    )  # prompt a is judged rightly, b the wrong way round
    assert got["accuracy"] == 0.5 and got["pairs"] == 0.5 and got["auroc"] == 0.75
    assert got["log-likelihood"] == pytest.approx((2 * math.log(0.8) + 2 * math.log(0.4)) / 4)


def test_a_missing_answer_is_neither_right_nor_free():
    rows = [{"prompt": "a", "broken": b} for b in (False, True)]
    got = labels.measures(np.array([np.nan, 0.9]), rows)
    assert got["accuracy"] == 0.5 and got["unanswered"] == 0.5
    assert got["log-likelihood"] == pytest.approx((math.log(0.5) + math.log(0.9)) / 2)


def test_a_calibrated_judge_has_no_calibration_error():
    rows = [{"prompt": str(i), "broken": i < 7} for i in range(10)]
    assert labels.measures(np.full(10, 0.7), rows)["calibration error"] == pytest.approx(0)


# --- the memory


def test_nothing_is_asked_twice_not_even_by_the_next_run(tmp_path):
    rows, judge = examples(4, tmp_path), Judge()
    for _ in range(2):  # the second time is another process' memory of the first
        answers = apo.CachedJudge(tmp_path / "answers.sqlite", judge, "judge")
        first = answers("noise?", rows)
    assert judge.asked == 8 and answers.calls == 0 and len(answers.used) == 8
    assert first.tolist() == pytest.approx([0.1, 0.9] * 4)


def test_another_judge_has_another_memory_and_a_failure_is_not_remembered(tmp_path):
    rows = examples(1, tmp_path)

    class Silent:
        answers = staticmethod(lambda question, images: [[]] * len(images))

    silent = apo.CachedJudge(tmp_path / "a.sqlite", Silent(), "silent")
    assert (
        np.isnan(silent("noise?", rows)).all()
        and np.isnan(silent("noise?", rows)).all()
        and silent.calls == 4
    )
    other = apo.CachedJudge(tmp_path / "a.sqlite", Judge(), "other")
    assert np.isfinite(other("noise?", rows)).all()


# --- candidates


@pytest.mark.parametrize(
    "text, why",
    [
        ("", "empty"),
        ("Describe the picture.", "does not ask for yes or no"),
        ("Broken? Yes or no. " + "Think. " * 300, "longer than 1200 characters"),
        ("Answer YES/NO: is it broken?", None),
    ],
)
def test_what_cannot_be_a_question_is_refused_with_a_reason(text, why):
    assert apo.refusal(text) == why


def test_without_mistakes_nobody_is_asked_for_reasons(tmp_path):
    class Nobody:
        def paraphrase(self, question, rng):
            return question + " "

    rows, refused = examples(4, tmp_path), {}
    answers = apo.CachedJudge(tmp_path / "a.sqlite", Judge(), "judge")
    cfg = apo.Config()
    found = apo.expand(
        "Any noise? yes or no", rows, answers, Nobody(), cfg, random.Random(0), refused
    )
    assert [reason for _, reason in found] == ["in other words"]


def test_a_picture_without_an_answer_is_no_mistake_to_learn_from(tmp_path):
    class Silent:
        answers = staticmethod(lambda question, images: [[]] * len(images))

    class Nobody:
        paraphrase = staticmethod(lambda question, rng: question + " ")

    answers = apo.CachedJudge(tmp_path / "a.sqlite", Silent(), "silent")
    found = apo.expand(
        PLAIN, examples(4, tmp_path), answers, Nobody(), apo.Config(), random.Random(0), {}
    )
    assert [reason for _, reason in found] == ["in other words"]  # nobody was asked for a reason


def test_bad_answers_of_the_writer_are_refused_and_counted(tmp_path):
    class Rambler:
        reason = staticmethod(lambda question, mistakes, rng: "who knows")
        rewrite = staticmethod(lambda question, reason, mistakes, rng: "Describe it.")
        paraphrase = staticmethod(lambda question, rng: "")

    rows, refused = examples(4, tmp_path), {}
    answers = apo.CachedJudge(tmp_path / "a.sqlite", Judge(), "judge")
    assert (
        apo.expand(PLAIN, rows, answers, Rambler(), apo.Config(), random.Random(0), refused) == []
    )
    assert refused == {"does not ask for yes or no": 4, "empty": 1}


# --- the whole


@pytest.fixture(scope="module")
def search(tmp_path_factory):
    out = tmp_path_factory.mktemp("apo")
    args = [
        "--output-dir",
        str(out),
        "--seeds",
        "0",
        "--select",
        "successive-rejects",
        "--rounds",
        "3",
    ]
    apo.main(tyro.cli(apo.Config, args=args))
    return out / "successive-rejects_seed0"


def test_the_question_learns_in_the_tiny_world(search):
    result = json.loads((search / "result.json").read_text())
    assert result["gain"][1] > 0, (
        "the interval of the gain in accuracy on the test split must not cross zero"
    )
    assert result["pairs after"][0] > result["pairs before"][0]
    assert (search / "question.txt").read_text().strip() == result["question"]


def test_every_question_has_its_history(search):
    tree = read_jsonl(search / "tree.jsonl")
    known = {node["question"] for node in tree}
    assert tree[0]["question"] == PLAIN and all(node["parent"] in known for node in tree[1:])
    assert len(known) == len(tree) and {node["round"] for node in tree} == {0, 1, 2, 3}
    page = (search / "report.html").read_text()
    assert "<ins>" in page and "Confusion" in page and "http" not in page.split("</style>")[1]


def test_the_same_command_again_asks_the_judge_nothing(search):
    first = json.loads((search / "result.json").read_text())
    args = [
        "--output-dir",
        str(search.parent),
        "--seeds",
        "0",
        "--select",
        "successive-rejects",
        "--rounds",
        "3",
    ]
    apo.main(tyro.cli(apo.Config, args=args))
    again = json.loads((search / "result.json").read_text())
    assert first.pop("asked") == first["calls"] and again.pop("asked") == 0
    assert again == first


def test_the_search_never_opens_the_test_split(data):
    class Closed(dict):
        def __getitem__(self, name):
            assert name != "test"
            return super().__getitem__(name)

    answers = lambda question, rows: np.array([0.4 + 0.2 * row["broken"] for row in rows])  # noqa: E731
    answers.used = set()

    class Writer:
        paraphrase = staticmethod(lambda question, rng: f"{question} {rng.random()}")

    cfg = apo.Config(rounds=2)
    best, *_ = apo.optimize(PLAIN, Closed(data), answers, Writer(), "full", 0, cfg)
    assert "yes or no" in best
