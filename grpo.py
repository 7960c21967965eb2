"""GRPO for text-to-image: reinforcement learning on pictures, and how it goes wrong.

For each prompt the policy paints a group of G pictures; a reward model scores them; pictures better
than their group's average become more likely, worse ones less. No value network: the group is the
baseline. One advantage trains both the thought and the picture (BiCoT-GRPO, T2I-R1, arXiv:2505.00703):

    A_i  = (r_i - mean_G r) / (std_G r + 1e-4)                                 arXiv:2402.03300, Sec. 4.1
    loss = mean over tokens of  -min(rho A, clip(rho, 1-eps_low, 1+eps_high) A) + beta k3
    rho  = pi(token) / pi_old(token),   k3 = exp(d) - d - 1  with  d = log pi_ref - log pi

The policy learns what the reward model *measures*, not what it was meant to measure. That gap is
the subject: `--rewards` train, `--eval-rewards` are only watched, and nothing is ever both.

Run:   torchrun grpo.py --rewards hps,artifact         the tiny world: about 7 minutes on two CPU cores
       torchrun grpo.py --rewards hps                  the same without the cure: watch gold fall
       torchrun --nproc-per-node 8 grpo.py --model deepseek-community/Janus-Pro-1B --judge-url http://HOST:8000/v1

You should see:  a bar with the rewards; every 10 steps a line on test prompts, where hps rises and the
share of artifact-free pictures (by gold) does not fall; at the end runs/<name>/hacking.png, report.html.

Left out: a value network, a KL in the reward, learned critics.   Read next: evaluate.py, tiny.py
"""

import json
import math
import os
import random
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Literal

import torch
import torch.distributed as dist
import tyro
from tqdm import tqdm

import files
import generate
import hacking
import rewards as reward_models
import scale
from files import HERE, usage_error
from report import mean

# Shapes:  P prompts   G rollouts of each   N = P*G rollouts   S = C+T tokens of a rollout


