"""Cures of 2025 and 2026, to be compared with the judge: each is off unless a flag asks for it.

Each changes one place of the loop in grpo.py and leaves the rest alone:

    flat optima       arXiv:2602.18037   the gradient of L + gamma/2 |grad L|^2   flatten_gradient
    GARDO             arXiv:2512.24138   KL only where the reward is doubtful     doubtful
                                         the reference policy moves               Cure.reference
                                         pictures unlike the others count more    spread
    entropy bonus     arXiv:2509.25027   reward for the reference's entropy       entropy_closeness
                      (STAGE)
    data anchor       arXiv:2512.04332   likelihood of reference pictures         Cure.data
                      (DDRL)             instead of a KL
    weight average    Polyak averaging   the averaged policy is tested            Cure.tested

Two others are ways to combine rewards: `winrate` and `quantized` in rewards.combine.

Read next: studies/contest.py, which measures them
"""

import contextlib
import math
import random
from dataclasses import replace

import torch

from training.files import usage_error
from training.flags import Cures, reward_names
from training.pictures import distances
from training.policy import trainable
from training.processes import pick_device
from training.sharding import as_reference

# Shapes:  N rollouts, G in a group   T tokens of a picture


def check(cfg):
    """Refuse flags of grpo.py that do not go together."""
    flags = cfg.cures
    for name in reward_names(flags.doubted_by):
        if name not in reward_names(cfg.eval_rewards):
            usage_error(f"--cures.doubted-by {name}: name it in --eval-rewards, too")
        if name.startswith("gold"):
            usage_error(f"--cures.doubted-by {name}: the truth must not guide the training")
    if flags.gradient_penalty and pick_device(cfg.device, cfg.dtype)[1] != torch.float32:
        usage_error(
            "--cures.gradient-penalty: needs --dtype float32; its difference of two gradients is "
            "smaller than the rounding of bfloat16"
        )
    if not 0 < flags.doubtful_share <= 1:
        usage_error(f"--cures.doubtful-share {flags.doubtful_share}: a share, above 0, up to 1")
    if not 0 <= flags.average < 1:
        usage_error(f"--cures.average {flags.average}: a decay, from 0 to below 1")
    if flags.copies() and cfg.shard:
        usage_error("--shard: not with --cures that keep copies of the weights")
    if flags.average and cfg.lora_rank:
        usage_error("--cures.average: not with --lora-rank; it would average A and B, not B A")
    if flags.data_weight and not cfg.references and cfg.model != "tiny":
        usage_error("--cures.data-weight: needs --references, pictures of the training prompts")


# --- the mathematics ----------------------------------------------------------------------------


def flatten_gradient(parameters, recompute, gamma, radius=1e-3):
    """Gradient regularisation (arXiv:2602.18037): turn g1 = grad L, which the parameters hold, into
    the gradient of L + gamma/2 |grad L|^2. Its second part is gamma H g1, with the Hessian H; a
    finite difference needs no H:

        g2 = grad L(theta + radius g1),    g = g1 + gamma / radius (g2 - g1)

    A reward is most easily hacked where a small change of the weights changes it much. recompute()
    replaces the gradients by those at the present weights. radius: the paper's."""
    parameters = [p for p in parameters if p.grad is not None]
    weights = [p.detach().clone() for p in parameters]
    first = [p.grad.clone() for p in parameters]
    with torch.no_grad():
        for p, g in zip(parameters, first):
            p.add_(g, alpha=radius)
    try:
        recompute()
    finally:  # also when memory runs out: a checkpoint may follow
        with torch.no_grad():
            for p, weight in zip(parameters, weights):
                p.copy_(weight)  # exactly: subtracting would round
    for p, g in zip(parameters, first):
        p.grad.sub_(g).mul_(gamma / radius).add_(g)


