"""Pictures of a diffusers pipeline, as generate.py asks a Janus for them.

Read next: generate.py
"""

from pathlib import Path

from huggingface_hub import hf_hub_download

from training.weights import readable


def pipeline_sampler(name_or_path, device, dtype, cfg_weight, seeded_generator):
    """sample_batch of a diffusers pipeline, or None if it is not one. Such models draw reference
    pictures (adversarial_reward.py). No remote code: only diffusers' own classes are loaded.

    seeded_generator: key -> torch.Generator."""
    try:
        if not (Path(name_or_path) / "model_index.json").is_file():
            if Path(name_or_path).is_dir():
                return None
            hf_hub_download(name_or_path, "model_index.json")
    except Exception:  # no pipeline, or no network: load_policy says what is wrong
        return None
    from diffusers import DiffusionPipeline

    with readable(name_or_path):
        pipeline = DiffusionPipeline.from_pretrained(name_or_path, dtype=dtype).to(device)
    pipeline.set_progress_bar_config(disable=True)
    guidance = {} if cfg_weight is None else {"guidance_scale": cfg_weight}

    def sample_batch(prompts, keys):
        generators = [seeded_generator(key) for key in keys]  # a picture depends on its key alone
        return pipeline(prompts, generator=generators, **guidance).images, [""] * len(prompts)

    return sample_batch