@dataclass
class Config:
    rewards: str = "hps,artifact"  # what trains the policy: name or name:weight, separated by commas
    eval_rewards: str | None = None  # held out: watched, never trained on [tiny: gold and its parts]
    model: str = "tiny"  # "tiny" makes every component tiny; or a folder or hub name of a Janus
    prompts: str | None = None  # training prompts [tiny/prompts/train.jsonl or prompts/train.jsonl]
    test_prompts: str | None = None  # prompts that only measure [.../test.jsonl]

    num_generations: int = 8  # G, rollouts of a prompt: the group
    prompts_per_step: int = 16  # P, over all processes
    max_steps: int | None = None  # steps of training [tiny: 100; else 1600]
    learning_rate: float | None = None  # of AdamW, falling linearly to 0 [tiny: 1e-4; else 1e-6, as T2I-R1]
    beta: float | None = None  # weight of the KL penalty to the reference policy [tiny: .02; else .01, as T2I-R1]
    epsilon: float = 0.2  # clip range below 1
    epsilon_high: float = 0.2  # clip range above 1; DAPO takes .28
    updates_per_rollout: int = 1  # optimizer steps on the same rollouts; 1: rho is 1, and nothing is clipped
    # divide by the std of the group (GRPO), by nothing (Dr.GRPO), by that of the batch (Flow-GRPO); or none of
    # these: best, which imitates the best picture of each group (RAFT, best-of-n fine-tuning)
    advantage: Literal["group", "none", "global", "best"] = "group"
    # several rewards -> one: see rewards.combine
    combine: Literal["sum", "normalized", "mean", "min", "uwo", "pareto", "constrained"] = "sum"
    floor: float = 0.7  # combine=constrained: every reward but the first is to stay above this
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm

    cot: bool = True  # think before painting, and train the thought too
    max_thought: int = 64  # longest thought, in tokens
    cfg_weight: float | None = None  # guidance w while sampling [the checkpoint's own: tiny 1, Janus-Pro 5]
    guidance: Literal["guided", "cond", "none"] = "guided"  # how rollouts are scored, see `guidance_weights`

    seed: int = 42  # with step, prompt and sample number, all the randomness there is
    micro_batch: int = 64  # rollouts in one forward and backward pass
    rollout_batch: int = 128  # rollouts that are painted at a time
    train_image_head: bool = False  # train it, too; T2I-R1 does not
    shard: bool = False  # FSDP2: every process keeps its share of weights and optimizer (scale.py)
    lora_rank: int = 0  # train low-rank additions instead of the weights; 0: the weights
    gradient_checkpointing: bool = False  # compute activations twice instead of keeping them
    dry_run: bool = False  # print the plan, and whether it fits, and stop; needs neither GPU nor weights
    world_size: int = 0  # dry run: of so many processes [as many as there are]
    gpu_memory: float = 80  # dry run: GB of each
    device: Literal["auto", "cpu", "mps", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the arithmetic; weights stay float32
    judge_url: tuple[str, ...] = ()  # judge server(s) [tiny: in-process; else http://127.0.0.1:8000/v1]
    judge_model: str | None = None  # the served model's name [the first that is served]
    references: str | None = None  # reward adversarial: a folder or file of reference pictures [tiny: drawn]
    adversary_steps: int = 4  # reward adversarial: steps of its discriminator for each of the policy's
    adversary_update: Literal["always", "beaten"] = "always"  # beaten: only while it is being fooled
    question: str | None = None  # put to the judge: a text or a file, such as apo.py writes [the judge's own]
    max_failures: float = 0.5  # stop when more than this share of a step's rollouts has no score

    report_to: Literal["none", "tensorboard", "wandb"] = "none"  # also log there, if it is installed
    output_dir: str = "runs"  # run folders go here
    run_name: str | None = None  # name of the run folder [made of model, rewards and seed]
    resume: str = "never"  # "latest", or a run folder: go on from its last checkpoint
    save_steps: int = 25  # a checkpoint every so many steps
    save_total_limit: int = 2  # keep so many checkpoints
    eval_steps: int = 10  # test and draw the grid of fixed prompts every so many steps
    eval_images: int = 216  # pictures of each test
    best_of: int = 16  # best-of-n is measured up to this n, on the base policy; 0: not at all


# What "[tiny: ...; else ...]" above stands for.
PRESETS = {
    "tiny": dict(eval_rewards="gold,gold-clean,gold-aligned", prompts=str(HERE / "tiny/prompts/train.jsonl"),
                 test_prompts=str(HERE / "tiny/prompts/test.jsonl"), max_steps=100, learning_rate=1e-4, beta=0.02),
    "real": dict(eval_rewards="", prompts=str(HERE / "prompts/train.jsonl"),
                 test_prompts=str(HERE / "prompts/test.jsonl"), max_steps=1600, learning_rate=1e-6, beta=0.01),
}


PATIENCE = 5  # steps in a row whose gradients are no numbers, until the run gives up


# --- the mathematics: tensors in, tensors out ---------------------------------------------------


def group_advantages(total_N, group_size, divide="group"):
    """Rewards -> advantages (N,), group by group. NaN rewards get 0 and do not move the others' mean.

    The deviation has n - 1, as released (T2I-R1 grpo_trainer.py:752). A unanimous group has nothing to
    teach: 0 / 1e-4 = 0. Per group and not per batch: an easy prompt must not make every picture of a hard
    one look bad. By std only if asked: it blows up nearly tied groups (Dr.GRPO, arXiv:2503.20783). "best": 1 for
    the best picture, 0 for the others, so that the loss is the likelihood of the best of G (RAFT, arXiv:2304.06767)."""
    reward = total_N.view(-1, group_size)
    known = reward.isfinite()
    count = known.sum(1, keepdim=True)
    mean = torch.where(known, reward, 0.0).sum(1, keepdim=True) / count.clamp(min=1)
    centered = torch.where(known, reward - mean, 0.0)
    if divide == "group":
        scale = (centered.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt() + 1e-4
    elif divide == "global":
        everyone = total_N[total_N.isfinite()]
        scale = (everyone.std() if len(everyone) > 1 else torch.zeros(())) + 1e-4
    elif divide == "best":
        best = torch.nn.functional.one_hot(centered.argmax(1), group_size)
        return (best * (centered > 0)).float().view(-1)
    else:
        scale = 1.0
    return (centered / scale).view(-1)


def kl_k3(logprobs, reference):
    """Schulman's k3, an estimate of KL(pi || pi_ref) per token: never negative, unbiased under samples of
    pi, small variance. Where sampling and scoring differ (guidance="cond") it is not a KL of anything."""
    d = reference - logprobs
    return d.exp() - d - 1


def grpo_loss(logprobs_NS, old_NS, reference_NS, advantages_N, mask_NS, beta, epsilon, epsilon_high):
    """Per-token loss (N, S), not yet averaged. With one update per rollout old == logprobs in value: the
    ratio is 1 and its gradient is that of the log-probability, REINFORCE with a baseline."""
    ratio = (logprobs_NS - old_NS).exp()
    advantage = advantages_N[:, None]
    # min: the pessimistic one. A ratio outside the range may only ever count *against* a change.
    surrogate = torch.min(ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon_high) * advantage)
    loss = -surrogate + beta * kl_k3(logprobs_NS, reference_NS)
    return torch.where(mask_NS, loss, 0.0)


def guidance_weights(cfg, policy):
    """(weight to sample with, weight to score with). Three policies are in use:

    guided  sample guided, score guided: exact, on-policy; scoring costs two branches.
    cond    sample guided, score the conditional branch alone: what T2I-R1 and ArtifactReward released.
            Biased: the gradient is not that of the expected reward; the logged KL is no KL.
    none    no guidance at all: exact and cheap, from a weaker start."""
    w = generate.default_cfg(policy) if cfg.cfg_weight is None else cfg.cfg_weight
    return {"guided": (w, w), "cond": (w, 1.0), "none": (1.0, 1.0)}[cfg.guidance]


# --- one step -----------------------------------------------------------------------------------


def prompts_of_step(rows, step, cfg):
    """Indices of this step's P prompts: every epoch a new order, which depends on nothing but the seed."""
    order, chosen = {}, []
    for n in range(step * cfg.prompts_per_step, (step + 1) * cfg.prompts_per_step):
        epoch, place = divmod(n, len(rows))
        if epoch not in order:
            order[epoch] = random.Random(f"{cfg.seed} {epoch}").sample(range(len(rows)), len(rows))
        chosen.append(order[epoch][place])
    return chosen


def rollout(policy, rows, jobs, stream, cfg, halve=True):
    """One thought and one picture for each job (prompt index, sample number). `stream` keeps the noise of
    different uses apart: the step while training, -1 in tests, -2 for best-of-n."""
    if len(jobs) > cfg.rollout_batch:
        cut = range(0, len(jobs), cfg.rollout_batch)
        return generate.join([rollout(policy, rows, jobs[i : i + cfg.rollout_batch], stream, cfg) for i in cut])
    keys = [(cfg.seed, stream, i, k) for i, k in jobs]
    weight = guidance_weights(cfg, policy)[0]
    prompts = [rows[i]["prompt"] for i, _ in jobs]
    try:
        return generate.sample(policy, prompts, keys, cfg.cot, weight, cfg.max_thought)
    except torch.OutOfMemoryError:  # in two halves, once: a rollout is the same in any batch
        if not halve or len(jobs) < 2:
            raise
        torch.cuda.empty_cache()
        tqdm.write(f"out of memory with {len(jobs)} rollouts at a time: going on with half as many", file=sys.stderr)
        middle = len(jobs) // 2
        halves = [rollout(policy, rows, part, stream, cfg, False) for part in (jobs[:middle], jobs[middle:])]
        return generate.join(halves)


def slices(rollouts, cfg):
    return [slice(i, i + cfg.micro_batch) for i in range(0, len(rollouts), cfg.micro_batch)]


@torch.no_grad()
def all_logprobs(policy, rollouts, cfg):
    weight = guidance_weights(cfg, policy)[1]
    return torch.cat([generate.logprobs(policy, rollouts[s], weight) for s in slices(rollouts, cfg)])


def reference_logprobs(policy, reference, rollouts, cfg):
    with scale.as_reference(policy, reference) as original:
        return all_logprobs(original, rollouts, cfg)


def update(policy, reference_NS, optimizer, rollouts, advantages, cfg):
    """Teach: `updates_per_rollout` optimizer steps on these rollouts. Returns metrics.

    The average goes over all tokens of all processes ("token mean", as DAPO): a process with longer
    thoughts must not weigh its tokens less (T2I-R1 averages within each micro-batch)."""
    mask, weight = rollouts.mask, guidance_weights(cfg, policy)[1]
    advantages, tokens = advantages.to(mask.device), sum(gather([mask.sum().item()]))
    old, loss_sum, clipped = [], 0.0, 0
    for repetition in range(cfg.updates_per_rollout):
        optimizer.zero_grad()
        policy.body.train(cfg.gradient_checkpointing)  # transformers checkpoints in training mode only; no dropout in it
        for i, s in enumerate(slices(rollouts, cfg)):
            logprobs = generate.logprobs(policy, rollouts[s], weight)
            # pi_old is what this very computation gave before the first update, never what the sampler
            # gave: in bfloat16 the two differ, guidance multiplies the difference, and rho leaves the range.
            if repetition == 0:
                old.append(logprobs.detach())
            loss = grpo_loss(logprobs, old[i], reference_NS[s], advantages[s], mask[s],
                             cfg.beta, cfg.epsilon, cfg.epsilon_high).sum() / tokens
            loss.backward()
            rho = (logprobs.detach() - old[i]).exp()
            clipped += (((rho < 1 - cfg.epsilon) | (rho > 1 + cfg.epsilon_high)) & mask[s]).sum().item()
            loss_sum += loss.item()
        policy.body.eval()
        sum_gradients(policy)
        norm = scale.whole(torch.nn.utils.clip_grad_norm_(trainable(policy), cfg.max_grad_norm))
        if not norm.isfinite():  # of the sum over all processes, so they agree: nobody takes this step
            optimizer.zero_grad()
            break
        optimizer.step()
    norms = gather([norm.item()])  # the same on all processes, or they are no longer training one policy
    kl = torch.where(mask, kl_k3(torch.cat(old), reference_NS), 0.0).sum().item()
    sums = gather([torch.tensor([loss_sum, clipped / tokens, kl, len(rollouts)], dtype=torch.float64)])
    loss_sum, clipped, kl, n = torch.stack(sums).sum(0).tolist()
    return {"loss": loss_sum / cfg.updates_per_rollout, "clip_ratio": clipped / cfg.updates_per_rollout,
            "kl": kl / n,  # nats a rollout, of the policy that sampled: before this update
            "grad_norm": norm.item(), "grad_norm_spread": max(norms) - min(norms), "skipped": int(not norm.isfinite()),
            "learning_rate": optimizer.param_groups[0]["lr"]}


def trainable(policy):
    return [p for p in policy.model.parameters() if p.requires_grad]


# --- several processes: only these four functions, and `rank` in main, know of them -------------


def start_processes():
    """(rank, number of processes). torchrun sets RANK; without it this is one process."""
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(items):
    """A list from each process -> one list, in the order of the ranks, on all of them."""
    if not dist.is_initialized():
        return items
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def sum_gradients(policy):
    """Each process has the gradient of its share of one loss, already divided by all tokens: add them."""
    for parameter in trainable(policy) if dist.is_initialized() else ():
        if parameter.grad is None:  # without --cot the text head has none, on any process
            continue
        if isinstance(parameter.grad, scale.DTensor):  # sharded: FSDP2 has taken the mean, shard by shard
            parameter.grad.mul_(dist.get_world_size())
        else:
            dist.all_reduce(parameter.grad)


def learn(learners, jobs, rollouts):
    """Rewards that learn (adversarial_reward.py) do so from the rollouts of all processes, each process all of it in
    the same order; should their arithmetic ever differ, rank 0 is right. Returns metrics."""
    metrics = {}
    if learners:
        _, prompts, images = zip(*sorted(gather(list(zip(jobs, rollouts.prompts, rollouts.images))), key=lambda e: e[0]))
    for name, reward in learners.items():
        metrics |= {f"{name}/{key}": value for key, value in reward.learn(prompts, images).items()}
        for parameter in reward.parameters() if dist.is_initialized() else ():
            dist.broadcast(parameter.data, 0)
    return metrics


# --- measuring ----------------------------------------------------------------------------------


def test(policy, reference, scorers, rows, cfg, rank, world):
    """Score the policy on test prompts, with the same noise each time, so that two steps differ by the
    policy alone. Returns (records, pictures)."""
    jobs = [(j % len(rows), j // len(rows)) for j in range(cfg.eval_images)][rank::world]
    records, shown = [], []
    for batch in (jobs[i : i + cfg.micro_batch] for i in range(0, len(jobs), cfg.micro_batch)):
        chosen = [rows[i] for i, _ in batch]
        rollouts = rollout(policy, rows, batch, -1, cfg)
        scores = reward_models.score(scorers, rollouts.prompts, rollouts.images, chosen)
        k3 = kl_k3(all_logprobs(policy, rollouts, cfg), reference_logprobs(policy, reference, rollouts, cfg))
        scores["kl"] = torch.where(rollouts.mask, k3, 0.0).sum(1)
        records += record(chosen, batch, rollouts, scores | image_statistics(rollouts.images))
        shown += rollouts.images
    return gather(records), gather(shown)


def image_statistics(images):
    """Brightness, saturation and the like, under the name image/...: always logged, never trained on."""
    return {f"image/{name}": reward_models.REWARDS[name]()(None, images) for name in reward_models.STATS}


def best_of_n_pool(policy, reference, scorers, weights, rows, cfg, rank, world):
    """`best_of` pictures of the *untrained* policy for each of 40 test prompts, with their scores: all that
    best-of-n needs. It optimises the same reward without any RL: what it breaks is the reward's fault."""
    pool = []
    for i in range(rank, min(40, len(rows)), world):
        jobs, group = [(i, k) for k in range(cfg.best_of)], [rows[i]] * cfg.best_of
        with scale.as_reference(policy, reference) as original:
            rollouts = rollout(original, rows, jobs, -2, cfg)
        scores = reward_models.score(scorers, rollouts.prompts, rollouts.images, group)
        scores["total"] = reward_models.combine(scores, weights, cfg.best_of)
        pool += record(group, jobs, rollouts, scores)
    return gather(pool)


def record(rows, jobs, rollouts, scores):
    """One dict a picture: what was asked, what was thought, what it scored."""
    return [{"id": row["id"], "prompt": row["prompt"], "sample": k, "thought": rollouts.thoughts[n],
             **{name: values[n].item() for name, values in scores.items()}}
            for n, (row, (_, k)) in enumerate(zip(rows, jobs))]


def summarize(records, trained, held_out, cfg):
    """One step's records -> numbers to log. NaN scores count as failed and enter no mean."""
    failed = mean(any(math.isnan(r[name]) for name in trained) for r in records)
    metrics = {"failed": failed, "thought_words": mean(len(r["thought"].split()) for r in records)}
    kinds = dict.fromkeys(trained, "reward") | dict.fromkeys(held_out, "held-out") | {"total": "reward"}
    for name, kind in kinds.items():
        values = torch.tensor([r[name] for r in records]).view(-1, cfg.num_generations)
        metrics[f"{kind}/{name}"] = values.nanmean().item()
        # Within the group: the spread that GRPO learns from. No spread in a group, nothing to learn.
        metrics[f"{kind}/{name}/group_std"] = values.std(1).nanmean().item()
        metrics["unanimous_groups"] = (values.std(1) == 0).float().mean().item()  # at last, of the total
    return metrics


def check(cfg, world):
    """Everything that can be wrong is found here, before a model is loaded. Fills in the presets; returns
    (weights, held-out names, training prompts, test prompts)."""
    for name, value in PRESETS["tiny" if cfg.model == "tiny" else "real"].items():
        if getattr(cfg, name) is None:
            setattr(cfg, name, value)
    weights, held_out = reward_models.parse(cfg.rewards), [*reward_models.parse(cfg.eval_rewards)]
    if not weights:
        usage_error("--rewards is empty; name at least one, such as hps,artifact")
    if weights.keys() & set(held_out):
        usage_error(
            f"{', '.join(weights.keys() & set(held_out))} is in --rewards and in --eval-rewards: what is trained "
            "on cannot be believed; take it out of one"
        )
    watched = [name for name in weights if hasattr(reward_models.REWARDS[name], "only_watched")]
    if watched:
        usage_error(f"--rewards {', '.join(watched)}: a statistic, not an opinion; it can only be watched, --eval-rewards")
    learning = [name for name in held_out if hasattr(reward_models.REWARDS[name], "learn")]
    if learning:
        usage_error(f"--eval-rewards {', '.join(learning)}: it knows nothing unless it learns beside the policy; "
                    "name it in --rewards")
    if cfg.num_generations < 2:
        usage_error(f"--num-generations {cfg.num_generations}: a group of one has no baseline; use 4 or more")
    if cfg.prompts_per_step < 1 or cfg.prompts_per_step % world:
        usage_error(
            f"--prompts-per-step {cfg.prompts_per_step}: must be a multiple of the {world} processes; a group stays on one"
        )
    if cfg.combine == "constrained" and len(weights) < 2:
        usage_error(
            "--combine constrained needs two rewards: the first is maximised, the others keep their --floor"
        )
    if cfg.shard and (cfg.lora_rank or world == 1 and not cfg.dry_run):
        usage_error("--shard: spreads full training over several processes (torchrun --nproc-per-node 8); it does not go "
                    "with --lora-rank, which has little to spread")
    positive = "max_steps learning_rate updates_per_rollout micro_batch rollout_batch max_thought max_grad_norm save_steps " \
               "save_total_limit eval_steps eval_images"
    for name in positive.split():
        if not getattr(cfg, name) > 0:
            usage_error(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must be greater than 0")
    return weights, held_out, files.load_prompts(cfg.prompts), files.load_prompts(cfg.test_prompts)


# --- the algorithm ------------------------------------------------------------------------------


def main(cfg):
    rank, world = start_processes()
    weights, held_out, rows, test_rows = check(cfg, world)
    if cfg.dry_run:
        return scale.print_plan(cfg, cfg.world_size or world)
    run, checkpoint = gather([files.run_folder(cfg) if rank == 0 else None])[0]
    if checkpoint:
        files.check_same_run(run, cfg)
    device, dtype = generate.pick_device(cfg.device, cfg.dtype)
    policy, reference = load_policies(cfg, checkpoint, device, dtype)
    train_on, watch = load_rewards(weights, cfg, device), load_rewards(held_out, cfg, device)
    optimizer = torch.optim.AdamW(trainable(policy), lr=cfg.learning_rate, betas=(0.9, 0.99), weight_decay=0)
    learners = {name: reward for name, reward in train_on.items() if hasattr(reward, "learn")}
    for reward in learners.values():
        reward.references.check([row["prompt"] for row in rows])
    state = load_state(checkpoint, optimizer, weights, learners)
    lock = files.lock(run) if rank == 0 else None  # noqa: F841 held as long as this process lives
    log = Log(cfg, run, state["step"], weights, held_out, rank, world)
    stop = listen_for_sigterm()

    def save(state):
        weights = scale.model_state(policy, keep=rank == 0)  # all processes gather what they have shards of
        moments = scale.whole(optimizer.state_dict(), keep=rank == 0)
        if rank == 0:
            extra = {"optimizer": moments, **{name: reward.state_dict() for name, reward in learners.items()}}
            extra |= {"lora": scale.lora_state(policy)} if cfg.lora_rank else {}
            files.save_checkpoint(run, state, policy, weights, extra, cfg.save_total_limit)

    def try_out(done):
        with scale.gathered(policy, reference):
            log.test(done, *test(policy, reference, train_on | watch, test_rows, cfg, rank, world))

    if state["step"] == 0:
        try_out(0)
    for step in log.steps():
        indices = prompts_of_step(rows, step, cfg)[rank::world]  # a group stays on one process
        jobs = [(i, k) for i in indices for k in range(cfg.num_generations)]
        asked = [rows[i] for i, _ in jobs]

        with scale.gathered(policy):
            rollouts = rollout(policy, rows, jobs, step, cfg)  # G thoughts and pictures for each prompt
        log.tick("rollout")
        if any(gather([bool(stop)])):  # nothing has been changed by this step: it will be made again
            save(state), give_up("asked to stop", 143, rank)
        adversary = learn(learners, jobs, rollouts)  # a reward that learns has seen these pictures when it scores them
        training_scores = reward_models.start_scoring(train_on, rollouts.prompts, rollouts.images, asked)
        reference_scores = reference_logprobs(policy, reference, rollouts, cfg)  # while a judge far away takes its time
        scores = training_scores()  # what trains
        believed = reward_models.score(watch, rollouts.prompts, rollouts.images, asked)  # what does not
        total = reward_models.combine(scores, weights, cfg.num_generations, cfg.combine, state["multipliers"])
        log.tick("score")
        everyone = torch.tensor(gather(total.tolist()))
        mine = slice(rank * len(total), (rank + 1) * len(total))
        advantages = group_advantages(everyone, cfg.num_generations, cfg.advantage)[mine]
        # Linear decay to 0, as T2I-R1 (the Trainer's default): at a constant rate the gradient's noise keeps
        # the policy wandering, which costs KL and buys no reward.
        optimizer.param_groups[0]["lr"] = cfg.learning_rate * (1 - step / cfg.max_steps)
        metrics = update(policy, reference_scores, optimizer, rollouts, advantages, cfg)  # the better, the likelier
        log.tick("update")

        scores |= believed | {"total": total, "advantage": advantages}
        records = gather(record(asked, jobs, rollouts, scores))
        metrics |= adversary | summarize(records, list(weights), held_out, cfg)
        metrics["diversity"] = mean(gather(hacking.diversity(rollouts.images, cfg.num_generations)))
        log.step(step, metrics, records)
        done, skipped = step + 1, (state["skipped"] + 1) * metrics["skipped"]
        state = {"step": done, "multipliers": multipliers_after(records, state["multipliers"], cfg), "skipped": skipped}
        if done % cfg.eval_steps == 0 or done == cfg.max_steps:
            log.group(step, gather(rollouts.images))
            try_out(done)
        trouble = what_is_wrong(metrics, state, train_on, cfg)
        if trouble or done % cfg.save_steps == 0 or done == cfg.max_steps:
            save(state)
        if trouble:
            give_up(trouble, 3, rank)

    if cfg.best_of:
        with scale.gathered(policy, reference):
            pool = best_of_n_pool(policy, reference, train_on | watch, weights, test_rows, cfg, rank, world)
        log.pool(pool)
    if rank == 0:
        print(f"look at {hacking.report_page(run)}")
    if dist.is_initialized():
        dist.destroy_process_group()


def load_policies(cfg, checkpoint, device, dtype):
    """(policy, reference): what is trained, and what it was. With LoRA the policy is its own reference: None."""
    load = lambda name: generate.load_policy(str(name), device, dtype, cfg.train_image_head)
    if cfg.lora_rank:
        policy = scale.add_lora(load(cfg.model), cfg.lora_rank)
        if checkpoint:
            policy.model.load_state_dict(torch.load(checkpoint / "lora.pt", weights_only=True), strict=False)
        reference = None
    else:
        policy, reference = load(checkpoint or cfg.model), load(cfg.model)
        reference.model.requires_grad_(False)
    if cfg.gradient_checkpointing:
        policy.body.gradient_checkpointing_enable({"use_reentrant": False})
    if cfg.shard:
        scale.shard(policy), scale.shard(reference)
    return policy, reference


def load_rewards(names, cfg, device):
    checkpoint = "tiny" if cfg.model == "tiny" else None
    adversary = dict(references=cfg.references, steps=cfg.adversary_steps, when=cfg.adversary_update, seed=cfg.seed)
    options = {"artifact": dict(judge_urls=cfg.judge_url, judge_model=cfg.judge_model, question=cfg.question),
               "adversarial": adversary, "adversarial-pickscore": adversary}
    where = reward_models.addresses(cfg.rewards) | reward_models.addresses(cfg.eval_rewards)
    loaded = {name: reward_models.load(name, device, checkpoint, where.get(name), **options.get(name, {}))
              for name in names}
    if isinstance(loaded.get("artifact"), reward_models.ArtifactReward):
        loaded["artifact"].check()
    return loaded


def load_state(checkpoint, optimizer, weights, learners):
    """The counters of a run: the next step, the multipliers of combine=constrained, the steps skipped just now."""
    if not checkpoint:
        return {"step": 0, "multipliers": {name: 1.0 for name in list(weights)[1:]}, "skipped": 0}
    scale.load_optimizer(optimizer, torch.load(checkpoint / "optimizer.pt", weights_only=True))
    for name, reward in learners.items():
        reward.load_state_dict(torch.load(checkpoint / f"{name}.pt", weights_only=True))
    return json.loads((checkpoint / "state.json").read_text())


def multipliers_after(records, multipliers, cfg):
    """combine=constrained: what a reward below its floor weighs from now on."""
    if cfg.combine != "constrained":
        return multipliers
    seen = {name: torch.tensor([r[name] for r in records]) for name in multipliers}
    return reward_models.update_multipliers(multipliers, seen, dict.fromkeys(seen, cfg.floor))


def listen_for_sigterm():
    """A list that is not empty any more when the run has been asked to stop. Asked twice, it stops at once."""
    stop = []

    def heard(number, frame):
        if stop:
            raise SystemExit(143)
        stop.append(number)

    signal.signal(signal.SIGTERM, heard)
    return stop


def what_is_wrong(metrics, state, scorers, cfg):
    """Why this run must not go on, or ""."""
    if metrics["failed"] > cfg.max_failures:
        reasons = Counter()
        for reward in scorers.values():
            reasons |= getattr(reward, "failures", Counter())
        return f"{metrics['failed']:.0%} of the rollouts had no score: {dict(reasons)}"
    if metrics["grad_norm_spread"] > 1e-3 * metrics["grad_norm"]:
        return f"the processes' gradients differ by {metrics['grad_norm_spread']:.2g}: do all load the same checkpoint?"
    if state["skipped"] >= PATIENCE:
        return f"{PATIENCE} steps in a row had gradients that are no numbers, and were skipped; lower --learning-rate"
    return ""


def give_up(why, code, rank):
    """The end before the end, after a checkpoint: 143 if asked to stop, 3 if it cannot go on."""
    if rank == 0:
        print(f"{why}; stopped, with a checkpoint; --resume latest goes on from it", file=sys.stderr)
    raise SystemExit(code)


def reporter(cfg, run):
    """A function (step, numbers) that tells --report-to; files in the run folder are written in any case."""
    if cfg.report_to == "tensorboard":
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            usage_error("--report-to tensorboard: it is not installed; pip install tensorboard, or leave the flag out")
        writer = SummaryWriter(run / "tensorboard")
        return lambda step, numbers: [writer.add_scalar(name, value, step) for name, value in numbers.items()]
    if cfg.report_to == "wandb":
        try:
            import wandb
        except ImportError:
            usage_error("--report-to wandb: it is not installed; pip install wandb, or leave the flag out")
        session = wandb.init(project="artifact-reward", name=run.name, id=run.name, resume="allow", dir=run, config=asdict(cfg))
        return lambda step, numbers: session.log(numbers | {"step": step})
    return lambda step, numbers: None


class Log:
    """The run folder and the screen: on rank 0 it writes, elsewhere it does nothing."""

    def __init__(self, cfg, run, start, weights, held_out, rank, world):
        self.run, self.writes, self.seconds, self.clock = run, rank == 0, {}, time.perf_counter()
        self.shown = [("reward", name) for name in weights] + [("held-out", name) for name in held_out]
        self.report = lambda step, numbers: None
        if self.writes:
            files.begin_log(run, start, cfg, world)
            self.report = reporter(cfg, run)
            print(f"{run}/: {' + '.join(weights)} trains, {' and '.join(held_out) or 'nothing'} is only "
                  f"watched; {cfg.prompts_per_step} prompts x {cfg.num_generations} pictures a step", flush=True)
        self.bar = tqdm(range(start, cfg.max_steps), initial=start, total=cfg.max_steps, desc="grpo",
                        disable=not self.writes)

    def steps(self):
        for step in self.bar:
            self.clock = time.perf_counter()
            yield step

    def tick(self, part):
        now = time.perf_counter()
        self.seconds[f"seconds/{part}"], self.clock = round(now - self.clock, 3), now

    def step(self, step, metrics, records):
        if self.writes:
            files.log_line(self.run / "metrics.jsonl", {"step": step, **metrics, **self.seconds})
            self.report(step, metrics | self.seconds)
            files.log_records(self.run / "rollouts" / f"step_{step:06d}.jsonl", records)
            numbers = {name: f"{metrics[f'{kind}/{name}']:.3f}" for kind, name in self.shown}
            self.bar.set_postfix(numbers | {"kl": f"{metrics['kl']:.2f}"})

    def test(self, step, records, images):
        if self.writes:
            means = hacking.test_means(records)
            files.log_records(self.run / "tests" / f"step_{step:06d}.jsonl", records)
            files.log_line(self.run / "test.jsonl", {"step": step, **means})
            self.report(step, {f"test/{name}": value for name, value in means.items()})
            hacking.save_strip(images[: hacking.STRIP], self.run / "samples" / f"step_{step:06d}.png")
            hacking.save_sheet(images, self.run / "tests" / ("last.png" if step else "first.png"))
            shown = "  ".join(f"{k} {v:.3f}" for k, v in means.items() if "/" not in k)
            tqdm.write(f"test at step {step}:  {shown}")

    def group(self, step, images):
        if self.writes:
            for old in (self.run / "rollouts").glob("*.png"):
                old.unlink()
            hacking.save_sheet(images, self.run / "rollouts" / f"step_{step:06d}.png")

    def pool(self, records):
        if self.writes:
            files.log_records(self.run / "best_of_n.jsonl", records)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
