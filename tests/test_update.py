"""A step of GRPO: the update, a whole step with rewards that are known, the tests, best-of-n, and
what several processes share. Expected values come from loops that are written out here."""

import contextlib
import copy
import math
import types

import pytest
import torch
import torch.distributed as dist
import torch.distributed.tensor
from conftest import tensor

import generate
import grpo
import rewards
from training import log, processes, sharding
from training.policy import trainable
from training.prompts import load_prompts

NAN = float("nan")
PROMPTS = ["a red circle", "a yellow star above a purple square"]


# --- the update ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_batch(policy):
    """Eight rollouts of two prompts, and advantages that are no z-scores."""
    prompts = [PROMPTS[0]] * 4 + [PROMPTS[1]] * 4
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
    betas = torch.full((len(rollouts),), cfg.beta)
    parts = (trained, reference_NS, optimizer, rollouts, advantages, betas, cfg)
    return trained, grpo.update_policy(*parts)


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
        k3 = (ref - logp).exp() - (ref - logp) - 1
        total = total + (-advantages[n] * logp + beta * k3).sum()
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
    assert metrics["entropy"] == pytest.approx(-logp[rollouts.mask].mean().item(), rel=1e-4)
    assert metrics["entropy/picture"] == pytest.approx(-logp[:, -64:].mean().item(), rel=1e-4)


def test_micro_batches_change_neither_the_gradient_nor_the_metrics(policy, small_batch, config):
    reference = other_policy(policy)
    cfg = {"updates_per_rollout": 2, "epsilon": 0.02, "beta": 0.3, "max_grad_norm": 1e9}
    whole, parts = (
        update(policy, reference, small_batch, config(micro_batch=size, **cfg), lr=0.2)
        for size in (8, 3)
    )
    gradients = [gradient_of(trained) for trained, _ in (whole, parts)]
    assert (gradients[0] - gradients[1]).norm() < 1e-3 * gradients[0].norm()
    assert parts[1] == pytest.approx(whole[1], rel=1e-3) and parts[1]["clip_ratio"] > 0


def test_a_gradient_above_the_limit_is_scaled_down_to_it(policy, small_batch, config):
    reference = other_policy(policy)
    cfg = config(beta=0.3, max_grad_norm=0.1)
    trained, metrics = update(policy, reference, small_batch, cfg, lr=1.0)
    assert metrics["grad_norm"] > 0.1  # before clipping
    change = torch.cat([(a - b).flatten() for a, b in zip(trainable(trained), trainable(policy))])
    assert change.norm().item() == pytest.approx(0.1, rel=1e-3)  # rate 1 x norm .1


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


def test_the_loss_of_a_step_is_a_mean_over_the_updates_that_were_tried(
    policy, small_batch, config, monkeypatch
):
    """The second of four gradients is not finite: two losses are known."""
    losses, norms = iter([1.0, 3.0]), iter([1.0, NAN])

    def compute_gradient(policy, reference_NS, rollouts, advantages, betas, old, *rest):
        old[:] = [reference_NS]
        return next(losses), 0

    monkeypatch.setattr(grpo, "compute_gradient", compute_gradient)
    monkeypatch.setattr(grpo.sharding, "clip_gradients", lambda *_: torch.tensor(next(norms)))
    _, metrics = update(policy, policy, small_batch, config(updates_per_rollout=4))
    assert metrics["loss"] == pytest.approx(2.0) and metrics["skipped"] == 1


def test_thought_and_picture_are_both_trained(policy, small_batch, config):
    trained, _ = update(policy, other_policy(policy), small_batch, config())
    assert trained.model.lm_head.weight.grad.norm() > 0  # only thoughts reach the text head


def test_repeated_updates_log_the_mean_of_their_losses(policy, small_batch, config):
    """At a learning rate of 0 all updates are the same one."""
    reference = other_policy(policy)
    once, twice = (
        update(policy, reference, small_batch, config(beta=0.3, updates_per_rollout=n))[1]
        for n in (1, 2)
    )
    assert twice == pytest.approx(once, rel=1e-5) and once["loss"] != 0


