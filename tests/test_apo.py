"""The prompt optimiser learns from mistakes, spends few calls, and never sees the test split."""

import json
import math
import random
import sqlite3

import numpy as np
import pytest
import tyro
from conftest import picture
from PIL import Image

import apo
from evaluation import labels
from evaluation.answers import Answers
from training.files import ROOT
from training.records import read_jsonl, write_jsonl

PAIRS = ROOT / "tiny_world" / "pairs"
PLAIN = "Are there artifacts in this picture? Answer yes or no."


@pytest.fixture(scope="module")
def data():
    return labels.load_examples(PAIRS)


class Judge:
    """Is right about a picture if the question contains the word "noise", and says clean if not.
    `asked` counts the pictures that it was shown."""

    def __init__(self):
        self.asked = 0

    def answers(self, question, images):
        self.asked += len(images)
        clean = [image.getpixel((0, 0))[0] == 0 or "noise" not in question for image in images]
        yes_no = {True: (0.1, 0.9), False: (0.9, 0.1)}
        pairs = [yes_no[c] for c in clean]
        return [[("no", math.log(no)), ("yes", math.log(yes))] for yes, no in pairs]


class Silent:
    """A judge that never answers."""

    answers = staticmethod(lambda question, images: [[]] * len(images))


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


# --- data and measures --------------------------------------------------------------------------


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
    for rows in splits.values():  # the clean and the broken picture of a prompt stay together
        assert len(rows) == 2 * len({row["prompt"] for row in rows})


@pytest.mark.parametrize(
    "row", [{"path": "nowhere.png", "label": 1}, {"label": 1}, {"clean": None}]
)
def test_bad_data_are_one_clear_error(row, tmp_path, capsys):
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "a"} | row) + "\n")
    with pytest.raises(SystemExit) as stop:
        labels.load_examples(tmp_path / "data.jsonl")
    assert stop.value.code == 2 and "no picture" in capsys.readouterr().err


@pytest.mark.parametrize(
    "row, rule",
    [
        ({"label": None}, "label nan; 0 for clean"),
        ({}, "label None"),
        ({"label": "0"}, "label '0'"),
        ({"label": 1, "prompt": 7}, "prompt 7 is no text"),
    ],
)
def test_a_label_is_zero_or_one(row, rule, tmp_path, capsys):
    picture().save(tmp_path / "a.png")
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "a", "path": "a.png"} | row) + "\n")
    with pytest.raises(SystemExit, match="2"):
        labels.load_examples(tmp_path / "data.jsonl")
    assert f"line 1: {rule}" in capsys.readouterr().err


def test_measures_by_hand():
    """Prompt a is judged rightly, b the wrong way round."""
    rows = [{"prompt": p, "broken": b} for p in "ab" for b in (False, True)]
    got = labels.measures(np.array([0.2, 0.8, 0.6, 0.4]), rows)
    assert got["accuracy"] == 0.5 and got["pairs"] == 0.5 and got["auroc"] == 0.75
    expected = (2 * math.log(0.8) + 2 * math.log(0.4)) / 4
    assert got["log-likelihood"] == pytest.approx(expected)
    # Each of the four is alone in its bin: .2, 1 - .8, .6 and 1 - .4.
    assert got["calibration error"] == pytest.approx((0.2 + 0.2 + 0.6 + 0.6) / 4)
    assert got["unanswered"] == 0 and all(type(value) is float for value in got.values())


def test_a_tie_of_a_pair_counts_half_and_one_half_is_not_called_broken():
    rows = [{"prompt": "a", "broken": False}, {"prompt": "a", "broken": True}]
    got = labels.measures(np.array([0.5, 0.5]), rows)
    assert got["pairs"] == got["auroc"] == 0.5
    assert got["accuracy"] == 0.5  # the clean one is right, the broken one is not


