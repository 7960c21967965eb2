"""What surrounds the loop of grpo.py: checking flags, loading, knowing when to stop, writing down.

Nothing here is about reinforcement learning; it is what makes an experiment one that can be trusted and repeated. Wrong
usage is found before anything is loaded. A run that is told to stop, or cannot go on, leaves a checkpoint and its reason.
Every number on the screen is in a file.

Read next: grpo.py, which imports this
"""

import json
import math
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import generate
import rewards as reward_models
from artifact_reward import read_question
from evaluation import hacking
from evaluation.pages import mean
from training import files
from training import sharding as scale
from training.files import HERE, usage_error

# What "[tiny: ...; else ...]" in grpo.py's flags stands for.
PRESETS = {
    "tiny": dict(
        eval_rewards="gold,gold-clean,gold-aligned",
        prompts=str(HERE / "tiny_world/prompts/train.jsonl"),
        test_prompts=str(HERE / "tiny_world/prompts/test.jsonl"),
        max_steps=100,
        learning_rate=1e-4,
        beta=0.02,
    ),
    "real": dict(
        eval_rewards="",
        prompts=str(HERE / "prompts/train.jsonl"),
        test_prompts=str(HERE / "prompts/test.jsonl"),
        max_steps=1600,
        learning_rate=1e-6,
        beta=0.01,
    ),
}


PATIENCE = 5  # steps in a row whose gradients are no numbers, until the run gives up


# --- before ---------------------------------------------------------------------------------------