def test_the_clipped_share_is_of_the_tokens_that_were_sampled(policy, small_batch, config):
    """The second of two updates, against ratios that are computed here."""
    rollouts, _ = small_batch
    cfg = config(updates_per_rollout=2, epsilon=0.02, epsilon_high=0.05, max_grad_norm=1e9)
    trained, _ = update(policy, policy, small_batch, config(max_grad_norm=1e9), lr=0.2)
    _, metrics = update(policy, policy, small_batch, cfg, lr=0.2)
    before, after = (grpo.all_logprobs(p, rollouts, cfg) for p in (policy, trained))
    ratio = (after - before).exp()[rollouts.mask]
    share = ((ratio < 0.98) | (ratio > 1.05)).float().mean().item()
    assert metrics["clip_ratio"] == pytest.approx(share / 2, abs=2e-3) and share > 0.05
    assert (ratio < 0.98).any() and (ratio > 1.05).any()


def test_a_process_has_its_share_of_one_loss(policy, small_batch, config, monkeypatch):
    """Two processes with the same rollouts: each has half of the gradient, and the metrics are
    those of one."""
    reference, cfg = other_policy(policy), config(beta=0.3, max_grad_norm=1e9)
    alone, metrics = update(policy, reference, small_batch, cfg)
    twice = lambda numbers: [2 * number for number in numbers]
    monkeypatch.setattr(processes, "sum_over_processes", twice)
    half, both = update(policy, reference, small_batch, cfg)
    assert torch.allclose(2 * gradient_of(half), gradient_of(alone), atol=1e-6)
    assert both == pytest.approx(metrics | {"grad_norm": metrics["grad_norm"] / 2}, rel=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_mode_is_on_only_while_activations_are_checkpointed(
    policy, small_batch, config, monkeypatch, checkpointing
):
    modes, logprobs = [], generate.logprobs

    def spy(policy, *args):
        modes.append(policy.language_model.training)
        return logprobs(policy, *args)

    reference_NS = grpo.all_logprobs(policy, small_batch[0], config())
    monkeypatch.setattr(generate, "logprobs", spy)
    trained = copy.deepcopy(policy)
    optimizer = torch.optim.SGD(trainable(trained), lr=0.0)
    cfg = config(gradient_checkpointing=checkpointing)
    betas = torch.full((len(small_batch[0]),), cfg.beta)
    grpo.update_policy(trained, reference_NS, optimizer, *small_batch, betas, cfg)
    assert modes == [checkpointing] and not trained.language_model.training


def test_the_optimizer_is_adamw_without_weight_decay(policy, config):
    optimizer = grpo.make_optimizer(policy, config(adam_beta2=0.5))
    (group,) = optimizer.param_groups
    assert type(optimizer) is torch.optim.AdamW and group["eps"] == 1e-8
    assert (group["betas"], group["weight_decay"]) == ((0.9, 0.5), 0)
    assert list(map(id, group["params"])) == list(map(id, trainable(policy)))


def test_the_learning_rate_rises_then_falls_linearly_to_zero(config):
    def rates(warmup_ratio, max_steps):
        cfg = config(learning_rate=12e-4, max_steps=max_steps, warmup_ratio=warmup_ratio)
        return [1e4 * grpo.learning_rate(step, cfg) for step in range(max_steps)]

    assert rates(0, 4) == pytest.approx([12, 9, 6, 3])
    assert rates(0.34, 9) == pytest.approx([3, 6, 9, 12, 10, 8, 6, 4, 2])
    assert rates(0.33, 1) == pytest.approx([12])  # too short for a warm-up


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
    cfg = config(learning_rate=1e-2, warmup_ratio=0, max_steps=4, num_generations=4)
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


def test_each_picture_is_scored_with_the_row_of_its_own_prompt(policy, small_batch, config):
    rollouts, _ = small_batch  # four of prompt 0, four of prompt 1
    rows = [{"prompt": PROMPTS[0], "n": 5}, {"prompt": PROMPTS[1], "n": 6}]
    seen = []

    def spy(prompts, images, metadata):
        seen.append((prompts, images, metadata))
        return torch.arange(8.0)

    known, cfg = known_rewards({"a": 1.0}, a=spy, b=spy), config()
    optimizer = torch.optim.SGD(trainable(copy.deepcopy(policy)), lr=0.0)
    clock = lambda name: None
    grpo.train_step(policy, policy, known, optimizer, rollouts, rows, 0, cfg, clock)
    expected = (rollouts.prompts, rollouts.images, [rows[0]] * 4 + [rows[1]] * 4)
    assert seen == [expected, expected]  # the training reward, then the held-out one


def test_a_step_uses_the_flags_of_the_combination(policy, small_batch, config, monkeypatch):
    rollouts, _ = small_batch
    rows = load_prompts(config().prompts)
    known = known_rewards({"a": 1.0, "b": 1.0}, a=Known(*range(8)), b=Known(*[1.0, 2.0] * 4))
    known.multipliers = {"b": 10.0}
    monkeypatch.setattr(grpo, "update_policy", lambda *_: {})
    optimizer = torch.optim.SGD(trainable(policy), lr=0.0)
    cfg = config(combine="constrained", advantage="best")
    arguments = (policy, policy, known, optimizer, rollouts, rows, 0, cfg, lambda name: None)
    scores, _ = grpo.train_step(*arguments)
    assert scores["total"].tolist() == [10, 21, 12, 23, 14, 25, 16, 27]  # a + 10 b
    assert scores["advantage"].tolist() == [0, 0, 0, 1, 0, 0, 0, 1]  # groups of four
    cfg.combine = "normalized"
    scores, _ = grpo.train_step(*arguments)
    # a: 1.5 from the mean, deviation sqrt(5 / 3) = 1.290994; b: .5 from it, sqrt(1 / 3) = .577350
    first = -1.5 / 1.291094 - 0.5 / 0.577450
    assert scores["total"][[0, 4]].tolist() == pytest.approx([first] * 2, abs=1e-5)


def test_the_gradients_of_the_trained_weights_are_summed(policy, small_batch, config, monkeypatch):
    summed = []
    monkeypatch.setattr(sharding, "sum_gradients", lambda parameters: summed.append(parameters))
    trained, _ = update(policy, policy, small_batch, config())
    assert [list(map(id, s)) for s in summed] == [list(map(id, trainable(trained)))]


def test_the_reference_policy_gives_the_kl_of_a_step(policy, small_batch, config, monkeypatch):
    """And the update gets everything in its place."""
    rollouts, _ = small_batch
    rows, cfg, reference = load_prompts(config().prompts), config(), other_policy(policy)
    got = []
    monkeypatch.setattr(grpo, "update_policy", lambda *a: got.append(a) or {"kl": 3.0})
    optimizer = torch.optim.SGD(trainable(policy), lr=0.0)
    known = known_rewards({"a": 1.0}, a=Known(*range(8)))
    clock = lambda name: None
    scores, metrics = grpo.train_step(
        policy, reference, known, optimizer, rollouts, rows, 0, cfg, clock
    )
    ((first, reference_NS, *others),) = got
    assert first is policy and torch.equal(
        reference_NS, grpo.all_logprobs(reference, rollouts, cfg)
    )
    assert others[0] is optimizer and others[1] is rollouts and others[4] is cfg
    assert torch.equal(others[2], scores["advantage"]) and metrics == {"kl": 3.0}
    assert others[3].tolist() == [pytest.approx(cfg.beta)] * 8


def test_an_adversary_learns_before_it_scores(policy, small_batch, config, monkeypatch):
    rollouts, _ = small_batch
    rows, log = load_prompts(config().prompts), []

    class Adversary:
        def learn(self, prompts, images):
            log.append("learn")
            return {"margin": 0.5}

        def __call__(self, prompts, images, metadata):
            log.append("score")
            return torch.zeros(8)

    monkeypatch.setattr(grpo, "update_policy", lambda *_: {"kl": 3.0})
    known = known_rewards({"d": 1.0}, d=Adversary())
    optimizer = torch.optim.SGD(trainable(policy), lr=0.0)
    arguments = (policy, policy, known, optimizer, rollouts, rows, 0, config(), lambda name: None)
    _, metrics = grpo.train_step(*arguments)
    assert log == ["learn", "score"] and metrics == {"d/margin": 0.5, "kl": 3.0}


@pytest.mark.parametrize("rank", [0, 1])
def test_the_deviation_of_the_whole_batch_is_of_all_processes(
    policy, small_batch, config, monkeypatch, rank
):
    """--advantage global, in the first and in the second of two processes."""
    rollouts, _ = small_batch
    other = [20.0, 0.0, 0.0, 0.0, 40.0, 0.0, 0.0, 0.0]
    local = [0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0]

    def gather(values):
        if len(values) == 1:  # how many rewards each process has
            return [8, 8]
        return other + values if rank else values + other

    monkeypatch.setattr(processes, "gather", gather)
    monkeypatch.setattr(processes, "rank", lambda: rank)
    monkeypatch.setattr(grpo, "update_policy", lambda *_: {})
    known = known_rewards({"a": 1.0}, a=Known(*local))
    optimizer = torch.optim.SGD(trainable(policy), lr=0.0)
    rows, cfg = load_prompts(config().prompts), config(advantage="global")
    arguments = (policy, policy, known, optimizer, rollouts, rows, 0, cfg, lambda name: None)
    scores, _ = grpo.train_step(*arguments)
    mean = sum(other + local) / 16
    std = (sum((v - mean) ** 2 for v in other + local) / 15) ** 0.5
    expected = [(v - group) / (std + 1e-4) for v, group in zip(local, [3.0] * 4 + [11.0] * 4)]
    assert scores["advantage"].tolist() == pytest.approx(expected, abs=1e-5)


# --- tests of the policy, and best-of-n ---------------------------------------------------------

ROWS = [
    {"id": "p", "prompt": "a red circle", "worth": 1.0},
    {"id": "q", "prompt": "three blue crosses", "worth": 2.0},
    {"id": "r", "prompt": "a cyan triangle", "worth": 3.0},
]


def worth(prompts, images, metadata):
    """A reward that reads the row of the prompt."""
    assert [row["prompt"] for row in metadata] == list(prompts) and len(images) == len(prompts)
    return torch.tensor([row["worth"] for row in metadata])


@pytest.mark.parametrize("guidance", ["guided", "cond"])
def test_a_test_draws_the_same_pictures_of_the_test_prompts_each_time(policy, config, guidance):
    """Five pictures of three prompts: one of each, then a second one of the first two."""
    reference = other_policy(policy)
    cfg = config(eval_images=5, micro_batch=2, rollout_batch=2, guidance=guidance, cfg_weight=2.0)
    known = known_rewards({"a": 1.0}, a=worth, b=lambda *_: -worth(*_))
    records, images = grpo.evaluate_policy(policy, reference, known, ROWS, cfg)
    jobs = [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1)]
    prompts, keys = [ROWS[i]["prompt"] for i, _ in jobs], [(42, -1, *job) for job in jobs]
    rollouts = generate.sample(policy, prompts, keys, cfg_weight=2.0, max_thought=40)
    assert [image.tobytes() for image in images] == [i.tobytes() for i in rollouts.images]
    assert [r["thought"] for r in records] == rollouts.thoughts
    assert [(r["id"], r["prompt"], r["sample"]) for r in records] == [
        (ROWS[i]["id"], ROWS[i]["prompt"], k) for i, k in jobs
    ]
    assert [(r["a"], r["b"]) for r in records] == [(w, -w) for w in (1, 2, 3, 1, 2)]
    weight = {"guided": 2.0, "cond": 1.0}[guidance]
    with torch.no_grad():
        pi, ref = (generate.logprobs(p, rollouts, weight) for p in (policy, reference))
    for record, mask, d in zip(records, rollouts.mask, ref - pi):
        kl = sum(math.exp(x) - x - 1 for x in d[mask].tolist())  # nats of the whole rollout
        assert record["kl"] == pytest.approx(kl, rel=1e-3) and kl > 0
    with torch.no_grad():
        own = generate.logprobs(policy, rollouts, weight, generate.with_entropies)
    for record, mask, both in zip(records, rollouts.mask, own):
        surprise = -both[mask].sum(1).mean().item()  # -log pi - entropy
        assert record["check/surprise"] == pytest.approx(surprise, abs=1e-4)
    statistics = {"brightness", "saturation", "edges", "entropy"}
    assert {f"image/{name}" for name in statistics} <= records[0].keys()


