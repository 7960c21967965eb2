"""Evaluation: official scores, WISE, intervals, hacking, figures, pages."""

import base64
import hashlib
import json
import math
import os
import re
import shutil

import numpy as np
import pytest
import tyro
from PIL import Image

import evaluate
from evaluation import (
    alarms,
    curves,
    figures,
    hacking,
    labels,
    official_scores,
    pages,
    tables,
    wise,
)
from evaluation.tables import bootstrap, markdown
from training import pictures, waiting
from training import records as records_module
from training.files import atomic
from training.records import json_line, mean_over_prompts, read_json, read_jsonl, write_jsonl


def picture(color=(200, 10, 10), side=8):
    return Image.new("RGB", (side, side), color)


# --- records ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", ['{"step": 2, "hp', "\0" * 40, '{"step": 2}\n' + "\0" * 40, "[1"])
def test_a_line_that_was_cut_off_is_left_out_and_named(tail, tmp_path, capsys):
    lines = [{"step": 0, "hps": math.nan}, {"step": 1, "hps": 0.5}]
    (tmp_path / "test.jsonl").write_text("".join(map(json_line, lines)) + tail)
    rows = read_jsonl(tmp_path / "test.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2][: 2 + ("2}" in tail)]
    assert math.isnan(rows[0]["hps"])
    assert "test.jsonl: its last line is cut off" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line", ["{half", "[1, 2]", "5", '{"prompt": "caf\u00e9"}', "\0\0", '"text"']
)
def test_a_damaged_line_in_the_middle_is_named_by_its_number(line, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(f'{{"step": 0}}\n{line}\n{{"step": 2}}\n'.encode("latin-1"))
    with pytest.raises(SystemExit, match="2"):
        read_jsonl(tmp_path / "a.jsonl")
    assert "a.jsonl, line 2: no JSON object" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", '{"flags": {', "[]", "\0\0", None])
def test_a_damaged_config_is_named(content, tmp_path, capsys):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(SystemExit, match="2"):
        read_json(tmp_path / "config.json")
    assert "config.json: missing, or no JSON object" in capsys.readouterr().err


def test_two_writers_of_one_file_do_not_disturb_each_other_and_a_failure_leaves_nothing(tmp_path):
    path = tmp_path / "a.txt"
    with atomic(path) as first, atomic(path) as second:
        first.write("one")
        second.write("two")
    assert path.read_text() == "one"  # the last to finish
    with pytest.raises(RuntimeError), atomic(path) as file:
        file.write("half")
        raise RuntimeError
    assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError, match="another"), atomic(path):
        open(tmp_path / "another")  # an error about another file keeps its name


# --- official scores ------------------------------------------------------------------------------


def test_geneval_overall_is_the_mean_of_tasks_not_of_pictures(tmp_path):
    rows = [{"tag": "colors", "correct": c} for c in (True, True, True, False)]
    write_jsonl(tmp_path / "r.jsonl", [*rows, {"tag": "counting", "correct": False}])
    benchmark, columns, _ = official_scores.summarize(tmp_path / "r.jsonl")
    assert benchmark == "GenEval" and (columns["colors"], columns["counting"]) == (0.75, 0.0)
    assert math.isnan(columns["overall"])  # of two tasks of six
    rows += [{"tag": tag, "correct": False} for tag in "abcde"]
    write_jsonl(tmp_path / "r.jsonl", rows)
    assert official_scores.summarize(tmp_path / "r.jsonl")[1]["overall"] == pytest.approx(0.75 / 6)
    rows.append({"tag": "a", "correct": None, "filename": "x.png"})
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)).replace("null", "NaN"))
    assert official_scores.summarize(tmp_path / "r.jsonl")[2] == ["x.png"]


def test_dpg_and_compbench_results_are_read(tmp_path):
    (tmp_path / "dpg.txt").write_text(
        "x.png, 1.0, 1.0\nModel: m\nL1 category scores:\n\tentity: 88.0\n\tglobal: 90.5\n"
        "L2 category scores:\n\tentity - whole: 1.0\nDPG-Bench score: 82.5\n"
    )
    _, columns, _ = official_scores.summarize(tmp_path / "dpg.txt")
    assert columns == {"Entity": 88.0, "Global": 90.5, "overall": 82.5}
    answers = [{"question_id": 0, "answer": "0.5"}, {"question_id": 1, "answer": "1.0"}]
    (tmp_path / "vqa_result.json").write_text(json.dumps(answers))
    assert official_scores.summarize(tmp_path / "vqa_result.json")[1] == {"overall": 0.75}


def test_result_files_of_one_benchmark_share_a_table(tmp_path, capsys):
    for name, right in (("a", True), ("b", False)):
        rows = [{"tag": tag, "correct": right} for tag in "abcdef"]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    (tmp_path / "dpg.txt").write_text(
        "L1 category scores:\n\tglobal: 90.5\nL2 category scores:\nDPG-Bench score: 82.5\n"
    )
    paths = [str(tmp_path / name) for name in ("a.jsonl", "dpg.txt", "b.jsonl")]
    with pytest.raises(SystemExit) as end:
        evaluate.main(tyro.cli(evaluate.Config, args=["--summarize", *paths]))
    out = capsys.readouterr().out
    geneval, dpg = out.split("DPG-Bench")
    assert end.value.code == 0 and "GenEval" in geneval
    for name, score in (("a", "1.000"), ("b", "0.000")):
        (row,) = [line for line in geneval.splitlines() if f"{name}.jsonl" in line]
        assert row.count(score) == 7  # the tasks, and their mean
    assert "82.500" in dpg and "a.jsonl" not in dpg and "published" in dpg


def test_another_file_is_no_result_file(tmp_path, capsys):
    write_jsonl(tmp_path / "other.jsonl", [{"prompt": "a house"}])
    with pytest.raises(SystemExit):
        official_scores.summarize(tmp_path / "other.jsonl")
    assert "not a result file" in capsys.readouterr().err


@pytest.mark.parametrize("benchmark", ["GenEval", "DPG-Bench", "WISE legacy", "WISE verified"])
def test_every_published_row_has_an_overall_score(benchmark):
    published = official_scores.published(benchmark)
    assert "Janus-Pro-1B" in published and all("overall" in row for row in published.values())
    assert official_scores.published("T2I-CompBench") == {}


def wise_rows(protocol, value):
    return [
        {"prompt_id": i, **dict.fromkeys(official_scores.WEIGHTS[protocol], value)}
        for i in range(1, 1001)
    ]