def win_rates(values_N, group_size):
    """Share of the others of its group that each rollout beats; a tie counts half. (N,) in [0, 1];
    NaN where the value is NaN, and the others are not compared with it."""
    groups = values_N.view(-1, group_size)
    a, b = groups[:, :, None], groups[:, None]
    known = groups.isfinite()
    others = (known.sum(1, keepdim=True) - 1).clamp(min=1)
    # Each ties with itself: minus .5.
    wins = ((a > b).float() + 0.5 * (a == b).float()).sum(2) - 0.5
    return torch.where(known, wins / others, torch.nan).view(-1)


def doubtful(total_N, auxiliary, group_size, share):
    """(N,) bool: the rollouts that the reward puts highest above where other rewards put them
    (GARDO, Eq. 7):  U_i = win rate by the reward - mean win rate by the auxiliary rewards.

    share of each group, at least one, and only with U > 0. The released code ranks in descending
    order and subtracts the other way round (train_sd3_grpo_gardo.py:827): it picks what the reward
    *under*rates. We follow the paper, with a fixed share (theirs moves slowly around .1)."""
    others = torch.stack([win_rates(values, group_size) for values in auxiliary]).nanmean(0)
    gap = (win_rates(total_N, group_size) - others).nan_to_num(-1).view(-1, group_size)
    count = max(1, round(share * group_size))
    chosen = torch.zeros_like(gap).scatter(1, gap.topk(count, dim=1).indices, 1.0)
    return ((chosen > 0) & (gap > 0)).view(-1)


def spread(advantages_N, images, group_size):
    """GARDO's diversity (Eq. 8): a positive advantage times the distance to the nearest picture of
    the group, so that one picture drawn eight times earns nothing. The distance is divided by its
    mean over the group, as released, so that beta keeps its meaning. (Theirs is between DINO
    features; ours is between pixels, as for the metric `diversity`.)"""
    apart = distances(images, group_size)
    nearest = apart.masked_fill(torch.eye(group_size, dtype=torch.bool), torch.inf).amin(2)
    factor = nearest / nearest.mean(1, keepdim=True).clamp(min=1e-8)
    factor = factor.view(-1).to(advantages_N.device)
    return torch.where(advantages_N > 0, advantages_N * factor, advantages_N)


def entropy_closeness(entropy_N, reference_N):
    """1 / (1 + (H_ref - H)^2), in (0, 1]: how near the mean entropy H of a picture's tokens is to
    the reference policy's for the same tokens (STAGE, arXiv:2509.25027). A policy that becomes too
    sure, or begins to guess, loses reward.

    STAGE's code gives the bonus only to the pictures with the highest reward of the batch, and then
    subtracts their mean bonus (grpo_trainer.py:987). If only one picture has the highest reward,
    nothing is left. We follow the paper: each picture gets the bonus. STAGE's weight is .4."""
    return 1 / (1 + (reference_N - entropy_N).square())


def dominated(values_NK, group_size):
    """(N,) bool: is another rollout of the group at least as good in every reward and better in
    one? (Pareto dominance)"""
    groups = values_NK.view(-1, group_size, values_NK.shape[-1])
    a, b = groups[:, :, None], groups[:, None]
    return ((b >= a).all(-1) & (b > a).any(-1)).any(2).view(-1)


def pareto_front(scores, weights, group_size):
    """(N,) bool: the rollouts that no other one of their group dominates. With --combine pareto the
    advantages of the others are 0 (Parrot, arXiv:2401.05675); they count in their group's mean."""
    columns = [scores[name] * math.copysign(bool(w), w) for name, w in weights.items()]
    return ~dominated(torch.stack(columns, 1), group_size)


@torch.no_grad()
def encode(policy, images):
    """Pictures -> their image tokens (N, T): for each patch the code with the largest cosine,
    because the decoder scales codes to length 1. (transformers' own `encode` compares without
    scaling: with codes of several lengths it finds others.)"""
    vq, normalize, ids = policy.model.model.vqmodel, torch.nn.functional.normalize, []
    codes = normalize(vq.quantize.embedding.weight, dim=1)
    pixels = policy.processor.image_processor(images, return_tensors="pt")["pixel_values"]
    for some in pixels.to(policy.device, torch.float32).split(16):
        with torch.autocast(policy.device.type, enabled=False):
            z = vq.quant_conv(vq.encoder(some)).flatten(2).transpose(1, 2)
            ids.append((normalize(z, dim=2) @ codes.T).argmax(-1))
    return torch.cat(ids)


