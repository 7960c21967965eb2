"""studies/explain.py prints the step that grpo.py takes; group_figure.py draws one group."""

import re

import pytest

import grpo
from studies import explain, group_figure
from training.records import read_jsonl

SMALL = {"num_generations": 4, "prompts_per_step": 2, "max_thought": 40, "device": "cpu"}
SMALL["warmup_ratio"] = 0.0


def test_a_step_is_printed_number_by_number(tmp_path, capsys):
    cfg = grpo.Config(rewards="hps", **SMALL, output_dir=str(tmp_path))
    explain.main(cfg)
    printed = "\n" + capsys.readouterr().out
    assert all(f"\n{number}. " in printed for number in range(1, 8))
    assert "picture tokens (4, 64)" in printed
    assert (tmp_path / "explain.html").read_text().count("data:image/png") == 4
    # Better pictures became more likely.
    assert float(re.search(r"advantage and change is ([+-]\d\.\d+)", printed)[1]) > 0.5


@pytest.fixture(scope="module")
def global_step():
    """A step with a reward that learns, and the std over all rollouts."""
    flags = {"rewards": "hps,adversarial", "eval_rewards": "gold", "advantage": "global"}
    cfg = grpo.Config(**flags, **SMALL)
    return cfg, explain.first_step(cfg)


def test_a_global_deviation_is_that_of_the_whole_step(global_step):
    cfg, step = global_step
    total, rows = step.scores["total"], explain.group_rows(step, cfg)
    numbers = explain.numbers(step, rows, cfg)
    assert len(total) == 8 and numbers["known"] == 8
    assert numbers["deviation"] == total.std() != total[:4].std()
    expected = (total[:4] - total[:4].mean()) / (total.std() + 1e-4)
    printed = [row["advantage"] for row in rows]
    assert printed == pytest.approx(sorted(expected.tolist(), reverse=True), abs=1e-5)


def test_the_printed_step_is_the_first_step_of_a_run(global_step, tmp_path):
    cfg, step = global_step
    flags = {"rewards": cfg.rewards, "eval_rewards": "gold", "advantage": "global"}
    run = {"output_dir": str(tmp_path), "run_name": "run", "eval_images": 1, "best_of": 0}
    # Without a warm-up, the learning rate of the first step is the same whatever max_steps is.
    grpo.main(grpo.Config(**flags, **SMALL, **run, max_steps=1))
    records = read_jsonl(tmp_path / "run/rollouts/step_000000.jsonl")[:4]
    best_first = sorted(records, key=lambda record: -record["advantage"])
    rows = explain.group_rows(step, cfg)
    for name in ("thought", "hps", "adversarial", "gold", "total", "advantage"):
        assert [row[name] for row in rows] == [record[name] for record in best_first]
    metrics = read_jsonl(tmp_path / "run/metrics.jsonl")[0]
    assert metrics.items() >= step.metrics.items()


def test_one_group_is_drawn_before_and_after_training(policy, tmp_path):
    run = tmp_path / "run"
    policy.save(run / "checkpoints/step-000002")
    (run / "config.json").write_text('{"flags": {"rewards": "hps:2", "combine": "sum"}}')
    cfg = group_figure.Config((str(run),), pictures=3, figure=str(tmp_path / "group.png"))
    group_figure.main(cfg)
    assert (tmp_path / "group.png").stat().st_size > 3000


def test_the_pictures_of_a_group_are_ranked_by_their_advantage(tmp_path):
    cfg = group_figure.Config(runs=(), pictures=3)
    group = group_figure.ranked_group("tiny", {"hps": 1.0}, cfg)
    advantages = [advantage for _, _, advantage in group]
    assert advantages == sorted(advantages, reverse=True)
    hps = [scores["hps"] for _, scores, _ in group]
    assert hps == sorted(hps, reverse=True)


def test_a_run_that_samples_in_another_way_is_not_drawn(policy, tmp_path, capsys):
    policy.save(tmp_path / "checkpoints/step-000002")
    (tmp_path / "config.json").write_text('{"flags": {"rewards": "hps", "cot": false}}')
    with pytest.raises(SystemExit):
        group_figure.main(group_figure.Config((str(tmp_path),), pictures=2))
    assert "has cot False; the figure shows runs with True" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [{"combine": "pareto"}, {"cures": grpo.Cures(spread=True)}])
def test_what_the_text_does_not_explain_is_refused(flags, capsys):
    with pytest.raises(SystemExit):
        explain.first_step(grpo.Config(**flags))
    assert "the plain method" in capsys.readouterr().err


def test_a_folder_without_a_checkpoint_cannot_be_drawn(tmp_path, capsys):
    with pytest.raises(SystemExit):
        group_figure.main(group_figure.Config((str(tmp_path),), pictures=2))
    assert "no checkpoints/step-*" in capsys.readouterr().err
