"""Rubrics: several weighted questions, learned on pairs (evaluation/rubric.py)."""

import collections
import json
import math

import numpy as np
import pytest
import tyro
from conftest import picture

import apo
import artifact_reward
from evaluation import rubric
from evaluation.labels import load_examples, measures
from training.decode import open_picture
from training.records import read_jsonl, write_jsonl

NAN = math.nan


def test_pairs_are_of_one_prompt_and_a_missing_answer_says_nothing():
    examples = [
        {"prompt": "a", "broken": True},
        {"prompt": "a", "broken": False},
        {"prompt": "b", "broken": True},
        {"prompt": "a", "broken": False},
        {"prompt": "c", "broken": False},
    ]
    p = np.array([[0.9, 0.5], [0.1, 0.75], [0.5, 0.5], [0.4, NAN], [0.3, 0.3]])
    differences = [[0.8, -0.25], [0.5, 0.0]]
    assert rubric.pair_differences(p, examples) == pytest.approx(np.array(differences))
    assert rubric.pair_differences(p[2:3], examples[2:3]).shape == (0, 2)


def test_the_weights_are_the_minimum():
    """One question that is always right by 1: log(1 + e^-w) + .1 w has its minimum where
    sigmoid(-w) = .1. A second one that is right as often as wrong has the weight 0, like a third
    that is mostly wrong."""
    d = np.array([[1.0, 1.0, -1.0], [1.0, -1.0, -1.0]] * 4)
    assert rubric.fit(d, 0.1) == pytest.approx([math.log(9), 0, 0], abs=1e-4)
    assert rubric.fit(d, 0.6).tolist() == [0, 0, 0]  # the penalty is above the gradient at 0, .5
    weak = rubric.fit(d * 0.5, 0.1)  # half the difference: sigmoid(-w / 2) = .2
    assert weak[0] == pytest.approx(2 * math.log(4), abs=1e-3)


def test_no_other_weights_are_better():
    rng = np.random.default_rng(0)
    d = rng.normal(0.3, 1.0, (60, 5))
    loss = lambda w: rubric.log_loss(d, w) + 0.02 * w.sum()
    best = rubric.fit(d, 0.02)
    for _ in range(300):
        assert loss(best) <= loss(np.maximum(best + rng.normal(0, 0.1, 5), 0)) + 1e-9
    assert (best > 0).any()


def test_at_most_so_many_questions_are_chosen():
    """Three questions, each right where the others are silent, and one that is always wrong."""
    d = np.array([[1.0, 0, 0, -1], [0, 0.8, 0, -1], [0, 0, 0.6, -1]] * 10)
    for most in (1, 2, 3):
        chosen = rubric.choose(d, d, most) > 0
        assert chosen.tolist() == [True, most > 1, most > 2, False]
    assert not rubric.choose(-d[:, :3], -d[:, :3], 3).any()
    # The validation pairs decide how far the penalty falls: a question that is right three times
    # of four there gets about log 3.
    doubting = np.array([[1.0, 0, 0, 0]] * 3 + [[-1.0, 0, 0, 0]])
    assert rubric.choose(d, doubting, 3)[0] == pytest.approx(math.log(3), abs=0.2)
    assert rubric.choose(d, d, 3)[0] > 2


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Is it torn? yes or no", [(1.0, "Is it torn? yes or no")]),
        ("2 shapes? yes or no", [(1.0, "2 shapes? yes or no")]),
        ("0.5 Is it torn?", [(1.0, "Is it torn?")]),
        (".6 Torn?\n.2  Noisy?", [(0.75, "Torn?"), (0.25, "Noisy?")]),
        ("\n.6 Torn?\n\n.2 Noisy?\n", [(0.75, "Torn?"), (0.25, "Noisy?")]),
        ("Torn?\nyes or no", [(1.0, "Torn?\nyes or no")]),
    ],
)
def test_a_rubric_is_lines_that_begin_with_a_weight(text, expected):
    found = artifact_reward.parse_rubric(text)
    assert [question for _, question in found] == [question for _, question in expected]
    assert [w for w, _ in found] == pytest.approx([w for w, _ in expected])