def check(cfg, world):
    """Everything that can be wrong is found here, before a model is loaded. Fills in the presets; returns
    (weights, held-out names, training prompts, test prompts)."""
    for name, value in PRESETS["tiny" if cfg.model == "tiny" else "real"].items():
        if getattr(cfg, name) is None:
            setattr(cfg, name, value)
    cfg.question = read_question(
        cfg.question
    )  # config.json keeps what was asked, not where it stood
    weights, held_out = reward_models.parse(cfg.rewards), [*reward_models.parse(cfg.eval_rewards)]
    if not weights:
        usage_error("--rewards is empty; name at least one, such as hps,artifact")
    if weights.keys() & set(held_out):
        usage_error(
            f"{', '.join(weights.keys() & set(held_out))} is in --rewards and in --eval-rewards: what is trained "
            "on cannot be believed; take it out of one"
        )
    watched = [
        name for name in weights if getattr(reward_models.REWARDS[name], "only_watched", False)
    ]
    if watched:
        usage_error(
            f"--rewards {', '.join(watched)}: a statistic, not an opinion; it can only be watched, --eval-rewards"
        )
    learning = [name for name in held_out if hasattr(reward_models.REWARDS[name], "learn")]
    if learning:
        usage_error(
            f"--eval-rewards {', '.join(learning)}: it knows nothing unless it learns beside the policy; "
            "name it in --rewards"
        )
    away = [
        name
        for name in reward_models.addresses(cfg.rewards)
        if hasattr(reward_models.REWARDS[name], "learn")
    ]
    if away:
        usage_error(
            f"--rewards {', '.join(away)}@...: it learns from the policy's pictures, and can only do so here; leave "
            "the address out"
        )
    if cfg.num_generations < 2:
        usage_error(
            f"--num-generations {cfg.num_generations}: a group of one has no baseline; use 4 or more"
        )
    if cfg.prompts_per_step < 1 or cfg.prompts_per_step % world:
        usage_error(
            f"--prompts-per-step {cfg.prompts_per_step}: must be a multiple of the {world} processes; a group stays on one"
        )
    if cfg.combine == "constrained" and len(weights) < 2:
        usage_error(
            "--combine constrained needs two rewards: the first is maximised, the others keep their --floor"
        )
    if cfg.shard and (cfg.lora_rank or world == 1 and not cfg.dry_run):
        usage_error(
            "--shard: spreads full training over several processes (torchrun --nproc-per-node 8); it does not go "
            "with --lora-rank, which has little to spread"
        )
    positive = (
        "max_steps learning_rate updates_per_rollout micro_batch rollout_batch max_thought max_grad_norm save_steps "
        "save_total_limit eval_steps eval_images"
    )
    for name in positive.split():
        if not getattr(cfg, name) > 0:
            usage_error(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must be greater than 0")
    rows = files.load_prompts(cfg.prompts)
    if len(rows) < cfg.prompts_per_step:
        usage_error(
            f"--prompts {cfg.prompts}: {len(rows)} prompts for --prompts-per-step {cfg.prompts_per_step}; a step "
            "needs as many different ones, or two groups would be copies"
        )
    return weights, held_out, rows, files.load_prompts(cfg.test_prompts)


def load_policies(cfg, checkpoint, device, dtype):
    """(policy, reference): what is trained, and what it was. With LoRA the policy is its own reference: None."""

    def load(name, where=device):
        policy = generate.load_policy(str(name), where, dtype, cfg.train_image_head)
        policy.cuda_graph = cfg.cuda_graph
        return policy

    if cfg.lora_rank:
        policy = scale.lighten(scale.add_lora(load(cfg.model, "cpu"), cfg.lora_rank, cfg.seed)).to(
            device
        )
        if checkpoint:
            policy.model.load_state_dict(
                torch.load(checkpoint / "lora.pt", weights_only=True, map_location="cpu"),
                strict=False,
            )
        reference = None
    else:
        policy = load(checkpoint or cfg.model)
        policy = (
            scale.shard(policy) if cfg.shard else scale.lighten(policy)
        )  # before the next: two whole ones need not fit
        reference = load(cfg.model)
        reference.model.requires_grad_(False)
        reference = scale.lighten(reference)
        reference = scale.shard(reference) if cfg.shard else reference
    if cfg.gradient_checkpointing:
        policy.body.gradient_checkpointing_enable({"use_reentrant": False})
    return policy, reference


def load_rewards(names, cfg, device):
    checkpoint = "tiny" if cfg.model == "tiny" else None
    adversary = dict(
        references=cfg.references,
        steps=cfg.adversary_steps,
        when=cfg.adversary_update,
        seed=cfg.seed,
    )
    options = {
        "artifact": dict(
            judge_urls=cfg.judge_url, judge_model=cfg.judge_model, question=cfg.question
        ),
        "adversarial": adversary,
        "adversarial-pickscore": adversary,
    }
    where = reward_models.addresses(cfg.rewards) | reward_models.addresses(cfg.eval_rewards)
    loaded = {
        name: reward_models.load(name, device, checkpoint, where.get(name), **options.get(name, {}))
        for name in names
    }
    if isinstance(loaded.get("artifact"), reward_models.ArtifactReward):
        loaded["artifact"].check()
    return loaded


def load_state(checkpoint, optimizer, weights, learners):
    """The counters of a run: the next step, the multipliers of combine=constrained, the steps skipped just now."""
    if not checkpoint:
        return {"step": 0, "multipliers": {name: 1.0 for name in list(weights)[1:]}, "skipped": 0}
    scale.load_optimizer(
        optimizer,
        torch.load(checkpoint / "optimizer.pt", weights_only=True, map_location="cpu", mmap=True),
    )
    for name, reward in learners.items():
        reward.load_state_dict(
            torch.load(checkpoint / f"{name}.pt", weights_only=True, map_location="cpu")
        )
    return json.loads((checkpoint / "state.json").read_text())


def multipliers_after(records, multipliers, cfg):
    """combine=constrained: what a reward below its floor weighs from now on."""
    if cfg.combine != "constrained":
        return multipliers
    seen = {name: torch.tensor([r[name] for r in records]) for name in multipliers}
    return reward_models.update_multipliers(multipliers, seen, dict.fromkeys(seen, cfg.floor))


@dataclass
class Experiment:
    """All that a run consists of, and what is done around a step of it."""

    cfg: object
    rank: int  # of this process
    world: int  # processes
    folder: Path
    policy: generate.Policy
    reference: generate.Policy | None  # with LoRA the policy is its own
    weights: dict  # training reward -> weight
    train_on: dict  # training reward -> the reward
    watch: dict  # held-out reward -> the reward
    rows: list  # training prompts
    test_rows: list
    optimizer: torch.optim.Optimizer
    state: dict  # "step": the next one; "multipliers" of combine=constrained; "skipped": steps skipped just now
    log: "Log"
    stop: list  # not empty: asked to stop
    lock: object  # on the run folder, as long as this process lives

    @property
    def learners(self):
        return learners(self.train_on)

    def save(self):
        weights = scale.model_state(
            self.policy, keep=self.rank == 0
        )  # all processes gather what they have shards of
        moments = scale.whole(self.optimizer.state_dict(), keep=self.rank == 0)
        if self.rank == 0:
            extra = {
                "optimizer": moments,
                **{name: reward.state_dict() for name, reward in self.learners.items()},
            }
            extra |= {"lora": scale.lora_state(self.policy)} if self.cfg.lora_rank else {}
            files.save_checkpoint(
                self.folder, self.state, self.policy, weights, extra, self.cfg.save_total_limit
            )
        scale.gather(
            [None]
        )  # nobody goes on, or ends, before it is written: torchrun would take that for a death

    def stop_if_asked(self):
        if any(scale.gather([bool(self.stop)])):
            self.save(), give_up("asked to stop", 143, self.rank)

    def finish_step(self, step, metrics, asked, jobs, rollouts, scores):
        """Write the step down and move on; returns further metrics."""
        records = scale.gather(record(asked, jobs, rollouts, scores))
        more = summarize(records, list(self.weights), list(self.watch), self.cfg)
        more["processes_agree"] = int(len(set(scale.gather([fingerprint(self.policy)]))) == 1)
        more["diversity"] = mean(
            scale.gather(hacking.diversity(rollouts.images, self.cfg.num_generations))
        )
        self.log.step(step, metrics | more, records)
        self.state = {
            "step": step + 1,
            "skipped": (self.state["skipped"] + 1) * metrics["skipped"],
            "multipliers": multipliers_after(records, self.state["multipliers"], self.cfg),
        }
        if self.tests_now():
            self.log.group(step, scale.gather(rollouts.images))
        return more

    def tests_now(self):
        return (
            self.state["step"] % self.cfg.eval_steps == 0
            or self.state["step"] == self.cfg.max_steps
        )

    def save_or_end(self, metrics):
        """A checkpoint when it is time for one, or when this run must not go on; then it ends here."""
        trouble, done = (
            what_is_wrong(metrics, self.state, self.train_on, self.cfg),
            self.state["step"],
        )
        if trouble or done % self.cfg.save_steps == 0 or done == self.cfg.max_steps:
            self.save()
        if trouble:
            give_up(trouble, 3, self.rank)


def fingerprint(policy):
    """A number that two processes share if they have the same trained weights (shards are parts of one set: 0)."""
    trained = [
        p.detach()
        for p in policy.model.parameters()
        if p.requires_grad and not isinstance(p, scale.DTensor)
    ]
    return sum(p.double().sum().item() for p in trained)


def learners(rewards):
    """Those of these rewards that are trained along."""
    return {name: reward for name, reward in rewards.items() if hasattr(reward, "learn")}


def prepare(cfg):
    """Check, load, and open the run folder; in this order, so that wrong usage costs nothing."""
    rank, world = scale.start_processes(cfg.device)
    weights, held_out, rows, test_rows = check(
        cfg, cfg.world_size or world if cfg.dry_run else world
    )
    if cfg.dry_run:
        scale.print_plan(cfg, cfg.world_size or world)
        raise SystemExit(0)
    folder, checkpoint = scale.gather([files.run_folder(cfg) if rank == 0 else None])[0]
    if checkpoint:
        files.check_same_run(folder, cfg)
    device, dtype = generate.pick_device(cfg.device, cfg.dtype)
    policy, reference = load_policies(cfg, checkpoint, device, dtype)
    train_on, watch = load_rewards(weights, cfg, device), load_rewards(held_out, cfg, device)
    for reward in learners(train_on).values():
        reward.references.check([row["prompt"] for row in rows])
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=cfg.learning_rate, betas=(0.9, 0.99), weight_decay=0)
    state = load_state(checkpoint, optimizer, weights, learners(train_on))
    lock = files.lock(folder) if rank == 0 else None
    log = Log(cfg, folder, state["step"], weights, held_out, rank, world)
    return Experiment(
        cfg,
        rank,
        world,
        folder,
        policy,
        reference,
        weights,
        train_on,
        watch,
        rows,
        test_rows,
        optimizer,
        state,
        log,
        listen_for_sigterm(),
        lock,
    )


