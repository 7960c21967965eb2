"""Does it fit? `grpo.py --dry-run` answers without a GPU and without weights, by arithmetic.

    torchrun grpo.py --model deepseek-community/Janus-Pro-7B --shard --dry-run --world-size 8

Kernels and fragmented memory come on top: a tenth of each GPU is kept free.

Read next: sharding.py
"""

import math
from pathlib import Path

import torch
from transformers import JanusConfig, JanusForConditionalGeneration

from training.policy import adapter_base
from training.processes import rank
from training.run_folder import checkpoint_folder
from training.weights import load_part

NODE = 8  # GPUs of a node: weights are sharded within one

# From the published configurations, so that a plan needs no network. Both are Llamas.
JANUS_PRO = {
    "Janus-Pro-1B": {"hidden_size": 2048, "num_hidden_layers": 24, "intermediate_size": 5632},
    "Janus-Pro-7B": {"hidden_size": 4096, "num_hidden_layers": 30, "intermediate_size": 11008},
}


def janus_config(name):
    """The configuration of a Janus: what --model takes, or one of the two that are published."""
    known = JANUS_PRO.get(Path(name).name)
    if known is None:
        folder = checkpoint_folder(name)
        base = adapter_base(folder)
        return janus_config(base) if base else load_part(JanusConfig, str(folder))
    width = known["hidden_size"]
    text = dict(known, model_type="llama", vocab_size=102400, max_position_embeddings=16384)
    heads = width // 128
    text |= {"num_attention_heads": heads, "num_key_value_heads": heads}
    vision = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "depth": 2}
    vision |= {"image_size": 384, "patch_size": 16, "num_image_tokens": 576}
    return JanusConfig(
        text_config=text | {"tie_word_embeddings": False},
        vision_config=vision | {"projection_dim": width},
        vq_config={"projection_dim": width, "image_token_embed_dim": width, "num_patches": 24},
        tie_word_embeddings=False,
    )


def meta_model(config):
    """The architecture, its weights without memory."""
    with torch.device("meta"):
        return JanusForConditionalGeneration(config)


def count_parameters(config, lora_rank, image_head=False):
    """Numbers of parameters: (all, trained, of the VQ model, of VQ model and image head)."""
    parameters = dict(meta_model(config).named_parameters())
    vq = sum(p.numel() for name, p in parameters.items() if "vqmodel" in name)
    exact = vq + sum(p.numel() for name, p in parameters.items() if "generation_head" in name)
    kinds = ("model.language_model.", "lm_head.") + ("model.generation_head.",) * image_head
    names = [name for name in parameters if name.startswith(kinds)]
    trained = sum(parameters[name].numel() for name in names)
    if lora_rank:
        adapted = [parameters[name].shape for name in names if name.endswith("_proj.weight")]
        trained = sum(lora_rank * sum(shape) for shape in adapted)
    return sum(p.numel() for p in parameters.values()), trained, vq, exact


def plan(config, world_size, pictures, micro_batch, guided, thought, sharded, lora_rank,
         checkpointing, rewards=0.0, copies=0, prompt=80, image_head=False,
         guided_update=None):  # fmt: skip
    """(counts, gigabytes), two dicts: what -> number. GB are those of one GPU.

    pictures: sampled at a time. guided: two branches in sampling, and in the update unless
    guided_update says otherwise. thought, prompt: tokens. rewards: GB. copies: for cures."""
    total, trained, vq, exact = count_parameters(config, lora_rank, image_head)
    frozen = total if lora_rank else total - trained
    llama, T = config.text_config, config.vq_config.num_patches**2
    D, layers, length = llama.hidden_size, llama.num_hidden_layers, prompt + thought + T
    branches, share = (2 if guided else 1), (min(world_size, NODE) if sharded else 1)
    head_size = D // llama.num_attention_heads
    kv_bytes = 2 * 2 * layers * llama.num_key_value_heads * head_size  # of one token, in bfloat16
    scored = branches if guided_update is None else 1 + guided_update
    # The picture is scored after prompt and thought, guided; the thought after the prompt.
    tokens = micro_batch * (scored * length + (prompt + thought if thought else 0))
    # Numbers that a layer keeps for each token and hidden unit, counted by saved_tensors_hooks
    # (tests/test_sharding.py): 26.1, with LoRA 25.1. With checkpointing only its input is kept, and
    # all of the layer at work.
    kept = 26 if lora_rank else 27
    kept = layers + kept if checkpointing else layers * kept
    # All logits wait for the backward pass; there, those of one head have four more copies.
    logits = (T * config.vq_config.num_embeddings, thought * llama.vocab_size)
    # Three float32 tensors of the decoder's last layer. Each stage but one doubles the side.
    side = config.vq_config.num_patches * 2 ** (len(config.vq_config.channel_multiplier) - 1)
    decoding = 3 * 4 * min(pictures, 16) * config.vq_config.base_channels * side**2
    state = {
        "weights, gradients, Adam: 16 bytes for each trained parameter": 16 * trained / share,
        "frozen weights: 2 bytes (sharded: 4)": (4 if sharded else 2) * frozen / share,
        "reference policy: 2 bytes": 0 if lora_rank else 2 * total / share,
        "VQ model and image head, float32: 2 bytes more": 2 * exact * (1 if lora_rank else 2),
        "autocast's copies: 2 bytes for each trained parameter": 0 if sharded else 2 * trained,
        "reward models in this process": rewards * 1e9,
        "copies for --cures: 4 bytes for each trained parameter": 4 * trained * copies,
    }
    rollout = {
        "rollout: gathered weights, in tests also the reference's": sharded * 4 * (total - vq),
        "rollout: keys and values": kv_bytes * pictures * branches * length,
        "rollout: decoding 16 pictures": decoding,
    }
    update = {
        "update: activations": 2 * tokens * D * kept,
        "update: logits in float32": 4 * micro_batch * (sum(logits) + 4 * max(logits)),
    }
    adam = {"optimizer: square roots, 4 bytes for each trained parameter": 4 * trained / share}
    parts = {"optimizer": adam, "rollout": rollout, "update": update}
    peaks = {f"peak of the {n}": sum((state | part).values()) for n, part in parts.items()}
    counts = {"total": total, "trained": trained, "tokens of a picture": T}
    return counts, {n: v / 1e9 for n, v in (state | rollout | update | adam | peaks).items()}


