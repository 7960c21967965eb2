"""The method, number by number. Each expected value is computed by hand or by a naive loop, and not
by the code under test; so a wrong sign, a swapped bound or another constant fails here."""

import copy
import math
import random

import pytest
import torch
from conftest import tensor

import generate
import grpo
import rewards
from training import log
from training import prompts as prompts_module
from training.cures import dominated, pareto_front
from training.prompts import jobs_of_step, load_prompts, prompts_of_step

NAN = float("nan")


# --- advantages ---------------------------------------------------------------------------------


def test_an_advantage_is_a_z_score_within_the_group():
    got = grpo.group_advantages(tensor(1.0, 2.0, 3.0, 10.0, 10.0, 40.0), 3)
    expected = [-1 / 1.0001, 0, 1 / 1.0001]  # mean 2, deviation 1 (n - 1), 1e-4 added
    expected += [-10 / 17.3206, -10 / 17.3206, 20 / 17.3206]  # mean 20, deviation sqrt(300)
    assert got.tolist() == pytest.approx(expected, abs=1e-5)


def test_the_epsilon_beside_the_deviation_is_one_ten_thousandth():
    got = grpo.group_advantages(tensor(0.0, 2e-4), 2)  # deviation sqrt(2) 1e-4
    assert got.tolist() == pytest.approx([-1 / (2**0.5 + 1), 1 / (2**0.5 + 1)], abs=1e-4)
    z = rewards.standardize(tensor(0.0, 2e-4)[:, None], 2)[:, 0]
    assert z.tolist() == pytest.approx([-1 / (2**0.5 + 1), 1 / (2**0.5 + 1)], abs=1e-4)
    by_batch = grpo.group_advantages(tensor(0.0, 2e-4, 0.0, 2e-4), 2, "global")
    deviation = (4 / 3) ** 0.5  # in units of 1e-4: four values 1 away from their mean, n - 1 = 3
    assert by_batch[1].item() == pytest.approx(1 / (deviation + 1), abs=1e-4)


@pytest.mark.parametrize("divide", ["group", "none", "global", "best"])
def test_a_unanimous_group_gives_no_advantage(divide):
    for reward in (0.5, 0.7, 1.36):  # the mean of eight times 1.36 is not 1.36 in float32
        assert (grpo.group_advantages(tensor(*[reward] * 8), 8, divide) == 0).all()


def test_a_unanimous_group_is_judged_by_its_own_rewards():
    """Neither another group nor a failed score makes a difference of 1e-7 an advantage."""
    values = tensor(*[1.36] * 8, *[0.4 * n for n in range(8)], *[1.36] * 7, NAN)
    for divide in ("group", "none", "global", "best"):
        got = grpo.group_advantages(values, 8, divide)
        assert (got[:8] == 0).all() and (got[16:] == 0).all() and got[15] > 0


def test_a_failed_score_gets_no_advantage_and_does_not_move_the_others():
    got = grpo.group_advantages(tensor(1.0, NAN, 3.0, 2.0), 4)
    assert got.tolist() == pytest.approx([-1 / 1.0001, 0, 1 / 1.0001, 0], abs=1e-5)
    # One score in a group of two is no comparison, and none is none.
    for divide in ("group", "none", "global", "best"):
        assert (grpo.group_advantages(tensor(NAN, 1.0, NAN, NAN), 2, divide) == 0).all()


def test_dr_grpo_does_not_divide_and_flow_grpo_divides_by_the_whole_batch():
    values = tensor(0.0, 2.0, 10.0, 10.2)
    centered = tensor(-1.0, 1.0, -0.1, 0.1)
    assert torch.allclose(grpo.group_advantages(values, 2, "none"), centered, atol=1e-5)
    # mean 5.55; squares 30.8025 + 12.6025 + 19.8025 + 21.6225 = 84.83; 84.83 / 3 = 28.2767
    by_batch = grpo.group_advantages(values, 2, "global")
    assert torch.allclose(by_batch, centered / (28.2767**0.5 + 1e-4), atol=1e-5)
    with_failure = grpo.group_advantages(tensor(0.0, 2.0, NAN, NAN), 2, "global")
    expected = [-1 / (2**0.5 + 1e-4), 1 / (2**0.5 + 1e-4), 0, 0]
    assert with_failure.tolist() == pytest.approx(expected, abs=1e-5)