@pytest.mark.parametrize(
    "text, rule",
    [
        ("0.0 Torn?\n0.0 Noisy?", "all weights of this rubric are 0"),
        ("0.5 Torn?\nNoisy?", "a weight before each question"),
        ("0.5 Torn?\n1 Noisy?", "a weight before each question"),
        ("1 Torn?\n2 Noisy?", "write the weights of a rubric as 1.0"),
    ],
)
def test_a_rubric_whose_weights_are_useless_is_refused(text, rule, capsys):
    with pytest.raises(SystemExit, match="2"):
        artifact_reward.parse_rubric(text)
    assert rule in capsys.readouterr().err


def test_a_file_of_a_rubric_may_begin_with_a_mark_and_must_be_text(tmp_path, capsys):
    (tmp_path / "rubric.txt").write_bytes("\ufeff0.5 Torn?\n0.5 Noisy?".encode())
    text = artifact_reward.read_question(str(tmp_path / "rubric.txt"))
    assert artifact_reward.parse_rubric(text) == [(0.5, "Torn?"), (0.5, "Noisy?")]
    (tmp_path / "latin.txt").write_bytes("Schäden? yes or no".encode("latin-1"))
    with pytest.raises(SystemExit, match="2"):
        artifact_reward.read_question(str(tmp_path / "latin.txt"))
    assert "is no text" in capsys.readouterr().err


class Judge:
    """Sees a picture as its brightness: "Dark?" and "Bright?" are answered accordingly."""

    address = "here"

    def __init__(self):
        self.failures = collections.Counter()

    def answers(self, question, images):
        for image in images:
            bright = image.resize((1, 1)).convert("L").getpixel((0, 0)) / 255
            yes = bright if "Bright" in question else 1 - bright
            yes = min(max(yes, 1e-6), 1 - 1e-6)
            yield [("yes", math.log(yes)), ("no", math.log(1 - yes))]


def test_the_reward_is_the_weighted_mean_of_the_questions(monkeypatch, tmp_path):
    monkeypatch.setattr(artifact_reward, "LocalJudge", lambda checkpoint, device: Judge())
    make = lambda text: artifact_reward.ArtifactReward(checkpoint=str(tmp_path), question=text)
    images = [picture((gray,) * 3) for gray in (0, 102, 255)]  # brightness 0, .4, 1
    one = make("Bright? yes or no")(None, images)
    both = make("0.3 Bright? yes or no\n0.1 Dark? yes or no")(None, images)
    assert one.tolist() == pytest.approx([1, 0.6, 0], abs=1e-5)
    assert both.tolist() == pytest.approx([0.75, 0.75 * 0.6 + 0.25 * 0.4, 0.25], abs=1e-5)
    ((score, answers),) = make("0.3 Bright? yes or no\n0.1 Dark? yes or no").answers(images[1:2])
    assert score == pytest.approx(0.55) and len(answers) == 2
    assert math.isnan(make("0.3 Bright?\n0.1 Dark?")(None, [None])[0])


def test_what_is_learned_is_written_and_measured_on_the_test_split(tmp_path):
    def judge(question, examples):
        """ "good" is right three times of four, "other" only where that is wrong, "bad" never."""
        hard = np.array([e["hard"] for e in examples])
        broken = np.array([e["broken"] for e in examples], dtype=float)
        right = {"good": ~hard, "other": hard, "bad": hard & False}[question]
        return np.where(right, broken, 0.5) if question != "bad" else 1 - broken

    data = {
        split: [
            {"prompt": f"{split} {i}", "broken": broken, "hard": i % 4 == 0}
            for i in range(40)
            for broken in (False, True)
        ]
        for split in ("train", "validation", "test")
    }
    file = tmp_path / "rubric.txt"
    result = rubric.learn(["bad", "other", "good"], judge, data, 2, file)
    assert result["questions"] == 2 and result["pairs of the rubric"][0] == 1.0
    (first, good), (second, other) = artifact_reward.parse_rubric(file.read_text())
    assert (good, other) == ("good", "other") and first + second == pytest.approx(1)
    single = rubric.learn(["bad", "other", "good"], judge, data, 1, file)
    assert single["questions"] == 1 and single["pairs of the rubric"][0] == 0.875


