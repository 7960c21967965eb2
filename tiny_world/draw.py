"""Whoever paints: a Janus, any text-to-image pipeline of diffusers, or the tiny world's own pen.

`generate.py --model ...` makes folders of pictures with each of them. Pictures of others are what adversarial_reward.py
takes as references. Each picture has its own noise, seeded by its key, so none depends on its batch.

Run:   python generate.py --model drawn-plain --prompts tiny_world/prompts/train.jsonl
       python generate.py --model Qwen/Qwen-Image --prompts prompts/train.jsonl --output-dir references

You should see:  GenEval's folders, one a prompt.

Left out: remote code; a pipeline is loaded from safetensors by diffusers' own classes.   Read next: adversarial_reward.py
"""

from pathlib import Path

import generate
from tiny_world import world as tiny
from training import sharding as scale
from training.files import usage_error


def is_pipeline(name_or_path):
    """Is this a text-to-image pipeline of diffusers, in a folder or on the hub?"""
    if name_or_path == "tiny" or Path(name_or_path).is_dir():
        return (Path(name_or_path) / "model_index.json").is_file()
    from huggingface_hub import hf_hub_download

    try:
        return bool(hf_hub_download(name_or_path, "model_index.json"))
    except (
        Exception
    ):  # it has none, or there is no network: generate.load_policy says what is wrong
        return False


def pipeline_painter(name_or_path, device, dtype, cfg_weight):
    """A function (prompts, keys) -> (images, thoughts); this kind does not think."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(name_or_path, dtype=dtype).to(device)
    pipeline.set_progress_bar_config(disable=True)
    guidance = {} if cfg_weight is None else {"guidance_scale": cfg_weight}

    def by_pipeline(prompts, keys):
        images = pipeline(
            prompts, generator=[generate.generator(key) for key in keys], **guidance
        ).images
        return images, [""] * len(prompts)

    return by_pipeline


def painter(cfg):
    """The function (prompts, keys) -> (images, thoughts) of --model, and its guidance weight."""
    if cfg.model.startswith("drawn-"):  # the tiny world's own pictures
        style = cfg.model.removeprefix("drawn-")
        if style not in tiny.STYLES:
            usage_error(f"--model {cfg.model}: the tiny world is drawn in {', '.join(tiny.STYLES)}")
        return lambda prompts, keys: (
            [tiny.reference(p, key, style) for p, key in zip(prompts, keys)],
            [""] * len(prompts),
        ), None
    device, dtype = generate.pick_device(cfg.device, cfg.dtype)
    if is_pipeline(cfg.model):
        return pipeline_painter(cfg.model, device, dtype, cfg.cfg_weight), cfg.cfg_weight
    policy = generate.load_policy(cfg.model, "cpu", dtype)
    policy.model.requires_grad_(
        False
    )  # nothing learns here, so all matrices may be rounded, before they move
    policy = scale.lighten(policy).to(device)
    policy.cuda_graph = cfg.cuda_graph
    weight = generate.default_cfg(policy) if cfg.cfg_weight is None else cfg.cfg_weight

    def by_policy(prompts, keys):
        rollouts = generate.sample(policy, prompts, keys, cfg.cot, weight, cfg.max_thought)
        return rollouts.images, rollouts.thoughts

    return by_policy, weight