def test_pairs_compare_pictures_of_one_prompt_only():
    rows = [{"prompt": p, "broken": b} for p, b in (("a", False), ("a", True), ("b", False))]
    got = labels.measures(np.array([0.1, 0.4, 0.9]), rows)
    assert got["pairs"] == 1 and got["auroc"] == 0.5
    alone = [{"prompt": p, "broken": b} for p, b in (("a", False), ("b", True))]
    assert math.isnan(labels.measures(np.array([0.1, 0.4]), alone)["pairs"])
    clean = [{"prompt": p, "broken": False} for p in "ab"]
    assert math.isnan(labels.measures(np.array([0.1, 0.4]), clean)["auroc"])


def test_a_missing_answer_is_neither_right_nor_free():
    rows = [{"prompt": "a", "broken": b} for b in (False, True, True)]
    got = labels.measures(np.array([np.nan, 0.9, 0.7]), rows)
    assert got["accuracy"] == pytest.approx(2 / 3) and got["unanswered"] == pytest.approx(1 / 3)
    expected = (math.log(0.5) + math.log(0.9) + math.log(0.7)) / 3
    assert got["log-likelihood"] == pytest.approx(expected)
    # The mean distance is over the two answers.
    assert got["calibration error"] == pytest.approx((0.1 + 0.3) / 2)
    assert math.isnan(got["pairs"])
    none = labels.measures(np.array([np.nan] * 3), rows)
    assert none["accuracy"] == 0 and none["calibration error"] == 0 and none["unanswered"] == 1


def test_a_judge_that_fails_now_and_then_does_not_seem_to_change_its_mind():
    rows = [{"prompt": str(i), "broken": b} for i in range(8) for b in (False, True)]
    p = np.array([0.2, 0.8] * 8)
    before, after = p.copy(), p.copy()
    before[:6], after[10] = math.nan, math.nan  # the accuracy rises from .625 to .9375
    result = labels.compare(before, after, rows)
    assert result["gain"] == (0, 0, 0)
    none = labels.compare(np.full(16, math.nan), after, rows)
    assert all(map(math.isnan, none["gain"]))


def test_a_calibrated_judge_has_no_calibration_error():
    rows = [{"prompt": str(i), "broken": i < 7} for i in range(10)]
    assert labels.measures(np.full(10, 0.7), rows)["calibration error"] == pytest.approx(0)


def test_the_bins_of_the_calibration_error_are_tenths_and_certainty_is_in_the_last():
    p = [0.0, 0.05, 0.15, 0.19, 0.92, 1.0]
    rows = [{"prompt": "a", "broken": b} for b in (False, True, False, True, True, False)]
    # [0, .1): |.05 - 1|; [.1, .2): |.34 - 1|; [.9, 1]: |1.92 - 1|
    expected = (0.95 + 0.66 + 0.92) / 6
    assert labels.measures(np.array(p), rows)["calibration error"] == pytest.approx(expected)


# --- the memory ---------------------------------------------------------------------------------


def test_nothing_is_asked_twice_not_even_by_the_next_run(tmp_path):
    rows, judge = examples(4, tmp_path), Judge()
    first = apo.CachedJudge(tmp_path / "answers.sqlite", judge, "judge")
    expected = pytest.approx([0.1, 0.9] * 4)  # P(broken)
    assert first("noise?", rows[:6]).tolist() == pytest.approx([0.1, 0.9] * 3)
    assert (first.calls, judge.asked, len(first.used)) == (6, 6, 6)
    assert first("noise?", rows).tolist() == expected  # two of these are new
    assert (first.calls, judge.asked, len(first.used)) == (8, 8, 8)
    again = apo.CachedJudge(tmp_path / "answers.sqlite", judge, "judge")  # another process
    assert again("noise?", rows).tolist() == expected
    assert (again.calls, judge.asked, len(again.used)) == (0, 8, 8)
    assert again("Clean?", rows[:2]).tolist() == pytest.approx([0.1, 0.1])  # another question
    assert (again.calls, judge.asked, len(again.used)) == (2, 10, 10)