@pytest.mark.parametrize("protocol, best", [("WISE legacy", 2), ("WISE verified", 1)])
def test_a_perfect_wise_is_one_and_its_weights_add_up(protocol, best):
    name, columns, failed = official_scores.wise_table(wise_rows(protocol, best))
    assert name == protocol and not failed and len(columns) == 7
    assert columns["overall"] == pytest.approx(1)


@pytest.mark.parametrize("value", [999, 3, -1, None])
def test_an_unparsed_wise_answer_is_listed_and_not_counted_as_zero(value):
    rows = wise_rows("WISE legacy", 2)
    rows[450] |= {"realism": value}
    _, columns, failed = official_scores.wise_table(rows)
    assert failed == [451] and columns["overall"] == pytest.approx(1)


@pytest.mark.parametrize(
    "protocol, column, first, last, weight",
    [
        ("WISE legacy", "Cultural", 1, 400, 0.4),
        ("WISE legacy", "Time", 401, 567, 0.167),
        ("WISE legacy", "Space", 568, 700, 0.133),
        ("WISE legacy", "Physics", 801, 900, 0.1),
        ("WISE verified", "Time", 401, 520, 0.12),
        ("WISE verified", "Chemistry", 881, 1000, 0.12),
    ],
)
def test_wiscore_by_hand(protocol, column, first, last, weight):
    rows, legacy = wise_rows(protocol, 0), protocol == "WISE legacy"
    scores = {"consistency": 2, "realism": 1, "aesthetic_quality": 0} if legacy else {"score": 1}
    rows[last - 1] |= scores  # only the last picture of this category scores
    mean = (0.8 if legacy else 1.0) / (last - first + 1)  # .8 = (1.4 + .2 + 0) / 2
    _, columns, _ = official_scores.wise_table(rows)
    assert columns.pop("overall") == pytest.approx(weight * mean)
    assert columns.pop(column) == pytest.approx(mean) and set(columns.values()) == {0}


# --- WISE -----------------------------------------------------------------------------------------


class ScriptedJudge:
    """Gives these answers, one after the other; logs (text, pictures, temperature, seed)."""

    model, address, each = "qwen", "here", 10.0

    def __init__(self, answers):
        self.answers, self.calls = list(answers), []

    def write(self, text, images, temperature=0.0, seed=0):
        self.calls.append((text, images, temperature, seed))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def judged(judge, protocol, tmp_path, **options):
    """The records of two prompts, with two pictures each, of which only the first is judged."""
    picture().save(tmp_path / "1.png")
    row = {"prompt": "p", "Explanation": "e", "tag": "t"}
    matched = [(row | {"id": i}, k, tmp_path / "1.png") for i in "12" for k in (0, 1)]
    return wise.judge_folder(judge, protocol, matched, **options)


@pytest.fixture(autouse=True)
def one_at_a_time(monkeypatch):
    start = waiting.start
    monkeypatch.setattr(waiting, "start", lambda calls, workers=1: start(calls, 1))


def test_an_answer_that_cannot_be_parsed_is_asked_for_again_and_then_given_up(tmp_path):
    judge = ScriptedJudge(["no idea", "Score: 1", "?", "Score: 7", "refused"])
    got = judged(judge, "verified", tmp_path)
    expected = {"prompt_id": 1, "Subcategory": "t", "score": 1, "evaluation": "Score: 1"}
    assert expected.items() <= got[0].items()
    assert math.isnan(got[1]["score"]) and got[1]["evaluation"] == "refused"
    # A server that repeats itself at temperature 0 must not be asked the same again.
    asked = [(temperature, seed) for _, _, temperature, seed in judge.calls]
    assert asked == [(0, 0), (0.7, 1), (0, 0), (0.7, 1), (0.7, 2)]
    path = tmp_path / "x_scores_results.jsonl"
    path.write_text("".join(map(json_line, got)))
    benchmark, columns, failed = official_scores.summarize(path)
    assert benchmark == "WISE verified" and columns["Cultural"] == 1 and failed == [2]


def test_the_judge_sees_the_prompt_its_explanation_and_the_picture(tmp_path):
    judge = ScriptedJudge(["Score: 1"] * 2)
    judged(judge, "verified", tmp_path)
    text, images, *_ = judge.calls[0]
    assert "Prompt: p\nExplanation: e\n" in text and images[0].getpixel((0, 0)) == (200, 10, 10)


