"""Every reward and every metric, in one dictionary, behind one calling convention.

    reward = rewards.load("hps")
    scores = reward(prompts, images, metadata)      # (N,) float32, higher is better, NaN = no score

A reward model is an opinion, and every opinion is silent about something. HPS was fitted to which of
two pictures people preferred (Bradley-Terry: P(a over b) = sigmoid(s_a - s_b)); whoever never had to
choose between a clean picture and a broken one taught it nothing about breakage. ArtifactReward is
asked about nothing else. Several opinions become one number, or one verdict, in `combine`.

Run:   python rewards.py --list
       python rewards.py hps "a red star" outputs/00000/samples/*.png

You should see:  a line per reward, with its range and what it needs; then a score per picture.

Left out: anything that trains. The same object serves as training reward and as held-out metric; which
one it is, is decided in grpo.py and nowhere else.   Read next: artifact_reward.py
"""

import math
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from artifact_reward import ArtifactReward
from files import HERE, usage_error
from generate import pick_device

# --- HPS v2.1: what people prefer -------------------------------------------------------------

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

# open_clip's names -> transformers' names. One table, read in both directions: the checkpoint of HPS
# is in open_clip's, and tiny_train.py writes ours in it too.
OPEN_CLIP_NAMES = [
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),  # (sic)
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
]


def from_open_clip(state):
    """An open_clip state dict -> one for transformers' CLIPModel. open_clip keeps queries, keys and
    values in one matrix, and its two final projections the other way round."""
    out = {}
    for name, value in state.items():
        for pattern, ours in OPEN_CLIP_NAMES:
            name = re.sub(pattern, ours, name)
        if ".attn.in_proj_" in name:
            for part, chunk in zip("qkv", value.chunk(3)):
                out[name.replace(".attn.in_proj_", f".self_attn.{part}_proj.")] = chunk
        elif name in ("visual_projection.weight", "text_projection.weight"):
            out[name] = value.T
        elif name != "attn_mask":  # a constant, not a weight
            out[name] = value
    return out


class HPS:
    """Human Preference Score v2.1 (arXiv:2306.09341): the cosine between CLIP's picture and text.

    Raw values, about 0.2 to 0.35 for the real model (people often report them times 100). Only
    comparable within one prompt, which is what a GRPO group is."""

    range = (-1.0, 1.0)
    needs = ("text",)
    checkpoint = "xswu/HPSv2"
    reference = "HPSv2, arXiv:2306.09341"

    def __init__(self, device="cpu", checkpoint=None):
        folder = Path(checkpoint or self.checkpoint)
        if folder.is_dir():
            weights, base = folder / "HPS_v2.1_compressed.pt", folder
        else:  # the weights come without configuration or vocabulary; CLIP ViT-H/14 has both
            from huggingface_hub import hf_hub_download

            weights = hf_hub_download(str(folder), "HPS_v2.1_compressed.pt")
            base = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
        config = CLIPConfig.from_pretrained(base)
        self.device, self.size = device, config.vision_config.image_size
        self.tokenizer = CLIPTokenizer.from_pretrained(base)
        self.length = config.text_config.max_position_embeddings
        # float32 throughout: a group's scores differ by about .01, and bfloat16 has steps of .002 at .3.
        self.model = CLIPModel(config).eval().requires_grad_(False)
        self.model.load_state_dict(from_open_clip(torch.load(weights, weights_only=True)["state_dict"]))
        self.model.to(device)

    def pixels(self, image):
        """Longest side to the model's size, bicubic, centred on black, CLIP's mean and deviation (as
        HPS; CLIP itself would crop to a square). Pillow's resampling, which smooths when shrinking."""
        scale = self.size / max(image.size)
        image = image.convert("RGB").resize(
            [max(1, round(side * scale)) for side in image.size], Image.BICUBIC
        )
        canvas = Image.new("RGB", (self.size, self.size))
        canvas.paste(image, ((self.size - image.width) // 2, (self.size - image.height) // 2))
        data = torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8).view(self.size, self.size, 3)
        return ((data / 255 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)).permute(2, 0, 1)

    def embed_texts(self, prompts):
        words = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        )
        text = self.model.get_text_features(**words.to(self.device)).pooler_output
        return torch.nn.functional.normalize(text.float(), dim=-1)

    def embed_images(self, pixels):
        picture = self.model.get_image_features(pixel_values=pixels.to(self.device)).pooler_output
        return torch.nn.functional.normalize(picture.float(), dim=-1)

    @torch.inference_mode()
    def __call__(self, prompts, images, metadata=None):
        scores = []
        for i in range(0, len(images), 64):
            picture = self.embed_images(torch.stack([self.pixels(image) for image in images[i : i + 64]]))
            scores.append((picture * self.embed_texts(list(prompts[i : i + 64]))).sum(-1))
        return torch.cat(scores).cpu()