def test_raft_imitates_the_best_of_each_group():
    got = grpo.group_advantages(tensor(1.0, NAN, 3.0, 5.0, 5.0, 5.0), 3, "best")
    assert got.tolist() == [0, 0, 1, 0, 0, 0]  # a unanimous group has no best
    assert grpo.group_advantages(tensor(1.0, 3.0, 2.0), 3, "best").tolist() == [0, 1, 0]


# --- KL and loss --------------------------------------------------------------------------------


def test_k3_by_hand_in_both_directions():
    # d = log pi_ref - log pi;  e^-1 - (-1) - 1 = .367879;  e^1 - 1 - 1 = .718282
    assert grpo.kl_k3(tensor(-1.0), tensor(-2.0)).item() == pytest.approx(0.367879, abs=1e-6)
    assert grpo.kl_k3(tensor(-2.0), tensor(-1.0)).item() == pytest.approx(0.718282, abs=1e-6)
    assert grpo.kl_k3(tensor(-1.5), tensor(-1.5)).item() == 0


def test_k3_estimates_the_kl_without_bias():
    p, q = tensor(0.7, 0.2, 0.1), tensor(0.4, 0.4, 0.2)
    expected = 0.7 * math.log(0.7 / 0.4) + 0.2 * math.log(0.2 / 0.4) + 0.1 * math.log(0.1 / 0.2)
    assert (p * grpo.kl_k3(p.log(), q.log())).sum().item() == pytest.approx(expected, abs=1e-6)


def loss_of(ratio, advantage, beta=0.0, reference=0.0, low=0.1, high=0.3):
    """The loss of one token whose old log-probability is 0, and its derivative by log pi."""
    logprob = tensor([math.log(ratio)]).requires_grad_()
    loss = grpo.grpo_loss(
        logprob,
        torch.zeros(1, 1),
        tensor([reference]),
        tensor(advantage),
        torch.ones(1, 1, dtype=torch.bool),
        beta,
        low,
        high,
    )
    loss.sum().backward()
    return loss.item(), logprob.grad.item()


@pytest.mark.parametrize(
    "ratio, advantage, loss, slope",
    [
        (1.0, 3.0, -3.0, -3.0),  # ratio 1: the gradient is REINFORCE's, minus the advantage
        (1.2, 1.0, -1.2, -1.2),  # within [.9, 1.3]
        (1.5, 1.0, -1.3, 0.0),  # too likely already: clipped at 1 + eps_high
        (1.5, -1.0, 1.5, 1.5),  # too likely and bad: not clipped
        (0.5, -1.0, 0.9, 0.0),  # unlikely already: clipped at 1 - eps_low
        (0.5, 1.0, -0.5, -0.5),  # unlikely and good: not clipped
    ],
)
def test_the_clipped_loss_by_hand(ratio, advantage, loss, slope):
    assert loss_of(ratio, advantage) == (
        pytest.approx(loss, abs=1e-6),
        pytest.approx(slope, abs=1e-6),
    )


def test_the_kl_penalty_is_added_and_pulls_towards_the_reference():
    # log pi = 0, log pi_ref = -1: k3 = .367879, its derivative 1 - e^-1 = .632121
    loss, slope = loss_of(1.0, 0.0, beta=0.5, reference=-1.0)
    assert loss == pytest.approx(0.5 * 0.367879, abs=1e-6)
    assert slope == pytest.approx(0.5 * 0.632121, abs=1e-6)  # > 0: descent lowers log pi


def test_padding_is_no_action():
    logprobs = torch.randn(1, 3, requires_grad=True)
    mask = tensor([True, False, True])
    old, reference = logprobs.detach(), torch.zeros(1, 3)
    loss = grpo.grpo_loss(logprobs, old, reference, torch.ones(1), mask, 0.1, 0.2, 0.2)
    loss.sum().backward()
    assert loss[0, 1] == 0 and logprobs.grad[0, 1] == 0 and (logprobs.grad[0, [0, 2]] != 0).all()


