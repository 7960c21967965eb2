"""GRPO for text-to-image: reinforcement learning on pictures, and how it goes wrong.

The policy is the model that is trained. For each prompt it writes a group of G rollouts, each a
thought (a short text) and then a picture. A reward model scores the pictures. Rollouts above the
mean of their group become more likely, those below less likely. There is no value network: the
group is the baseline. One advantage trains both the thought and the picture (BiCoT-GRPO, T2I-R1,
arXiv:2505.00703):

    A_i  = (r_i - mean_G r) / (std_G r + 1e-4)                        arXiv:2402.03300, Sec. 4.1
    loss = mean over tokens of  -min(rho A, clip(rho, 1-eps_low, 1+eps_high) A) + beta k3
    rho  = pi(token) / pi_old(token),   k3 = exp(d) - d - 1  with  d = log pi_ref - log pi

The policy learns what the reward model *measures*, not what it was meant to measure. To see the
difference, `--rewards` train the policy, `--eval-rewards` are held out, and no reward is both.

Run:   torchrun grpo.py --rewards hps,artifact    the tiny world: minutes on two CPU cores
       torchrun grpo.py --rewards hps             without the cure: gold rises, then falls
       torchrun grpo.py --rewards noise           the control: what moves here is drift
       torchrun grpo.py --model deepseek-community/Janus-Pro-1B    GPUs; flags: docs/gpus.md

You should see:  a progress bar with the rewards; every 10 steps a line with test scores, where hps
rises, and gold, too; at the end runs/<name>/hacking.png and report.html.

Left out: a value network, a KL in the reward.   Read next: generate.py
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from training.flags import Combine, Cures, JudgeUrls, parse_flags


@dataclass
class Config:
    rewards: str = "hps,artifact"  # train the policy: name or name:weight, separated by commas
    eval_rewards: str | None = None  # held out: logged, never trained on [tiny: gold and its parts]
    preset: Literal["ours", "t2i-r1"] = "ours"  # t2i-r1: as released, see docs/differences.md
    model: str = "tiny"  # "tiny" makes every component tiny; or a folder or hub name of a Janus
    prompts: str | None = None  # training prompts [tiny_world/prompts/ or prompts/train.jsonl]
    test_prompts: str | None = None  # prompts of the tests [.../test.jsonl]

    num_generations: int = 8  # G, rollouts of a prompt: the group
    prompts_per_step: int = 16  # P, over all processes
    max_steps: int | None = None  # steps of training [tiny: 80; else 1600]
    learning_rate: float | None = None  # AdamW's highest, falls to 0 [tiny: 2e-4; else 1e-6]
    warmup_ratio: float | None = None  # share of the steps in which it rises [tiny: .33; else 0]
    adam_beta2: float | None = None  # memory of AdamW's second moment [.99; t2i-r1: .999]
    beta: float | None = None  # weight of the KL to the reference policy [tiny: .02; else .01]
    epsilon: float = 0.2  # clip range below 1
    epsilon_high: float = 0.2  # clip range above 1; DAPO takes .28
    updates_per_rollout: int = 1  # optimizer steps on the same rollouts; with 1 nothing is clipped
    # group: / its std (GRPO); none: / 1 (Dr. GRPO); global: / std of the batch; best: RAFT
    advantage: Literal["group", "none", "global", "best"] = "group"
    combine: Combine = "sum"  # several rewards -> one number, see rewards.combine
    floor: float = 0.7  # combine=constrained: each reward but the first is to stay above this
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm

    cot: bool = True  # write a thought before drawing, and train the thought too
    max_thought: int | None = None  # its longest, in tokens [tiny: 64; else 128; t2i-r1: 1024]
    cfg_weight: float | None = None  # guidance weight w of sampling [tiny: 1, Janus-Pro: 5]
    # guided: sampled and scored with guidance; cond: sampled only; none [guided; t2i-r1: cond]
    guidance: Literal["guided", "cond", "none"] | None = None

    seed: int = 42  # with step, prompt and sample number, all the randomness there is
    micro_batch: int = 64  # rollouts in one forward and backward pass
    rollout_batch: int = 128  # rollouts that are sampled at a time
    cuda_graph: bool = True  # on a GPU: record the sampling step of one token and replay it
    train_image_head: bool = False  # train the image head, too; T2I-R1 does not
    shard: bool = False  # FSDP2: each process keeps a shard of weights and optimizer
    lora_rank: int = 0  # train low-rank matrices instead of the weights; 0: the weights
    gradient_checkpointing: bool = False  # compute activations twice instead of keeping them
    dry_run: bool = False  # print the plan, and whether it fits, without GPU and weights
    world_size: int = 0  # dry run: number of processes [as many as there are]
    gpu_memory: float = 80  # dry run: GB of each GPU
    device: Literal["auto", "cpu", "mps", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of arithmetic and frozen weights
    judge_url: JudgeUrls = ()  # judge server; again for more [tiny: in-process; else port 8000]
    judge_model: str | None = None  # the served model's name [the first that is served]
    references: str | None = None  # pictures for adversarial and --cures.data-weight [tiny: drawn]
    adversary_steps: int = 4  # reward adversarial: discriminator updates in each step
    adversary_update: Literal["always", "beaten"] = "always"  # its updates; beaten: if it is fooled
    question: str | None = None  # for the judge: a text or a file, as apo.py writes [its own]
    max_failures: float = 0.5  # stop when a larger share of a step's rollouts has no score
    cures: Cures = field(default_factory=Cures)  # to compare with: training/cures.py

    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = "none"  # also log there
    push_to_hub: str = ""  # upload the trained policy to this repository, user/name
    output_dir: str = "runs"  # run folders go here
    run_name: str | None = None  # name of the run folder [made of model, rewards and seed]
    resume: str = "never"  # "latest", or a run folder: continue from its last checkpoint
    save_steps: int = 25  # steps between two checkpoints
    save_total_limit: int = 2  # number of checkpoints that are kept
    eval_steps: int = 10  # steps between two tests
    eval_images: int = 540  # pictures of each test
    best_of: int = 16  # measure best-of-n of the base policy up to this n; 0: not at all


if __name__ == "__main__":  # before torch is loaded, so that --help and a typo take no time
    flags = parse_flags(Config, __doc__)

import torch

import generate
import rewards as reward_lib
from adversarial_reward import References, update_adversaries
from artifact_reward import read_question
from evaluation.figures import report_page
from reward_models.image_statistics import image_statistics
from training import checks, processes, run_folder, sharding, stopping
from training.cures import OFF, Cure, flatten_gradient, pareto_front
from training.log import Log, make_records, token_scores
from training.memory_plan import print_plan
from training.model_card import push_to_hub
from training.optimizer import learning_rate, make_optimizer
from training.policy import trainable
from training.prompts import jobs_of_step

# Shapes:  P prompts   N = P*G rollouts   S = C+T tokens of one: C of the thought, T of the picture

# --- the mathematics: tensors in, tensors out ---------------------------------------------------


def group_advantages(total_N, group_size, divide="group"):
    """Rewards -> advantages (N,), group by group. A NaN reward gets 0 and does not move the mean.

    Per group and not per batch: an easy prompt must not make every picture of a hard one look bad.
    The standard deviation has n - 1, as released (T2I-R1 grpo_trainer.py:743). Dividing by it
    inflates nearly tied groups (Dr. GRPO, arXiv:2503.20783). "best": 1 for the best picture of the
    group, 0 for the others: the gradient of -log of its likelihood (RAFT, arXiv:2304.06767)."""
    reward = total_N.view(-1, group_size)
    known = reward.isfinite()
    count = known.sum(1, keepdim=True)
    mean = torch.where(known, reward, 0.0).sum(1, keepdim=True) / count.clamp(min=1)
    lowest = torch.where(known, reward, math.inf).amin(1, keepdim=True)
    highest = torch.where(known, reward, -math.inf).amax(1, keepdim=True)
    # A unanimous group has no best picture: 0. Tested explicitly, as the float32 mean of rewards
    # may differ from them in the last digit, and that digit / 1e-4 is an advantage.
    centered = torch.where(known & (highest > lowest), reward - mean, 0.0)
    if divide == "group":
        std = (centered.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    elif divide == "global":
        finite = total_N[total_N.isfinite()]
        std = finite.std() if len(finite) > 1 else torch.zeros(())
    elif divide == "best":
        best = torch.nn.functional.one_hot(centered.argmax(1), group_size)
        return (best * (centered > 0)).float().view(-1)
    else:
        return centered.view(-1)
    return (centered / (std + 1e-4)).view(-1)


def kl_k3(logprobs, reference_logprobs):
    """Schulman's k3, per token: exp(d) - d - 1 with d = log pi_ref - log pi.

    Its *value*, under samples of pi, estimates KL(pi || pi_ref) without bias and is never negative.
    Its *gradient*, with the samples held fixed, is (1 - e^d) grad log pi: on average the gradient
    of KL(pi_ref || pi), the other direction. Both have the same minimum. Where samples and
    log-probabilities differ (guidance="cond") it is not a KL."""
    d = reference_logprobs - logprobs
    return d.exp() - d - 1


def grpo_loss(logprobs_NS, old_NS, reference_NS, advantages_N, mask_NS, beta, epsilon, eps_high):
    """Loss of each token (N, S), not averaged yet. In the first update old_NS has the values of
    logprobs_NS, so the ratio is 1. Only logprobs_NS has a gradient: the loss' is that of -A log pi,
    the plain policy gradient with the group's mean as baseline (REINFORCE)."""
    ratio = (logprobs_NS - old_NS).exp()
    advantage = advantages_N[:, None]
    clipped = ratio.clamp(1 - epsilon, 1 + eps_high)
    # The smaller of the two: moving further beyond the clip range brings no gain.
    surrogate = torch.min(ratio * advantage, clipped * advantage)
    loss = -surrogate + beta * kl_k3(logprobs_NS, reference_NS)
    return torch.where(mask_NS, loss, 0.0)