def test_the_pictures_of_a_test_are_dealt_out_to_the_processes(policy, config, monkeypatch):
    cfg = config(eval_images=5, cot=False)
    known, gathered = known_rewards({"a": 1.0}, a=worth), []
    whole = grpo.evaluate_policy(policy, policy, known, ROWS, cfg)
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    monkeypatch.setattr(processes, "gather", lambda results: gathered.append(results) or results)
    for rank in (0, 1):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        grpo.evaluate_policy(policy, policy, known, ROWS, cfg)
    assert [key[2:] for key, *_ in gathered[1]] == [(1, 0), (0, 1)]
    monkeypatch.setattr(processes, "gather", lambda results: gathered[0] + gathered[1])
    records, images = grpo.evaluate_policy(policy, policy, known, ROWS, cfg)
    # In order, whichever process made them; `is`, because they are the pictures that were gathered.
    assert [(r["id"], r["sample"]) for r in records] == [(r["id"], r["sample"]) for r in whole[0]]
    assert [i.tobytes() for i in images] == [i.tobytes() for i in whole[1]]


def test_best_of_n_draws_from_the_base_policy_and_adds_up_the_training_rewards(policy, config):
    cfg = config(best_of=3)
    known = known_rewards({"a": 2.0}, a=worth, b=lambda *_: -worth(*_))
    pool = grpo.best_of_n_pool(other_policy(policy), policy, known, ROWS[:2], cfg)
    jobs = [(i, k) for i in (0, 1) for k in (0, 1, 2)]
    prompts, keys = [ROWS[i]["prompt"] for i, _ in jobs], [(42, -2, *job) for job in jobs]
    thoughts = generate.sample(policy, prompts, keys, max_thought=40).thoughts
    assert pool == [
        {"id": ROWS[i]["id"], "prompt": ROWS[i]["prompt"], "sample": k, "thought": thought}
        | {"a": i + 1.0, "b": -i - 1.0, "total": 2 * (i + 1.0)}
        for (i, k), thought in zip(jobs, thoughts)
    ]