# --- in the loop --------------------------------------------------------------------------------


@torch.no_grad()
def exchange(policy, weights):
    """Put these weights into the policy, and the policy's into their place. By value: a recorded
    CUDA graph knows addresses."""
    for parameter, weight in zip(trainable(policy), weights):
        old = parameter.detach().clone()
        parameter.copy_(weight)
        weight.copy_(old)


@contextlib.contextmanager
def exchanged(policy, weights):
    exchange(policy, weights)
    try:
        yield policy
    finally:
        exchange(policy, weights)


class Cure:
    """The cures of a run, and the copies of the weights that some of them keep."""

    def __init__(self, flags=None, policy=None, references=None, seed=0, rows=()):
        self.flags, self.references, self.seed = flags or Cures(), references, seed
        self.doubted_by = reward_names(self.flags.doubted_by)
        if self.flags.data_weight:
            references.check([row["prompt"] for row in rows])
        self.copies = {}  # name -> a tensor for each trained parameter; part of each checkpoint
        kept = {"reference": self.flags.reference_steps, "average": self.flags.average}
        for name in (name for name, wanted in kept.items() if wanted):
            self.copies[name] = [p.detach().clone() for p in trainable(policy)]

    def reference(self, policy, reference):
        """A context: the policy that the KL of an update is measured from."""
        if "reference" in self.copies:
            return exchanged(policy, self.copies["reference"])
        return as_reference(policy, reference)

    def tested(self, policy):
        """A context in which the policy has the weights that are tested: averaged ones, if any."""
        averaged = self.copies.get("average")
        return exchanged(policy, averaged) if averaged else contextlib.nullcontext()

    def entropy_bonus(self, policy, reference, entropies):
        """What is added to the reward, (N,) or 0. entropies(policy): of all tokens, (N, S)."""
        if not self.flags.entropy_bonus:
            return 0.0
        of_picture = lambda policy: entropies(policy)[:, -(policy.grid**2) :].mean(1).cpu()
        with self.reference(policy, reference) as original:
            wanted = of_picture(original)
        return self.flags.entropy_bonus * entropy_closeness(of_picture(policy), wanted)

    def betas(self, beta, total, scores, group_size):
        """The weight of the KL, for each rollout (N,)."""
        if not self.doubted_by:
            return torch.full((len(total),), beta)
        auxiliary = [scores[name] for name in self.doubted_by]
        return beta * doubtful(total, auxiliary, group_size, self.flags.doubtful_share).float()

    def advantages(self, advantages, images, group_size):
        return spread(advantages, images, group_size) if self.flags.spread else advantages

    def data(self, policy, rollouts, group_size, step):
        """Rollouts whose pictures are references, one for each prompt, without thoughts: a thought
        names places and sizes, and a sampled one describes another picture than the reference.
        After such a thought a reference costs the tiny policy 34 nats; without thoughts 21, about
        as many as its own pictures. None if they are not asked for."""
        if not self.flags.data_weight:
            return None
        first, chosen = rollouts[::group_size], []
        for (_, _, i, _), prompt, own in zip(first.keys, first.prompts, first.images):
            picture = self.references.choose(prompt, random.Random(f"{self.seed} {step} {i}"))
            chosen.append(picture or own)  # all references of this prompt are damaged
        nothing = {name: getattr(first, name)[:, :0] for name in ("thought_ids", "thought_mask")}
        nothing["thoughts"] = [""] * len(first)
        return replace(first, image_ids=encode(policy, chosen), images=chosen, **nothing)

    @torch.no_grad()
    def after_step(self, policy, step):
        """step: how many have been taken."""
        every = self.flags.reference_steps
        for weight, p in zip(self.copies.get("average", ()), trainable(policy)):
            weight.lerp_(p, 1 - self.flags.average)
        if every and step % every == 0:
            for weight, p in zip(self.copies["reference"], trainable(policy)):
                weight.copy_(p)


OFF = Cure()