def test_a_damaged_picture_is_a_failure_and_no_question(tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(b"\x89PNG no more")
    row = {"id": "1", "prompt": "p", "tag": ""}
    (record,) = wise.judge_folder(ScriptedJudge([]), "verified", [(row, 0, tmp_path / "bad.png")])
    assert math.isnan(record["score"]) and record["evaluation"] == "no readable picture"


def test_a_wise_judgement_is_saved_as_it_goes_and_not_made_again(tmp_path):
    saved = []
    judge = ScriptedJudge(["Score: 1", waiting.Unanswered("the server is away")])
    got = judged(judge, "verified", tmp_path, save=lambda records: saved.append(list(records)))
    assert saved == [got] and got[1]["evaluation"] == "the server is away"
    path = tmp_path / "x_scores_results.jsonl"
    write_jsonl(path, got)
    again = ScriptedJudge(["Score: 0"])  # for the failed one only
    known = read_jsonl(path)
    assert [r["score"] for r in judged(again, "verified", tmp_path, known=known)] == [1, 0]
    again.model = "another"  # its judgements would replace those of the first
    with pytest.raises(SystemExit, match="2"):
        judged(again, "verified", tmp_path, known=known)


def test_a_call_about_some_pictures_keeps_the_judgements_of_the_others(tmp_path):
    picture().save(tmp_path / "1.png")
    row = {"prompt": "p", "tag": "t"}
    matched = [(row | {"id": str(i)}, 0, tmp_path / "1.png") for i in range(1, 4)]
    answers = ["Score: 1", "Score: 1", *["?"] * 3]  # the third one fails
    known = wise.judge_folder(ScriptedJudge(answers), "verified", matched)
    saved, other = [], [(row | {"id": "2", "prompt": "q"}, 0, tmp_path / "1.png")]
    got = wise.judge_folder(ScriptedJudge(["Score: 0"]), "verified", other, known, saved.append)
    scores = {r["prompt_id"]: r["score"] for r in got}
    assert scores == {1: 1, 2: 0, 3: pytest.approx(math.nan, nan_ok=True)} and saved == [got]


def test_half_an_answer_is_asked_for_again(tmp_path):
    judge = ScriptedJudge([waiting.CutOff("cut off after 512 tokens"), "Score: 1"] * 2)
    assert [r["score"] for r in judged(judge, "verified", tmp_path)] == [1, 1]
    (record, _) = judged(ScriptedJudge([waiting.CutOff("cut off")] * 6), "verified", tmp_path)
    assert math.isnan(record["score"]) and record["evaluation"] == "cut off"


def test_the_first_picture_of_a_prompt_is_judged_also_where_number_0_is_missing(tmp_path):
    picture().save(tmp_path / "1.png")
    row = {"id": "1", "prompt": "p", "tag": "t"}
    matched = [(row, k, tmp_path / "1.png") for k in (3, 2)]
    (record,) = wise.judge_folder(ScriptedJudge(["Score: 1"]), "verified", matched)
    assert record["score"] == 1


def test_a_stop_does_not_lose_the_judgements_that_are_not_due_yet(tmp_path):
    picture().save(tmp_path / "1.png")
    row = {"prompt": "p", "tag": "t"}
    matched = [(row | {"id": str(i)}, 0, tmp_path / "1.png") for i in range(1, 66)]
    known = wise.judge_folder(ScriptedJudge(["Score: 1"] * 65), "verified", matched)
    saved = []
    again = wise.judge_folder(ScriptedJudge([]), "verified", matched, known, saved.append)
    assert again == known and [len(records) for records in saved] == [65, 65]


def test_an_id_that_is_no_number_is_refused_before_anything_is_judged(tmp_path, capsys):
    rows = [({"id": i, "prompt": "p", "tag": ""}, 0, tmp_path / "1.png") for i in ("1", "bonus-1")]
    with pytest.raises(SystemExit, match="2"):
        wise.judge_folder(ScriptedJudge([]), "verified", rows)
    assert "bonus-1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "answer, score",
    [
        ("Score: 1", 1),
        ("score = 1.0", 1),
        ("**Score:** 0", 0),
        ('{"score": 1}', 1),
        ("```json\n{'Score': 0}\n```", 0),
        ("Score: 1/1", 1),
        ("<think>Score: 0 or Score: 1?</think>\nScore: 1", 1),
        ("1", 1),  # the official scorer takes it, too
        ("Score: 0? But wait</think>\nScore: 1", 1),  # some servers keep the opening tag
        ("Score: 1 ... Final Score: 1.0", 1),
        ("Score: 1 ... Score: 1/1", 1),
        ("Score: 1 ... Score: 1/10", None),
        ("12", None),
        ("Score: 8/10", None),
        ("Score: 1/10", None),
        ("Score: 0.5", None),
        ("Score: -1", None),
        ("Score: 1 ... Score: 0", None),
        ("<think>Score: 1", None),  # it thought until its tokens were used up
        ("", None),
    ],
)
def test_an_answer_is_read_or_it_is_none_and_never_zero(answer, score):
    scores = wise.read_scores(answer, "verified")
    assert scores == (None if score is None else {"score": score})


def test_the_two_protocols_of_wise_are_never_mixed(tmp_path):
    judge = ScriptedJudge(["Consistency: 2\nRealism: 1\nAesthetic Quality: 1"] * 2)
    legacy = judged(judge, "legacy", tmp_path)
    protocol, columns, _ = official_scores.wise_table(legacy)
    assert protocol == "WISE legacy" and columns["Cultural"] == pytest.approx(0.85)
    with pytest.raises(SystemExit):
        official_scores.wise_table(legacy + [{"prompt_id": 3, "score": 1}])


# --- numbers --------------------------------------------------------------------------------------


def test_the_bootstrap_covers_the_truth_about_as_often_as_it_says():
    rng, hits = np.random.default_rng(0), 0
    prompts = np.arange(40).repeat(4)
    for trial in range(100):
        values = rng.normal(size=40).repeat(4)  # four pictures of a prompt, all alike
        low, high = bootstrap(lambda chosen, v=values: v[chosen].mean(), prompts, 200, trial)
        hits += low < 0 < high
    assert 88 <= hits <= 99  # drawing pictures instead of prompts would give about 67


def test_a_markdown_table_is_one_text():
    rows = [{"reward": "hps", "accuracy": 0.5}, {"reward": "artifact", "accuracy": 0.80004}]
    lines = ["| reward | accuracy |", "|---|---|", "| hps | 0.500 |", "| artifact | 0.800 |"]
    assert markdown(rows) == "\n".join(lines) and markdown([]) == ""


def test_best_of_n_is_the_expectation_over_all_draws():
    pool = [{"id": "x", "total": t, "gold": g} for t, g in ((3.0, 0.0), (2.0, 1.0), (1.0, 0.5))]
    value = [hacking.best_of_n(pool, n, lambda r: r["gold"]) for n in (1, 2, 3)]
    assert value == pytest.approx([0.5, (0 + 0 + 1) / 3, 0.0])  # pairs: {3,2}, {3,1}, {2,1}


def test_best_of_n_averages_prompts_and_leaves_out_failures_and_small_groups():
    totals = {"x": [1.0, 2.0, math.nan], "y": [4.0, 3.0], "z": [9.0]}
    pool = [{"id": id_, "total": t} for id_, values in totals.items() for t in values]
    assert hacking.best_of_n(pool, 2, lambda r: r["total"]) == (2 + 4) / 2


def test_the_within_prompt_deviation_ignores_how_prompts_differ():
    scores = {"x": [1.0, 3.0], "y": [101.0, 105.0], "z": [7.0]}  # variances 2 and 8; z has none
    pool = [{"id": id_, "hps": s} for id_, values in scores.items() for s in values]
    assert hacking.within_prompt_std(pool, "hps") == pytest.approx(math.sqrt(5))


def records(values, name="gold"):
    return [{"id": str(i), "sample": 0, name: float(v)} for i, v in enumerate(values)]


def test_paired_differences_by_hand():
    """Gains .1, .2 and .3: mean .2, deviation .1, standard error .1 / sqrt 3. Failures are out."""
    before, after = [0.1, 0.5, 0.9, math.nan, 0.3], [0.2, 0.7, 1.2, 0.4, math.nan, 0.8]
    gain, error = hacking.paired(records(before), records(after)[::-1], "gold")
    assert gain == pytest.approx(0.2) and error == pytest.approx(0.1 / math.sqrt(3))
    assert math.isnan(hacking.paired(records([0.1]), records([0.2]), "gold")[1])