# --- gold: the truth, where there is one ------------------------------------------------------


class Gold:
    """The tiny world's truth (tiny.py): does the picture show what the prompt says, times: is it
    whole. Prompts from outside that world have no gold score: NaN."""

    range = (0.0, 1.0)
    needs = ("text",)
    checkpoint = None
    reference = "tiny.py"
    part = staticmethod(lambda aligned, clean: aligned * clean)

    def __init__(self, device="cpu", checkpoint=None):
        import tiny  # lazily: whoever trains Janus-Pro has no use for it

        self.world = tiny

    def __call__(self, prompts, images, metadata=None):
        scores = torch.full((len(images),), math.nan)
        known = []
        for i, prompt in enumerate(prompts):
            try:
                self.world.wanted(prompt)
                known.append(i)
            except ValueError:
                pass  # stays NaN
        if known:
            aligned, clean = self.world.gold([prompts[i] for i in known], [images[i] for i in known])
            scores[known] = self.part(aligned, clean).float()
        return scores


class GoldAligned(Gold):
    """The first factor of gold: what the prompt asks for is there."""

    part = staticmethod(lambda aligned, clean: aligned)


class GoldClean(Gold):
    """The second factor of gold: nothing in the picture is left unexplained."""

    part = staticmethod(lambda aligned, clean: clean)


# --- the dictionary ---------------------------------------------------------------------------

REWARDS = {
    "hps": HPS,
    "artifact": ArtifactReward,
    "gold": Gold,
    "gold-aligned": GoldAligned,
    "gold-clean": GoldClean,
}


def load(name, device="cpu", checkpoint=None, **options):
    """The reward of that name. checkpoint: None = the published one, "tiny" = ours, or a folder."""
    if name not in REWARDS:
        usage_error(f"unknown reward {name!r}; known are {', '.join(REWARDS)}")
    if checkpoint == "tiny":
        checkpoint = HERE / "tiny" / name
    return REWARDS[name](device=device, checkpoint=checkpoint, **options)


def parse(text):
    """ "hps:1,artifact:0.5" -> {"hps": 1.0, "artifact": 0.5}. Wrong input ends with exit code 2."""
    weights = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, weight = part.partition(":")
        try:
            value = float(weight or 1)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            usage_error(
                f"--rewards {text}: {weight!r} is no number; write name:weight, as in hps:1,artifact:0.5"
            )
        if name not in REWARDS:
            usage_error(f"--rewards {text}: unknown reward {name!r}; known are {', '.join(REWARDS)}")
        if name in weights:
            usage_error(f"--rewards {text}: {name!r} is named twice; give it one weight")
        weights[name] = value
    return weights


def start_scoring(rewards, prompts, images, metadata=None):
    """Begin to score pictures with all rewards of a dict; call the result to have the scores.

    Rewards that work elsewhere are asked at once, in threads, and answer while the policy does something of
    its own; those of this process wait until the scores are wanted, for two at a time on one machine only get
    in each other's way. A reward that raises, or that returns another number of scores, ends the run: only
    a *picture* may fail, and is NaN then."""
    pool = ThreadPoolExecutor(max(1, len(rewards)))
    asked = {name: pool.submit(reward, prompts, images, metadata)
             for name, reward in rewards.items() if getattr(reward, "remote", False)}

    def finish():
        scores = {}
        for name, reward in rewards.items():
            values = asked[name].result() if name in asked else reward(prompts, images, metadata)
            values = torch.as_tensor(values, dtype=torch.float32).cpu()
            if values.shape != (len(images),):
                raise ValueError(f"reward {name!r} gave {tuple(values.shape)} scores for {len(images)} pictures")
            scores[name] = torch.where(values.isfinite(), values, math.nan)
        pool.shutdown()
        return scores

    return finish


def score(rewards, prompts, images, metadata=None):
    """All rewards of a dict on the same pictures: dict name -> (N,) float32, NaN where a picture failed."""
    return start_scoring(rewards, prompts, images, metadata)()


# --- several opinions, one number -------------------------------------------------------------