def checkpoint_sizes(config, lora_rank, image_head=False, copies=0, average=False):
    """GB of a checkpoint's files: (weights, optimizer). float32 weights, with LoRA its matrices
    alone, twice with an average of them; two moments of Adam for each trained parameter, and the
    copies for cures."""
    total, trained, *_ = count_parameters(config, lora_rank, image_head)
    weights = 4 * (trained if lora_rank else total) * (1 + average)
    return weights / 1e9, (8 + 4 * copies) * trained / 1e9


def plan_of(cfg, world_size, rewards):
    """The plan of these flags of grpo.py; rewards: GB of their models."""
    config = janus_config(cfg.model)
    cfg_weight = cfg.cfg_weight or (1 if cfg.model == "tiny" else 5)
    guided = cfg.guidance != "none" and cfg_weight != 1
    rollouts = rollouts_of(cfg, world_size)
    # Tests and best-of-n sample, too, and often more pictures than a step.
    most = max(rollouts, math.ceil(cfg.eval_images / world_size), cfg.best_of)
    return plan(config, world_size, min(cfg.rollout_batch, most),
        min(cfg.micro_batch, rollouts), guided, cfg.max_thought * cfg.cot, cfg.shard, cfg.lora_rank,
        cfg.gradient_checkpointing, rewards, cfg.cures.copies(),
        image_head=cfg.train_image_head,
        guided_update=guided and cfg.guidance == "guided")  # fmt: skip


def rollouts_of(cfg, world_size):
    """Rollouts of a step on one process, at most."""
    return math.ceil(cfg.prompts_per_step / world_size) * cfg.num_generations


def print_plan(cfg, world_size, rewards):
    """--dry-run: what would happen, and whether it fits."""
    counts, gigabytes = plan_of(cfg, world_size, rewards)
    if rank() != 0:
        return
    billions = {name: counts[name] / 1e9 for name in ("total", "trained")}
    pictures = cfg.prompts_per_step * cfg.num_generations
    print(
        f"{cfg.model}: {billions['total']:.3f} billion parameters, {billions['trained']:.3f} "
        f"trained, on {world_size} processes\n"
        f"a step: {pictures} pictures of {counts['tokens of a picture']} tokens, "
        f"{rollouts_of(cfg, world_size)} on a process; {cfg.max_steps} steps, "
        f"{cfg.max_steps * pictures} pictures\n"
    )
    for name, value in gigabytes.items():
        print(f"{value:9.2f} GB   {name}")
    kept = bool(cfg.cures.reference_steps) + bool(cfg.cures.average)
    weights, optimizer = checkpoint_sizes(
        janus_config(cfg.model), cfg.lora_rank, cfg.train_image_head, kept, bool(cfg.cures.average)
    )
    disk = (weights + optimizer) * (cfg.save_total_limit + 1)
    print(
        f"\na checkpoint: {weights:.1f} GB of weights, {optimizer:.1f} of optimizer, gathered in "
        f"the memory of the first process' host; {cfg.save_total_limit} are kept and one is being "
        f"written: {disk:.0f} GB of disk"
    )
    remedies = {
        "--shard": not cfg.shard and world_size > 1,
        "--lora-rank 16": not cfg.lora_rank,
        "--gradient-checkpointing": not cfg.gradient_checkpointing,
        "a smaller --micro-batch": cfg.micro_batch > 1,
        "a smaller --rollout-batch": cfg.rollout_batch > 1,
        "more GPUs": True,
    }
    peak = max(value for name, value in gigabytes.items() if name.startswith("peak"))
    fits = peak < 0.9 * cfg.gpu_memory
    advice = "; try " + ", ".join(name for name, helps in remedies.items() if helps)
    verdict = "fits" if fits else "does not fit"
    room = f"{cfg.gpu_memory:.0f} GB, a tenth kept free"
    print(f"\n{verdict} into {room}{'' if fits else advice}")
