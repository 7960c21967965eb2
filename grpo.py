"""GRPO for text-to-image: reinforcement learning on pictures, and how it goes wrong.

For each prompt the policy paints a group of G pictures; a reward model scores them; pictures better
than their group's average become more likely, worse ones less. No value network: the group is the
baseline. One advantage trains both the thought and the picture (BiCoT-GRPO, T2I-R1, arXiv:2505.00703):

    A_i  = (r_i - mean_G r) / (std_G r + 1e-4)                                 arXiv:2402.03300, Sec. 4.1
    loss = mean over tokens of  -min(rho A, clip(rho, 1-eps_low, 1+eps_high) A) + beta k3
    rho  = pi(token) / pi_old(token),   k3 = exp(d) - d - 1  with  d = log pi_ref - log pi

The policy learns what the reward model *measures*, not what it was meant to measure. That gap is
the subject: `--rewards` train, `--eval-rewards` are only watched, and nothing is ever both.

Run:   torchrun grpo.py --rewards hps,artifact         the tiny world: about 8 minutes on two CPU cores
       torchrun grpo.py --rewards hps                  the same without the cure: watch gold fall
       torchrun --nproc-per-node 8 grpo.py --model deepseek-community/Janus-Pro-1B --judge-url http://HOST:8000/v1

You should see:  a bar with the rewards; every 25 steps a line on test prompts, where hps rises and the
share of artifact-free pictures (by gold) does not fall; at the end runs/<name>/hacking.png, report.html.

Left out: a value network, a KL in the reward, learned critics.   Read next: evaluate.py, tiny.py
"""

import json
import math
import os
import platform
import random
import shlex
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import transformers
import tyro
from tqdm import tqdm

import evaluate
import generate
import rewards as reward_models
from generate import HERE, atomic, usage_error

# Shapes:  P prompts   G rollouts of each   N = P*G rollouts   S = C+T tokens of a rollout