def test_pictures_are_paired_by_prompt_and_sample():
    keys = [("x", 0), ("x", 1), ("y", 0)]
    before = [{"id": i, "sample": k, "gold": g} for (i, k), g in zip(keys, (0.0, 0.5, 0.25))]
    after = [{"id": i, "sample": k, "gold": g} for (i, k), g in zip(keys, (0.25, 0.75, 0.5))]
    after = [after[1], {"id": "x", "sample": 2, "gold": 9.0}, after[2], after[0]]
    assert hacking.paired(before, after, "gold") == (0.25, 0.0)


def test_the_mean_over_prompts_is_that_of_independent_prompts():
    """Prompt means 0 and 1: deviation sqrt(1/2), error 1/2, however many pictures each has."""
    values, prompts = [-0.5, 0.5, 1.0, 1.0, math.nan], ["x", "x", "y", "y", "y"]
    assert mean_over_prompts(values, prompts) == pytest.approx((0.5, 0.5))
    assert math.isnan(mean_over_prompts([1.0, 2.0], ["x", "x"])[1])


def test_paired_differences_take_the_prompts_difficulty_out():
    rng = np.random.default_rng(0)
    hard = rng.normal(size=200)
    after = hard + 0.1 + 0.01 * rng.normal(size=200)
    gain, error = hacking.paired(records(hard), records(after), "gold")
    assert gain == pytest.approx(0.1, abs=0.005) and error < 0.001


# --- onset, dominance, the table over seeds -------------------------------------------------------


def make_run(folder, gold, proxy, **flags):
    """A run folder. gold: for each test, gold of each picture. proxy: for each test, mean hps."""
    flags = {"rewards": "hps", "eval_rewards": "gold", "num_generations": 2, **flags}
    (folder / "tests").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"flags": flags, "command": "grpo.py <b>"}))
    tests = []
    for step, (golds, hps) in enumerate(zip(gold, proxy)):
        mean = float(np.mean(golds))
        tests.append({"step": step, "hps": hps, "gold": mean, "kl": float(step)})
        rows = [row | {"hps": hps, "kl": 0.0, "prompt": "p"} for row in records(golds)]
        write_jsonl(folder / f"tests/step_{step:06d}.jsonl", rows)
    write_jsonl(folder / "test.jsonl", tests)
    return folder


@pytest.mark.parametrize(
    "gold, proxy, expected",
    [
        ([0.3, 0.4, 0.35, 0.2], [0.1, 0.2, 0.3, 0.4], 1),  # up, then down, while the proxy rises
        ([0.3, 0.4, 0.5, 0.6], [0.1, 0.2, 0.3, 0.4], None),  # both rise
        ([0.3, 0.4, 0.35, 0.2], [0.1, 0.2, 0.1, 0.1], None),  # both fall: no hacking
        ([0.3, 0.4, 0.35, 0.2], [0.1, 0.2, 0.3, 0.2], None),  # the proxy ends where it was
        ([0.3, 0.4, 0.399, 0.399], [0.1, 0.2, 0.3, 0.4], None),  # a fall within the error
    ],
)
def test_the_onset_of_hacking_by_its_rule(gold, proxy, expected, tmp_path):
    rng = np.random.default_rng(0)
    golds = [mean + rng.normal(0, 0.05, 100) for mean in gold]
    assert hacking.onset(make_run(tmp_path / "run", golds, proxy)) == expected


@pytest.mark.parametrize("extra, expected", [(0.0, None), (1 / 64, 0)])
def test_the_onset_needs_more_than_three_standard_errors(extra, expected, tmp_path):
    """Changes -1/2, -1/2, -1/2, 0: mean -3/8, deviation 1/4, standard error 1/8, exactly."""
    after = [1 - 1 / 2 - extra] * 3 + [1 - extra]
    run = make_run(tmp_path / "run", [[1.0] * 4, after], [0.1, 0.2])
    assert hacking.onset(run) == expected


@pytest.mark.parametrize(
    "gold, proxy, says",
    [
        ([0.3, 0.4, 0.2], [0.1, 0.2, 0.4], "Onset of hacking: step 1; from there on gold fell by"),
        ([0.3, 0.4, 0.5], [0.1, 0.2, 0.3], "gold is highest at the last test"),
        ([0.3, 0.4, 0.2], [0.1, 0.2, 0.15], "at step 1, gold fell, but hps did not rise"),
        ([0.3, 0.4, 0.399], [0.1, 0.2, 0.4], "step 1, by less than the rule's 3 standard errors"),
    ],
)
def test_the_verdict_says_what_the_rule_says(gold, proxy, says, tmp_path):
    rng = np.random.default_rng(0)
    golds = [mean + rng.normal(0, 0.05, 100) for mean in gold]
    text = hacking.verdict(make_run(tmp_path / "run", golds, proxy))
    assert text.startswith("In 2 steps hps rose by") and says in text


def test_the_verdict_names_the_drift_of_the_control(tmp_path):
    run = make_run(tmp_path / "run", [[0.5] * 4, [0.25] * 4], [0.1, 0.2])
    control = make_run(tmp_path / "noise", [[0.5] * 4, [0.375] * 4], [0.1, 0.1], rewards="noise")
    text = hacking.verdict(run, control)
    assert "gold, the truth, fell by 0.250 ± 0.000" in text
    assert "Under the control, which learns from noise, gold fell by 0.125 ± 0.000." in text


def test_a_run_from_before_a_cure_existed_is_a_seed_of_the_same_experiment(tmp_path):
    old = make_run(tmp_path / "old", [[0.5], [0.5]], [0.1, 0.1], seed=1)
    now = {"seed": 2, "cures.average": 0.0, "cures.entropy_bonus": 0.0}
    new = make_run(tmp_path / "new", [[0.5], [0.5]], [0.1, 0.1], **now)
    cured = make_run(tmp_path / "cured", [[0.5], [0.5]], [0.1, 0.1], **now | {"cures.average": 0.9})
    groups = hacking.runs_by_rewards([old, new, cured])
    assert [len(members) for members in groups.values()] == [2, 1]
    assert list(groups)[1] == "hps (cures.average 0.9)"