# --- the end before the end -------------------------------------------------------------------------


def listen_for_sigterm():
    """A list that is not empty any more when the run has been asked to stop. Asked again ten seconds later, it stops at
    once; sooner, that is the same request, which a cluster sends to the process and to its launcher, who passes it on."""
    stop = []

    def heard(number, frame):
        if stop and time.monotonic() - stop[0] > 10:
            raise SystemExit(143)
        stop.append(time.monotonic())

    signal.signal(signal.SIGTERM, heard)
    return stop


def what_is_wrong(metrics, state, scorers, cfg):
    """Why this run must not go on, or ""."""
    if metrics["failed"] > cfg.max_failures:
        reasons = Counter()
        for reward in scorers.values():
            reasons |= getattr(reward, "failures", Counter())
        return f"{metrics['failed']:.0%} of the rollouts had no score: {dict(reasons)}"
    if not metrics["processes_agree"]:
        return "the processes train different policies: their weights are not the same any more"
    if state["skipped"] >= PATIENCE:
        return f"{PATIENCE} steps in a row had gradients that are no numbers, and were skipped; lower --learning-rate"
    return ""


def give_up(why, code, rank):
    """The end before the end, after a checkpoint: 143 if asked to stop, 3 if it cannot go on."""
    if rank == 0:
        print(
            f"{why}; stopped, with a checkpoint; --resume latest goes on from it", file=sys.stderr
        )
    raise SystemExit(code)


