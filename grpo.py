"""GRPO for text-to-image: reinforcement learning on pictures, and how it goes wrong.

For each prompt the policy paints a group of G pictures; a reward model scores them; pictures better
than their group's average become more likely, worse ones less. No value network: the group is the
baseline. One advantage trains both the thought and the picture (BiCoT-GRPO, T2I-R1, arXiv:2505.00703):

    A_i  = (r_i - mean_G r) / (std_G r + 1e-4)                                 arXiv:2402.03300, Sec. 4.1
    loss = mean over tokens of  -min(rho A, clip(rho, 1-eps_low, 1+eps_high) A) + beta k3
    rho  = pi(token) / pi_old(token),   k3 = exp(d) - d - 1  with  d = log pi_ref - log pi

The policy learns what the reward model *measures*, not what it was meant to measure. That gap is
the subject: `--rewards` train, `--eval-rewards` are only watched, and nothing is ever both.

Run:   torchrun grpo.py --rewards hps,artifact         the tiny world: about 9 minutes on two CPU cores
       torchrun grpo.py --rewards hps                  the same without the cure: watch gold fall
       python grpo.py --explain                        one step, told number by number
       torchrun --nproc-per-node 8 grpo.py --model deepseek-community/Janus-Pro-1B --judge-url http://HOST:8000/v1

You should see:  a bar with the rewards; every 10 steps a line on test prompts, where hps rises and the
share of artifact-free pictures (by gold) does not fall; at the end runs/<name>/hacking.png, report.html.

Left out: a value network, a KL in the reward, learned critics.   Read next: evaluate.py, tiny.py
"""

import math
import random
import sys
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
import tyro
from tqdm import tqdm

import generate
import rewards as reward_models
from evaluation import hacking
from training import harness
from training import sharding as scale

# Shapes:  P prompts   G rollouts of each   N = P*G rollouts   S = C+T tokens of a rollout