def test_the_companions_of_a_run_differ_in_the_rewards_only(tmp_path, capsys):
    def run(name, **flags):
        folder = make_run(tmp_path / name, [[0.5], [0.5]], [0.1, 0.1], **flags)
        (folder / "samples").mkdir()
        (folder / "samples/step_000000.png").write_bytes(b"")
        return folder

    own = run("own", seed=1, max_steps=1)
    cure = run("cure", seed=1, max_steps=1, rewards="hps,artifact", eval_rewards="gold")
    run("again", seed=1, max_steps=1)  # the same rewards
    run("third", seed=1, max_steps=1, rewards="hps,pickscore")  # neither hack nor cure
    run("other seed", seed=2, max_steps=1, rewards="noise")
    run("unfinished", seed=1, max_steps=9, rewards="noise")
    assert hacking.companions(own) == [cure]
    control = run("control", seed=1, max_steps=1, rewards="noise")
    assert hacking.companions(own) == [cure, control]
    assert hacking.is_control(control) and not hacking.is_control(cure)
    # A damaged neighbour costs a line, and not the report.
    (control / "tests/step_000000.jsonl").write_text("")
    assert hacking.companions(own) == [cure]
    assert "control: damaged, and left out" in capsys.readouterr().err


def test_without_scores_the_onset_is_unknown_and_nothing_rose_or_fell(tmp_path):
    """Of a hacked run: gold .9 -> .1 while hps rises. Without the last hps, or gold, who knows?"""
    curve = [[0.5, 0.6], [0.9, 0.8], [0.1, 0.2]]
    hacked = make_run(tmp_path / "hacked", curve, [0.1, 0.2, 0.3], seed=1)
    assert hacking.onset(hacked) == 1 and hacking.is_decided(hacked)
    for name in ("hps", "gold"):
        run = tmp_path / name
        shutil.copytree(hacked, run)
        for file in (run / "test.jsonl", run / "tests/step_000002.jsonl"):
            rows = read_jsonl(file)
            rows = rows[:2] + [rows[2] | {name: None}] if len(rows) == 3 else rows
            write_jsonl(file, [r | {name: None} for r in rows] if file.parent != run else rows)
        assert hacking.onset(run) is None and not hacking.is_decided(run)
        said = hacking.verdict(run)
        assert "has no score that the first and the last test share" in said
        assert "cannot be decided" in said and "did not rise" not in said
        last = hacking.seeds_table([run])[-1]
        assert last["measured"] == "onset of hacking" and last[hacking.CHANGE] == "unknown"


def test_the_interval_of_one_run_counts_the_prompts_that_have_scores(tmp_path):
    """Four prompts, gains 1, 0, 1 and none: Student's t of three, 4.303, times the error 1/3."""
    run = make_run(tmp_path / "run", [[0.0] * 4, [1.0, 0.0, 1.0, math.nan]], [0.1, 0.1], seed=1)
    (row,) = [row for row in hacking.seeds_table([run]) if row["measured"] == "gold"]
    assert row[hacking.CHANGE].startswith("+0.667 ± 1.434")


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda run: (run / "test.jsonl").write_text(""), "holds no test"),
        (lambda run: (run / "config.json").write_text("{}"), "damaged, or of another version"),
        (lambda run: (run / "tests/step_000000.jsonl").write_text(""), "missing or empty"),
        (lambda run: (run / "tests/step_000001.jsonl").unlink(), "missing or empty"),
    ],
    ids=["no test", "no flags", "an empty test", "the peak is gone"],
)
def test_a_damaged_run_is_one_clear_error(damage, said, tmp_path, capsys):
    run = make_run(tmp_path / "run", [[0.5], [0.9], [0.1]], [0.1, 0.2, 0.3], seed=1)
    (run / "tests/step_000002 (copy).jsonl").write_text("")  # not ours, and no test
    hacking.seeds_table([run])
    damage(run)
    with pytest.raises(SystemExit, match="2"):
        hacking.seeds_table([run])
    assert said in capsys.readouterr().err


def test_runs_with_other_flags_are_another_experiment_and_a_copy_is_no_seed(tmp_path, capsys):
    def run(name, **flags):
        return make_run(tmp_path / name, [[0.5]], [0.1], **flags)

    runs = [run(f"a{seed}", seed=seed, beta=0.1) for seed in (2, 1)]
    runs += [run("b", seed=1, beta=0.2), run("c", seed=1, beta=0.1, rewards="noise")]
    groups = hacking.runs_by_rewards(runs)
    assert {title: [folder.name for folder, _ in members] for title, members in groups.items()} == {
        "hps (beta 0.1)": ["a1", "a2"],
        "hps (beta 0.2)": ["b"],
        "noise": ["c"],
    }
    copied = run("copy", seed=2, beta=0.1, output_dir="elsewhere")
    os.utime(copied / "test.jsonl", (4e9, 4e9))
    groups = hacking.runs_by_rewards([*runs, copied])
    assert [folder.name for folder, _ in groups["hps (beta 0.1)"]] == ["a1", "copy"]
    assert "one seed; the newer counts" in capsys.readouterr().err


def test_students_t_holds_95_percent():
    """The integral of its density from -t to t, for n - 1 degrees of freedom."""
    x = np.linspace(0, 1, 200001)
    for n in (*range(2, 10), 12, 29, 30, 60, 99, 100, 108, 180, 1000):
        t, v = tables.t_95(n), n - 1
        log_scale = math.lgamma((v + 1) / 2) - math.lgamma(v / 2) - 0.5 * math.log(v * math.pi)
        density = np.exp(log_scale - (v + 1) / 2 * np.log1p((t * x) ** 2 / v))
        held = 2 * t * np.trapezoid(density, x)
        assert held == pytest.approx(0.95, abs=1e-4) if n in tables.T_95 else 0.9497 < held < 0.98


def test_a_bootstrap_of_a_mean_is_as_wide_as_theory_says():
    values = np.random.default_rng(1).normal(size=400)
    low, high = tables.bootstrap(lambda pick: values[pick].mean(), range(400))
    assert (high - low) / (2 * 1.96 / 20 * values.std()) == pytest.approx(1, abs=0.07)
    assert low < values.mean() < high


def test_one_prompt_has_no_interval():
    got = tables.bootstrap(lambda pick: [0.5, len(pick)], ["p"] * 4)
    assert np.isnan(got).all() and np.shape(got) == (2, 2)


def test_a_prompt_that_is_drawn_twice_counts_twice_and_not_four_times():
    """100 prompts with a pair each, 80 right: a binomial share, so 1.96 sqrt(.8 * .2 / 100)."""
    examples = [{"prompt": str(n), "broken": b} for n in range(100) for b in (False, True)]
    p_broken = np.array([[0.2, 0.8] if n < 80 else [0.8, 0.2] for n in range(100)]).flatten()
    value, low, high = labels.with_intervals(p_broken, examples)["pairs"]
    assert value == 0.8 and high - low == pytest.approx(2 * 1.96 * 0.04, rel=0.15)


