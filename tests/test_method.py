"""The method, number by number. Each expected value is computed by hand or by a naive loop, and not
by the code under test; so a wrong sign, a swapped bound or another constant fails here."""

import copy
import math

import pytest
import torch

import generate
import grpo
import rewards
from training.policy import trainable
from training.prompts import jobs_of_step, load_prompts, prompts_of_step

NAN = float("nan")


def tensor(*values):
    return torch.tensor(values)


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


def test_a_failed_score_gets_no_advantage_and_does_not_move_the_others():
    got = grpo.group_advantages(tensor(1.0, NAN, 3.0, 2.0), 4)
    assert got.tolist() == pytest.approx([-1 / 1.0001, 0, 1 / 1.0001, 0], abs=1e-5)
    # One score in a group of two is no comparison, and none is none.
    assert (grpo.group_advantages(tensor(NAN, 1.0, NAN, NAN), 2) == 0).all()


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
    assert grpo.guidance_weights(config(), policy) == (1.0, 1.0)  # the tiny checkpoint's own


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


def test_a_group_is_one_prompt_and_the_sample_numbers_from_zero(config):
    cfg = config(num_generations=3, prompts_per_step=2)
    rows = load_prompts(cfg.prompts)
    i, j = prompts_of_step(len(rows), 5, 2, cfg.seed)
    assert jobs_of_step(rows, 5, cfg) == [(i, 0), (i, 1), (i, 2), (j, 0), (j, 1), (j, 2)]