def guidance_weights(cfg, policy):
    """Two guidance weights for pictures: of sampling, and of the log-probabilities.
    guided  both guided: exact, on-policy; log-probabilities need two branches.
    cond    samples guided, log-probabilities of the conditional branch only: as released by T2I-R1
            and ArtifactReward. Not the gradient of the expected reward; the logged KL is no KL.
    none    no guidance at all: exact and cheap, but the base policy is weaker."""
    w = generate.default_cfg_weight(policy) if cfg.cfg_weight is None else cfg.cfg_weight
    return {"guided": (w, w), "cond": (w, 1.0), "none": (1.0, 1.0)}[cfg.guidance]


# --- rollouts and their log-probabilities -------------------------------------------------------


def rollout(policy, rows, jobs, stream, cfg):
    """Sample one thought and one picture for each job (prompt index, sample number). stream: which
    random numbers; the step in training, -1 in tests, -2 for best-of-n."""

    def sample(jobs):
        keys = [(cfg.seed, stream, i, k) for i, k in jobs]
        prompts, weight = [rows[i]["prompt"] for i, _ in jobs], guidance_weights(cfg, policy)[0]
        return generate.sample(policy, prompts, keys, cfg.cot, weight, cfg.max_thought)

    return generate.join(stopping.in_batches(sample, jobs, cfg.rollout_batch))


