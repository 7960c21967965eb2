"""Pictures of a diffusers pipeline, as generate.py asks a Janus for them.

Read next: generate.py
"""

import inspect
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
    # Qwen-Image's guidance_scale does nothing (its default is None); it has true_cfg_scale, which
    # needs a negative prompt. Flux has both: there guidance_scale is the one it was trained with.
    parameters = inspect.signature(pipeline.__call__).parameters
    true_cfg = "true_cfg_scale" in parameters and parameters["guidance_scale"].default is None
    name = "true_cfg_scale" if true_cfg else "guidance_scale"
    guidance = {} if cfg_weight is None else {name: cfg_weight}

    def sample_batch(prompts, keys):
        generators = [seeded_generator(key) for key in keys]  # a picture depends on its key alone
        options = guidance | ({"negative_prompt": [" "] * len(prompts)} if true_cfg else {})
        return pipeline(prompts, generator=generators, **options).images, [""] * len(prompts)

    return sample_batch