# --- the update ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_batch(policy):
    """Eight rollouts of two prompts, and advantages that are no z-scores."""
    prompts = [PROMPTS[0]] * 4 + [PROMPTS[2]] * 4
    rollouts = generate.sample(policy, prompts, [(3, 0, n // 4, n % 4) for n in range(8)])
    return rollouts, tensor(1.0, -0.5, 0.25, 0.0, 2.0, -1.0, -2.0, 0.5)


def other_policy(policy):
    """A reference policy that differs from the policy."""
    reference = copy.deepcopy(policy)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trainable(reference):
            parameter.add_(0.02 * torch.randn_like(parameter))
    return reference


def update(policy, reference, batch, cfg, lr=0.0):
    """One call of update_policy on a copy, by plain gradient descent: (policy, metrics)."""
    rollouts, advantages = batch
    trained = copy.deepcopy(policy)
    optimizer = torch.optim.SGD(trainable(trained), lr=lr)
    reference_NS = grpo.all_logprobs(reference, rollouts, cfg)
    return trained, grpo.update_policy(trained, reference_NS, optimizer, rollouts, advantages, cfg)


def naive_gradient(policy, reference, batch, beta, cfg_weight=1.0):
    """Gradient of  mean over all tokens of  -A log pi + beta k3,  a rollout at a time. With one
    update per rollout this is the gradient of the clipped loss, too."""
    rollouts, advantages = batch
    trained = copy.deepcopy(policy)
    total = 0.0
    for n in range(len(rollouts)):
        mask = rollouts.mask[n]
        logp = generate.logprobs(trained, rollouts[n : n + 1], cfg_weight)[0][mask]
        with torch.no_grad():
            ref = generate.logprobs(reference, rollouts[n : n + 1], cfg_weight)[0][mask]
        total = (
            total + (-advantages[n] * logp + beta * ((ref - logp).exp() - (ref - logp) - 1)).sum()
        )
    (total / rollouts.mask.sum()).backward()
    return torch.cat([p.grad.flatten() for p in trainable(trained)]), total.item()


def gradient_of(policy):
    return torch.cat([p.grad.flatten() for p in trainable(policy)])


@pytest.mark.parametrize("guidance, cfg_weight", [("guided", 2.0), ("cond", 2.0)])
def test_the_update_follows_the_gradient_of_the_loss_as_written(
    policy, small_batch, config, guidance, cfg_weight
):
    cfg = config(beta=0.3, max_grad_norm=1e9, guidance=guidance, cfg_weight=cfg_weight)
    reference = other_policy(policy)
    trained, metrics = update(policy, reference, small_batch, cfg)
    scored_with = cfg_weight if guidance == "guided" else 1.0
    expected, _ = naive_gradient(policy, reference, small_batch, 0.3, scored_with)
    assert (gradient_of(trained) - expected).norm() < 1e-4 * expected.norm()
    assert metrics["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-4)
    # pi_old is the policy before the update and not the reference: the ratio is 1, in every token.
    assert metrics["clip_ratio"] == 0 and metrics["skipped"] == 0


def test_the_logged_loss_and_kl_by_their_definitions(policy, small_batch, config):
    rollouts, advantages = small_batch
    reference = other_policy(policy)
    cfg = config(beta=0.3)
    _, metrics = update(policy, reference, small_batch, cfg)
    logp, ref = (grpo.all_logprobs(p, rollouts, cfg) for p in (policy, reference))
    k3 = ((ref - logp).exp() - (ref - logp) - 1)[rollouts.mask]
    tokens = rollouts.mask.sum(1)
    # At ratio 1 the surrogate of a token is its advantage.
    loss = (-(advantages * tokens).sum() + 0.3 * k3.sum()) / tokens.sum()
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert metrics["kl"] == pytest.approx(k3.sum().item() / 8, rel=1e-4)  # nats per rollout


def test_micro_batches_do_not_change_the_gradient(policy, small_batch, config):
    reference = other_policy(policy)
    gradients = [
        gradient_of(update(policy, reference, small_batch, config(micro_batch=size))[0])
        for size in (8, 3)
    ]
    assert torch.allclose(*gradients, atol=1e-6) and gradients[0].norm() > 0


def test_a_gradient_above_the_limit_is_scaled_down_to_it(policy, small_batch, config):
    reference = other_policy(policy)
    trained, metrics = update(policy, reference, small_batch, config(beta=0.3), lr=1.0)
    assert metrics["grad_norm"] > 1.0  # before clipping
    change = torch.cat([(a - b).flatten() for a, b in zip(trainable(trained), trainable(policy))])
    assert change.norm().item() == pytest.approx(1.0, rel=1e-3)  # lr 1, norm 1, the default limit


def test_a_second_update_has_a_ratio_and_may_be_clipped(policy, small_batch, config):
    cfg = config(updates_per_rollout=4, max_grad_norm=1e9)
    _, metrics = update(policy, policy, small_batch, cfg, lr=0.2)
    assert 0 < metrics["clip_ratio"] < 1
    # The first of two updates cannot be clipped: the share is a mean over both.
    tight = config(updates_per_rollout=2, epsilon=1e-9, epsilon_high=1e-9, max_grad_norm=1e9)
    _, metrics = update(policy, policy, small_batch, tight, lr=0.2)
    assert 0.4 < metrics["clip_ratio"] <= 0.5


def test_the_second_update_follows_the_clipped_surrogate(policy, small_batch, config):
    """Two updates against a loop that is written out."""
    rollouts, advantages = small_batch
    cfg = config(updates_per_rollout=2, beta=0.1, max_grad_norm=1e9)
    cfg.epsilon, cfg.epsilon_high = 0.05, 0.15
    reference = other_policy(policy)
    trained, _ = update(policy, reference, small_batch, cfg, lr=0.5)
    naive, mask = copy.deepcopy(policy), rollouts.mask
    with torch.no_grad():
        old, ref = (generate.logprobs(p, rollouts, 1.0) for p in (policy, reference))
    for _ in range(2):
        naive.model.zero_grad()
        logp = generate.logprobs(naive, rollouts, 1.0)
        ratio, A = (logp - old).exp(), advantages[:, None].expand_as(logp)
        clipped = torch.where(A > 0, ratio.clamp(max=1.15), ratio.clamp(min=0.95))
        k3 = (ref - logp).exp() - (ref - logp) - 1
        ((-clipped * A + 0.1 * k3)[mask].sum() / mask.sum()).backward()
        with torch.no_grad():
            for parameter in trainable(naive):
                parameter -= 0.5 * parameter.grad
    for a, b in zip(trainable(trained), trainable(naive)):
        assert torch.allclose(a, b, atol=1e-5)


def test_a_step_whose_gradient_is_not_finite_is_not_taken(policy, small_batch, config, monkeypatch):
    monkeypatch.setattr(grpo, "grpo_loss", lambda logprobs, *_: logprobs * NAN)
    trained, metrics = update(policy, policy, small_batch, config(updates_per_rollout=2), lr=1.0)
    assert metrics["skipped"] == 1
    assert all(torch.equal(a, b) for a, b in zip(trainable(trained), trainable(policy)))


def test_thought_and_picture_are_both_trained(policy, small_batch, config):
    trained, _ = update(policy, other_policy(policy), small_batch, config())
    assert trained.model.lm_head.weight.grad.norm() > 0  # only thoughts reach the text head


def test_the_learning_rate_falls_linearly_to_zero(config):
    cfg = config(learning_rate=4e-4, max_steps=4)
    rates = [grpo.learning_rate(step, cfg) for step in range(4)]
    assert rates == pytest.approx([4e-4, 3e-4, 2e-4, 1e-4])


# --- a whole step, with rewards that are known --------------------------------------------------


class Known:
    """A reward that returns the numbers it was given."""

    def __init__(self, *values):
        self.values = torch.tensor(values)

    def __call__(self, prompts, images, metadata=None):
        assert len(prompts) == len(images) == len(metadata) == len(self.values)
        return self.values


def known_rewards(weights, **loaded):
    heldout = [name for name in loaded if name not in weights]
    return rewards.Rewards(weights, heldout, loaded)


def test_a_step_scores_combines_and_updates(policy, small_batch, config):
    rollouts, _ = small_batch
    cfg = config(learning_rate=1e-2, max_steps=4, num_generations=4, combine="sum")
    a = Known(1.0, 2.0, 3.0, 4.0, 0.0, 0.0, 0.0, 1.0)
    b = Known(*[0.5] * 4, 1.0, 2.0, 3.0, 4.0)
    truth = Known(*range(8))
    known = known_rewards({"a": 1.0, "b": 2.0}, a=a, b=b, truth=truth)
    trained = copy.deepcopy(policy)
    optimizer, parts = torch.optim.SGD(trainable(trained), lr=1.0), []
    rows = load_prompts(cfg.prompts)
    scores, metrics = grpo.train_step(
        trained, policy, known, optimizer, rollouts, rows, 1, cfg, parts.append
    )
    assert scores["total"].tolist() == [2, 3, 4, 5, 2, 4, 6, 9]
    expected = grpo.group_advantages(tensor(2.0, 3, 4, 5, 2, 4, 6, 9), 4)
    assert torch.equal(scores["advantage"], expected)
    assert scores["truth"].tolist() == list(range(8))  # held out: scored, and in no total
    assert metrics["learning_rate"] == pytest.approx(7.5e-3)  # step 1 of 4
    assert metrics["kl"] == pytest.approx(0, abs=1e-6) and parts == ["score", "update"]
    change = grpo.all_logprobs(trained, rollouts, cfg) - grpo.all_logprobs(policy, rollouts, cfg)
    moved = (change * rollouts.mask).sum(1)
    assert torch.corrcoef(torch.stack([moved, expected]))[0, 1] > 0.7


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
        # (0, .3) is dominated by (1, .3), and (1, .1) by both (1, .3) and (2, .1)
        ("pareto", [NAN, 1.6, 2.2, NAN]),
        ("constrained", [3.0, 4.0, 3.0, 2.0]),  # a + 10 b
    ],
)
def test_rewards_are_combined_as_written(how, expected):
    got = rewards.combine(SCORES, WEIGHTS, 4, how, {"b": 10.0})
    assert got.tolist() == pytest.approx(expected, abs=1e-4, nan_ok=True)


def test_a_reward_with_a_negative_weight_is_better_when_smaller():
    got = rewards.combine(SCORES, {"a": 1.0, "b": -1.0}, 4, "pareto")
    # In (a, -b): (2, -.1) dominates all others.
    assert got.isnan().tolist() == [True, True, False, True]


def test_groups_are_combined_one_by_one():
    twice = {name: torch.cat([values, values + 7]) for name, values in SCORES.items()}
    got = rewards.combine(twice, WEIGHTS, 4, "normalized")
    assert torch.allclose(got[:4], got[4:], atol=1e-4)


def test_a_failed_score_makes_the_total_nan_and_leaves_the_others_alone():
    broken = {"a": tensor(0.0, NAN, 2.0, 1.0), "b": B}
    for how in ("sum", "normalized", "mean", "min", "uwo"):
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
    known.update_multipliers([{"b": 1.0}], "constrained", 0.5, rate=10.0)
    assert known.multipliers["b"] == 0.0