def micro_batches(rollouts, cfg):
    return [slice(i, i + cfg.micro_batch) for i in range(0, len(rollouts), cfg.micro_batch)]


@torch.no_grad()
def all_logprobs(policy, rollouts, cfg, read=generate.gather_logprobs):
    """generate.logprobs without gradients, in micro-batches: (N, S), or more by `read`."""
    weight = guidance_weights(cfg, policy)[1]
    parts = (rollouts[b] for b in micro_batches(rollouts, cfg))
    return torch.cat([generate.logprobs(policy, part, weight, read) for part in parts])


def reference_logprobs(policy, reference, rollouts, cfg):
    """(N, S): the same tokens under the policy that training started from."""
    with sharding.as_reference(policy, reference) as original:
        return all_logprobs(original, rollouts, cfg)


# --- one step -----------------------------------------------------------------------------------


def compute_gradient(policy, reference_NS, rollouts, advantages, betas, old, tokens, cfg, data):
    """The gradient of the loss, a mean over the tokens of all processes (DAPO; T2I-R1: of each
    process apart). old: a list; the first call fills it with log pi_old of each micro-batch.
    Returns this process' part of the loss, and how many of its ratios are out of the clip range."""
    mask, cfg_weight = rollouts.mask, guidance_weights(cfg, policy)[1]
    loss_sum, clipped = 0.0, 0
    policy.model.zero_grad()
    # transformers checkpoints activations in training mode only; the model has no dropout.
    policy.language_model.train(cfg.gradient_checkpointing)
    for i, b in enumerate(micro_batches(rollouts, cfg)):
        logprobs = generate.logprobs(policy, rollouts[b], cfg_weight)
        # pi_old is what this very computation gave before the first update, never what the
        # sampler gave: in bfloat16 the two differ, and guidance multiplies the difference.
        if len(old) == i:
            old.append(logprobs.detach())
        batch = (logprobs, old[i], reference_NS[b], advantages[b], mask[b])
        loss = grpo_loss(*batch, betas[b], cfg.epsilon, cfg.epsilon_high).sum() / tokens
        loss.backward()
        ratio = (logprobs.detach() - old[i]).exp()
        outside = (ratio < 1 - cfg.epsilon) | (ratio > 1 + cfg.epsilon_high)
        clipped += (outside & mask[b]).sum().item()
        loss_sum += loss.item()
    # DDRL: the pictures of the references, one for each prompt.
    for b in micro_batches(data, cfg) if data else ():
        logprobs = generate.logprobs(policy, data[b], cfg_weight)[:, -data.image_ids.shape[1] :]
        loss = -cfg.cures.data_weight * logprobs.mean(1).sum() / cfg.prompts_per_step
        loss.backward()
        loss_sum += loss.item()
    policy.language_model.eval()
    sharding.sum_gradients(trainable(policy))
    return loss_sum, clipped


