"""Each alarm by numbers that can be checked by hand."""

import json
import math

import numpy as np
import pytest

import evaluate
from evaluation import alarms, hacking
from training.records import write_jsonl


def make_run(folder, tests, steps=(), heldout="artifact,gold", rewards="hps"):
    """A run folder. tests: for each test a list of records; steps: dicts of metrics."""
    flags = {"rewards": rewards, "eval_rewards": heldout, "seed": 1, "num_generations": 2}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"flags": flags, "command": "grpo.py"}))
    lines = []
    for number, records in enumerate(tests):
        rows = [{"id": str(i), "sample": 0, **record} for i, record in enumerate(records)]
        write_jsonl(folder / f"tests/step_{10 * number:06d}.jsonl", rows)
        lines.append({"step": 10 * number, "kl": float(number), "gold": 0.5, "hps": 0.5})
    write_jsonl(folder / "test.jsonl", lines)
    write_jsonl(folder / "metrics.jsonl", [{"step": i, **step} for i, step in enumerate(steps)])
    return folder


def test_held_out_is_the_fall_in_standard_errors_while_the_reward_rises(tmp_path):
    """artifact falls by .1 and .3: mean .2, standard deviation .1 sqrt 2, error .1."""
    before = [{"hps": 0.5, "artifact": 0.9}, {"hps": 0.5, "artifact": 0.9}]
    after = [{"hps": 0.6, "artifact": 0.8}, {"hps": 0.6, "artifact": 0.6}]
    both = [{"hps": 0.4, "artifact": 0.8}, {"hps": 0.4, "artifact": 0.6}]  # the reward falls, too
    values = alarms.held_out(make_run(tmp_path / "run", [before, after, both]))
    assert values == {10: pytest.approx(2.0), 20: 0.0}


def test_pictures_is_the_largest_move_in_standard_deviations(tmp_path):
    def records(*pairs):
        return [{"hps": 0.5, "image/edges": e, "image/brightness": b} for e, b in pairs]

    run = make_run(tmp_path / "run", [records((0, 0), (2, 8)), records((1, 1), (3, 9))])
    # Edges by 1, with deviation sqrt(2); brightness by 1, with deviation 4 sqrt(2).
    assert alarms.pictures(run) == {10: pytest.approx(0.5**0.5)}


def test_distance_is_the_kl_of_the_tests(tmp_path):
    record = [{"hps": 0.5}]
    run = make_run(tmp_path / "run", [record] * 4)
    assert alarms.distance(run) == {0: 0, 10: 1, 20: 2, 30: 3}
    assert alarms.first_alarm("distance", alarms.distance(run)) == 30  # above 2, not at it


def test_diversity_compares_ten_steps_with_the_first_ten(tmp_path):
    steps = [{"diversity": 0.5}] * 10 + [{"diversity": 0.6}] * 11
    values = alarms.diversity(make_run(tmp_path / "run", [[{"hps": 0.5}]], steps))
    assert values == {20: pytest.approx(0.2), 21: pytest.approx(0.2)}


def test_pictures_that_were_all_alike_from_the_beginning_set_off_nothing(tmp_path):
    run = make_run(tmp_path / "run", [[{"hps": 0.5}]], [{"diversity": 0.0}] * 25)
    assert alarms.diversity(run) == {}


def test_sampler_is_the_surprise_in_standard_errors(tmp_path):
    """Means .1 and .3 of two prompts: mean .2, standard error .1. Older runs did not measure it."""
    surprised = [{"hps": 0.5, "check/surprise": s} for s in (0.1, 0.3)]
    run = make_run(tmp_path / "run", [[{"hps": 0.5}] * 2, surprised])
    assert alarms.sampler(run) == {10: pytest.approx(2.0)}
    opposite = [{"hps": 0.5, "check/surprise": s} for s in (-0.4, -0.5)]
    run = make_run(tmp_path / "other", [opposite, opposite])
    assert alarms.first_alarm("sampler", alarms.sampler(run)) == 0


USUAL = [(0.5 + 0.1 * (-1) ** i, 0.8 + 0.1 * (-1) ** i) for i in range(10)]


def test_the_sum_grows_by_what_the_held_out_score_has_fallen():
    """The usual deviation is .1 sqrt(10 / 9) = .1054; .2108 below the mean is 2 of it, minus 1."""
    reward, heldout = zip(*USUAL, *[(0.7, 0.8 - 0.2108)] * 3, (0.7, 0.8), (0.4, 0.1))
    assert alarms.cusum(reward, heldout)[10:] == pytest.approx([1, 2, 3, 2, 1], abs=1e-3)


def test_a_missing_score_adds_nothing_and_does_not_end_the_audit(tmp_path):
    nan = float("nan")
    pairs = [(0.5, nan), *USUAL, (0.7, nan), (0.7, 0.3)]
    steps = [{"reward/hps": r, "held-out/artifact": h, "diversity": nan} for r, h in pairs]
    run = make_run(tmp_path / "run", [[{"hps": 0.5, "artifact": nan}]] * 2, steps)
    values = alarms.parting(run)
    assert values[12] == 0 and values[13] > 3
    assert alarms.diversity(run) == alarms.held_out(run) == {}
    assert len(alarms.audit([run])[0]) == len(alarms.ALARMS)


def test_a_false_alarm_is_rare_in_eighty_steps_without_any_change():
    rng = np.random.default_rng(0)
    runs = [(np.ones(80), rng.normal(size=80)) for _ in range(300)]
    for reward, _ in runs:
        reward[:10] = 0.5  # from then on always above the usual mean: the worst case
        reward[0] = 0.6
    off = [max(alarms.cusum(*run)) > alarms.LIMITS["parting"] for run in runs]
    assert 0 < sum(off) / len(off) < 0.05