def test_best_of_n_ranks_by_the_objective_that_is_trained(policy, config):
    """The higher reward of each two pictures has the lower z-score sum here: .1 a + b."""
    known = known_rewards(
        {"a": 1.0, "b": 1.0},
        a=lambda prompts, *_: torch.tensor([10.0, 0.0, 0.0]),
        b=lambda prompts, *_: torch.tensor([0.0, 1.0, 0.9]),
    )
    best = {}
    for how in ("sum", "normalized", "pareto"):
        cfg = config(best_of=3, combine=how)
        pool = grpo.best_of_n_pool(policy, policy, known, ROWS[:1], cfg)
        best[how] = [record["total"] for record in pool]
    assert best["sum"] == best["pareto"] == pytest.approx([10.0, 1.0, 0.9])
    assert sum(best["normalized"]) == pytest.approx(0, abs=1e-4)


def test_best_of_n_takes_the_first_forty_prompts_dealt_out_to_the_processes(
    policy, config, monkeypatch
):
    asked = []

    def rollout(policy, rows, jobs, stream, cfg):
        asked.append(jobs)
        nothing = torch.zeros(len(jobs), 0, dtype=torch.long)
        keys = [(0, stream, *job) for job in jobs]
        return generate.Rollouts(keys, ["a"] * 2, ["t"] * 2, nothing, nothing, nothing, [0, 0])

    monkeypatch.setattr(grpo, "rollout", rollout)
    rows = [{"id": str(i), "prompt": "a", "worth": 1.0} for i in range(45)]
    known = known_rewards({"a": 1.0}, a=lambda *_: torch.ones(2))
    grpo.best_of_n_pool(policy, policy, known, rows, config(best_of=2))
    assert asked == [[(i, 0), (i, 1)] for i in range(40)]
    asked.clear()
    monkeypatch.setattr(processes, "rank", lambda: 1)
    monkeypatch.setattr(processes, "world_size", lambda: 3)
    grpo.best_of_n_pool(policy, policy, known, rows, config(best_of=2))
    assert asked == [[(i, 0), (i, 1)] for i in range(1, 40, 3)]