def update_policy(policy, reference_NS, optimizer, rollouts, advantages, betas, cfg, data=None):
    """Updates on these rollouts; returns metrics. betas: (N,), the weight of each rollout's KL.
    data: rollouts of reference pictures (training/cures.py)."""
    mask = rollouts.mask
    weights = advantages.to(mask.device), betas.to(mask.device)[:, None]
    (tokens,) = processes.sum_over_processes([mask.sum().item()])
    old, results, gamma = [], [], cfg.cures.gradient_penalty
    arguments = (policy, reference_NS, rollouts, *weights, old, tokens, cfg, data)
    for _ in range(cfg.updates_per_rollout):
        results.append(compute_gradient(*arguments))
        if gamma:
            flatten_gradient(trainable(policy), lambda: compute_gradient(*arguments), gamma)
        norm = sharding.clip_gradients(trainable(policy), cfg.max_grad_norm)
        if not norm.isfinite():  # the norm over all processes: all of them skip this step
            optimizer.zero_grad()
            break
        optimizer.step()
    loss, clipped = map(sum, zip(*results))
    old_NS, T = torch.cat(old), rollouts.image_ids.shape[1]
    per_token = (kl_k3(old_NS, reference_NS), -old_NS)  # the mean of -old_NS is the entropy
    kl, surprise = (torch.where(mask, values, 0.0) for values in per_token)
    parts = [len(rollouts), kl.sum().item(), surprise.sum().item(), surprise[:, -T:].sum().item()]
    sums = processes.sum_over_processes([loss, clipped, *parts])
    loss, clipped, N, kl, surprise, surprise_of_pictures = sums
    return {
        "loss": loss / len(results),
        "clip_ratio": clipped / tokens / len(results),
        "kl": kl / N,  # nats per rollout, of the policy that sampled: before the update
        "kl_per_token": kl / tokens,
        "entropy": surprise / tokens,  # nats per token; with guidance="cond" a cross-entropy
        "entropy/picture": surprise_of_pictures / (N * T),  # of the picture's tokens alone
        "grad_norm": norm.item(),
        "skipped": int(not norm.isfinite()),
        "learning_rate": optimizer.param_groups[0]["lr"],
    }