def test_one_reward_without_scores_does_not_silence_another(tmp_path):
    before = [{"hps": 0.5, "artifact": 0.9, "pickscore": 20.0}] * 2
    after = [{"hps": 0.6, "artifact": float("nan"), "pickscore": 19.0}] * 2
    for names in ("artifact,pickscore,stats,noise", "pickscore,artifact"):
        run = make_run(tmp_path / names, [before, after], heldout=names)
        assert alarms.held_out(run) == {10: math.inf}  # all by the same: an error of 0


def test_the_audit_counts_the_runs_in_which_an_alarm_went_off(tmp_path, capsys):
    calm = make_run(tmp_path / "calm", [[{"hps": 0.5, "artifact": 0.9}]] * 2)
    far = make_run(tmp_path / "far", [[{"hps": 0.5}]] * 4, heldout="gold", rewards="noise")
    rows, off = alarms.audit([calm, far])
    rows = {(row["trained on"], row["alarm"]): row for row in rows}
    assert off
    assert rows["`hps`", "distance"]["went off"] == "0 of 1"
    assert rows["`noise`", "distance"] == {
        "trained on": "`noise`",
        "alarm": "distance",
        "limit": "2",
        "largest": "3.00",
        "went off": "1 of 1",
        "at step (median)": "30",
    }
    assert rows["`noise`", "held-out"]["largest"] == "not measured"  # gold is not asked
    for runs, code in (((calm,), 0), ((calm, far, tmp_path), 4)):
        with pytest.raises(SystemExit) as stop:
            evaluate.main(evaluate.Config(audit=tuple(map(str, runs))))
        assert stop.value.code == code
    assert "| `noise` | distance | 2 | 3.00 | 1 of 1 | 30 |" in capsys.readouterr().out


def test_a_reward_that_decides_where_the_kl_counts_is_no_witness():
    flags = {"eval_rewards": "artifact,hps,gold,stats"}
    assert alarms.held_out_names({"flags": flags}) == ["artifact", "hps"]
    guided = {"flags": flags | {"cures.doubted_by": "artifact"}}
    assert alarms.held_out_names(guided) == ["hps"]


def test_held_out_is_the_score_that_has_fallen_most_since_the_first_test(tmp_path):
    """pickscore falls by .1 and .3 (error .1), later by .3 and .5; artifact does not fall."""
    tests = [
        [{"hps": h, "artifact": 0.5 + d / 10, "pickscore": 0.9 - d} for d in falls]
        for h, falls in ((0.5, (0, 0)), (0.6, (0.1, 0.3)), (0.7, (0.3, 0.5)))
    ]
    for names in ("artifact,pickscore", "pickscore,artifact"):
        run = make_run(tmp_path / names, tests, heldout=names)
        assert alarms.held_out(run) == {10: pytest.approx(2), 20: pytest.approx(4)}


def test_pictures_are_measured_in_deviations_of_the_base_policys_and_in_both_directions(tmp_path):
    """Deviation sqrt 2 in the first test; edges fall by 2, then by 3, and spread out."""
    records = lambda *edges: [{"hps": 0.5, "image/edges": e} for e in edges]
    run = make_run(tmp_path / "run", [records(4, 6), records(0, 6), records(-6, 10)])
    assert alarms.pictures(run) == {10: pytest.approx(2**0.5), 20: pytest.approx(3 / 2**0.5)}


def test_diversity_is_that_of_the_last_ten_steps_and_may_fall(tmp_path):
    """1 ten times, then .9, .8, ... : the mean of ten after step 20 is .45, after step 21 .35."""
    values = [1.0] * 10 + [1 - n / 10 for n in range(1, 11)] + [-0.1]
    run = make_run(tmp_path / "run", [[{"hps": 0.5}]], [{"diversity": v} for v in values])
    assert alarms.diversity(run) == {20: pytest.approx(0.55), 21: pytest.approx(0.65)}


def test_parting_is_the_largest_sum_of_the_held_out_scores(tmp_path):
    usual = [0.5 + 0.1 * (-1) ** i for i in range(10)]
    rows = [{"reward/hps": u, "held-out/a": u, "held-out/b": u} for u in usual]
    rows += [{"reward/hps": 0.9, "held-out/a": 0.0, "held-out/b": 0.5}]
    for names in ("a,b", "b,a"):
        run = make_run(tmp_path / names, [[{"hps": 0.5}]], rows, heldout=names)
        assert alarms.parting(run)[11] == pytest.approx(0.5 / (0.1 * (10 / 9) ** 0.5) - 1)


def test_a_control_has_no_onset(tmp_path):
    for reward, expected in (("hps", 0), ("noise", None)):
        tests = [[{reward: r, "gold": g, "kl": 0.0}] * 2 for r, g in ((0.1, 0.9), (0.9, 0.1))]
        run = make_run(tmp_path / reward, tests, heldout="gold", rewards=reward)
        write_jsonl(run / "test.jsonl", [{"step": 10 * n, **t[0]} for n, t in enumerate(tests)])
        assert hacking.onset(run) == expected


def test_reward_drivers_are_of_the_first_and_of_the_last_steps(tmp_path):
    run = make_run(tmp_path / "run", [[{"hps": 0.5}]], heldout="")
    for step in range(3):
        rows = [{"hps": v * step, "advantage": v} for v in (-1.0, 1.0)]
        write_jsonl(run / f"rollouts/step_{step:06d}.jsonl", rows)
    rows = hacking.reward_drivers(run, steps=1)
    assert [row["std within a group"] for row in rows] == pytest.approx([0, 2 * 2**0.5])
