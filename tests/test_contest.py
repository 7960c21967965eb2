"""The contest: what is compared with what, in runs small enough to check by hand."""

import json

import pytest

import grpo
import rewards
from studies import contest
from training import harness


def run(proxy, gold, seed=1, stop=2, kl=(0.0, 4.0, 9.0)):
    tests = [
        {
            "step": step,
            "kl": k,
            "hps": p,
            "artifact": 0.5,
            "gold": g,
            "gold-clean": g,
            "gold-aligned": 1.0,
            "artifact-free": g,
        }
        for step, k, p, g in zip((0, 10, 20), kl, proxy, gold)
    ]
    return {
        "seed": seed,
        "tests": tests,
        "seconds": 120.0,
        "stop": stop,
        "diversity": [0.2, 0.4] + [0.3] * 8 + [0.1] * 10,
    }


@pytest.mark.parametrize("cure", contest.CURES)
def test_every_cure_is_a_command_that_grpo_takes(cure):
    import tyro

    flags = contest.command(contest.Config(), cure, 1)
    cfg = tyro.cli(grpo.Config, args=flags)
    harness.check(cfg, 1)
    trained, watched = rewards.parse(cfg.rewards), rewards.parse(cfg.eval_rewards)
    assert (
        not trained.keys() & watched.keys() and {"gold", "gold-clean"} <= watched.keys()
    )  # the truth trains nobody
    assert set(contest.MEASURED) <= trained.keys() | watched.keys()


def test_a_change_is_the_last_test_minus_the_first_and_its_interval_is_over_seeds():
    runs = [run((0.4, 0.5, 0.5), (0.6, 0.5, 0.3)), run((0.4, 0.5, 0.6), (0.6, 0.5, 0.5))]
    columns = contest.changes(runs)
    assert columns["hps"] == pytest.approx(
        (0.15, 12.71 * 0.05), abs=1e-6
    )  # t of two seeds; s / sqrt(2) = .05
    assert columns["gold"][0] == pytest.approx(-0.2)
    assert columns["diversity"] == pytest.approx(
        (0.1 - 0.3, 0.0)
    )  # the last five steps against the first two
    assert columns["minutes"] == (2.0, 0.0)


def test_gold_per_proxy_is_a_ratio_of_means_and_only_where_the_proxy_rose():
    rose = [run((0.4, 0.5, 0.6), (0.6, 0.5, 0.5)), run((0.4, 0.5, 0.6), (0.6, 0.5, 0.5))]
    fell = [run((0.4, 0.4, 0.4), (0.6, 0.5, 0.5)), run((0.4, 0.4, 0.4), (0.6, 0.5, 0.5))]
    table = contest.contest_table({"no cure": rose, "judge, summed": fell})
    assert [row["gold per hps"] for row in table] == ["-0.50", "-"]


def test_early_stopping_is_the_run_without_a_cure_up_to_its_stopping_time(tmp_path):
    cfg = contest.Config(seeds=1, results=str(tmp_path))
    contest.file_of(cfg, "no cure", 1).write_text(
        json.dumps(run((0.4, 0.5, 0.6), (0.6, 0.7, 0.3), stop=1))
    )
    results = contest.read_results(cfg)
    assert list(results) == ["no cure", contest.STOPPED]
    stopped = contest.changes(results[contest.STOPPED])
    assert stopped["gold"][0] == pytest.approx(0.1) and stopped["minutes"][0] == 1.0


def test_a_result_is_filed_under_the_name_of_its_cure(tmp_path):
    cfg = contest.Config(results=str(tmp_path))
    names = {contest.file_of(cfg, cure, 1).name for cure in contest.CURES}
    assert len(names) == len(contest.CURES) and "kl_beta_.05_seed1.json" in names


def test_the_stopping_time_is_before_the_judge_falls_by_two_standard_errors(tmp_path):
    (tmp_path / "tests").mkdir()
    scores = {0: (0.5, 0.7), 10: (0.6, 0.6), 20: (0.2, 0.4), 30: (0.9, 0.9)}
    for step, values in scores.items():
        lines = [
            json.dumps({"id": str(i), "sample": 0, "artifact": v}) for i, v in enumerate(values)
        ]
        (tmp_path / "tests" / f"step_{step:06d}.jsonl").write_text("\n".join(lines))
    tests = [{"step": step} for step in scores]
    assert contest.stopping_time(tmp_path, tests) == 1  # at step 20 it fell by .3 twice: error 0
    assert contest.stopping_time(tmp_path, tests[:2]) == 1  # never: the last test