def train_step(policy, reference, rewards, optimizer, rollouts, rows, step, cfg, clock, cure=OFF):
    """Score this process' rollouts, compute advantages, update the policy. Returns (scores,
    metrics): name -> tensor (N,), with "total" and "advantage"; name -> number."""
    to_score = (rollouts.prompts, rollouts.images, [rows[i] for _, _, i, _ in rollouts.keys])
    metrics = update_adversaries(rewards.adversaries, rollouts)  # before they score
    pending = reward_lib.start_scoring(rewards.train, *to_score)
    # A judge on a server works while we compute these.
    with cure.reference(policy, reference) as original:
        reference_NS = all_logprobs(original, rollouts, cfg)
    scores, heldout_scores = pending(), reward_lib.score(rewards.heldout, *to_score)
    needed = rewards.train | {name: rewards.heldout[name] for name in cure.doubted_by}
    stopping.check_scores(scores | heldout_scores, needed, cfg.max_failures)
    G = cfg.num_generations
    total = reward_lib.combine(scores, rewards.weights, G, cfg.combine, rewards.multipliers)
    entropies = lambda policy: all_logprobs(policy, rollouts, cfg, generate.entropies)
    total = total + cure.entropy_bonus(policy, reference, entropies)
    clock("score")

    # --advantage global needs the rewards of all processes; a group never leaves its process.
    all_rewards = torch.tensor(processes.gather(total.tolist()))
    first = sum(processes.gather([len(total)])[: processes.rank()])
    advantages = group_advantages(all_rewards, G, cfg.advantage)[first : first + len(total)]
    if cfg.combine == "pareto":
        advantages = advantages * pareto_front(scores, rewards.weights, G)
    advantages = cure.advantages(advantages, rollouts.images, G)
    optimizer.param_groups[0]["lr"] = learning_rate(step, cfg)
    betas = cure.betas(cfg.beta, total, heldout_scores, G)
    parts = (policy, reference_NS, optimizer, rollouts, advantages, betas, cfg)
    metrics |= update_policy(*parts, cure.data(policy, rollouts, G, step))
    cure.after_step(policy, step + 1)
    clock("update")
    return scores | heldout_scores | {"total": total, "advantage": advantages}, metrics


# --- tests --------------------------------------------------------------------------------------