# --- several processes --------------------------------------------------------------------------


class TwoProcesses:
    """torch.distributed as the second of two processes sees it; the first one sent `other`."""

    def __init__(self, other):
        self.other = other

    def is_initialized(self):
        return True

    def get_world_size(self):
        return 2

    def all_gather_object(self, parts, local):
        assert len(parts) == 2
        parts[:] = [self.other, local]

    def all_reduce(self, local):
        local.add_(self.other)


def test_lists_are_gathered_in_the_order_of_the_ranks(monkeypatch):
    assert processes.gather([3]) == [3]
    monkeypatch.setattr(processes, "dist", TwoProcesses([1, 2]))
    assert processes.gather([3]) == [1, 2, 3]


def test_numbers_are_summed_one_by_one_without_rounding(monkeypatch):
    assert processes.sum_over_processes([1.0, 2]) == [1.0, 2.0]
    monkeypatch.setattr(processes, "dist", TwoProcesses([[2.0**24, 10]]))
    assert processes.sum_over_processes([1, 2.5]) == [2.0**24 + 1, 12.5]  # not so in float32


def parameters_with_gradients(*gradients):
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in gradients]
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient
    return parameters


def test_gradients_are_summed_over_the_processes(monkeypatch):
    """Each is its share of one loss, so they are added, not averaged. One parameter has none."""
    parameters = parameters_with_gradients(tensor(1.0, 2.0), None, tensor(3.0, 4.0))
    sharding.sum_gradients(parameters)
    assert parameters[2].grad.tolist() == [3, 4]  # alone
    monkeypatch.setattr(sharding, "dist", TwoProcesses(10.0))
    sharding.sum_gradients(parameters)
    assert parameters[0].grad.tolist() == [11, 12] and parameters[2].grad.tolist() == [13, 14]
    assert parameters[1].grad is None


