"""Rewards: one convention, one scoring rule for the judge, and no made-up numbers."""

import json
import math

import pytest
import torch
from PIL import Image

import artifact_reward
import generate
import rewards

NAN = math.nan


def test_every_reward_says_what_it_is():
    for kind in rewards.REWARDS.values():
        assert (
            len(kind.range) == 2
            and isinstance(kind.needs, tuple)
            and kind.reference
            and hasattr(kind, "checkpoint")
        )


def test_rewards_are_floats_one_per_picture_and_independent_of_the_batch(hps, artifact):
    images = [Image.new("RGB", (32, 32), color) for color in ("red", "white", "blue")]
    prompts = ["a red square", "a red square", "a blue square"]
    for reward in (hps, artifact, rewards.load("gold")):
        together = reward(prompts, images, None)
        assert together.dtype == torch.float32 and together.shape == (3,) and together.device.type == "cpu"
        assert torch.allclose(together[1:2], reward(prompts[1:2], images[1:2], None), atol=1e-5)


def test_parse_reads_names_and_weights():
    assert rewards.parse("hps,artifact:0.5") == {"hps": 1.0, "artifact": 0.5}


@pytest.mark.parametrize(
    "text, rule",
    [
        ("hsp", "unknown reward 'hsp'"),
        ("hps:heavy", "'heavy' is no number"),
        ("hps:nan", "is no number"),
        ("hps,hps:2", "named twice"),
    ],
)
def test_bad_rewards_are_one_clear_error(text, rule, capsys):
    with pytest.raises(SystemExit) as stop:
        rewards.parse(text)
    assert stop.value.code == 2 and rule in capsys.readouterr().err


def test_a_prompt_from_outside_the_tiny_world_has_no_gold_score():
    scores = rewards.load("gold")(["a red circle", "a corgi"], [Image.new("RGB", (32, 32))] * 2)
    assert scores[0] == 0 and scores[1].isnan()


# --- combining: groups of numbers to check by hand

A, B = torch.tensor([0.0, 1.0, 2.0, 1.0]), torch.tensor([0.3, 0.3, 0.1, 0.1])
SCORES, WEIGHTS = {"a": A, "b": B}, {"a": 1.0, "b": 2.0}


def test_sum_weighs_and_adds():
    assert torch.allclose(rewards.combine(SCORES, WEIGHTS, 4, "sum"), torch.tensor([0.6, 1.6, 2.2, 1.2]))


def test_normalized_forgets_scale():
    small = {"a": A, "b": B / 1000 * 1000}
    big = {"a": A * 50, "b": B}
    assert torch.allclose(
        rewards.combine(small, WEIGHTS, 4, "normalized"),
        rewards.combine(big, WEIGHTS, 4, "normalized"),
        atol=1e-2,
    )


def test_min_is_the_worst_opinion_and_mean_the_average():
    z = rewards.standardize(torch.stack([A, B], 1), 4)
    assert torch.allclose(z[:, 0], (A - 1) / (A.std() + 1e-4))
    assert torch.equal(rewards.combine(SCORES, WEIGHTS, 4, "min"), z.min(1).values)
    assert torch.equal(rewards.combine(SCORES, WEIGHTS, 4, "mean"), z.mean(1))
    assert torch.allclose(
        rewards.combine(SCORES, WEIGHTS, 4, "uwo"), z.mean(1) - 0.5 * ((z[:, 0] - z[:, 1]) / 2) ** 2
    )


def test_pareto_leaves_out_who_is_beaten_in_everything():
    # (0,.3) is beaten by (1,.3), (1,.1) by both (1,.3) and (2,.1); (1,.3) and (2,.1) by nobody.
    assert rewards.combine(SCORES, WEIGHTS, 4, "pareto").isnan().tolist() == [True, False, False, True]


def test_the_multiplier_rises_below_the_floor_and_falls_above_it_never_below_zero():
    below = rewards.update_multipliers({"b": 0.0}, {"b": torch.tensor([0.2, 0.4, NAN])}, {"b": 0.8}, rate=1.0)
    assert below["b"] == pytest.approx(0.5)
    assert rewards.update_multipliers({"b": 0.1}, {"b": torch.ones(2)}, {"b": 0.5}, rate=1.0)["b"] == 0
    total = rewards.combine(SCORES, WEIGHTS, 4, "constrained", {"b": 10.0})
    assert torch.allclose(total, A + 10 * B)


def test_a_failed_score_makes_the_total_nan_and_leaves_the_others_alone():
    broken = {"a": torch.tensor([0.0, NAN, 2.0, 1.0]), "b": B}
    for how in ("sum", "normalized", "mean", "min", "uwo"):
        assert rewards.combine(broken, WEIGHTS, 4, how).isnan().tolist() == [False, True, False, False]


def test_a_reward_of_the_wrong_length_stops_the_run():
    with pytest.raises(ValueError, match="2 scores|\\(2,\\) scores"):
        rewards.score({"x": lambda *_: torch.zeros(2)}, ["p"] * 3, [None] * 3)


# --- the tiny rewards: a preference model's blind spot, and a judge that looks


def pairs(split="test"):
    folder = generate.HERE / "tiny/pairs"
    rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
    return (
        [r["prompt"] for r in rows],
        [Image.open(folder / r["clean"]) for r in rows],
        [Image.open(folder / r["broken"]) for r in rows],
    )


def accuracy(reward, prompts, clean, broken):
    a, b = reward(prompts, clean), reward(prompts, broken)
    return ((a > b).float() + (a == b).float() / 2).mean().item()


def test_hps_is_nearly_blind_to_artifacts_and_the_judge_is_not(hps, artifact):
    """The paper's Table 2 in small: .53 and .80 there."""
    assert 0.35 < accuracy(hps, *pairs()) < 0.65
    assert accuracy(artifact, *pairs()) > 0.8


def test_the_judge_answers_the_question_it_is_asked(artifact):
    import random

    import tiny

    rng = random.Random(0)
    scenes = [tiny.sample_scene([("circle", None), ("square", None)], None, rng) for _ in range(48)]
    noisy = [tiny.to_image(tiny.corrupt(scene, "noise", 0.8, rng)) for scene in scenes]
    about_noise = torch.tensor(artifact_reward.ask(artifact.judge, "Do you see noise in this picture? Answer yes or no.", noisy))
    about_stains = torch.tensor(artifact_reward.ask(artifact.judge, "Do you see stains in this picture? Answer yes or no.", noisy))
    assert about_noise.mean() < 0.3 < 0.7 < about_stains.mean()


def test_pair_prompts_of_test_and_train_are_disjoint():
    assert not set(pairs("train")[0]) & set(pairs("test")[0]) and not set(pairs("train")[0]) & set(
        pairs("validation")[0]
    )
