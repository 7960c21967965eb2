"""The contenders of the benchmark compute the same. How fast they are is not tested: machines
differ."""

from types import SimpleNamespace

import pytest
import torch

import generate
from studies import bench
from training.memory_plan import janus_config, meta_model


def test_the_plain_algorithm_scores_what_ours_scores(policy):
    keys = [(0, 0, 0, k) for k in range(3)]
    rollouts = generate.sample(policy, ["a red star"] * 3, keys, cfg_weight=1.0, max_thought=40)
    tokens = (rollouts.thought_ids, rollouts.image_ids)
    with torch.no_grad():
        plain = bench.plain_logprobs(policy, rollouts.prompts, rollouts.thoughts, *tokens)
        ours = generate.logprobs(policy, rollouts, 1.0)
    assert torch.allclose(plain[rollouts.mask], ours[rollouts.mask], atol=1e-4)


@pytest.mark.parametrize("sampler", [bench.ours, bench.by_transformers, bench.by_plain_loop])
def test_every_sampler_draws_pictures_of_the_same_size(sampler, policy):
    ids = sampler(policy, ["a red star", "two blue circles"], 2.0)
    assert ids.shape == (2, 64) and ids.max() < 512


def test_the_tables_have_a_row_for_each_contender_and_each_part(policy):
    rows = bench.sampling_table(policy, ["a red star"] * 2, 1, 4800)
    names = [row["sampling"].split(",")[0] for row in rows]
    assert names == ["ours", "ours", "transformers", "plain loop"]
    *parts, whole = bench.step_table(8, 1)
    assert [part["a GRPO step, seconds"] for part in parts] == list(bench.PARTS.values())
    for name in ("ours", "plain"):
        assert whole[name] == pytest.approx(sum(part[name] for part in parts))


def test_a_round_of_the_benchmark_leaves_the_policy_as_it_was(monkeypatch):
    """Learning rate 0: each round measures the same policy, which writes thoughts of one length."""
    unchanged, our_step = [], bench.our_step

    def step(policy, *state):
        before = [p.clone() for p in policy.model.parameters()]
        seconds = our_step(policy, *state)
        unchanged.append(all(map(torch.equal, before, policy.model.parameters())))
        return seconds

    monkeypatch.setattr(bench, "our_step", step)
    bench.step_table(8, 1)
    assert unchanged == [True, True]  # the warm-up and one round


def test_a_janus_of_random_weights_is_sampled_by_all_contenders(monkeypatch):
    """In bfloat16, with the image head in float32, as load_policy leaves it."""
    small = janus_config("tiny")
    monkeypatch.setattr(bench, "janus_config", lambda name: small)
    monkeypatch.setattr(bench, "pick_device", lambda device: ("cpu", torch.bfloat16))
    policy = bench.load("Janus-Pro-1B")
    assert policy.language_model.dtype == torch.bfloat16
    rows = bench.sampling_table(policy, ["a red star"] * 2, 1, 4800)
    assert [row["tokens/s"] > 0 for row in rows] == [True] * 4


def test_the_roofline_of_janus_pro_1b_is_that_of_a_pocket_calculator():
    model = meta_model(janus_config("Janus-Pro-1B"))
    policy = SimpleNamespace(model=model, language_model=model.model.language_model, grid=24)
    # 2.5 GB of weights and, for 128 rows of 60 + 288 tokens, 8.8 GB of keys and values, 576 times,
    # at 4.8 TB/s
    assert bench.roofline(policy, 64, 5.0, 4800) == pytest.approx(1.36, abs=0.05)
