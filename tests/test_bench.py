"""The benchmark compares things that compute the same; how fast they are is not tested, machines differ."""

import torch

import generate
from studies import bench


def test_the_plain_algorithm_scores_what_ours_scores(policy):
    rollouts = generate.sample(
        policy, ["a red star"] * 3, [(0, 0, 0, k) for k in range(3)], cot=False, cfg_weight=1.0
    )
    plain = bench.plain_logprobs(
        policy, rollouts.prompts, rollouts.thoughts, rollouts.thought_ids, rollouts.image_ids
    )
    with torch.no_grad():
        assert torch.allclose(plain, generate.logprobs(policy, rollouts), atol=1e-4)


def test_all_samplers_paint_pictures_of_the_same_size(policy):
    for sampler in (bench.ours, bench.by_transformers, bench.by_plain_loop):
        ids = sampler(policy, ["a red star", "two blue circles"], 2.0)
        assert ids.shape == (2, 64) and ids.max() < 256


def test_tables_have_a_row_for_each_contender(policy):
    rows = bench.sampling_table(policy, ["a red star"] * 2, 1, 4800)
    assert [row["sampling"].split(",")[0] for row in rows] == [
        "ours",
        "ours",
        "transformers",
        "plain loop",
    ]
    parts = bench.step_table(bench.Config(pictures=8), 1)
    total = sum(row["ours"] for row in parts[:-1])
    assert parts[-1]["a GRPO step, seconds"] == "all" and abs(parts[-1]["ours"] - total) < 1e-9


def test_the_roofline_of_janus_pro_1b_is_that_of_a_pocket_calculator():
    from training import sharding as scale

    model = scale.meta_model(scale.janus_config("Janus-Pro-1B"))
    policy = type("P", (), dict(model=model, body=model.model.language_model, grid=24))
    # 2.5 GB of weights and, for 128 rows of 60 + 288 tokens, 8.8 GB of keys and values, 576 times, at 4.8 TB/s
    assert abs(bench.roofline(policy, 64, 5.0, 4800) - 1.36) < 0.05