@dataclass
class Config:
    rewards: str = "hps,artifact"  # what trains the policy: name or name:weight, separated by commas
    eval_rewards: str | None = None  # held out: watched, never trained on [tiny: gold,gold-clean; else: none]
    model: str = "tiny"  # "tiny" makes every component tiny; or a folder or hub name of a Janus
    prompts: str | None = None  # training prompts [tiny/prompts/train.jsonl or prompts/train.txt]
    test_prompts: str | None = None  # prompts that only measure [tiny/prompts/test.jsonl or prompts/test.txt]

    num_generations: int = 8  # G, rollouts of a prompt: the group
    prompts_per_step: int = 8  # P, over all processes
    max_steps: int | None = None  # steps of training [tiny: 150; else 1600]
    learning_rate: float | None = None  # of AdamW [tiny: 1e-4; else 1e-6, as T2I-R1]
    beta: float = 0.01  # weight of the KL penalty to the reference policy
    epsilon: float = 0.2  # clip range below 1
    epsilon_high: float = 0.2  # clip range above 1; DAPO takes .28
    updates_per_rollout: int = 1  # optimizer steps on the same rollouts; 1: rho is 1, and nothing is clipped
    advantage: Literal["group", "none", "global"] = "group"  # divide by the group's std (GRPO), nothing (Dr.GRPO), the batch's std (Flow-GRPO)
    combine: Literal["sum", "normalized", "mean", "min", "uwo", "pareto", "constrained"] = "sum"  # several rewards -> one, see rewards.combine
    floor: float = 0.7  # combine=constrained: every reward but the first is to stay above this
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm

    cot: bool = True  # think before painting, and train the thought too
    max_thought: int = 64  # longest thought, in tokens
    cfg_weight: float | None = None  # guidance w while sampling [the checkpoint's own: tiny 1, Janus-Pro 5]
    guidance: Literal["guided", "cond", "none"] = "guided"  # how rollouts are scored, see `guidance_weights`

    seed: int = 42  # with step, prompt and sample number, all the randomness there is
    micro_batch: int = 64  # rollouts in one forward and backward pass
    device: Literal["auto", "cpu", "mps", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the arithmetic; weights stay float32
    judge_url: tuple[str, ...] = ()  # judge server(s) [tiny: in-process; else http://127.0.0.1:8000/v1]
    judge_model: str | None = None  # the served model's name [the first that is served]
    max_failures: float = 0.5  # stop when more than this share of a step's rollouts has no score

    output_dir: str = "runs"  # run folders go here
    run_name: str | None = None  # name of the run folder [made of model, rewards and seed]
    resume: str = "never"  # "latest", or a run folder: go on from its last checkpoint
    save_steps: int = 25  # a checkpoint every so many steps
    save_total_limit: int = 2  # keep so many checkpoints
    eval_steps: int = 25  # test and draw the grid of fixed prompts every so many steps
    eval_images: int = 160  # pictures of each test
    best_of: int = 16  # best-of-n is measured up to this n, on the base policy; 0: not at all


# What "[tiny: ...; else ...]" above stands for.
PRESETS = {
    "tiny": dict(eval_rewards="gold,gold-clean", prompts=str(HERE / "tiny/prompts/train.jsonl"),
                 test_prompts=str(HERE / "tiny/prompts/test.jsonl"), max_steps=150, learning_rate=1e-4),
    "real": dict(eval_rewards="", prompts=str(HERE / "prompts/train.txt"),
                 test_prompts=str(HERE / "prompts/test.txt"), max_steps=1600, learning_rate=1e-6),
}


# --- the mathematics: tensors in, tensors out ---------------------------------------------------


def group_advantages(total_N, group_size, divide="group"):
    """Rewards -> advantages (N,), group by group. NaN rewards get 0 and do not move the others' mean.

    The deviation has n - 1, as released (T2I-R1 grpo_trainer.py:752). A unanimous group has nothing to
    teach: 0 / 1e-4 = 0. Per group and not per batch: an easy prompt must not make every picture of a hard
    one look bad. By std only if asked: it blows up nearly tied groups (Dr.GRPO, arXiv:2503.20783)."""
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


def rollout(policy, rows, indices, step, cfg):
    """A group of G rollouts for each prompt index; groups are contiguous."""
    keys = [(cfg.seed, step, i, k) for i in indices for k in range(cfg.num_generations)]
    return generate.sample(policy, [rows[i]["prompt"] for _, _, i, _ in keys], keys, cot=cfg.cot,
                           cfg_weight=guidance_weights(cfg, policy)[0], max_thought=cfg.max_thought)


def slices(rollouts, cfg):
    return [slice(i, i + cfg.micro_batch) for i in range(0, len(rollouts), cfg.micro_batch)]


@torch.no_grad()
def all_logprobs(policy, rollouts, cfg):
    weight = guidance_weights(cfg, policy)[1]
    return torch.cat([generate.logprobs(policy, rollouts[s], weight) for s in slices(rollouts, cfg)])


def update(policy, reference, optimizer, rollouts, advantages, cfg):
    """Teach: `updates_per_rollout` optimizer steps on these rollouts. Returns metrics.

    The average goes over all tokens of all processes ("token mean", as DAPO): a process with longer
    thoughts must not weigh its tokens less (T2I-R1 averages within each micro-batch)."""
    mask, weight = rollouts.mask, guidance_weights(cfg, policy)[1]
    advantages, tokens = advantages.to(mask.device), sum(gather([mask.sum().item()]))
    reference_logprobs = all_logprobs(reference, rollouts, cfg)
    old, loss_sum, clipped = [], 0.0, 0
    for repetition in range(cfg.updates_per_rollout):
        optimizer.zero_grad()
        for i, s in enumerate(slices(rollouts, cfg)):
            logprobs = generate.logprobs(policy, rollouts[s], weight)
            # pi_old is what this very computation gave before the first update, never what the sampler
            # gave: in bfloat16 the two differ, guidance multiplies the difference, and rho leaves the range.
            if repetition == 0:
                old.append(logprobs.detach())
            loss = grpo_loss(logprobs, old[i], reference_logprobs[s], advantages[s], mask[s],
                             cfg.beta, cfg.epsilon, cfg.epsilon_high).sum() / tokens
            loss.backward()
            rho = (logprobs.detach() - old[i]).exp()
            clipped += (((rho < 1 - cfg.epsilon) | (rho > 1 + cfg.epsilon_high)) & mask[s]).sum().item()
            loss_sum += loss.item()
        sum_gradients(policy)
        norm = torch.nn.utils.clip_grad_norm_(trainable(policy), cfg.max_grad_norm)
        optimizer.step()
    kl = torch.where(mask, kl_k3(torch.cat(old), reference_logprobs), 0.0).sum().item()
    totals = torch.tensor(gather([[loss_sum, clipped / tokens, kl, len(rollouts)]]), dtype=torch.float64).sum(0).tolist()
    return {"loss": totals[0] / cfg.updates_per_rollout, "clip_ratio": totals[1] / cfg.updates_per_rollout,
            "kl": totals[2] / totals[3],  # nats a rollout, of the policy that sampled, so before this update
            "grad_norm": norm.item()}


def trainable(policy):
    return [p for p in policy.model.parameters() if p.requires_grad]


# --- several processes: only these three functions, and `rank` in main, know of them ------------


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
    if dist.is_initialized():
        for parameter in trainable(policy):
            if parameter.grad is not None:  # without --cot the text head has none, on any process
                dist.all_reduce(parameter.grad)


# --- measuring ----------------------------------------------------------------------------------


def test(policy, reference, scorers, rows, cfg, rank, world):
    """Score the policy on test prompts, with the same keys each time, so that two steps differ by the
    policy alone. Returns (records of all pictures, the first pictures of this process)."""
    jobs = [(j % len(rows), j // len(rows)) for j in range(cfg.eval_images)][rank::world]
    records, shown = [], []
    for start in range(0, len(jobs), cfg.micro_batch):
        batch = jobs[start:start + cfg.micro_batch]
        chosen = [rows[i] for i, _ in batch]
        rollouts = generate.sample(policy, [row["prompt"] for row in chosen], [(cfg.seed, -1, i, k) for i, k in batch],
                                   cfg.cot, guidance_weights(cfg, policy)[0], cfg.max_thought)
        scores = reward_models.score(scorers, rollouts.prompts, rollouts.images, chosen)
        k3 = kl_k3(all_logprobs(policy, rollouts, cfg), all_logprobs(reference, rollouts, cfg))
        scores["kl"] = torch.where(rollouts.mask, k3, 0.0).sum(1)
        records += record(chosen, [k for _, k in batch], rollouts, scores)
        shown += rollouts.images
    return gather(records), shown[:evaluate.STRIP]


def best_of_n_pool(reference, scorers, weights, rows, cfg, rank, world):
    """`best_of` pictures of the *untrained* policy for each of 40 test prompts, with their scores: all that
    best-of-n needs. It optimises the same reward without any RL, so what it breaks is the reward's fault."""
    pool = []
    for i in range(rank, min(40, len(rows)), world):
        group = [rows[i]] * cfg.best_of
        rollouts = generate.sample(reference, [rows[i]["prompt"]] * cfg.best_of, [(cfg.seed, -2, i, k) for k in range(cfg.best_of)],
                                   cfg.cot, guidance_weights(cfg, reference)[0], cfg.max_thought)
        scores = reward_models.score(scorers, rollouts.prompts, rollouts.images, group)
        scores["total"] = reward_models.combine(scores, weights, cfg.best_of)
        pool += record(group, range(cfg.best_of), rollouts, scores)
    return gather(pool)


def record(rows, samples, rollouts, scores):
    """One dict a picture: what was asked, what was thought, what it scored."""
    return [{"id": row["id"], "prompt": row["prompt"], "sample": k, "thought": rollouts.thoughts[n],
             **{name: values[n].item() for name, values in scores.items()}}
            for n, (row, k) in enumerate(zip(rows, samples))]


def summarize(records, trained, held_out, cfg):
    """One step's records -> numbers to log. NaN scores count as failed and enter no mean."""
    groups = len(records) // cfg.num_generations
    metrics = {"failed": sum(math.isnan(r["total"]) and any(math.isnan(r[name]) for name in trained) for r in records) / len(records)}
    for name, kind in [*((n, "reward") for n in trained), *((n, "held-out") for n in held_out), ("total", "reward")]:
        values = torch.tensor([r[name] for r in records])
        metrics[f"{kind}/{name}"] = values.nanmean().item()
        # Within the group: the spread that GRPO learns from. No spread in a group, nothing to learn.
        spread = values.view(groups, -1).std(1)
        metrics[f"{kind}/{name}/group_std"] = spread.nanmean().item()
    metrics["unanimous_groups"] = (spread == 0).float().mean().item()  # of the total, the last of the loop
    metrics["thought_words"] = sum(len(r["thought"].split()) for r in records) / len(records)
    return metrics


# --- the run folder -----------------------------------------------------------------------------


def save_checkpoint(run, step, policy, optimizer, state, cfg):
    """checkpoints/step-000100: the policy in the Hugging Face format, the optimizer, the counters. Written
    under another name and renamed when complete, so that a kill leaves the previous one whole."""
    folder = run / "checkpoints" / f"step-{step:06d}"
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    generate.save_policy(policy, partial)
    torch.save(optimizer.state_dict(), partial / "optimizer.pt")
    with atomic(partial / "state.json") as file:
        json.dump({"step": step, **state}, file)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    for old in checkpoints(run)[:-cfg.save_total_limit]:
        shutil.rmtree(old)


def checkpoints(run):
    return sorted((run / "checkpoints").glob("step-*"))


def run_folder(cfg):
    """(run folder, checkpoint to go on from or None). A name that is taken gets a number: nothing is overwritten."""
    root = Path(cfg.output_dir)
    name = cfg.run_name or f"{Path(cfg.model).name}_{cfg.rewards.replace(',', '+').replace(':', '=')}_seed{cfg.seed}"
    if Path(name).name != name:
        usage_error(f"--run-name {name}: a name, not a path; the folder is made in --output-dir {root}")
    if cfg.resume not in ("never", "latest"):
        run = Path(cfg.resume)
        if not checkpoints(run):
            usage_error(f"--resume {run}: no checkpoints/step-* in it; give a run folder, 'latest' or 'never'")
        return run, checkpoints(run)[-1]
    made = [p for p in root.glob("*") if p.name == name or p.name.startswith(name + "-") and p.name[len(name) + 1:].isdigit()]
    if cfg.resume == "latest" and made:
        run = max(made, key=lambda p: p.stat().st_ctime)
        return run, checkpoints(run)[-1] if checkpoints(run) else None
    run, number = root / name, 2
    while run.exists():
        run, number = root / f"{name}-{number}", number + 1
    return run, None


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
        usage_error(f"{', '.join(weights.keys() & set(held_out))} is in --rewards and in --eval-rewards: what is trained "
                    "on cannot be believed; take it out of one")
    if cfg.num_generations < 2:
        usage_error(f"--num-generations {cfg.num_generations}: a group of one has no baseline; use 4 or more")
    if cfg.prompts_per_step < 1 or cfg.prompts_per_step % world:
        usage_error(f"--prompts-per-step {cfg.prompts_per_step}: must be a multiple of the {world} processes; a group stays on one")
    if cfg.combine == "constrained" and len(weights) < 2:
        usage_error("--combine constrained needs two rewards: the first is maximised, the others keep their --floor")
    for name in ("max_steps", "learning_rate", "updates_per_rollout", "micro_batch", "max_thought", "max_grad_norm",
                 "save_steps", "save_total_limit", "eval_steps", "eval_images"):
        if not getattr(cfg, name) > 0:
            usage_error(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must be greater than 0")
    return weights, held_out, generate.load_prompts(cfg.prompts), generate.load_prompts(cfg.test_prompts)


def load_rewards(names, cfg, device):
    judge = dict(judge_urls=cfg.judge_url, judge_model=cfg.judge_model)
    return {name: reward_models.load(name, device, "tiny" if cfg.model == "tiny" else None, **(judge if name == "artifact" else {}))
            for name in names}


def begin_log(run, start, cfg, world):
    """Make the run folder. Lines of steps that will be made again are dropped, so that the log of a resumed
    run equals that of an uninterrupted one."""
    run.mkdir(parents=True, exist_ok=True)
    for name, first in (("metrics.jsonl", start), ("test.jsonl", start + 1 if start else 0)):
        if (run / name).exists():
            lines = [line for line in (run / name).read_text().splitlines(True) if line.endswith("\n")]
            with atomic(run / name) as file:
                file.writelines(line for line in lines if json.loads(line)["step"] < first)
    with atomic(run / "config.json") as file:
        json.dump({"flags": asdict(cfg), "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]), "processes": world,
                   "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
                   "threads": torch.get_num_threads()}, file, indent=2)


def log_line(path, line):
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def log_records(path, records):
    with atomic(path) as file:
        file.writelines(json.dumps(r) + "\n" for r in records)


# --- the algorithm ------------------------------------------------------------------------------


def main(cfg):
    rank, world = start_processes()
    weights, held_out, rows, test_rows = check(cfg, world)
    run, checkpoint = gather([run_folder(cfg) if rank == 0 else None])[0]
    device, dtype = generate.pick_device(cfg.device, cfg.dtype)
    reference = generate.load_policy(cfg.model, device, dtype)
    policy = generate.load_policy(str(checkpoint or cfg.model), device, dtype)
    train_on, watch = load_rewards(weights, cfg, device), load_rewards(held_out, cfg, device)
    optimizer = torch.optim.AdamW(trainable(policy), lr=cfg.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    start, multipliers = 0, {name: 1.0 for name in list(weights)[1:]}  # multipliers: only for combine=constrained
    if checkpoint:
        optimizer.load_state_dict(torch.load(checkpoint / "optimizer.pt", weights_only=True, map_location=device))
        state = json.loads((checkpoint / "state.json").read_text())
        start, multipliers = state["step"], state["multipliers"]
    if rank == 0:
        begin_log(run, start, cfg, world)
        print(f"{run}/: {' + '.join(weights)} trains, {' and '.join(held_out) or 'nothing'} is only watched; "
              f"{cfg.prompts_per_step} prompts x {cfg.num_generations} pictures a step", flush=True)
    signals = []  # SIGTERM ends the run after the step at hand, with a checkpoint
    signal.signal(signal.SIGTERM, lambda number, frame: signals.append(number))

    def measure(step):
        records, shown = test(policy, reference, train_on | watch, test_rows, cfg, rank, world)
        if rank == 0:
            means = evaluate.test_means(records)
            log_records(run / "tests" / f"step_{step:06d}.jsonl", records)
            log_line(run / "test.jsonl", {"step": step, **means})
            evaluate.save_strip(shown, run / "samples" / f"step_{step:06d}.png")
            tqdm.write(f"test at step {step}:  " + "  ".join(f"{name} {value:.3f}" for name, value in means.items()))

    if start == 0:
        measure(0)
    bar = tqdm(range(start, cfg.max_steps), initial=start, total=cfg.max_steps, disable=rank > 0, desc="grpo")
    for step in bar:
        clock = [time.perf_counter()]
        indices = prompts_of_step(rows, step, cfg)[rank::world]  # a group stays on one process
        asked = [rows[i] for i in indices for _ in range(cfg.num_generations)]

        rollouts = rollout(policy, rows, indices, step, cfg)  # G thoughts and pictures for each prompt
        clock.append(time.perf_counter())
        scores = reward_models.score(train_on, rollouts.prompts, rollouts.images, asked)  # what trains
        believed = reward_models.score(watch, rollouts.prompts, rollouts.images, asked)  # what does not
        total = reward_models.combine(scores, weights, cfg.num_generations, cfg.combine, multipliers)
        clock.append(time.perf_counter())
        everyone = torch.tensor(gather(total.tolist()))
        advantages = group_advantages(everyone, cfg.num_generations, cfg.advantage)[rank * len(total):][:len(total)]
        metrics = update(policy, reference, optimizer, rollouts, advantages, cfg)  # better ones become likelier
        clock.append(time.perf_counter())

        records = gather(record(asked, [*range(cfg.num_generations)] * len(indices), rollouts,
                                {**scores, **believed, "total": total, "advantage": advantages}))
        metrics |= summarize(records, list(weights), held_out, cfg)
        if cfg.combine == "constrained":
            means = {name: torch.tensor([r[name] for r in records]) for name in multipliers}
            multipliers = reward_models.update_multipliers(multipliers, means, dict.fromkeys(multipliers, cfg.floor))
        if rank == 0:
            seconds = {f"seconds/{part}": round(b - a, 3) for part, a, b in zip(("rollout", "score", "update"), clock, clock[1:])}
            log_line(run / "metrics.jsonl", {"step": step, **metrics, **seconds})
            log_records(run / "rollouts" / f"step_{step:06d}.jsonl", records)
            bar.set_postfix({name: f"{metrics[f'{kind}/{name}']:.3f}" for kind, names in (("reward", weights), ("held-out", held_out))
                             for name in names} | {"kl": f"{metrics['kl']:.2f}"})

        done, last = step + 1, step + 1 == cfg.max_steps
        failing, stopping = metrics["failed"] > cfg.max_failures, any(gather([bool(signals)]))
        if done % cfg.eval_steps == 0 or last:
            measure(done)
        if rank == 0 and (done % cfg.save_steps == 0 or last or failing or stopping):
            save_checkpoint(run, done, policy, optimizer, {"multipliers": multipliers}, cfg)
        if failing or stopping:
            reasons = [f"{reason} ({count}x)" for reward in train_on.values() for reason, count in getattr(reward, "failures", {}).items()]
            if rank == 0:
                print(f"stopped after step {done}, saved; go on with --resume latest. " + (
                    f"{metrics['failed']:.0%} of the rollouts had no score: {'; '.join(reasons)}" if failing else ""), file=sys.stderr)
            raise SystemExit(3 if failing else 143)

    if cfg.best_of:
        pool = best_of_n_pool(reference, train_on | watch, weights, test_rows, cfg, rank, world)
        if rank == 0:
            log_records(run / "best_of_n.jsonl", pool)
    if rank == 0:
        print(f"look at {evaluate.report(run)}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