def test_the_standard_errors_of_a_test_are_over_its_prompts():
    records = [{"id": i, "hps": s, "image/b": s} for i, s in (("a", 0.1), ("a", 0.3), ("b", 0.6))]
    got = records_module.test_means(records)
    assert got["hps"] == pytest.approx(1 / 3)  # the mean of the pictures
    assert got["hps/se"] == pytest.approx(0.2)  # of .2 and .6: deviation .2828, over sqrt(2)
    assert "image/b/se" not in got


def test_best_of_n_lies_at_its_own_distance(tmp_path):
    run = make_run(tmp_path / "a", [[0.5] * 4, [0.6] * 4], [0.1, 0.2])
    pool = [{"id": "x", "sample": k, "total": s, "hps": s} for k, s in enumerate((0.1, 0.3))]
    write_jsonl(run / "best_of_n.jsonl", pool)
    lines = [line for axis in curves.hacking_curves([run]).axes for line in axis.get_lines()]
    (dotted,) = [line for line in lines if line.get_marker() == "s"]
    assert list(dotted.get_xdata()) == pytest.approx([0, math.sqrt(math.log(2) - 1 / 2)])
    assert list(dotted.get_ydata()) == pytest.approx([0.2, 0.3])


def test_the_headline_begins_at_zero(tmp_path):
    run = make_run(tmp_path / "a", [[0.5, 0.7], [0.6, 0.8], [0.7, 0.9]], [0.1, 0.2, 0.3])
    first = [
        {"id": "x", "sample": k, "hps": h, "gold": g} for k, h, g in ((0, 0.0, 0.5), (1, 0.2, 0.7))
    ]
    write_jsonl(run / "tests/step_000000.jsonl", first)  # two pictures of one prompt
    (headline, *_) = curves.hacking_curves([run]).axes
    (gold,) = [x for x in headline.get_lines() if str(x.get_label()).startswith("gold")]
    unit = hacking.within_prompt_std(hacking.read_test(run, "first"), "gold")
    assert list(gold.get_ydata()) == pytest.approx([0, 0.1 / unit, 0.2 / unit])


@pytest.mark.parametrize("tests, two, three", [(9, 0.11, 0.01), (31, 0.24, 0.03)])
def test_how_often_the_rule_finds_an_onset_where_nothing_changes(tests, two, three):
    """The highest of many tests is high by chance. The numbers are in hacking.py's header."""
    gold = np.random.default_rng(0).normal(size=(20000, tests))  # of independent pictures
    fall = (gold.max(1) - gold[:, -1]) / math.sqrt(2)  # in standard errors of a difference
    assert (fall > 2).mean() == pytest.approx(two, abs=0.01)
    assert (fall > hacking.ERRORS).mean() == pytest.approx(three, abs=0.005)


def test_a_reward_that_learns_is_no_proxy(tmp_path):
    """Its scores drift while nothing else changes: no onset, no alarm that compares them."""
    golds, proxy = [np.full(100, 0.9), np.linspace(0, 0.9, 100)], [0.1, 0.9]
    run = make_run(tmp_path / "a", golds, proxy, rewards="adversarial", eval_rewards="gold,hps")
    text = hacking.verdict(run)
    assert hacking.onset(run) is None and "The training reward learns, too" in text
    assert text.startswith("In 1 steps gold, the truth, fell by")
    assert alarms.held_out(run) == alarms.parting(run) == {}
    both = make_run(tmp_path / "b", golds, proxy, rewards="adversarial,hps")
    assert hacking.proxy_of(hacking.read_run(both).config) == "hps" and hacking.onset(both) == 0


def test_the_headline_shows_the_interval_of_the_change(tmp_path):
    """Two seeds that start apart and gain the same: no width, and none at step 0."""
    runs = [
        make_run(tmp_path / str(i), [[level] * 2, [level + 0.1] * 2], [level, level + 0.1], seed=i)
        for i, level in enumerate((0.3, 0.5))
    ]
    (members,) = hacking.runs_by_rewards(runs).values()
    _, _, center, width = curves.means_over_seeds(members, "gold", change=True)
    assert center.tolist() == pytest.approx([0, 0.1]) and width == pytest.approx(0, abs=1e-9)
    assert curves.means_over_seeds(members, "gold")[3].min() > 1


def test_a_pool_without_gold_clean_has_no_share_of_artifact_free_pictures(tmp_path):
    runs = []
    for name, held_out in (("a", "gold"), ("b", "gold,gold-clean")):
        run = make_run(tmp_path / name, [[0.5] * 4, [0.6] * 4], [0.1, 0.2], eval_rewards=held_out)
        more = {"gold-clean": 0.5, "artifact-free": 1.0} if "clean" in held_out else {}
        write_jsonl(run / "test.jsonl", [row | more for row in read_jsonl(run / "test.jsonl")])
        pool = [{"id": "x", "sample": k, "total": 0.1 * k, "hps": 0.1 * k} | more for k in (0, 1)]
        write_jsonl(run / "best_of_n.jsonl", pool)
        runs.append(run)
    assert len(curves.hacking_curves(runs).axes) > 2


def test_every_n_is_a_mean_over_the_same_prompts():
    """Prompt p lacks a score: as a member of the mean for n = 1 only, it would make choosing the
    best of 4 look worse than choosing none."""
    pool = [
        {"id": prompt, "sample": k, "total": k, "gold": gold}
        for prompt, golds in (("p", (0.1, 0.5, 0.9, math.nan)), ("q", (0.1, 0.1, 0.1, 0.1)))
        for k, gold in enumerate(golds)
    ]
    values = [hacking.best_of_n(pool, n, hacking.score_of("gold")) for n in (1, 3, 4)]
    assert values == pytest.approx([0.1, 0.1, 0.1])


def test_the_mean_of_paired_differences_is_over_prompts_like_its_error():
    before = [{"id": "a", "sample": k, "gold": 0.0} for k in range(9)]
    before += [{"id": "b", "sample": 0, "gold": 0.0}]
    after = [row | {"gold": float(row["id"] == "a")} for row in before]
    assert hacking.paired(before, after, "gold") == pytest.approx((0.5, 0.5))


