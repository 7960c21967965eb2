"""The contest: what is compared with what, on runs that can be checked by hand."""

import json

import pytest
import tyro

import grpo
import rewards
from studies import contest, optimiser
from training import checks


def run(proxy, gold, kl=(0.0, 4.0, 9.0), onset=None, **alarms):
    """The numbers of a run with tests at steps 0, 10 and 20."""
    tests = [
        {"step": step, "kl": k, "hps": p, "gold": g, "gold-aligned": 1.0, "artifact-free": g}
        for step, k, p, g in zip((0, 10, 20), kl, proxy, gold)
    ]
    made = {"tests": tests, "seconds": 120.0, "seed": 1, "deviation": 0.2}
    return made | {"alarms": alarms, "onset": onset}


@pytest.mark.parametrize("cure", contest.CURES)
def test_every_cure_is_a_command_that_grpo_takes(cure):
    cfg = tyro.cli(grpo.Config, args=contest.command(contest.Config(), cure, 1))
    checks.fill_presets(cfg)
    weights, heldout = rewards.check_roles(cfg.rewards, cfg.eval_rewards, cfg.combine)
    checks.check_flags(cfg, len(weights), 1)
    assert {"gold", "gold-clean"} <= set(heldout)  # gold never trains
    assert set(contest.MEASURED) <= weights.keys() | set(heldout)


def test_the_kept_results_are_those_of_these_commands():
    cfg = contest.Config()
    files = [(cure, contest.result_file(cfg, cure, 1)) for cure in contest.CURES]
    kept = [(cure, json.loads(file.read_text())) for cure, file in files if file.is_file()]
    for cure, result in kept:
        assert contest.shlex.split(result["command"])[2:] == contest.command(cfg, cure, 1)


def test_a_change_is_the_last_test_minus_the_first_and_its_interval_is_over_seeds():
    runs = [run((0.4, 0.5, 0.5), (0.6, 0.5, 0.3)), run((0.4, 0.5, 0.6), (0.6, 0.5, 0.5))]
    columns = contest.changes(runs)
    # t of two seeds; s / sqrt(2) = .05
    assert columns["hps"] == pytest.approx((0.15, 12.71 * 0.05), abs=1e-6)
    assert columns["gold"][0] == pytest.approx(-0.2)
    assert columns["minutes"] == (2.0, 0.0)


def test_gold_per_proxy_is_a_ratio_of_means_and_only_where_the_proxy_rose():
    rose = [run((0.4, 0.5, 0.6), (0.6, 0.5, 0.5))] * 2
    better = [run((0.4, 0.5, 0.6), (0.6, 0.5, 0.7)), run((0.4, 0.5, 0.5), (0.6, 0.5, 0.7))]
    fell = [run((0.4, 0.4, 0.4), (0.6, 0.5, 0.5))] * 3
    unsure = [*better, run((0.4, 0.4, 0.2), (0.6, 0.5, 0.5))]  # its interval holds 0
    cures = {"control": unsure, "no cure": rose, "judge, summed": fell, "GARDO": better}
    table = contest.contest_table(cures)
    assert [row["cure"] for row in table] == ["GARDO", "no cure", "control", "judge, summed"]
    assert [row["gold per hps"] for row in table] == ["+0.67", "-0.50", "-", "-"]


def test_a_cure_is_compared_with_no_cure_seed_by_seed():
    """Gold changes by -.3, .0, -.1 and -.1, without a cure by -.4, -.2, -.1: +.1, +.2, +.0."""
    curve = lambda change: run((0.4, 0.5, 0.6), (0.6, 0.5, 0.6 + change))
    seeds = lambda *changes: [curve(c) | {"seed": i + 1} for i, c in enumerate(changes)]
    results = {"no cure": seeds(-0.4, -0.2, -0.1), "GARDO": seeds(-0.3, 0.0, -0.1, -0.1)}
    differences = contest.against_none(results, results["GARDO"])
    assert differences == pytest.approx([0.1, 0.2, 0.0])
    table = {row["cure"]: row["against none"] for row in contest.contest_table(results)}
    # t of three seeds; s / sqrt(3) = .0577
    assert table == {"GARDO": "+0.100 ± 0.248", "no cure": ""}


def test_a_run_that_is_at_work_is_not_deleted(tmp_path, capsys):
    live = tmp_path / "no_cure_seed1"
    flags = ["--output-dir", str(tmp_path)]
    with contest.lock(live, "--run-name"), pytest.raises(SystemExit, match="2"):
        contest.train(flags, tmp_path / "results/no_cure_seed1.json", {})
    assert live.is_dir() and "another command is writing there" in capsys.readouterr().err


def test_a_contest_needs_a_worker(capsys):
    with pytest.raises(SystemExit, match="2"):
        contest.train_missing([], 0)
    assert "--workers 0: must be 1 or more" in capsys.readouterr().err