# --- sampling and scoring -----------------------------------------------------------------------

PROMPTS = ["a red circle", "three blue crosses", "a yellow star above a purple square"]
KEYS = [(7, 0, i, 0) for i in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def rollouts(policy):
    return generate.sample(policy, PROMPTS, KEYS, cfg_weight=2.0)


def test_the_random_numbers_of_a_rollout_come_from_its_key_alone():
    first = generate.uniform_numbers([(42, 0, 5, 1), (42, 0, 5, 2)], 3)
    assert first[0].tolist() == pytest.approx(
        [0.304000, 0.621850, 0.196332], abs=1e-6
    )  # on any machine, in any version
    assert torch.equal(generate.uniform_numbers([(42, 0, 5, 2)], 3)[0], first[1])
    assert not torch.equal(first[0], first[1])


def test_guidance_is_u_plus_w_times_the_difference():
    logits = tensor([2.0, 0.0], [1.0, 1.0])  # a row with the prompt, a row without
    assert generate.apply_cfg(logits, 3.0).tolist() == [[4.0, -2.0]]
    assert generate.apply_cfg(logits, 1).tolist() == logits.tolist()


def test_what_is_sampled_and_what_is_scored_under_guidance(policy, config):
    weights = {
        name: grpo.guidance_weights(config(guidance=name, cfg_weight=5.0), policy)
        for name in ("guided", "cond", "none")
    }
    assert weights == {"guided": (5.0, 5.0), "cond": (5.0, 1.0), "none": (1.0, 1.0)}
    assert config().guidance == "guided"  # the exact one, unless another is asked for
    assert grpo.guidance_weights(config(), policy) == (1.0, 1.0)  # the tiny checkpoint's own
    assert grpo.guidance_weights(config(cfg_weight=0.0), policy) == (0.0, 0.0)


def naive_logprobs(policy, prompt, thought_ids, thought, image_ids, cfg_weight):
    """log pi of each token of one rollout by one full forward pass for each token: no cache, no
    padding, no batch, the definition itself."""
    model, embed_text = policy.model, policy.language_model.get_input_embeddings()

    def hidden(x):
        return policy.language_model(inputs_embeds=x[None], use_cache=False).last_hidden_state[
            0, -1
        ]

    found, context = [], generate.thought_context(policy, [prompt])[0][0]
    for t, token in enumerate(thought_ids):
        logits = model.lm_head(hidden(embed_text(torch.cat([context, thought_ids[:t]]))))
        found.append(logits.log_softmax(-1)[token].item())
    context = generate.image_context(policy, [prompt], [thought])[0][0]
    blank = context.clone()
    blank[1:-1] = policy.tokenizer.pad_token_id  # begin of sentence and begin of image stay
    for t, token in enumerate(image_ids):
        before = model.prepare_embeddings_for_image_generation(image_ids[:t])
        c, u = (
            model.model.generation_head(hidden(torch.cat([embed_text(ids), before])))
            for ids in (context, blank)
        )
        logits = u + cfg_weight * (c - u)
        found.append(logits.log_softmax(-1)[token].item())
    return found


@torch.no_grad()
@pytest.mark.parametrize("cfg_weight", [1.0, 3.0])
def test_logprobs_equal_the_definition_token_by_token(policy, rollouts, cfg_weight):
    scored = generate.logprobs(policy, rollouts, cfg_weight)
    for n in (0, 2):  # the shortest prompt, and the longest
        words = rollouts.thought_ids[n][rollouts.thought_mask[n]]
        expected = naive_logprobs(
            policy, PROMPTS[n], words, rollouts.thoughts[n], rollouts.image_ids[n], cfg_weight
        )
        assert scored[n][rollouts.mask[n]].tolist() == pytest.approx(expected, abs=1e-4)


@torch.no_grad()
def test_without_a_thought_only_the_picture_is_scored(policy):
    rollouts = generate.sample(policy, PROMPTS, KEYS, cot=False, cfg_weight=3.0)
    scored = generate.logprobs(policy, rollouts, 3.0)
    assert scored.shape == (3, policy.grid**2) and rollouts.thoughts == ["", "", ""]
    expected = naive_logprobs(policy, PROMPTS[1], [], "", rollouts.image_ids[1], 3.0)
    assert scored[1].tolist() == pytest.approx(expected, abs=1e-4)


def test_the_end_of_the_thought_is_an_action_and_padding_is_none(policy, rollouts):
    eos, T = policy.tokenizer.eos_token_id, policy.grid**2
    for ids, mask in zip(rollouts.thought_ids.tolist(), rollouts.mask):
        length = ids.index(eos) + 1  # the words and the end-of-sentence token
        assert mask.tolist() == [i < length for i in range(len(ids))] + [True] * T
    assert len({ids.index(eos) for ids in rollouts.thought_ids.tolist()}) > 1


def test_the_flag_guidance_decides_which_logprobs_train(policy, rollouts, config):
    scored = {
        name: grpo.all_logprobs(policy, rollouts, config(guidance=name, cfg_weight=2.0))
        for name in ("guided", "cond")
    }
    assert not scored["cond"].requires_grad
    for name, cfg_weight in (("guided", 2.0), ("cond", 1.0)):
        expected = generate.logprobs(policy, rollouts, cfg_weight).detach()
        assert torch.allclose(scored[name], expected, atol=1e-5)
    assert (scored["guided"] - scored["cond"])[rollouts.mask].abs().max() > 0.01


# --- the prompts of a step ----------------------------------------------------------------------


def test_each_prompt_comes_once_an_epoch_in_an_order_that_only_the_seed_decides():
    chosen = [i for step in range(5) for i in prompts_of_step(10, step, 4, seed=1)]
    assert sorted(chosen[:10]) == sorted(chosen[10:]) == list(range(10))
    assert chosen[:10] != chosen[10:] and chosen[:10] != list(range(10))
    assert chosen == [i for step in range(5) for i in prompts_of_step(10, step, 4, seed=1)]
    assert chosen != [i for step in range(5) for i in prompts_of_step(10, step, 4, seed=2)]


def test_an_epoch_is_a_permutation_by_the_seed_and_its_number():
    first, second = (random.Random(f"1 {epoch}").sample(range(10), 10) for epoch in (0, 1))
    assert prompts_of_step(10, 0, 4, seed=1) == first[:4]
    assert prompts_of_step(10, 2, 4, seed=1) == first[8:] + second[:2]


def test_groups_are_dealt_out_to_the_processes_in_turn(config, monkeypatch):
    cfg = config(num_generations=2, prompts_per_step=6)
    rows = load_prompts(cfg.prompts)
    monkeypatch.setattr(prompts_module, "world_size", lambda: 3)
    monkeypatch.setattr(prompts_module, "rank", lambda: 1)
    chosen = prompts_of_step(len(rows), 5, 6, cfg.seed)
    expected = [(i, k) for i in (chosen[1], chosen[4]) for k in (0, 1)]
    assert jobs_of_step(rows, 5, cfg) == expected


def test_a_group_is_one_prompt_and_the_sample_numbers_from_zero(config):
    cfg = config(num_generations=3, prompts_per_step=2)
    rows = load_prompts(cfg.prompts)
    i, j = prompts_of_step(len(rows), 5, 2, cfg.seed)
    assert jobs_of_step(rows, 5, cfg) == [(i, 0), (i, 1), (i, 2), (j, 0), (j, 1), (j, 2)]


@pytest.mark.parametrize("world", [1, 3])
def test_no_two_rollouts_of_a_step_have_the_same_random_numbers(world, config, monkeypatch):
    """Where two epochs meet a prompt can come twice in a step: its groups are two, not copies."""
    rows, cfg, repeated = [{}] * 20, config(prompts_per_step=16, num_generations=4), 0
    monkeypatch.setattr(prompts_module, "world_size", lambda: world)
    for step in range(30):
        jobs = []
        for rank in range(world):
            monkeypatch.setattr(prompts_module, "rank", lambda rank=rank: rank)
            mine = jobs_of_step(rows, step, cfg)
            assert all(len({i for i, _ in mine[n : n + 4]}) == 1 for n in range(0, len(mine), 4))
            jobs += mine
        assert len(set(jobs)) == len(jobs) == 64
        repeated += len({i for i, _ in jobs}) < 16
    assert repeated > 5  # else this tests nothing


# --- several rewards, one number ----------------------------------------------------------------

A, B = tensor(0.0, 1.0, 2.0, 1.0), tensor(0.3, 0.3, 0.1, 0.1)
SCORES, WEIGHTS = {"a": A, "b": B}, {"a": 1.0, "b": 2.0}
# Deviations with n - 1: a: sqrt(2 / 3) = .816497, b: sqrt(.04 / 3) = .115470
Z_A = [-1 / 0.816597, 0, 1 / 0.816597, 0]
Z_B = [0.1 / 0.115570, 0.1 / 0.115570, -0.1 / 0.115570, -0.1 / 0.115570]


@pytest.mark.parametrize(
    "how, expected",
    [
        ("sum", [0.6, 1.6, 2.2, 1.2]),
        ("normalized", [a + 2 * b for a, b in zip(Z_A, Z_B)]),
        ("mean", [(a + b) / 2 for a, b in zip(Z_A, Z_B)]),
        ("min", [min(a, b) for a, b in zip(Z_A, Z_B)]),
        # mean - variance / 2; the variance of two numbers is a quarter of their difference squared
        ("uwo", [(a + b) / 2 - (a - b) ** 2 / 8 for a, b in zip(Z_A, Z_B)]),
        ("pareto", [0.6, 1.6, 2.2, 1.2]),  # `pareto_front` says which of them teach
        (
            "winrate",
            [(0 + 2 * 2.5) / 3, (1.5 + 2 * 2.5) / 3, (3 + 2 * 0.5) / 3, (1.5 + 2 * 0.5) / 3],
        ),
        ("quantized", [0.6, 1.6, 2.2, 1.2]),
        ("constrained", [3.0, 4.0, 3.0, 2.0]),  # a + 10 b
    ],
)
def test_rewards_are_combined_as_written(how, expected):
    got = rewards.combine(SCORES, WEIGHTS, 4, how, {"b": 10.0})
    assert got.tolist() == pytest.approx(expected, abs=1e-4, nan_ok=True)


def test_quantized_rewards_are_rounded_to_tenths_each_with_its_weight():
    scores = {"a": tensor(0.04, 0.06, NAN, -0.26), "b": tensor(0.5, 0.5, 0.5, 0.52)}
    got = rewards.combine(scores, {"a": 1.0, "b": 0.1}, 4, "quantized")
    expected = [0.0, 0.1, NAN, -0.2]  # .05 is rounded to 0 (to even), .052 to .1
    assert got.tolist() == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_without_a_choice_the_rewards_are_added():
    assert rewards.combine(SCORES, WEIGHTS, 4).tolist() == pytest.approx([0.6, 1.6, 2.2, 1.2])


def test_a_reward_with_a_negative_weight_is_better_when_smaller():
    # (0, .3) is dominated by (1, .3), and (1, .1) by both (1, .3) and (2, .1)
    assert pareto_front(SCORES, WEIGHTS, 4).tolist() == [False, True, True, False]
    # In (a, -b): (2, -.1) dominates all others.
    got = pareto_front(SCORES, {"a": 1.0, "b": -1.0}, 4)
    assert got.tolist() == [False, False, True, False]


def test_a_reward_without_weight_decides_no_comparison():
    scores = {"a": A, "b": tensor(1.0, -1.0, 0.0, 1.0)}
    got = pareto_front(scores, {"a": 1.0, "b": 0.0}, 4)
    assert got.tolist() == [False, False, True, False]


def test_groups_are_combined_one_by_one():
    twice = {name: torch.cat([values, values + 7]) for name, values in SCORES.items()}
    got = rewards.combine(twice, WEIGHTS, 4, "normalized")
    assert torch.allclose(got[:4], got[4:], atol=1e-4)


def test_groups_do_not_see_each_other():
    values = tensor(0.0, 2.0, 10.0, 14.0)[:, None]
    z = rewards.standardize(values, 2)[:, 0]  # deviations sqrt(2) and 2 sqrt(2)
    expected = [-1 / 1.414314, 1 / 1.414314, -2 / 2.828527, 2 / 2.828527]
    assert z.tolist() == pytest.approx(expected, abs=1e-5)
    # (2, 2) would dominate all, but it is in the other group.
    pairs = tensor([0.0, 1.0], [1.0, 0.0], [2.0, 2.0], [1.0, 2.0])
    assert dominated(pairs, 2).tolist() == [False, False, False, True]


def test_equal_rollouts_do_not_dominate_each_other():
    assert dominated(tensor([1.0, 2.0], [1.0, 2.0]), 2).tolist() == [False, False]


def test_one_score_in_a_group_is_no_comparison():
    z = rewards.standardize(tensor(NAN, 3.0, NAN, NAN)[:, None], 2)[:, 0]
    assert z.tolist() == pytest.approx([NAN, 0, NAN, NAN], nan_ok=True)


def test_what_is_sampled_is_what_is_scored_and_a_sharper_scorer_is_seen(policy, config):
    """The mean of -log pi - entropy over the tokens of 64 pictures, in standard errors."""
    prompts, keys = ["a red circle"] * 64, [(5, 0, 0, k) for k in range(64)]
    rollouts, cfg = generate.sample(policy, prompts, keys, max_thought=40), config()

    def surprise(scorer):
        own_NS2 = grpo.all_logprobs(scorer, rollouts, cfg, generate.with_entropies)
        assert torch.allclose(own_NS2[..., 0], grpo.all_logprobs(scorer, rollouts, cfg))
        values = log.token_scores(own_NS2[..., 0], -own_NS2.sum(-1), rollouts.mask)
        mean = values["check/surprise"]
        return (mean.mean() / (mean.std() / 8)).item()

    sharper = copy.deepcopy(policy)
    with torch.no_grad():  # logits times 1.5
        sharper.model.model.generation_head.vision_head.weight.mul_(1.5)
        sharper.model.model.generation_head.vision_head.bias.mul_(1.5)
    assert abs(surprise(policy)) < 3
    assert abs(surprise(sharper)) > 5


def test_a_failed_score_makes_the_total_nan_and_leaves_the_others_alone():
    broken = {"a": tensor(0.0, NAN, 2.0, 1.0), "b": B}
    for how in ("sum", "normalized", "mean", "min", "uwo", "winrate", "quantized"):
        got = rewards.combine(broken, WEIGHTS, 4, how)
        assert got.isnan().tolist() == [False, True, False, False]
    z = rewards.standardize(broken["a"][:, None], 4)[:, 0]  # 0, 2, 1: mean 1, deviation 1
    assert z.tolist() == pytest.approx([-1 / 1.0001, NAN, 1 / 1.0001, 0], nan_ok=True, abs=1e-5)


def test_the_multiplier_rises_below_the_floor_and_falls_above_it_never_below_zero():
    records = [{"b": 0.2}, {"b": 0.4}, {"b": NAN}]  # mean .3
    known = rewards.Rewards({"a": 1.0, "b": 1.0}, [], {"a": None, "b": None})
    assert known.multipliers == {"b": 1.0}  # of all training rewards but the first
    known.update_multipliers(records, "sum", 0.8)
    assert known.multipliers == {"b": 1.0}
    known.update_multipliers(records, "constrained", 0.8)
    assert known.multipliers["b"] == pytest.approx(1 + 0.1 * 0.5)
    known.update_multipliers(records, "constrained", 0.8, rate=1.0)
    assert known.multipliers["b"] == pytest.approx(1.55)
    known.update_multipliers([{"b": NAN}], "constrained", 0.8)  # a step without a score
    assert known.multipliers["b"] == pytest.approx(1.55)
    known.update_multipliers([{"b": 1.0}], "constrained", 0.5, rate=10.0)
    assert known.multipliers["b"] == 0.0