def test_the_memory_goes_by_the_picture_and_not_by_its_file_name(tmp_path):
    rows, judge = examples(1, tmp_path), Judge()
    copy = tmp_path / "copy.png"
    copy.write_bytes(rows[1]["path"].read_bytes())
    answers = apo.CachedJudge(tmp_path / "answers.sqlite", judge, "judge")
    twins = [rows[1], {**rows[1], "path": copy}]
    assert answers("noise?", twins).tolist() == pytest.approx([0.9, 0.9])
    assert (answers.calls, judge.asked, len(answers.used)) == (1, 1, 1)


def test_a_certain_answer_is_an_answer(tmp_path):
    """P(broken) = 0 is kept as such and is not taken for a missing one."""

    class Certain:
        answers = staticmethod(lambda question, images: [[("no", 0.0)]] * len(images))

    answers = apo.CachedJudge(tmp_path / "a.sqlite", Certain(), "certain")
    assert answers("noise?", examples(1, tmp_path)).tolist() == [0, 0]


def test_the_judge_sees_pictures_without_transparency(tmp_path):
    modes = []

    class Looker:
        def answers(self, question, images):
            modes.extend(image.mode for image in images)
            return [[("no", 0.0)]] * len(images)

    Image.new("RGBA", (2, 2)).save(tmp_path / "x.png")
    answers = apo.CachedJudge(tmp_path / "a.sqlite", Looker(), "looker")
    answers("noise?", [{"path": tmp_path / "x.png", "prompt": "", "broken": False}])
    assert modes == ["RGB"]


def test_another_judge_has_another_memory_and_a_failure_is_not_remembered(tmp_path):
    rows = examples(1, tmp_path)
    silent = apo.CachedJudge(tmp_path / "a.sqlite", Silent(), "silent")
    for calls in (2, 4):
        assert np.isnan(silent("noise?", rows)).all() and silent.calls == calls
    other = apo.CachedJudge(tmp_path / "a.sqlite", Judge(), "other")
    assert np.isfinite(other("noise?", rows)).all()


def test_the_tiny_judge_is_shown_no_photographs(tmp_path, capsys):
    picture((1, 2, 3), side=65).save(tmp_path / "x.png")
    judge = Judge()
    judge.tiny = True
    answers = apo.CachedJudge(tmp_path / "a.sqlite", judge, "tiny")
    with pytest.raises(SystemExit, match="2"):
        answers("noise?", [{"path": tmp_path / "x.png", "prompt": "", "broken": False}])
    assert "--judge-url" in capsys.readouterr().err and judge.asked == 0


def test_answers_are_saved_as_they_come(tmp_path):
    class Killed(Judge):
        def answers(self, question, images):
            if self.asked >= 64:
                raise KeyboardInterrupt
            return super().answers(question, images)

    rows, judge = examples(50, tmp_path), Killed()
    first = apo.CachedJudge(tmp_path / "a.sqlite", judge, "judge")
    with pytest.raises(KeyboardInterrupt):
        first("noise?", rows)
    again = apo.CachedJudge(tmp_path / "a.sqlite", Judge(), "judge")
    assert np.isfinite(again("noise?", rows)).all() and again.calls == 36


def test_a_value_that_is_no_number_is_asked_for_again(tmp_path):
    rows = examples(1, tmp_path)
    answers = apo.CachedJudge(tmp_path / "a.sqlite", Judge(), "judge")
    expected = answers("noise?", rows).tolist()
    answers.memory.db.execute("UPDATE answers SET value = 'abc'")
    assert answers("noise?", rows).tolist() == expected and answers.calls == 4


@pytest.mark.parametrize("content", [b"no database at all" * 99, b"\0" * 5000, "another table"])
def test_a_memory_that_cannot_be_read_is_set_aside(content, tmp_path, capsys):
    file = tmp_path / "a.sqlite"
    if content == "another table":
        with sqlite3.connect(file) as db:
            db.execute("CREATE TABLE answers (question TEXT)")
        content = file.read_bytes()
    file.write_bytes(content)
    answers = apo.CachedJudge(file, Judge(), "judge")
    assert np.isfinite(answers("noise?", examples(1, tmp_path))).all()
    assert (tmp_path / "a.sqlite.unreadable").read_bytes() == content
    assert "cannot be read" in capsys.readouterr().err