@dataclass
class Config:
    rewards: str = (
        "hps,artifact"  # what trains the policy: name or name:weight, separated by commas
    )
    eval_rewards: str | None = (
        None  # held out: watched, never trained on [tiny: gold and its parts]
    )
    model: str = "tiny"  # "tiny" makes every component tiny; or a folder or hub name of a Janus
    prompts: str | None = (
        None  # training prompts [tiny_world/prompts/train.jsonl or prompts/train.jsonl]
    )
    test_prompts: str | None = None  # prompts that only measure [.../test.jsonl]

    num_generations: int = 8  # G, rollouts of a prompt: the group
    prompts_per_step: int = 16  # P, over all processes
    max_steps: int | None = None  # steps of training [tiny: 100; else 1600]
    learning_rate: float | None = (
        None  # of AdamW, falling linearly to 0 [tiny: 1e-4; else 1e-6, as T2I-R1]
    )
    beta: float | None = (
        None  # weight of the KL penalty to the reference policy [tiny: .02; else .01, as T2I-R1]
    )
    epsilon: float = 0.2  # clip range below 1
    epsilon_high: float = 0.2  # clip range above 1; DAPO takes .28
    updates_per_rollout: int = (
        1  # optimizer steps on the same rollouts; 1: rho is 1, and nothing is clipped
    )
    # divide by the std of the group (GRPO), by nothing (Dr.GRPO), by that of the batch (Flow-GRPO); or none of
    # these: best, which imitates the best picture of each group (RAFT, best-of-n fine-tuning)
    advantage: Literal["group", "none", "global", "best"] = "group"
    # several rewards -> one: see rewards.combine
    combine: Literal["sum", "normalized", "mean", "min", "uwo", "pareto", "constrained"] = "sum"
    floor: float = 0.7  # combine=constrained: every reward but the first is to stay above this
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm

    cot: bool = True  # think before painting, and train the thought too
    max_thought: int = 64  # longest thought, in tokens
    cfg_weight: float | None = (
        None  # guidance w while sampling [the checkpoint's own: tiny 1, Janus-Pro 5]
    )
    guidance: Literal["guided", "cond", "none"] = (
        "guided"  # how rollouts are scored, see `guidance_weights`
    )

    seed: int = 42  # with step, prompt and sample number, all the randomness there is
    micro_batch: int = 64  # rollouts in one forward and backward pass
    rollout_batch: int = 128  # rollouts that are painted at a time
    cuda_graph: bool = True  # painting on a GPU: record the kernels of one token and replay them, several times as fast
    train_image_head: bool = False  # train it, too; T2I-R1 does not
    shard: bool = False  # FSDP2: every process keeps its share of weights and optimizer (scale.py)
    lora_rank: int = 0  # train low-rank additions instead of the weights; 0: the weights
    gradient_checkpointing: bool = False  # compute activations twice instead of keeping them
    explain: bool = False  # tell one step of one group, number by number, and stop
    dry_run: bool = (
        False  # print the plan, and whether it fits, and stop; needs neither GPU nor weights
    )
    world_size: int = 0  # dry run: of so many processes [as many as there are]
    gpu_memory: float = 80  # dry run: GB of each
    device: Literal["auto", "cpu", "mps", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = (
        "auto"  # of the arithmetic; trained weights stay float32
    )
    judge_url: tuple[
        str, ...
    ] = ()  # judge server(s) [tiny: in-process; else http://127.0.0.1:8000/v1]
    judge_model: str | None = None  # the served model's name [the first that is served]
    references: str | None = (
        None  # reward adversarial: a folder or file of reference pictures [tiny: drawn]
    )
    adversary_steps: int = (
        4  # reward adversarial: steps of its discriminator for each of the policy's
    )
    adversary_update: Literal["always", "beaten"] = (
        "always"  # beaten: only while it is being fooled
    )
    question: str | None = (
        None  # put to the judge: a text or a file, such as apo.py writes [the judge's own]
    )
    max_failures: float = 0.5  # stop when more than this share of a step's rollouts has no score

    report_to: Literal["none", "tensorboard", "wandb"] = (
        "none"  # also log there, if it is installed
    )
    output_dir: str = "runs"  # run folders go here
    run_name: str | None = None  # name of the run folder [made of model, rewards and seed]
    resume: str = "never"  # "latest", or a run folder: go on from its last checkpoint
    save_steps: int = 25  # a checkpoint every so many steps
    save_total_limit: int = 2  # keep so many checkpoints
    eval_steps: int = 10  # test and draw the grid of fixed prompts every so many steps
    eval_images: int = 216  # pictures of each test
    best_of: int = 16  # best-of-n is measured up to this n, on the base policy; 0: not at all


# --- the mathematics: tensors in, tensors out ---------------------------------------------------


def group_advantages(total_N, group_size, divide="group"):
    """Rewards -> advantages (N,), group by group. NaN rewards get 0 and do not move the others' mean.

    The deviation has n - 1, as released (T2I-R1 grpo_trainer.py:743). A unanimous group has nothing to
    teach, and gets 0. Per group and not per batch: an easy prompt must not make every picture of a hard
    one look bad. By std only if asked: it blows up nearly tied groups (Dr.GRPO, arXiv:2503.20783). "best": 1 for
    the best picture, 0 for the others, so that the loss is the likelihood of the best of G (RAFT, arXiv:2304.06767)."""
    reward = total_N.view(-1, group_size)
    known = reward.isfinite()
    count = known.sum(1, keepdim=True)
    mean = torch.where(known, reward, 0.0).sum(1, keepdim=True) / count.clamp(min=1)
    lowest = torch.where(known, reward, math.inf).amin(1, keepdim=True)
    highest = torch.where(known, reward, -math.inf).amax(1, keepdim=True)
    # Equal rewards are asked for by name: their mean in float32 may differ from them in the last digit, and a last digit
    # divided by 1e-4 is an advantage.
    centered = torch.where(known & (highest > lowest), reward - mean, 0.0)
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
    """Schulman's k3, per token. Its *value*, under samples of pi, estimates KL(pi || pi_ref) without bias, with little
    variance, and never below 0. Its *gradient*, with the samples held fixed, is (1 - e^d) grad log pi, on average that
    of KL(pi_ref || pi), the other direction; both pull to the same place, and everybody uses it so. Where sampling and
    scoring differ (guidance="cond") it is not a KL of anything."""
    d = reference - logprobs
    return d.exp() - d - 1


def grpo_loss(
    logprobs_NS, old_NS, reference_NS, advantages_N, mask_NS, beta, epsilon, epsilon_high
):
    """Per-token loss (N, S), not yet averaged. With one update per rollout old == logprobs in value: the
    ratio is 1 and its gradient is that of the log-probability, REINFORCE with a baseline."""
    ratio = (logprobs_NS - old_NS).exp()
    advantage = advantages_N[:, None]
    # min: the pessimistic one. A ratio outside the range may only ever count *against* a change.
    surrogate = torch.min(ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon_high) * advantage)
    loss = -surrogate + beta * kl_k3(logprobs_NS, reference_NS)
    return torch.where(mask_NS, loss, 0.0)