def evaluate_policy(policy, reference, rewards, rows, cfg):
    """Score the policy on test prompts, with the same random numbers each time, so that two tests
    differ only by what has learned. Returns (records, pictures) of all processes, in order."""
    jobs = [(j % len(rows), j // len(rows)) for j in range(cfg.eval_images)]
    jobs = jobs[processes.rank() :: processes.world_size()]
    results = []
    for start in processes.bar(range(0, len(jobs), cfg.rollout_batch), "test"):
        rollouts = rollout(policy, rows, jobs[start : start + cfg.rollout_batch], -1, cfg)
        batch_rows = [rows[i] for _, _, i, _ in rollouts.keys]
        scores = reward_lib.score(rewards.all, rollouts.prompts, rollouts.images, batch_rows)
        own_NS2 = all_logprobs(policy, rollouts, cfg, generate.with_entropies)
        k3 = kl_k3(own_NS2[..., 0], reference_logprobs(policy, reference, rollouts, cfg))
        scores |= token_scores(k3, -own_NS2.sum(-1), rollouts.mask)
        records = make_records(rows, rollouts, scores | image_statistics(rollouts.images))
        results += zip(rollouts.keys, records, rollouts.images)
    # By sample number, then by prompt: the order of the jobs.
    results = sorted(processes.gather(results), key=lambda result: result[0][:1:-1])
    return [record for _, record, _ in results], [image for *_, image in results]


def best_of_n_pool(policy, reference, rewards, rows, cfg):
    """Records of `best_of` pictures of the base policy for each of 40 test prompts. Choosing the
    best raises the reward without training, with pictures like those that it was fitted to."""
    pool, n = [], cfg.best_of
    mine = range(processes.rank(), min(40, len(rows)), processes.world_size())
    for i in processes.bar(mine, "best of n"):
        with sharding.as_reference(policy, reference) as original:
            rollouts = rollout(original, rows, [(i, k) for k in range(n)], -2, cfg)
        scores = reward_lib.score(rewards.all, rollouts.prompts, rollouts.images, [rows[i]] * n)
        weights, multipliers = rewards.weights, rewards.multipliers
        scores["total"] = reward_lib.combine(scores, weights, n, cfg.combine, multipliers)
        pool += make_records(rows, rollouts, scores)
    return processes.gather(pool)


# --- the algorithm ------------------------------------------------------------------------------


def load_policies(cfg, checkpoint=None):
    """(policy, reference policy): the one that is trained, and the one that training started from.
    With LoRA the policy is its own reference: None."""
    device, dtype = processes.pick_device(cfg.device, cfg.dtype)
    if cfg.lora_rank:
        policy = generate.load_policy(cfg.model, "cpu", dtype)
        sharding.add_lora(policy, cfg.lora_rank, cfg.seed)
        if checkpoint:
            sharding.resume_lora(policy, checkpoint)
        sharding.cast_frozen_weights(policy).model.to(device)
        reference = None
    else:
        source = str(checkpoint or cfg.model)
        policy = generate.load_policy(source, device, dtype, cfg.train_image_head)
        # Sharded before the next one is loaded: two whole ones may not fit.
        policy = sharding.shard(policy) if cfg.shard else sharding.cast_frozen_weights(policy)
        reference = generate.load_policy(cfg.model, device, dtype)
        reference.model.requires_grad_(False)
        sharding.cast_frozen_weights(reference)
        reference = sharding.shard(reference) if cfg.shard else reference
    # A checkpoint is drawn from as it was trained, and both policies read one instruction.
    policy.model.generation_config.guidance_scale = guidance_weights(cfg, policy)[0]
    for each in filter(None, (policy, reference)):
        each.cuda_graph, each.reasoning = cfg.cuda_graph, policy.reasoning
    if cfg.gradient_checkpointing:
        policy.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    return policy, reference


def main(cfg):
    processes.start_processes(cfg.device, math.inf if cfg.shard else max(1, cfg.prompts_per_step))
    checks.fill_presets(cfg)
    cfg.question = read_question(cfg.question)  # config.json keeps the text, not the file's name
    weights, heldout = reward_lib.check_roles(cfg.rewards, cfg.eval_rewards, cfg.combine)
    rows, test_rows = checks.check_flags(cfg, len(weights), checks.num_processes(cfg))
    if cfg.dry_run:
        return print_plan(cfg, checks.num_processes(cfg), reward_lib.gigabytes(cfg))
    folder, checkpoint, _lock = run_folder.open_run(cfg)  # held while this variable exists

    policy, reference = load_policies(cfg, checkpoint)
    rewards = reward_lib.load_all(cfg, weights, heldout, rows)
    optimizer = make_optimizer(policy, cfg)
    cure = Cure(cfg.cures, policy, References(cfg.references), cfg.seed, rows)
    run = run_folder.Run(folder, policy, rewards, optimizer, cure, cfg.save_total_limit)
    run.load(checkpoint)  # all but the weights, if there is a checkpoint
    log, stop = Log(cfg, folder, run.step, rewards), stopping.StopSignal()

    def test():
        with stopping.rescued(), sharding.unsharded(policy, reference), cure.tested(policy):
            log.test(run.step, *evaluate_policy(policy, reference, rewards, test_rows, cfg))

    if run.step == 0:
        test()
    for step in log.steps():
        with sharding.unsharded(policy):
            rollouts = rollout(policy, rows, jobs_of_step(rows, step, cfg), step, cfg)
        log.clock("rollout")
        stop.stop_if_requested(run.save)  # nothing has changed yet: this step is repeated
        parts = (policy, reference, rewards, optimizer)
        with stopping.rescued(run.save, cfg.updates_per_rollout):
            scores, metrics = train_step(*parts, rollouts, rows, step, cfg, log.clock, cure)
        metrics, records = log.step(step, metrics, policy, rows, rollouts, scores)
        stopping.stop_if_diverged(metrics, step, folder)
        rewards.update_multipliers(records, cfg.combine, cfg.floor)
        run.finish_step(metrics["skipped"])
        if run.is_due(cfg.eval_steps, cfg.max_steps):
            log.rollout_pictures(step, rollouts.images)
            test()
        stopping.stop_if_wrong(metrics, run.skipped, run.save)
        if run.is_due(cfg.save_steps, cfg.max_steps):
            run.save()

    if cfg.best_of:
        with sharding.unsharded(policy, reference):
            log.pool(best_of_n_pool(policy, reference, rewards, test_rows, cfg))
    if processes.rank() == 0:
        log.end(report_page(folder))
        push_to_hub(cfg.push_to_hub, run_folder.checkpoints(folder)[-1])
    processes.end_processes()


if __name__ == "__main__":
    main(flags)