def test_a_verdict_without_gold_or_proxy_is_a_sentence(tmp_path):
    run = make_run(tmp_path / "run", [[0.5] * 4, [0.25] * 4], [0.1, 0.2])
    control = make_run(tmp_path / "noise", [[0.5] * 4, [0.5] * 4], [0.1, 0.1], rewards="noise")
    for file in [control / "test.jsonl", *control.glob("tests/*.jsonl")]:
        write_jsonl(file, [{k: v for k, v in r.items() if k != "gold"} for r in read_jsonl(file)])
    assert "control" not in hacking.verdict(run, control)  # it did not measure gold
    config = read_json(control / "config.json")
    config["flags"] |= {"rewards": "adversarial", "eval_rewards": ""}
    (control / "config.json").write_text(json.dumps(config))
    assert hacking.verdict(control).startswith("Gold was not measured, so no onset")


def test_the_training_rewards_of_the_page_are_all_of_them_and_nothing_else(tmp_path):
    run = make_run(tmp_path / "run", [[0.5], [0.5]], [0.1, 0.1], rewards="hps,artifact")
    step = {"step": 1, "reward/total": 1.0}
    for name in ("hps", "artifact"):
        extra = ("", "/group_std", "/ceiling", "/advantage_corr")
        step |= {f"reward/{name}{part}": 0.5 for part in extra}
    write_jsonl(run / "metrics.jsonl", [step, step | {"step": 2}])
    legend = curves.training_curves(hacking.read_run(run)).axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["total", "hps", "artifact"]


def test_a_group_has_the_colour_of_its_rewards_and_not_of_its_title(tmp_path):
    """Titles name the flags in which experiments differ, "artifact" may be among them."""
    flags = [
        {"rewards": "noise"},
        {"rewards": "noise", "learning_rate": 1.0},
        {"rewards": "hps", "eval_rewards": "artifact,gold"},
        {"rewards": "hps", "eval_rewards": "gold"},
        {"rewards": "hps,artifact"},
    ]
    runs = [
        make_run(tmp_path / str(i), [[0.5], [0.5]], [0.1, 0.1], **more)
        for i, more in enumerate(flags)
    ]
    colors = list(curves.colors_of(hacking.runs_by_rewards(runs)).values())
    assert colors[0] == curves.CONTROL and colors[2] == curves.HACK and colors[4] == curves.CURE
    assert {colors[1], colors[3]} < set(curves.OTHERS) and colors[1] != colors[3]


def test_an_address_with_the_word_stats_is_an_address():
    config = {"flags": {"rewards": "hps@http://stats.lab:8100, stats", "eval_rewards": None}}
    four = ["brightness", "saturation", "edges", "entropy"]
    assert hacking.names_in(config, "rewards") == ["hps", *four]
    assert hacking.names_in(config, "eval_rewards") == []


def test_there_is_no_onset_without_gold(tmp_path):
    run = make_run(tmp_path / "run", [[1.0], [0.0]], [0.1, 0.2])
    write_jsonl(run / "test.jsonl", [{"step": step, "hps": 0.1, "kl": 0.0} for step in (0, 1)])
    assert hacking.onset(run) is None