def test_a_full_disk_is_one_clear_error(tmp_path, capsys):
    memory = Answers(tmp_path / "answers.sqlite")
    memory.db.execute("PRAGMA max_page_count = 1")
    with pytest.raises(SystemExit, match="2"):
        for i in range(1000):
            memory.save(str(i), "x" * 100)
    assert "is the disk full?" in capsys.readouterr().err


def test_a_memory_that_another_command_holds_is_one_clear_error(tmp_path, capsys):
    with sqlite3.connect(tmp_path / "a.sqlite") as db:
        db.execute("CREATE TABLE answers (key TEXT PRIMARY KEY, value TEXT)")
        db.commit()
        db.execute("BEGIN EXCLUSIVE")
        with pytest.raises(SystemExit, match="2"):
            Answers(tmp_path / "a.sqlite", wait=0.1)
    assert "wait for the command" in capsys.readouterr().err
    (tmp_path / "folder.sqlite").mkdir()
    with pytest.raises(SystemExit, match="2"):
        Answers(tmp_path / "folder.sqlite")


@pytest.mark.parametrize(
    "flags",
    ["--rounds 0", "--beam 0", "--minibatch 0", "--gradients 0", "--errors 0", "--max-expansion -1"]
    + ["--budget nan", "--budget 0", "--budget 2", "--seeds", "--checkpoint /nonexistent"],
)
def test_numbers_that_make_no_sense_are_refused(flags, tmp_path, capsys):
    args = [*flags.split(), "--output-dir", str(tmp_path)]
    with pytest.raises(SystemExit, match="2"):
        apo.main(tyro.cli(apo.Config, args=args))
    err = capsys.readouterr().err
    assert (
        err.startswith("error: ") and err.count("\n") == 1 and flags.split()[-1].lstrip("-") in err
    )


# --- candidates ---------------------------------------------------------------------------------

LONG = "Broken? Yes or no. " + "x" * 1200


@pytest.mark.parametrize(
    "text, why",
    [
        ("", "empty"),
        (" ... ", "does not ask for yes or no"),
        ("Describe the picture.", "does not ask for yes or no"),
        ("Is it broken? Answer yes.", "does not ask for yes or no"),
        ("Nothing broken, yes?", "does not ask for yes or no"),  # "Nothing" is not "no"
        (LONG[:1201], "longer than 1200 characters"),
        (LONG[:1200], None),
        ("Answer YES/NO: is it broken?", None),
        ("Is it broken ('yes'), or not (\"no\")?", None),
        ("Broken: yes; no!", None),
        ("Yes? No?", None),
    ],
)
def test_what_cannot_be_a_question_is_refused_with_a_reason(text, why):
    assert apo.refusal(text) == why


class Writer:
    """Notes what it is asked, and answers with a number in turn."""

    def __init__(self):
        self.reasons, self.rewrites, self.paraphrases = [], [], []

    def reason(self, question, mistakes, rng):
        self.reasons.append((question, mistakes, rng))
        return f"reason {len(self.reasons)}"

    def rewrite(self, question, reason, mistakes, rng):
        self.rewrites.append((question, reason, mistakes, rng))
        return f"Rewrite {len(self.rewrites)}, yes or no?"

    def paraphrase(self, question, rng):
        self.paraphrases.append((question, rng))
        return f"Other words {len(self.paraphrases)}, yes or no?"


def expand(question, rows, judge, writer, refused=None, seed=0, **flags):
    refused = {} if refused is None else refused
    cfg = apo.Config(**flags)
    return apo.expand(question, rows, judge, writer, cfg, random.Random(seed), refused)


def verdicts(question, rows):
    """Picture n is broken with probability n / 10."""
    return np.array([row["n"] / 10 for row in rows])