def standardize(values_NK, group_size):
    """z-scores within each group of group_size rows, NaN-aware; n - 1 in the deviation as in T2I-R1."""
    groups = values_NK.view(-1, group_size, values_NK.shape[-1])
    known = groups.isfinite()
    count = known.sum(1, keepdim=True)
    mean = groups.nan_to_num().sum(1, keepdim=True) / count.clamp(min=1)
    square = torch.where(known, groups - mean, 0.0).square().sum(1, keepdim=True)
    std = (square / (count - 1).clamp(min=1)).sqrt()
    return ((groups - mean) / (std + 1e-4)).view_as(values_NK)


def combine(scores, weights, group_size, how="sum", multipliers=None):
    """Many rewards -> one number a rollout, (N,). NaN marks a rollout that takes no part: one of its
    scores failed, or (pareto) it is dominated.

    sum          sum_k w_k r_k: the paper, and T2I-R1. Scale decides who is heard.
    normalized   sum_k w_k z_k, z within the group: everyone is heard alike (GDPO).
    mean, min    of the z_k: ensembles (Coste et al., arXiv:2310.02743; mean and worst case). Taken over
    uwo          mean - 0.5 variance                       z, because our opinions have different scales.
    pareto       sum, but only over rollouts that no other one of the group beats in every reward at
                 once (Parrot, arXiv:2401.05675).
    constrained  r_1 + sum_{k>1} lambda_k r_k, the multipliers set by `update_multipliers` so that each
                 further reward stays above its floor (arXiv:2310.04373).
    """
    names = list(weights)
    values = torch.stack([scores[name] for name in names], 1)  # (N, K)
    weight = torch.tensor([weights[name] for name in names])
    if how in ("sum", "pareto"):
        total = (values * weight).sum(1)
    elif how == "constrained":
        multiplier = torch.tensor([multipliers[name] for name in names[1:]])
        total = values[:, 0] + (values[:, 1:] * multiplier).sum(1)
    else:
        z = standardize(values, group_size)
        total = {
            "normalized": lambda: (z * weight).sum(1),
            "mean": lambda: z.mean(1),
            "min": lambda: z.min(1).values,
            "uwo": lambda: z.mean(1) - 0.5 * z.var(1, correction=0),
        }[how]()
    if how == "pareto":
        groups = (values * weight.sign()).view(-1, group_size, len(names))
        a, b = groups[:, :, None], groups[:, None]  # does b beat a: nowhere worse, somewhere better?
        beaten = ((b >= a).all(-1) & (b > a).any(-1)).any(2).view(-1)
        total = total.masked_fill(beaten, math.nan)
    return total


def update_multipliers(multipliers, scores, floors, rate=0.1):
    """Lagrange: lambda_k <- [lambda_k + rate (floor_k - mean r_k)]_+, one step of dual ascent."""
    return {
        name: max(0.0, value + rate * (floors[name] - float(scores[name].nanmean())))
        for name, value in multipliers.items()
    }


# --- command line -----------------------------------------------------------------------------


@dataclass
class Config:
    reward: Annotated[str, tyro.conf.Positional] = ""  # which reward
    prompt: Annotated[str, tyro.conf.Positional] = ""  # what the pictures were to show
    images: Annotated[tuple[str, ...], tyro.conf.Positional] = ()  # picture files
    list: bool = False  # list all rewards
    model: str = "tiny"  # "tiny" for our checkpoints, "real" for the published ones


def main(cfg):
    if cfg.list or not cfg.reward:
        print(f"{'name':14} {'range':14} {'needs':16} {'checkpoint':30} reference")
        for name, kind in REWARDS.items():
            print(
                f"{name:14} {str(kind.range):14} {', '.join(kind.needs) or '-':16} {kind.checkpoint or '-':30} {kind.reference}"
            )
        return
    if not cfg.images:
        usage_error('give pictures as well: python rewards.py hps "a red star" picture.png ...')
    if cfg.reward not in REWARDS:
        usage_error(f"unknown reward {cfg.reward!r}; known are {', '.join(REWARDS)}")
    images, failed = [], 0
    for path in cfg.images:
        try:
            images.append(Image.open(path).convert("RGB"))
        except OSError as problem:  # one bad picture costs one score
            failed += 1
            images.append(None)
            print(f"error: {path}: not a readable picture ({problem})", file=sys.stderr)
    reward = load(cfg.reward, pick_device("auto")[0], "tiny" if cfg.model == "tiny" else None)
    readable = [image for image in images if image is not None]
    values = iter(reward([cfg.prompt] * len(readable), readable).tolist() if readable else [])
    for path, image in zip(cfg.images, images):
        print(f"{next(values) if image is not None else math.nan:8.4f}  {path}")
    sys.exit(3 if failed else 0)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