def test_all_gradients_together_are_scaled_down_to_the_limit():
    parameters = parameters_with_gradients(tensor(3.0, 0.0), tensor(0.0, 4.0))
    assert sharding.clip_gradients(parameters, 10.0).item() == 5
    assert parameters[0].grad.tolist() == [3, 0]
    assert sharding.clip_gradients(parameters, 1.0).item() == 5  # before
    assert parameters[0].grad.tolist() == pytest.approx([0.6, 0], abs=1e-5)
    assert parameters[1].grad.tolist() == pytest.approx([0, 0.8], abs=1e-5)


@pytest.fixture
def process_group(tmp_path):
    """A real group of one process."""
    store = f"file://{tmp_path}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_shard_holds_an_averaged_gradient_and_the_norm_is_of_the_whole(
    process_group, monkeypatch
):
    """FSDP2 averages gradients; the sum is that times the number of processes."""
    mesh = dist.init_device_mesh("cpu", (1,))
    values = tensor(3.0, 4.0)
    shard = dist.tensor.distribute_tensor(values, mesh, [dist.tensor.Shard(0)])
    parameter = torch.nn.Parameter(shard)
    parameter.grad = shard.clone()
    monkeypatch.setattr(sharding, "world_size", lambda: 2)
    sharding.sum_gradients([parameter])
    assert parameter.grad.full_tensor().tolist() == [6, 8]
    norm = sharding.clip_gradients([parameter], 5.0)
    assert type(norm) is torch.Tensor and norm.item() == 10
    assert parameter.grad.full_tensor().tolist() == pytest.approx([3, 4], abs=1e-4)


def test_a_shard_that_is_not_finite_is_seen(process_group):
    mesh = dist.init_device_mesh("cpu", (1,))
    for value, finite in ((1.0, 1), (math.nan, 0)):
        shard = dist.tensor.distribute_tensor(tensor(value, 0.0), mesh, [dist.tensor.Shard(0)])
        model = torch.nn.ParameterList([torch.nn.Parameter(shard)])
        metrics = log.check_weights(types.SimpleNamespace(model=model))
        assert metrics == {"weights_finite": finite, "processes_agree": 1}


def policy_with_adapter():
    """(policy, events): events tells when its adapter was switched off and on."""
    events = []

    @contextlib.contextmanager
    def disable_adapter():
        events.append("off")
        yield
        events.append("on")

    adapter = types.SimpleNamespace(disable_adapter=disable_adapter)
    return types.SimpleNamespace(adapter=adapter), events


