"""Commands for GPUs, and whether they fit: the trainer's plan and the judge's share of each GPU.

Run:   python -m studies.recipes      the list in docs/gpus.md; plans, not measurements

A command names its GPUs by CUDA_VISIBLE_DEVICES. vLLM takes --gpu-memory-utilization of a GPU,
whatever it needs: weights, then keys and values of --max-model-len tokens. Qwen2.5-VL's own context
of 128,000 tokens does not fit into 24 GB; a question and a picture need 1,500.

Read next: bench.py
"""

import re
import shlex
import textwrap
from typing import NamedTuple

import tyro

import grpo
import rewards
from training import checks, memory_plan
from training.files import usage_error

JUDGE_GB = 16.6 + 3.0  # Qwen2.5-VL-7B: weights in bfloat16; vision tower at work, CUDA graphs
TOKEN_GB = 2 * 2 * 28 * 4 * 128 / 1e9  # keys and values of one token: 28 layers, 4 heads, bfloat16


class Recipe(NamedTuple):
    """A training on real models: the two commands, each in a terminal of its own."""

    title: str
    memory: int  # GB of a GPU
    judge: str  # "" if it runs elsewhere
    trainer: str


def judge_command(device, share):
    return (
        f"CUDA_VISIBLE_DEVICES={device} vllm serve Qwen/Qwen2.5-VL-7B-Instruct --port 8000 "
        f"--max-model-len 4096 --gpu-memory-utilization {share} "
        "--limit-mm-per-prompt.image 1 --limit-mm-per-prompt.video 0"
    )


MODEL = "--model deepseek-community/Janus-Pro"
SMALL = f"{MODEL}-1B --lora-rank 16 --learning-rate 1e-4 --gradient-checkpointing"
SMALL += " --prompts-per-step 8 --micro-batch 2 --rollout-batch 16"
SEVEN = "CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6 torchrun --nproc-per-node 7 grpo.py"
NODES = "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400"
NODES += " --max-restarts 3 grpo.py"

ONE = "CUDA_VISIBLE_DEVICES=0 torchrun grpo.py"
SHARDED = "--shard --gradient-checkpointing --micro-batch 4 --rollout-batch 16 --save-steps 100"

RECIPES = [
    Recipe("1B, two GPUs of 24 GB", 24, judge_command(1, 0.92), f"{ONE} {SMALL}"),
    Recipe("1B, one GPU of 80 GB", 80, judge_command(0, 0.4), f"{ONE} {SMALL}"),
    Recipe(
        "1B, eight of 80 GB",
        80,
        judge_command(7, 0.9),
        f"{SEVEN} {MODEL}-1B --gradient-checkpointing --prompts-per-step 14 --micro-batch 8 "
        "--rollout-batch 16",
    ),
    Recipe(
        "7B, eight of 80 GB",
        80,
        judge_command(7, 0.9),
        f"{SEVEN} {MODEL}-7B {SHARDED} --prompts-per-step 14",
    ),
    Recipe(
        "7B, two nodes of eight of 80 GB (this command on each), the judge elsewhere",
        80,
        "",
        f"{NODES} {MODEL}-7B {SHARDED} --prompts-per-step 32 --resume latest "
        "--judge-url http://JUDGE:8000/v1",
    ),
]


def devices(command):
    """The GPUs that a command names, as a set of numbers; None if it names none."""
    named = re.match(r"CUDA_VISIBLE_DEVICES=([\d,]+) ", command)
    return named and set(map(int, named[1].split(",")))


def option(command, name, default):
    """The number behind an option of a command line."""
    found = re.search(rf"--{name} ([\d.]+)", command)
    return float(found[1]) if found else default


def trainer_gb(recipe):
    """Planned GB of each GPU of the trainer."""
    cfg = tyro.cli(grpo.Config, args=shlex.split(recipe.trainer.partition("grpo.py ")[2]))
    checks.fill_presets(cfg)
    nodes, processes = (
        option(recipe.trainer, f"n{what}", 1) for what in ("nodes", "proc-per-node")
    )
    gigabytes = memory_plan.plan_of(cfg, int(nodes * processes), rewards.gigabytes(cfg))[1]
    return max(value for name, value in gigabytes.items() if name.startswith("peak"))


def judge_gb(recipe):
    """GB that vLLM takes of its GPU. Exit code 2 if the judge does not fit into that."""
    if not recipe.judge:
        return 0.0
    takes = option(recipe.judge, "gpu-memory-utilization", 0.92) * recipe.memory
    needs = JUDGE_GB + TOKEN_GB * option(recipe.judge, "max-model-len", 128000)
    if takes < needs:
        usage_error(f"{recipe.title}: the judge needs {needs:.1f} GB, and takes {takes:.1f}")
    return takes


def listing():
    """The recipes as Markdown, with their planned GB, for docs/gpus.md."""
    parts = []
    for recipe in RECIPES:
        taken = f"the judge takes {judge_gb(recipe):.0f} GB of its GPU, " if recipe.judge else ""
        parts.append(f"**{recipe.title}**: {taken}the trainer {trainer_gb(recipe):.0f} of each.\n")
        for command in filter(None, (recipe.judge, recipe.trainer)):
            pairs = re.sub(r"(--[\w.-]+) (?!--)", "\\1\0", command)  # a flag and its value
            lines = textwrap.wrap(pairs, 110, break_long_words=False, break_on_hyphens=False)
            text = " \\\n".join(f"    {line}" for line in lines)
            parts.append(text.replace("\0", " ") + "\n")
    return "\n".join(parts)


def main():
    print(listing())


if __name__ == "__main__":
    main()