def test_new_questions_come_from_mistakes_and_all_are_said_in_other_words():
    """Pictures 2 (broken, P .2) and 7 and 8 (clean, P .7 and .8) are judged wrongly."""
    broken = {1: False, 2: True, 5: False, 7: False, 8: False, 9: True}
    rows, writer = [{"n": n, "broken": b} for n, b in broken.items()], Writer()
    flags = {"gradients": 3, "errors": 2, "max_expansion": 100}
    found = expand(PLAIN, rows, verdicts, writer, **flags)
    assert len(writer.reasons) == 3
    for (question, mistakes, rng), rewrite in zip(writer.reasons, writer.rewrites):
        assert question == PLAIN and len(mistakes) == 2 and isinstance(rng, random.Random)
        assert all(p == e["n"] / 10 for e, p in mistakes)
        assert {e["n"] for e, _ in mistakes} < {2, 7, 8}
        assert rewrite[0] == PLAIN and rewrite[2] == mistakes and rewrite[3] is rng
    assert [reason for _, reason, *_ in writer.rewrites] == ["reason 1", "reason 2", "reason 3"]
    rewrites = [f"Rewrite {n}, yes or no?" for n in (1, 2, 3)]
    assert [text for text, _ in writer.paraphrases] == [PLAIN, *rewrites]
    assert all(rng is writer.reasons[0][2] for _, rng in writer.paraphrases)
    expected = {text: f"reason {n}" for n, text in enumerate(rewrites, 1)}
    expected |= {f"Other words {n}, yes or no?": "in other words" for n in (1, 2, 3, 4)}
    assert dict(found) == expected and len(found) == 7


def test_fewer_mistakes_than_are_shown_are_all_shown_and_a_few_candidates_are_kept():
    rows, writer = [{"n": 9, "broken": False}, {"n": 0, "broken": False}], Writer()
    found = expand(PLAIN, rows, verdicts, writer, gradients=2, errors=4, max_expansion=3)
    assert [len(mistakes) for _, mistakes, _ in writer.reasons] == [1, 1]
    everything = expand(PLAIN, rows, verdicts, Writer(), gradients=2, max_expansion=100)
    assert len(found) == 3 and set(found) < set(everything) and len(everything) == 5


def test_one_half_is_not_called_broken():
    writer = Writer()
    expand(PLAIN, [{"n": 5, "broken": True}], verdicts, writer, gradients=1)
    assert len(writer.reasons) == 1
    expand(PLAIN, [{"n": 5, "broken": False}], verdicts, writer, gradients=1)
    assert len(writer.reasons) == 1


def test_without_mistakes_no_reasons_are_asked_for():
    writer = Writer()
    found = expand(PLAIN, [{"n": 9, "broken": True}], verdicts, writer)
    assert writer.reasons == [] and [reason for _, reason in found] == ["in other words"]


def test_a_picture_without_an_answer_is_no_mistake_to_learn_from(tmp_path):
    answers = apo.CachedJudge(tmp_path / "a.sqlite", Silent(), "silent")
    writer = Writer()
    found = expand(PLAIN, examples(4, tmp_path), answers, writer)
    assert writer.reasons == [] and [reason for _, reason in found] == ["in other words"]


def test_without_a_reason_nothing_is_rewritten():
    class Mute(Writer):
        reason = staticmethod(lambda question, mistakes, rng: "")

        def rewrite(self, *_):
            raise AssertionError("it would be asked to follow no reason")

    refused = {}
    found = expand(PLAIN, [{"n": 9, "broken": False}], verdicts, Mute(), refused)
    assert [reason for _, reason in found] == ["in other words"] and refused == {"empty": 4}


def test_bad_answers_of_the_writer_are_refused_and_counted():
    class Rambler:
        reason = staticmethod(lambda question, mistakes, rng: "who knows")
        rewrite = staticmethod(lambda question, reason, mistakes, rng: "Describe it.")
        paraphrase = staticmethod(lambda question, rng: "")

    rows, refused = [{"n": 9, "broken": False}], {"empty": 2}
    assert expand(PLAIN, rows, verdicts, Rambler(), refused) == []
    assert refused == {"does not ask for yes or no": 4, "empty": 3}