def test_apo_learns_a_rubric_that_the_reward_takes(tmp_path, capsys):
    source = apo.ROOT / "tiny_world/pairs"
    for split in ("train", "validation", "test"):
        pairs = read_jsonl(source / f"{split}.jsonl")[:12]
        rows = [p | {k: str(source / p[k]) for k in ("clean", "broken")} for p in pairs]
        write_jsonl(tmp_path / f"{split}.jsonl", rows)
    flags = f"--data {tmp_path} --output-dir {tmp_path / 'apo'} --seeds 3 --select full --rubric 2"
    flags += " --rounds 2 --max-expansion 2 --gradients 2 --beam 2"
    apo.main(tyro.cli(apo.Config, args=flags.split()))
    folder = tmp_path / "apo/full_seed3"
    result = json.loads((folder / "result.json").read_text())
    text = artifact_reward.read_question(str(folder / "rubric.txt"))
    found = artifact_reward.parse_rubric(text)
    assert len(found) == result["questions"] <= 2
    assert result["pairs of the rubric"][0] > 0.6
    assert "of the rubric" in capsys.readouterr().out
    # The reward computes what was measured.
    tiny = artifact_reward.ROOT / "tiny_world/checkpoints/artifact"
    reward = artifact_reward.ArtifactReward(checkpoint=str(tiny), question=text)
    examples = load_examples(tmp_path)["test"]
    scores = reward(None, [open_picture(example["path"]) for example in examples])
    measured = measures(1 - scores.numpy(), examples)["pairs"]
    assert measured == pytest.approx(result["pairs of the rubric"][0])


def test_without_a_question_that_helps_no_rubric_is_written(tmp_path, capsys):
    rows = [{"prompt": str(i), "broken": b} for i in range(4) for b in (False, True)]
    wrong = lambda question, examples: np.array([1.0 - e["broken"] for e in examples])
    data = dict.fromkeys(("train", "validation", "test"), rows)
    result = rubric.learn(["a", "b"], wrong, data, 2, tmp_path / "rubric.txt")
    assert "no question" in capsys.readouterr().out and not list(tmp_path.iterdir())
    assert result["questions"] == 0 and math.isnan(result["pairs of the rubric"][0])


def test_a_question_that_gets_no_answer_costs_the_rubric_nothing(tmp_path):
    rows = [{"prompt": str(i), "broken": b} for i in range(4) for b in (False, True)]
    data = dict.fromkeys(("train", "validation", "test"), rows)

    def judge(question, examples):
        return np.array([NAN if question == "silent" else float(e["broken"]) for e in examples])

    for questions, expected in ((["silent", "good"], 1), (["silent"], 0)):
        result = rubric.learn(questions, judge, data, 2, tmp_path / "rubric.txt")
        assert result["questions"] == expected
    assert (tmp_path / "rubric.txt").read_text() == "1.0000 good\n"


def test_a_rubric_needs_pairs_and_says_so_before_the_search(tmp_path, capsys):
    for kind in ("clean", "broken"):
        (tmp_path / kind).mkdir()
        for i in range(30):
            picture().save(tmp_path / kind / f"{kind}{i}__1.png")
    data = load_examples(tmp_path)
    rubric.check(data, 0)
    with pytest.raises(SystemExit, match="2"):
        rubric.check(data, 3)
    assert "--rubric 3: in the train split no prompt has" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, rule",
    [
        (["--rubric", "-1"], "how many questions at most"),
        (["--question", "0.5 Torn? yes or no\n0.5 Noisy? yes or no"], "a rubric, and not one"),
    ],
)
def test_wrong_flags_are_refused(flags, rule, capsys):
    with pytest.raises(SystemExit, match="2"):
        apo.main(tyro.cli(apo.Config, args=flags))
    assert rule in capsys.readouterr().err


def test_the_test_split_chooses_no_question_of_a_rubric_and_measures_it(tmp_path):
    """On the test split "good" is always wrong and "bad" right."""
    asked = []

    def judge(question, examples):
        (split,) = {e["split"] for e in examples}
        asked.append((split, question))
        right = (question == "good") != (split == "test")
        return np.array([float(e["broken"] == right) for e in examples])

    data = {
        split: [
            {"prompt": str(i), "split": split, "broken": b} for i in range(6) for b in (False, True)
        ]
        for split in ("train", "validation", "test")
    }
    result = rubric.learn(["bad", "good"], judge, data, 2, tmp_path / "rubric.txt")
    assert (tmp_path / "rubric.txt").read_text() == "1.0000 good\n"
    assert result["pairs of the rubric"][0] == 0
    assert [question for split, question in asked if split == "test"] == ["good"]