def test_a_folder_without_tests_is_no_run(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        hacking.read_run(tmp_path)
    assert stop.value.code == 2 and "make one with torchrun grpo.py" in capsys.readouterr().err


def add_rollouts(run):
    """Two groups of two: hps varies much, gold little, and the advantage is their centred sum."""
    loud, quiet = [0.0, 1.0, 0.2, 0.9], [0.51, 0.50, 0.5, 0.5]
    rows = [{"hps": a, "gold": b, "total": a + b} for a, b in zip(loud, quiet)]
    for row, mean in zip(rows, (1.005, 1.005, 1.05, 1.05)):
        row |= {"advantage": row["total"] - mean, "prompt": "<b>", "thought": "t"}
    write_jsonl(run / "rollouts/step_000000.jsonl", rows)


def test_the_reward_with_the_largest_spread_dominates(tmp_path):
    """hps is .5 and .35 from its groups' means: sqrt of the mean square, times n / (n - 1) = 2."""
    run = make_run(tmp_path / "run", [[0.3]], [0.1])
    add_rollouts(run)
    first = {row["reward"]: row for row in hacking.reward_drivers(run)[:2]}
    hps, gold = first["hps"], first["gold"]
    assert hps["std within a group"] == pytest.approx(math.sqrt(0.25 + 0.1225))
    assert hps["correlation with the advantage"] > 0.9 and hps["ties"] == 0
    assert gold["ties"] == 0.5 and gold["role"] == "held out" and gold["steps"] == "first 1"


def test_the_table_over_seeds_by_hand(tmp_path):
    """hps gains .1 and .3: mean .2, deviation .1 sqrt 2, error .1; t = 12.71 for two seeds."""
    pool = [{"id": "x", "sample": k, "hps": s, "total": s} for k, s in enumerate((0.0, 0.4))]
    first = [row | {"gold": 0.5, "kl": 0.0} for row in pool]  # deviation of hps .2828
    for seed, gain in (("a", 0.1), ("b", 0.3)):
        run = make_run(tmp_path / seed, [[0.5], [0.6]], [0.0, gain], seed=seed)
        write_jsonl(run / "best_of_n.jsonl", pool)  # best of 2: .4 against .2
        write_jsonl(run / "tests/step_000000.jsonl", first)
        last = [row | {"hps": row["hps"] + gain, "gold": 0.6, "kl": 1.0} for row in pool]
        write_jsonl(run / "tests/step_000001.jsonl", last)
    rows = hacking.seeds_table([tmp_path / "a", tmp_path / "b"])
    table = {row["measured"]: row for row in rows}
    assert rows[0]["trained on"] == "`hps`, 2 seeds" and rows[1]["trained on"] == ""
    assert table["hps"]["before"] == 0 and table["hps"]["after"] == pytest.approx(0.2)
    assert table["hps"][hacking.CHANGE] == "+0.200 ± 1.271 (+0.7 within-prompt deviations)"
    assert table["gold"][hacking.CHANGE] == "+0.100 ± 0.000"
    assert table["onset of hacking"][hacking.CHANGE] == "none, none"
    assert table["best of 2: hps"][hacking.CHANGE] == "+0.200 ± 0.000"


def test_the_interval_of_one_seed_is_over_its_prompts(tmp_path):
    """Gold changes by 0 and .2: mean .1, standard error .1, times 12.71 for two prompts."""
    run = make_run(tmp_path / "a", [[0.5, 0.5], [0.5, 0.7]], [0.0, 0.1], seed=1)
    rows = hacking.seeds_table([run])
    assert rows[0]["trained on"] == "`hps`, 1 seed, intervals over prompts"
    changes = {row["measured"]: row[hacking.CHANGE] for row in rows}
    assert changes["gold"] == "+0.100 ± 1.271"


def test_a_picture_without_a_score_in_one_test_does_not_change_the_gain(tmp_path):
    """The worst picture fails in the last test: the mean of the others is higher, their gain is
    not."""
    nan = float("nan")
    run = make_run(tmp_path / "a", [[0.2, 0.6, 0.7], [nan, 0.5, 0.6]], [0.0, 0.1], seed=1)
    (gold,) = [row for row in hacking.seeds_table([run]) if row["measured"] == "gold"]
    assert gold[hacking.CHANGE] == "-0.100 ± 0.000"


def test_a_run_without_its_tests_is_named(tmp_path, capsys):
    run = make_run(tmp_path / "a", [[0.5], [0.6]], [0.0, 0.1], seed=1)
    shutil.rmtree(run / "tests")
    with pytest.raises(SystemExit):
        hacking.seeds_table([run])
    assert "tests/step_*.jsonl are missing" in capsys.readouterr().err


# --- pictures -------------------------------------------------------------------------------------


def test_a_group_of_one_picture_has_no_diversity():
    assert pictures.diversity([picture()] * 4, 4) == [0.0]
    black_white = [picture((0, 0, 0)), picture((255, 255, 255))]
    assert pictures.diversity(black_white, 2) == pytest.approx([1.0])


def test_a_sheet_gives_its_pictures_back(tmp_path):
    images = [picture((i, 2 * i, 0)) for i in range(21)]
    pictures.save_sheet(images, tmp_path / "sheet.png")
    cut = pictures.cut_sheet(tmp_path / "sheet.png", 21)
    assert [image.getpixel((4, 4)) for image in cut] == [(i, 2 * i, 0) for i in range(21)]


def test_the_training_grid_keeps_the_first_and_the_last_test(tmp_path):
    for step in range(5):
        pictures.save_strip([picture((50 * step, 0, 0))], tmp_path / f"samples/step_{step:06d}.png")
    figures.training_grid(tmp_path, tmp_path / "grid.png", rows=3)
    grid = Image.open(tmp_path / "grid.png")
    assert grid.size == (70 + 100, 46 + 3 * 100)  # the prompts stand above
    assert [grid.getpixel((118, 46 + y))[0] for y in (48, 148, 248)] == [0, 100, 200]


def test_the_largest_gap_between_reward_and_gold_comes_first(tmp_path):
    run = make_run(tmp_path / "run", [[0.0, 1.0, 0.5]], [0.1])
    rows = records([0.0, 1.0, 0.5])
    for row, hps in zip(rows, (0.5, 0.0, 1.0)):  # z(hps) - z(gold): 1.22, -2.45, 1.22
        row |= {"hps": hps + 0.01 * (row["gold"] == 0), "prompt": "p", "image/edges": 0.1}
    write_jsonl(run / "tests/step_000000.jsonl", rows)
    gaps = figures.worst_gaps(run, ["hps"], n=2)
    assert [row["gold"] for row in gaps] == [0.0, 0.5]
    assert list(gaps[0]) == ["before", "after", "gold", "hps", "prompt"]


def test_a_run_gets_its_figures_and_its_page(tmp_path):
    run = make_run(tmp_path / "run", [[0.5] * 4, [0.1] * 4], [0.1, 0.2])
    add_rollouts(run)
    pictures.save_sheet([picture((i, 0, 0)) for i in range(4)], run / "rollouts/step_000000.png")
    for step in (0, 1):
        pictures.save_strip([picture()] * 3, run / f"samples/step_{step:06d}.png")
    text = figures.report_page(run).read_text()
    assert "gold, the truth, fell by 0.400 ± 0.000" in text
    assert "Onset of hacking: step 0; from there on gold fell by 0.400" in text
    assert "grpo.py &lt;b&gt;" in text and "<b>" not in text
    assert text.count("data:image/png") == 6 + 1 + 4  # before and after, the grid, two groups
    assert text.count("<svg") == 2 and 'alt=""' not in text
    assert text.index("A +0.35") < text.index("A -0.35")  # the best of a group comes first
    assert (run / "hacking.png").stat().st_size > 10_000
    config = {"flags": {"num_generations": 2, "rewards": "hps"}}
    first = figures.groups_of_last_step(run, config, n=1)  # there are two groups
    assert first.count("data:image/png") == 2 and "hps 1.00" in first


# --- pages ----------------------------------------------------------------------------------------


def test_every_text_in_a_page_is_escaped():
    evil = "<script>alert(1)</script>"
    body = pages.table([{evil: evil, "n": 1.0}]) + pages.word_diff(evil, evil + " x")
    assert "<script>alert" not in pages.page(evil, body + evil)


def test_a_page_loads_nothing_and_runs_one_script_known_by_its_hash():
    page = pages.page("t", pages.table([{"a": 1.0, "picture": picture()}]))
    assert "default-src 'none'" in page and "http://" not in page and "https://" not in page
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page


def test_a_table_shows_three_digits_and_is_sorted_by_all_of_them():
    table = pages.table([{"a": 0.12345, "b": 7, "c": "x" * 25, "d": math.nan}])
    assert '<td data-value="0.12345">0.123</td><td>7</td><td class="long">xxx' in table
    assert '<td data-value="nan">nan</td>' in table and pages.table([]).strip() == "<p>none</p>"


def test_a_section_holds_a_table_or_html_and_its_heading_is_escaped():
    body = pages.sections({"a < b": [{"n": 1}], "diff": pages.word_diff("a", "b")})
    assert "<h2>a &lt; b</h2>" in body and "<td>1</td>" in body
    assert "<h2>diff</h2><del>a</del> <ins>b</ins>" in body


def test_a_picture_in_a_table_is_a_part_of_the_page(tmp_path):
    picture((1, 2, 3)).save(tmp_path / "a&b.png")
    from_file, from_memory = pages.picture(tmp_path / "a&b.png"), pages.picture(picture((1, 2, 3)))
    assert from_file.replace("a&amp;b.png", "") == from_memory
    table = pages.table([{"before": picture((1, 2, 3)), "prompt": "a <star>"}])
    assert str(from_memory).replace('alt=""', 'alt="a &lt;star&gt; before"') in table


def test_a_word_diff_shows_what_was_deleted_and_what_was_inserted():
    diff = pages.word_diff("Do you see noise ?", "Do you see stains ?")
    assert diff == "Do you see <del>noise</del> <ins>stains</ins> ?"
    assert pages.word_diff("a", "a b") == "a <ins>b</ins>"