# --- the search, with a judge that is known -----------------------------------------------------


class KnownJudge:
    """quality: question -> P(right answer) on the pictures of each split. Counts the pictures."""

    def __init__(self, quality):
        self.quality, self.used, self.log = quality, set(), []

    def __call__(self, question, rows):
        self.log.append((question, [row["n"] for row in rows]))
        self.used.update((question, row["n"]) for row in rows)
        right = [self.quality[question][row["split"]] for row in rows]
        return np.array([r if row["broken"] else 1 - r for r, row in zip(right, rows)])


A, B, C = (f"{letter}: yes or no?" for letter in "ABC")


def splits(size=8):
    """Pictures with a number that no other picture has, and no test split."""
    return {
        split: [
            {"n": 100 * s + n, "prompt": str(n // 2), "broken": n % 2 == 1, "split": split}
            for n in range(size)
        ]
        for s, split in enumerate(("train", "validation"))
    }


class Paraphraser:
    """Says A as B and B as C; so a right judge gives one new question per old one."""

    def paraphrase(self, question, rng):
        return {A: B, B: C, C: A}[question]


def search(quality, rounds=1, how="full", first=A, seed=0, **flags):
    judge = KnownJudge({q: dict(zip(("train", "validation"), v)) for q, v in quality.items()})
    cfg = apo.Config(rounds=rounds, **flags)
    return *apo.optimize(first, splits(), judge, Paraphraser(), how, seed, cfg), judge


def test_a_search_keeps_every_question_with_its_parent_and_its_score():
    """A leads to B, and B leads to C in the second round."""
    quality = {A: (0.6, 0.6), B: (0.7, 0.8), C: (0.8, 0.9)}
    best, tree, rounds, refused, judge = search(quality, rounds=2, beam=1)
    assert best == C and refused == {}
    node = lambda n, text, parent, reason, right: {
        "round": n,
        "question": text,
        "parent": parent,
        "reason": reason,
        "log-likelihood": pytest.approx(math.log(right)),
        "pictures": 8,
    }
    assert tree == [
        node(0, A, "", "the first one", 0.6),
        node(1, B, A, "in other words", 0.7),
        node(2, C, B, "in other words", 0.8),
    ]
    kept = [{k: line[k] for k in ("round", "question", "candidates")} for line in rounds]
    assert kept == [
        {"round": 1, "question": B, "candidates": 2},
        {"round": 2, "question": C, "candidates": 2},
    ]
    # Measured on the validation split: the value and its interval.
    assert rounds[0]["log-likelihood"] == pytest.approx([math.log(0.8)] * 3)
    assert rounds[1]["accuracy"] == (1, 1, 1)
    assert all(n < 200 for _, pictures in judge.log for n in pictures)


def test_the_validation_split_decides_at_the_end():
    """B is the best on training pictures, and worse than A and C on the others."""
    overfitted = {A: (0.6, 0.7), B: (0.9, 0.55), C: (0.7, 0.8)}
    assert search(overfitted, rounds=2, beam=2)[0] == C
    # With a beam of one, the first question is gone from the beam, and still a candidate.
    best, _, rounds, *_ = search(overfitted, rounds=1, beam=1)
    assert rounds[0]["question"] == B and best == A


def test_a_question_that_was_tried_before_is_not_tried_again():
    """C leads back to A, which is in the beam, and keeps its place as the first one."""
    quality = {A: (0.6, 0.6), B: (0.7, 0.7), C: (0.8, 0.8)}
    best, tree, rounds, _, _ = search(quality, rounds=4, beam=3)
    assert best == C and [node["round"] for node in tree] == [0, 1, 2]
    assert [line["candidates"] for line in rounds] == [2, 3, 3, 3]


def test_mistakes_are_looked_for_in_a_few_training_pictures_in_an_order_of_the_seed():
    quality = {A: (0.6, 0.6), B: (0.7, 0.7)}
    logs = {seed: search(quality, minibatch=3, seed=seed)[-1].log for seed in (0, 1)}
    (question, batch), *others = logs[0]
    assert question == A and len(batch) == 3 and set(batch) < set(range(8))
    assert others[0][0] == A and sorted(others[0][1]) == list(range(8))  # then the selection
    assert logs[0] == search(quality, minibatch=3)[-1].log and logs[0] != logs[1]
    rng = random.Random(0)
    order = rng.sample(range(8), 8)
    assert others[0][1] == order and batch == rng.sample(order, 3)
    assert len(search(quality, minibatch=100)[-1].log[0][1]) == 8


def test_a_selection_gets_its_budget_as_a_share_of_all_answers(monkeypatch):
    calls = []

    def select(race, keep, budget):
        calls.append((list(race.scores), [row["n"] for row in race.examples], keep, budget))
        for question in race.scores:
            race.run(question, 2)
        return race.best(keep)

    monkeypatch.setitem(apo.SELECT, "known", select)
    quality = {A: (0.6, 0.6), B: (0.7, 0.7)}
    _, tree, _, _, judge = search(quality, how="known", beam=3, budget=0.25)
    ((questions, pictures, keep, budget),) = calls
    assert questions == [A, B] and sorted(pictures) == list(range(8))
    assert keep == 3 and budget == 0.25 * 2 * 8
    assert [node["pictures"] for node in tree] == [2, 2] and len(judge.used) == 2 * 8 + 8 + 2


def test_a_round_is_reported(capsys):
    _, _, _, _, judge = search({A: (0.6, 0.6), B: (0.7, 0.7)}, beam=1)
    assert (
        capsys.readouterr().out == f"  round 1: validation accuracy 1.000, 24 judge answers  {B}\n"
    )


# --- the whole, in the tiny world ---------------------------------------------------------------


FLAGS = "--seeds 0 --select successive-rejects --rounds 3".split()


@pytest.fixture(scope="module")
def tiny_search(tmp_path_factory):
    out = tmp_path_factory.mktemp("apo")
    apo.main(tyro.cli(apo.Config, args=[*FLAGS, "--output-dir", str(out)]))
    return out / "successive-rejects_seed0"


def test_the_question_learns_in_the_tiny_world(tiny_search):
    result = json.loads((tiny_search / "result.json").read_text())
    assert result["gain"][1] > 0  # the interval of the gain in test accuracy is above zero
    assert result["pairs after"][0] > result["pairs before"][0]
    assert (tiny_search / "question.txt").read_text().strip() == result["question"]


def test_every_question_has_its_history(tiny_search):
    tree = read_jsonl(tiny_search / "tree.jsonl")
    known = {node["question"] for node in tree}
    assert tree[0]["question"] == PLAIN and all(node["parent"] in known for node in tree[1:])
    assert len(known) == len(tree) and {node["round"] for node in tree} == {0, 1, 2, 3}
    page = (tiny_search / "report.html").read_text()
    assert "<ins>" in page and "Confusion" in page and "http" not in page.split("</style>")[1]


def test_the_same_command_again_asks_the_judge_nothing(tiny_search):
    first = json.loads((tiny_search / "result.json").read_text())
    apo.main(tyro.cli(apo.Config, args=[*FLAGS, "--output-dir", str(tiny_search.parent)]))
    again = json.loads((tiny_search / "result.json").read_text())
    assert first.pop("asked") == first["calls"] and again.pop("asked") == 0
    assert again == first


def test_the_search_never_opens_the_test_split(data):
    class Closed(dict):
        def __getitem__(self, name):
            assert name != "test"
            return super().__getitem__(name)

    def answers(question, rows):
        return np.array([0.4 + 0.2 * row["broken"] for row in rows])

    class Rephraser:
        paraphrase = staticmethod(lambda question, rng: f"{question} {rng.random()}")

    answers.used = set()
    cfg = apo.Config(rounds=2)
    best, *_ = apo.optimize(PLAIN, Closed(data), answers, Rephraser(), "full", 0, cfg)
    assert "yes or no" in best


def test_each_search_has_its_seed_and_is_measured_on_the_test_split(tmp_path, monkeypatch):
    """On the other splits the judge is right; on the test split red pictures are labelled clean."""
    for split in ("train", "validation", "test"):
        rows = []
        for red in sorted((False, True), reverse=split == "test"):
            file = f"{split}_{red}.png"
            picture((255 * red, 0, 0)).save(tmp_path / file)
            label = int(red != (split == "test"))
            rows.append({"path": file, "prompt": split, "label": label})
        write_jsonl(tmp_path / f"{split}.jsonl", rows)
    seeds, better = [], "Is there noise? yes or no"

    def optimize(first, data, judge, writer, how, seed, cfg):
        seeds.append((how, seed))
        return better, [{"question": better, "log-likelihood": 0.0}], [], {}

    monkeypatch.setattr(apo, "optimize", optimize)
    monkeypatch.setattr(apo, "load_judge", lambda cfg: (Judge(), "known"))
    flags = f"--data {tmp_path} --output-dir {tmp_path}/out --seeds 3 4 --select full ucb"
    apo.main(tyro.cli(apo.Config, args=flags.split()))
    assert seeds == [("full", 3), ("ucb", 3), ("full", 4), ("ucb", 4)]
    result = json.loads((tmp_path / "out/full_seed3/result.json").read_text())
    assert result["accuracy before"][0] == 0.5 and result["accuracy after"][0] == 0
    assert result["calls"] == 0
    page = (tmp_path / "out/full_seed3/report.html").read_text()
    assert "Still judged wrongly" in page and page.count("data:image/png") == 2


class Served:
    """A served writer: answers with a number in turn; notes what it is asked."""

    model = "writer"

    def __init__(self):
        self.asked = []

    def write(self, text, images, temperature, seed):
        self.asked.append((text, [image.getpixel((0, 0))[0] for image in images], seed))
        return f"answer {len(self.asked)}"

    def ask(self, calls):
        return [call() for call in calls]


def test_the_writer_is_told_the_truth_about_the_pictures_that_it_is_shown(tmp_path):
    rows, served = examples(2, tmp_path), Served()  # black is clean, red is broken
    writer = apo.Writer(served, apo.CachedJudge(tmp_path / "a.sqlite", Judge(), "judge"))
    mistakes = [(rows[1], 0.2), (rows[2], 0.9)]
    assert writer.reason("Q?", mistakes, random.Random(0)) == "answer 1"
    text, shown, _ = served.asked[0]
    assert "Q?" in text and shown == [255, 0]
    assert "Picture 1: it is broken; the answer gave 20% for broken." in text
    assert "Picture 2: it is not broken; the answer gave 90% for broken." in text
    assert writer.rewrite("Q?", "too vague", mistakes, random.Random(0)) == "answer 2"
    assert "Q?" in served.asked[1][0] and "too vague" in served.asked[1][0]
    assert writer.paraphrase("Q?", random.Random(0)) == "answer 3"
    assert "Q?" in served.asked[2][0] and served.asked[2][1] == []


def test_an_answer_of_the_writer_is_kept_for_its_text_pictures_and_seed(tmp_path):
    rows, served = examples(2, tmp_path), Served()
    writer = apo.Writer(served, apo.CachedJudge(tmp_path / "a.sqlite", Judge(), "judge"))
    ask = lambda text, row, seed: writer.write(text, [(rows[row], 0.5)], random.Random(seed))
    first = ask("text", 0, 0)
    assert ask("text", 0, 0) == first and len(served.asked) == 1
    others = [ask("other", 0, 0), ask("text", 2, 0), ask("text", 0, 1)]
    assert len({first, *others}) == 4 and len({seed for *_, seed in served.asked}) == 2
