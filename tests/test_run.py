"""A run does what its flags say: what main connects, looked at from the run folder."""

import shutil

import pytest
import tyro

import generate
import grpo
from training.prompts import jobs_of_step, load_prompts
from training.records import read_json, read_jsonl

FLAGS = (
    "--num-generations 2 --prompts-per-step 2 --eval-images 1 --eval-steps 9 --save-steps 1 "
    "--max-thought 40 --learning-rate 3e-3 --warmup-ratio 0 --device cpu --run-name run"
).split()
CONSTRAINED = "--rewards hps,artifact --combine constrained --floor .6 --max-steps 2 --best-of 2"
CONSTRAINED = CONSTRAINED.split()


def run(place, *flags):
    cfg = tyro.cli(grpo.Config, args=[*FLAGS, "--output-dir", str(place), *flags])
    grpo.main(cfg)
    return cfg, place / "run"


@pytest.fixture(scope="module")
def constrained(tmp_path_factory):
    return run(tmp_path_factory.mktemp("runs"), *CONSTRAINED)


def test_a_step_of_a_run_is_sampled_anew_from_the_policy_that_the_last_one_left(constrained, hps):
    """New prompts, and random numbers of this step."""
    cfg, folder = constrained
    rows, records = load_prompts(cfg.prompts), read_jsonl(folder / "rollouts/step_000001.jsonl")
    jobs = jobs_of_step(rows, 1, cfg)
    assert [(r["id"], r["sample"]) for r in records] == [(rows[i]["id"], k) for i, k in jobs]
    policy = generate.load_policy(str(folder / "checkpoints/step-000001"))
    again = grpo.rollout(policy, rows, jobs, 1, cfg)
    assert [r["thought"] for r in records] == again.thoughts
    assert [r["hps"] for r in records] == pytest.approx(hps(again.prompts, again.images).tolist())


def test_best_of_n_of_a_run_is_of_the_base_policy_on_test_prompts(constrained, policy, hps):
    cfg, folder = constrained
    rows, records = load_prompts(cfg.test_prompts), read_jsonl(folder / "best_of_n.jsonl")
    assert [r["id"] for r in records] == [row["id"] for row in rows[:40] for _ in range(2)]
    again = grpo.rollout(policy, rows, [(i, k) for i in range(4) for k in range(2)], -2, cfg)
    scores = hps(again.prompts, again.images).tolist()
    assert [r["hps"] for r in records[:8]] == pytest.approx(scores, abs=1e-5)


def test_a_run_moves_its_multipliers_between_its_steps(constrained):
    _, folder = constrained
    first, second = (read_jsonl(folder / f"rollouts/step_00000{n}.jsonl") for n in (0, 1))
    assert all(r["total"] == pytest.approx(r["hps"] + r["artifact"], abs=1e-5) for r in first)
    weight = 1 + 0.1 * (0.6 - sum(r["artifact"] for r in first) / 4)
    assert all(
        r["total"] == pytest.approx(r["hps"] + weight * r["artifact"], abs=1e-5) for r in second
    )
    state = read_json(folder / "checkpoints/step-000001/state.json")
    assert state["multipliers"] == {"artifact": pytest.approx(weight)}


def test_a_resumed_run_has_its_multipliers_again(constrained, tmp_path):
    _, folder = constrained
    shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-000002")
    run(tmp_path, *CONSTRAINED, "--resume", "latest")
    for file in ("rollouts/step_000001.jsonl", "best_of_n.jsonl"):
        assert read_jsonl(tmp_path / "run" / file) == read_jsonl(folder / file)
    last = "checkpoints/step-000002/state.json"
    assert (
        read_json(tmp_path / "run" / last)["multipliers"] == read_json(folder / last)["multipliers"]
    )


def test_a_run_without_thoughts_goes_on_and_is_drawn_from_as_it_was_trained(tmp_path):
    """The text head has no gradient then, so Adam has no moments for it."""
    flags = "--rewards hps --best-of 0 --no-cot --cfg-weight 2".split()
    _, whole = run(tmp_path / "whole", *flags, "--max-steps", "2")
    _, parts = run(tmp_path / "parts", *flags, "--max-steps", "1")
    run(tmp_path / "parts", *flags, "--max-steps", "2", "--resume", "latest")
    file = "checkpoints/step-000002/model.safetensors"
    first, second = (generate.load_policy(str(folder)) for folder in (whole, parts))
    assert generate.default_cfg_weight(first) == generate.default_cfg_weight(second) == 2
    last = [read_jsonl(folder / "rollouts/step_000001.jsonl") for folder in (whole, parts)]
    assert [r["hps"] for r in last[0]] == [r["hps"] for r in last[1]]
    assert (whole / file).is_file()


def test_policy_and_reference_read_one_instruction(tmp_path, monkeypatch, config):
    """Also where a checkpoint brings an older one than the base model."""
    for rank in (0, 2):
        cfg, place = config(lora_rank=rank, cfg_weight=3.0), tmp_path / str(rank)
        policy, _ = grpo.load_policies(cfg)
        policy.reasoning = "Describe: {}"
        policy.save(place)
        policy, reference = grpo.load_policies(cfg, place)
        assert policy.reasoning == "Describe: {}" == (reference or policy).reasoning
        assert generate.default_cfg_weight(generate.load_policy(str(place))) == 3


def test_a_run_with_a_cure_uses_it_in_its_steps(tmp_path):
    flags = "--rewards hps --best-of 0 --max-steps 1 --cures.entropy-bonus .4 --cures.average .5"
    _, folder = run(tmp_path, *flags.split())
    records = read_jsonl(folder / "rollouts/step_000000.jsonl")
    # The policy is the reference still, so the entropies are equal.
    assert [r["total"] - r["hps"] for r in records] == pytest.approx([0.4] * 4, abs=1e-5)
