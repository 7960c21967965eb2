"""Flags of grpo.py, checked before anything is loaded: wrong usage costs nothing.

Read next: run_folder.py
"""

import math

from training import cures
from training.files import ROOT, usage_error
from training.model_card import check_hub
from training.processes import launched, rank, world_size
from training.prompts import load_prompts
from training.run_folder import flags_of
from training.trackers import check_installed

# What "[tiny: ...; else ...; t2i-r1: ...]" stands for in grpo.py's flags.
PRESETS = {
    "ours": {"guidance": "guided", "adam_beta2": 0.99},
    "t2i-r1": {"guidance": "cond", "adam_beta2": 0.999, "max_thought": 1024},
    "tiny": {
        "max_thought": 64,
        "eval_rewards": "gold,gold-clean,gold-aligned",
        "prompts": str(ROOT / "tiny_world/prompts/train.jsonl"),
        "test_prompts": str(ROOT / "tiny_world/prompts/test.jsonl"),
        "max_steps": 80,
        "learning_rate": 2e-4,
        "warmup_ratio": 0.33,
        "beta": 0.02,
    },
    "real": {
        "max_thought": 128,  # up to 50 words are asked for, about 65 tokens
        "eval_rewards": "",
        "prompts": str(ROOT / "prompts/train.jsonl"),
        "test_prompts": str(ROOT / "prompts/test.jsonl"),
        "max_steps": 1600,
        "learning_rate": 1e-6,
        "warmup_ratio": 0.0,
        "beta": 0.01,
    },
}
POSITIVE = (
    "prompts_per_step max_steps learning_rate updates_per_rollout micro_batch rollout_batch "
    "max_thought max_grad_norm save_steps save_total_limit eval_steps eval_images"
).split()

NOT_NEGATIVE = (
    "beta epsilon epsilon_high cfg_weight max_failures lora_rank best_of world_size "
    "adversary_steps gpu_memory cures.gradient_penalty cures.reference_steps cures.data_weight "
    "cures.entropy_bonus"
).split()


def fill_presets(cfg):
    """Give each flag that was left out its value; a preset says which it sets."""
    values = PRESETS["tiny" if cfg.model == "tiny" else "real"] | PRESETS[cfg.preset]
    unset = {name: value for name, value in values.items() if getattr(cfg, name) is None}
    for name, value in unset.items():
        setattr(cfg, name, value)
    if cfg.preset != "ours" and rank() == 0:
        flags = [f"--{n.replace('_', '-')} {unset[n]}" for n in PRESETS[cfg.preset] if n in unset]
        print(f"--preset {cfg.preset}: {' '.join(flags)}", flush=True)


def num_processes(cfg):
    """As many as there are; a dry run may plan for others."""
    wanted = cfg.world_size if cfg.dry_run and cfg.world_size else world_size()
    return wanted if cfg.shard else min(wanted, max(1, cfg.prompts_per_step))


def check_numbers(cfg):
    """Refuse a number that is out of its range."""
    for name in POSITIVE:
        if not getattr(cfg, name) > 0:
            flag = name.replace("_", "-")
            usage_error(f"--{flag} {getattr(cfg, name)}: must be greater than 0")
    for name, value in flags_of(cfg).items():
        flag = name.replace("_", "-")
        if isinstance(value, float) and not math.isfinite(value):
            usage_error(f"--{flag} {value}: must be a number")
        if name in NOT_NEGATIVE and value is not None and value < 0:
            usage_error(f"--{flag} {value}: must be 0 or greater")
    if not -(2**63) <= cfg.seed < 2**63:
        usage_error(f"--seed {cfg.seed}: must have 64 bits at most")
    if cfg.max_failures > 1:
        usage_error(f"--max-failures {cfg.max_failures}: a share of the rollouts, from 0 to 1")
    if cfg.save_total_limit < 2:
        usage_error(
            f"--save-total-limit {cfg.save_total_limit}: keep 2 or more, because the newest "
            "checkpoint may be of a policy that has just diverged"
        )
    if not 0 <= cfg.warmup_ratio < 1:
        usage_error(f"--warmup-ratio {cfg.warmup_ratio}: a share of the steps, from 0 to below 1")
    if not 0 <= cfg.adam_beta2 < 1:
        usage_error(f"--adam-beta2 {cfg.adam_beta2}: from 0 to below 1; AdamW's usual one is .999")


def check_flags(cfg, num_rewards, processes):
    """Refuse what cannot work; returns (training prompts, test prompts), lists of rows."""
    check_numbers(cfg)
    cures.check(cfg)
    check_installed(cfg.report_to)
    check_hub(cfg.push_to_hub)
    if cfg.num_generations < 2:
        usage_error(
            f"--num-generations {cfg.num_generations}: a group of one has no baseline; use 4 or "
            "more"
        )
    if cfg.shard and cfg.prompts_per_step % processes:
        usage_error(
            f"--shard --prompts-per-step {cfg.prompts_per_step}: must be a multiple of the "
            f"{processes} processes, because they gather each layer together and a group stays on "
            "one of them"
        )
    if cfg.combine == "constrained" and num_rewards < 2:
        usage_error(
            "--combine constrained needs two rewards: the first is maximised, the others keep "
            "their --floor"
        )
    if cfg.shard and (cfg.lora_rank or not (launched() or cfg.dry_run)):
        usage_error(
            "--shard spreads full training over several processes (torchrun --nproc-per-node 8); "
            "it does not go with --lora-rank, which has little to spread"
        )
    if cfg.guidance == "none" and cfg.cfg_weight not in (None, 1):
        usage_error(f"--guidance none --cfg-weight {cfg.cfg_weight}: none has no weight; drop one")
    if cfg.train_image_head and cfg.lora_rank:
        usage_error("--train-image-head: --lora-rank trains matrices in the language model only")
    rows = load_prompts(cfg.prompts)
    if len(rows) < cfg.prompts_per_step:
        usage_error(
            f"--prompts {cfg.prompts}: {len(rows)} prompts for --prompts-per-step "
            f"{cfg.prompts_per_step}; a step needs as many, each once"
        )
    return rows, load_prompts(cfg.test_prompts, "--test-prompts")