def test_early_stopping_is_the_run_without_a_cure_up_to_its_stopping_time(tmp_path):
    cfg = contest.Config(seeds=1, results=str(tmp_path))
    numbers = run((0.4, 0.5, 0.6), (0.6, 0.7, 0.3), distance=20)
    contest.result_file(cfg, "no cure", 1).write_text(json.dumps(numbers))
    results = contest.read_results(cfg)
    assert list(results) == ["no cure", contest.STOPPED]
    stopped = contest.changes(results[contest.STOPPED])
    assert stopped["gold"][0] == pytest.approx(0.1) and stopped["minutes"][0] == 1.0


def test_a_result_is_filed_under_the_name_of_its_cure(tmp_path):
    cfg = contest.Config(results=str(tmp_path))
    names = {contest.result_file(cfg, cure, 1).name for cure in contest.CURES}
    assert len(names) == len(contest.CURES) and "kl_beta_.05_seed1.json" in names


def test_the_stopping_time_is_the_last_test_before_the_first_alarm():
    tests = [{"step": step} for step in (0, 10, 20, 30)]
    stop = lambda **alarms: contest.stopping_time({"tests": tests, "alarms": alarms})
    assert stop(distance=20, parting=15, pictures=None) == 1
    assert stop(distance=20, parting=None) == 1  # an alarm at a test: not that one
    assert stop(distance=0) == 0  # never before the first test
    assert stop(distance=None) == stop() == 3  # no alarm: the last test


def test_the_first_step_of_each_alarm_is_kept_if_it_was_measured(monkeypatch):
    far = {"distance": {10: 0.5, 20: 2.5}, "parting": {15: 1.0, 20: 3.0}, "pictures": {}}
    kinds = {name: lambda run, values=values: values for name, values in far.items()}
    monkeypatch.setattr(contest.alarms, "ALARMS", kinds)
    assert contest.alarm_steps("run") == {"distance": 20, "parting": None}


def test_the_table_of_alarms_counts_runs_by_what_gold_says():
    curve = (0.4, 0.5, 0.6), (0.6, 0.7, 0.3)
    results = {
        "no cure": [
            run(*curve, onset=10, distance=20, pictures=30),
            run(*curve, onset=10, distance=None, pictures=20),
            run(*curve, distance=None),
        ],
        contest.STOPPED: [run(*curve, onset=10, distance=20)],  # of the same runs: not counted
        "judge, summed": [run(*curve, onset=20, distance=30), run(*curve, distance=10)],
        "control": [run(*curve, distance=None, pictures=None)],
    }
    table = {row.pop("alarm"): row for row in contest.detection_table(results)}
    delay = "after the onset (median)"
    assert table["distance"] == {
        "limit": "2", "hacked": "2 of 3", delay: "+10 steps",
        "not hacked": "1 of 2", "of these with more faults": "1", "control": "0 of 1",
    }  # fmt: skip
    pictures = ("2 of 2", "+15 steps", "0 of 0", "0", "0 of 1")
    assert tuple(table["pictures"].values())[1:] == pictures
    anything = ("3 of 3", "+10 steps", "1 of 2", "1", "0 of 1")
    assert tuple(table["any of them"].values())[1:] == anything
    assert "parting" not in table  # no run measured it


def test_the_table_of_optimisers_by_hand():
    """hps gains .3 and .5, each deviation .2: 2 deviations on average, for 9 nats."""
    runs = [run([0.1, 0.2, 0.1 + g], [0.5, 0.6, 0.4]) for g in (0.3, 0.5)]
    still = [run([0.1, 0.1, 0.1], [0.5, 0.5, 0.5], kl=(0.0, 0.1, 0.2))]
    variant = next(iter(optimiser.VARIANTS))
    (row,) = optimiser.table({(variant, "hps"): runs, (variant, "noise"): still})
    assert row["variant"] == variant and row["runs"] == 2 and row["KL"] == "9.0"
    assert row["hps, deviations"].startswith("+2.000") and row["KL of the control"] == "0.2"
    assert row["KL at .5 deviations"] == "4.00" and row["gold"].startswith("-0.100")
    # In the second run the gain is .5 at 4 nats and 2.5 at 9.
    assert optimiser.kl_at(runs[1], 1.5) == pytest.approx(4 + 5 / 2)
    assert not optimiser.kl_at(runs[0], 1.6) > 0  # never reached
    assert row["gold, control"] == "+0.000"


@pytest.mark.parametrize("variant", optimiser.VARIANTS)
@pytest.mark.parametrize("reward", optimiser.REWARDS)
def test_every_optimiser_is_a_command_that_grpo_takes(variant, reward):
    flags, file, facts = optimiser.job(optimiser.Config(), variant, reward, 2)
    cfg = tyro.cli(grpo.Config, args=flags)
    checks.fill_presets(cfg)
    assert (cfg.rewards, cfg.seed) == (reward, 2) and cfg.run_name == file.stem
    default = not optimiser.VARIANTS[variant]
    assert file.parent.name == ("contest" if default else "optimiser")
    assert facts["seed"] == 2 and ("cure" in facts) == default