def guidance_weights(cfg, policy):
    """(weight to sample with, weight of the log-probabilities), of pictures: thoughts are never guided. Three policies are
    in use:

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
        return generate.join(
            [rollout(policy, rows, jobs[i : i + cfg.rollout_batch], stream, cfg) for i in cut]
        )
    keys = [(cfg.seed, stream, i, k) for i, k in jobs]
    weight = guidance_weights(cfg, policy)[0]
    prompts = [rows[i]["prompt"] for i, _ in jobs]
    try:
        return generate.sample(policy, prompts, keys, cfg.cot, weight, cfg.max_thought)
    except torch.OutOfMemoryError:
        if not halve or len(jobs) < 2:
            raise
    # In two halves, once: a rollout is the same in any batch. Out here the exception, and the memory it held, are gone.
    torch.cuda.empty_cache()
    tqdm.write(
        f"out of memory with {len(jobs)} rollouts at a time: going on with half as many",
        file=sys.stderr,
    )
    middle = len(jobs) // 2
    return generate.join(
        [rollout(policy, rows, part, stream, cfg, False) for part in (jobs[:middle], jobs[middle:])]
    )


def slices(rollouts, cfg):
    return [slice(i, i + cfg.micro_batch) for i in range(0, len(rollouts), cfg.micro_batch)]


@torch.no_grad()
def all_logprobs(policy, rollouts, cfg):
    weight = guidance_weights(cfg, policy)[1]
    return torch.cat(
        [generate.logprobs(policy, rollouts[s], weight) for s in slices(rollouts, cfg)]
    )


def reference_logprobs(policy, reference, rollouts, cfg):
    with scale.as_reference(policy, reference) as original:
        return all_logprobs(original, rollouts, cfg)


def update(policy, reference_NS, optimizer, rollouts, advantages, cfg):
    """Teach: `updates_per_rollout` optimizer steps on these rollouts. Returns metrics.

    The average goes over all tokens of all processes ("token mean", as DAPO): a process with longer
    thoughts must not weigh its tokens less (T2I-R1 averages within each micro-batch)."""
    mask, weight = rollouts.mask, guidance_weights(cfg, policy)[1]
    advantages, tokens = advantages.to(mask.device), sum(scale.gather([mask.sum().item()]))
    old, loss_sum, clipped = [], 0.0, 0
    for repetition in range(cfg.updates_per_rollout):
        optimizer.zero_grad()
        policy.body.train(
            cfg.gradient_checkpointing
        )  # transformers checkpoints in training mode only; no dropout in it
        for i, s in enumerate(slices(rollouts, cfg)):
            logprobs = generate.logprobs(policy, rollouts[s], weight)
            # pi_old is what this very computation gave before the first update, never what the sampler
            # gave: in bfloat16 the two differ, guidance multiplies the difference, and rho leaves the range.
            if repetition == 0:
                old.append(logprobs.detach())
            loss = (
                grpo_loss(
                    logprobs,
                    old[i],
                    reference_NS[s],
                    advantages[s],
                    mask[s],
                    cfg.beta,
                    cfg.epsilon,
                    cfg.epsilon_high,
                ).sum()
                / tokens
            )
            loss.backward()
            rho = (logprobs.detach() - old[i]).exp()
            clipped += (
                (((rho < 1 - cfg.epsilon) | (rho > 1 + cfg.epsilon_high)) & mask[s]).sum().item()
            )
            loss_sum += loss.item()
        policy.body.eval()
        sum_gradients(policy)
        norm = scale.whole(torch.nn.utils.clip_grad_norm_(trainable(policy), cfg.max_grad_norm))
        if (
            not norm.isfinite()
        ):  # of the sum over all processes, so they agree: nobody takes this step
            optimizer.zero_grad()
            break
        optimizer.step()
    kl = torch.where(mask, kl_k3(torch.cat(old), reference_NS), 0.0).sum().item()
    sums = scale.gather(
        [torch.tensor([loss_sum, clipped / tokens, kl, len(rollouts)], dtype=torch.float64)]
    )
    loss_sum, clipped, kl, n = torch.stack(sums).sum(0).tolist()
    return {
        "loss": loss_sum / cfg.updates_per_rollout,
        "clip_ratio": clipped / cfg.updates_per_rollout,
        "kl": kl / n,  # nats a rollout, of the policy that sampled: before this update
        "grad_norm": norm.item(),
        "skipped": int(not norm.isfinite()),
        "learning_rate": optimizer.param_groups[0]["lr"],
    }


def trainable(policy):
    return [p for p in policy.model.parameters() if p.requires_grad]


# --- several processes: here, in scale.py, and where main picks this process' prompts -------------


def sum_gradients(policy):
    """Each process has the gradient of its share of one loss, already divided by all tokens: add them."""
    for parameter in trainable(policy) if dist.is_initialized() else ():
        if parameter.grad is None:  # without --cot the text head has none, on any process
            continue
        if isinstance(
            parameter.grad, scale.DTensor
        ):  # sharded: FSDP2 has taken the mean, shard by shard
            parameter.grad.mul_(dist.get_world_size())
        else:
            dist.all_reduce(parameter.grad)


def learn(learners, jobs, rollouts):
    """Rewards that learn (adversarial_reward.py) do so from the rollouts of all processes, each process all of it in
    the same order; should their arithmetic ever differ, rank 0 is right. Returns metrics."""
    metrics = {}
    if learners:
        _, prompts, images = zip(
            *sorted(
                scale.gather(list(zip(jobs, rollouts.prompts, rollouts.images))), key=lambda e: e[0]
            )
        )
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
        k3 = kl_k3(
            all_logprobs(policy, rollouts, cfg),
            reference_logprobs(policy, reference, rollouts, cfg),
        )
        scores["kl"] = torch.where(rollouts.mask, k3, 0.0).sum(1)
        records += harness.record(
            chosen, batch, rollouts, scores | harness.image_statistics(rollouts.images)
        )
        shown += rollouts.images
    everyone = sorted(
        scale.gather(list(zip(jobs, records, shown))), key=lambda entry: entry[0][::-1]
    )
    return [r for _, r, _ in everyone], [image for *_, image in everyone]


def best_of_n_pool(e):
    """`best_of` pictures of the policy *before* RL for each of 40 test prompts, with their scores: all that best-of-n
    needs. It optimises the same reward but never leaves what that policy paints: what it breaks is the reward's fault,
    what RL breaks beyond it is broken where nobody ever asked the reward."""
    pool, n = [], e.cfg.best_of
    for i in range(e.rank, min(40, len(e.test_rows)), e.world):
        jobs, group = [(i, k) for k in range(n)], [e.test_rows[i]] * n
        with scale.as_reference(e.policy, e.reference) as original:
            rollouts = rollout(original, e.test_rows, jobs, -2, e.cfg)
        scores = reward_models.score(e.train_on | e.watch, rollouts.prompts, rollouts.images, group)
        scores["total"] = reward_models.combine(scores, e.weights, n)
        pool += harness.record(group, jobs, rollouts, scores)
    return scale.gather(pool)


# --- the algorithm ------------------------------------------------------------------------------


def main(cfg):
    if cfg.explain:
        from studies import explain  # uphill, for once: the same functions, talking

        return explain.explain(cfg)
    e = harness.prepare(
        cfg
    )  # policy, reference, rewards, prompts, optimizer, run folder: `e` for experiment
    if e.state["step"] == 0:
        try_out(e, 0)
    for step in e.log.steps():
        indices = prompts_of_step(e.rows, step, cfg)[
            e.rank :: e.world
        ]  # a group stays on one process
        jobs = [(i, k) for i in indices for k in range(cfg.num_generations)]
        asked = [e.rows[i] for i, _ in jobs]

        with scale.gathered(e.policy):
            rollouts = rollout(
                e.policy, e.rows, jobs, step, cfg
            )  # G thoughts and pictures for each prompt
        e.stop_if_asked()  # nothing has been changed by this step: it would be made again
        e.log.tick("rollout")
        adversary = learn(
            e.learners, jobs, rollouts
        )  # a reward that learns does so before it scores them
        training_scores = reward_models.start_scoring(
            e.train_on, rollouts.prompts, rollouts.images, asked
        )
        reference_NS = reference_logprobs(
            e.policy, e.reference, rollouts, cfg
        )  # while a judge far away takes its time
        scores = training_scores()  # what trains
        believed = reward_models.score(
            e.watch, rollouts.prompts, rollouts.images, asked
        )  # what does not
        total = reward_models.combine(
            scores, e.weights, cfg.num_generations, cfg.combine, e.state["multipliers"]
        )
        e.log.tick("score")

        everyone = torch.tensor(
            scale.gather(total.tolist())
        )  # of all processes, for --advantage global; groups stay apart
        mine = slice(e.rank * len(total), (e.rank + 1) * len(total))
        advantages = group_advantages(everyone, cfg.num_generations, cfg.advantage)[mine]
        # Linear decay to 0, as T2I-R1 (the Trainer's default): at a constant rate the gradient's noise keeps
        # the policy wandering, which costs KL and buys no reward.
        e.optimizer.param_groups[0]["lr"] = cfg.learning_rate * (1 - step / cfg.max_steps)
        metrics = adversary | update(e.policy, reference_NS, e.optimizer, rollouts, advantages, cfg)
        e.log.tick("update")

        scores |= believed | {"total": total, "advantage": advantages}
        metrics |= e.finish_step(step, metrics, asked, jobs, rollouts, scores)
        if e.tests_now():
            try_out(e, step + 1)
        e.save_or_end(metrics)
    finish(e)


def try_out(e, done):
    """Test the policy as it is after `done` steps."""
    with scale.gathered(e.policy, e.reference):
        e.log.test(
            done,
            *test(e.policy, e.reference, e.train_on | e.watch, e.test_rows, e.cfg, e.rank, e.world),
        )


def finish(e):
    if e.cfg.best_of:
        with scale.gathered(e.policy, e.reference):
            e.log.pool(best_of_n_pool(e))
    if e.rank == 0:
        print(f"look at {hacking.report_page(e.folder)}")
    scale.end_processes()


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