# --- writing down ---------------------------------------------------------------------------------


def record(rows, jobs, rollouts, scores):
    """One dict a picture: what was asked, what was thought, what it scored."""
    return [
        {
            "id": row["id"],
            "prompt": row["prompt"],
            "sample": k,
            "thought": rollouts.thoughts[n],
            **{name: values[n].item() for name, values in scores.items()},
        }
        for n, (row, (_, k)) in enumerate(zip(rows, jobs))
    ]


def summarize(records, trained, held_out, cfg):
    """One step's records -> numbers to log. NaN scores count as failed and enter no mean."""
    failed = mean(any(math.isnan(r[name]) for name in trained) for r in records)
    metrics = {"failed": failed, "thought_words": mean(len(r["thought"].split()) for r in records)}
    kinds = (
        dict.fromkeys(trained, "reward") | dict.fromkeys(held_out, "held-out") | {"total": "reward"}
    )
    for name, kind in kinds.items():
        values = torch.tensor([r[name] for r in records]).view(-1, cfg.num_generations)
        metrics[f"{kind}/{name}"] = values.nanmean().item()
        # Within the group: the spread that GRPO learns from. No spread in a group, nothing to learn.
        metrics[f"{kind}/{name}/group_std"] = values.std(1).nanmean().item()
        metrics["unanimous_groups"] = (
            (values.amax(1) == values.amin(1)).float().mean().item()
        )  # at last, of the total
    return metrics


def image_statistics(images):
    """Brightness, saturation and the like, under the name image/...: always logged, never trained on."""
    return {
        f"image/{name}": reward_models.REWARDS[name]()(None, images) for name in reward_models.STATS
    }


def reporter(cfg, run):
    """A function (step, numbers) that tells --report-to; files in the run folder are written in any case."""
    if cfg.report_to == "tensorboard":
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            usage_error(
                "--report-to tensorboard: it is not installed; pip install tensorboard, or leave the flag out"
            )
        writer = SummaryWriter(run / "tensorboard")
        return lambda step, numbers: [
            writer.add_scalar(name, value, step) for name, value in numbers.items()
        ]
    if cfg.report_to == "wandb":
        try:
            import wandb
        except ImportError:
            usage_error(
                "--report-to wandb: it is not installed; pip install wandb, or leave the flag out"
            )
        session = wandb.init(
            project="artifact-reward",
            name=run.name,
            id=run.name,
            resume="allow",
            dir=run,
            config=asdict(cfg),
        )
        return lambda step, numbers: session.log(numbers | {"step": step})
    return lambda step, numbers: None


class Log:
    """The run folder and the screen: on rank 0 it writes, elsewhere it does nothing."""

    def __init__(self, cfg, run, start, weights, held_out, rank, world):
        self.run, self.writes, self.seconds, self.clock = run, rank == 0, {}, time.perf_counter()
        self.shown = [("reward", name) for name in weights] + [
            ("held-out", name) for name in held_out
        ]
        self.report = lambda step, numbers: None
        if self.writes:
            files.begin_log(run, start, cfg, world)
            self.report = reporter(cfg, run)
            print(
                f"{run}/: trained on {' + '.join(weights)}; only watched: {', '.join(held_out) or 'nothing'}; "
                f"{cfg.prompts_per_step} prompts x {cfg.num_generations} pictures a step",
                flush=True,
            )
        self.bar = tqdm(
            range(start, cfg.max_steps),
            initial=start,
            total=cfg.max_steps,
            desc="grpo",
            disable=not self.writes,
        )

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
            hacking.save_strip(
                images[: hacking.STRIP], self.run / "samples" / f"step_{step:06d}.png"
            )
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