def test_the_reference_is_another_model_or_the_policy_without_its_adapter():
    policy, events = policy_with_adapter()
    with sharding.as_reference(policy, "reference") as chosen:
        assert chosen == "reference" and events == []
    with sharding.as_reference(policy, None) as chosen:
        assert chosen is policy and events == ["off"]
    assert events == ["off", "on"]


def test_with_lora_the_reference_policy_is_the_policy_without_its_adapter(monkeypatch):
    policy, events = policy_with_adapter()
    monkeypatch.setattr(grpo, "all_logprobs", lambda *arguments: events.append(arguments) or 5)
    assert grpo.reference_logprobs(policy, None, "rollouts", "cfg") == 5
    assert events == ["off", (policy, "rollouts", "cfg"), "on"]
    assert grpo.reference_logprobs(policy, "reference", "rollouts", "cfg") == 5
    assert events[3:] == [("reference", "rollouts", "cfg")]


def test_with_lora_the_base_policy_is_the_policy_without_its_adapter(config, monkeypatch):
    policy, events = policy_with_adapter()

    def rollout(chosen, *_):
        assert chosen is policy and events == ["off"]
        nothing = torch.zeros(1, 0, dtype=torch.long)
        return generate.Rollouts([(0, -2, 0, 0)], ["a"], ["t"], nothing, nothing, nothing, [0])

    monkeypatch.setattr(grpo, "rollout", rollout)
    known = known_rewards({"a": 1.0}, a=lambda *_: torch.ones(1))
    pool = grpo.best_of_n_pool(policy, None, known, ROWS[:1], config(best_of=1))
    assert [record["total"] for record in pool] == [1] and events == ["off", "on"]


# --- rollouts that do not fit -------------------------------------------------------------------


def limited_memory(monkeypatch, most):
    """Sampling more than `most` rollouts at a time raises; returns the sizes that were tried."""
    sizes = []

    def sample(policy, prompts, keys, *flags):
        sizes.append(len(prompts))
        if len(prompts) > most:
            raise torch.OutOfMemoryError("no room")
        nothing = torch.zeros(len(prompts), 0, dtype=torch.long)
        thoughts = [str((policy, *flags))] * len(prompts)
        return generate.Rollouts(keys, prompts, thoughts, nothing, nothing, nothing, prompts)

    monkeypatch.setattr(generate, "sample", sample)
    return sizes


@pytest.mark.parametrize("number, tried", [(2, [2, 1, 1]), (3, [3, 2, 1])])
def test_rollouts_that_do_not_fit_are_sampled_in_halves(number, tried, config, monkeypatch, capsys):
    sizes = limited_memory(monkeypatch, number - 1)
    jobs = [(n % 2, n) for n in range(number)]
    cfg = config(cfg_weight=2.0, cot=False, max_thought=7)
    got = grpo.rollout("policy", ROWS, jobs, 5, cfg)
    assert sizes == tried and got.keys == [(42, 5, i, k) for i, k in jobs]
    assert got.prompts == [ROWS[i]["prompt"] for i, _ in jobs]
    assert got.thoughts == [str(("policy", False, 2.0, 7))] * number
    assert f"out of memory with {number} rollouts" in capsys.readouterr().err


def test_what_does_not_fit_alone_ends_the_run(config, monkeypatch):
    for number, tried in ((4, [4, 2, 1]), (1, [1])):
        sizes = limited_memory(monkeypatch, 0)
        with pytest.raises(torch.OutOfMemoryError):
            grpo.rollout("policy", ROWS, [(0, k) for k in range(number)], 5, config(cfg_weight=1.0))
        assert sizes == tried
    # Each batch of a large rollout may be halved.
    sizes = limited_memory(monkeypatch, 1)
    cfg = config(cfg_weight=1.0, rollout_batch=2)
    got = grpo.rollout("policy", ROWS, [(0, k) for k in range(3)], 5, cfg)
    assert sizes == [2, 1, 1, 1] and got.keys == [(42, 5, 0, k) for k in range(3)]


def test_the_flag_of_the_image_head_reaches_the_policy(config):
    head = lambda policy: {p.requires_grad for p in policy.model.model.generation_head.parameters()}
    for wanted in (False, True):
        policy, reference = grpo.load_policies(config(train_image_head=wanted))
        assert head(policy) == {wanted} and head(reference) == {False}
