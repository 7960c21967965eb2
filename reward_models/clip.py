"""Rewards on a CLIP: human preferences (HPS, PickScore), and how pretty a picture is (Aesthetic).

CLIP encodes picture and text into one space. HPS and PickScore are CLIPs fine-tuned on people's
choices between two pictures of one prompt (Bradley-Terry, with a scale for s):

    score s = cos(picture, prompt)              P(a is preferred to b) = sigmoid(s_a - s_b)

People who never had to choose between a clean picture and one with artifacts have taught the model
nothing about artifacts.   Read next: imagereward.py
"""

import functools
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from reward_models import pixels
from reward_models.hub import NAMES, download, rename
from reward_models.pixels import CLIP_MEAN, CLIP_STD
from training.files import usage_error
from training.weights import fill, load_model, load_part, read_weights

# Shapes:  N pictures, each with its prompt   D numbers in an embedding

CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # vocabulary of HPS and PickScore, sizes of HPS


def from_open_clip(state):
    """State dict of open_clip -> state dict of transformers' CLIPModel.

    open_clip keeps query, key and value in one matrix, and transposes the two final projections."""
    out = {}
    for name, value in rename(state, NAMES["open_clip"]).items():
        if ".attn.in_proj_" in name:
            for part, chunk in zip("qkv", value.chunk(3)):
                out[name.replace(".attn.in_proj_", f".self_attn.{part}_proj.")] = chunk
        elif name in ("visual_projection.weight", "text_projection.weight"):
            out[name] = value.T
        elif name != "attn_mask":  # a constant, not a weight
            out[name] = value
    return out


class Clip:
    """What the rewards on a CLIP share. Not a reward itself."""

    needs = ("text",)
    make_square = staticmethod(pixels.crop_to_square)

    def prepare(self, model, base, device):
        """model: a CLIPModel; base: folder or hub name of a CLIP with the right vocabulary."""
        # float32: scores of a group differ by about 0.01, and bfloat16 has steps of 0.002 at 0.3.
        self.model, self.device = model.float().eval().requires_grad_(False).to(device), device
        self.tokenizer = load_part(CLIPTokenizer, base)
        self.size = model.config.vision_config.image_size
        self.length = model.config.text_config.max_position_embeddings

    def preprocess(self, image):
        """(3, size, size), normalized."""
        square = pixels.to_tensor(self.make_square(image, self.size))
        return pixels.normalize(square, CLIP_MEAN, CLIP_STD)

    def embed_texts(self, prompts):
        """(N, D), of length 1. A prompt that occurs many times, as in a group, is encoded once."""
        unique = list(dict.fromkeys(prompts))
        options = dict(padding="max_length", truncation=True, max_length=self.length)
        words = self.tokenizer(unique, return_tensors="pt", **options).to(self.device)
        text = F.normalize(self.model.get_text_features(**words).pooler_output.float(), dim=-1)
        return text[[unique.index(prompt) for prompt in prompts]]

    def embed_images(self, batch):
        """(N, 3, size, size), normalized -> (N, D), of length 1."""
        features = self.model.get_image_features(pixel_values=batch.to(self.device))
        return F.normalize(features.pooler_output.float(), dim=-1)

    def similarity(self, image_embeddings, prompts):
        """(N,): the cosine of each picture and its prompt; in some subclasses another score."""
        return (image_embeddings * self.embed_texts(prompts)).sum(-1)

    def score(self, prompts, images):
        batch = torch.stack([self.preprocess(image) for image in images])
        return self.similarity(self.embed_images(batch), prompts)

    @torch.inference_mode()
    def __call__(self, prompts, images, metadata=None):
        return pixels.in_batches(self.score, 64, prompts, images)


class HPS(Clip):
    """Human Preference Score v2.1 (arXiv:2306.09341): the cosine of CLIP's picture and text.

    About 0.2 to 0.35 for the published model (often reported times 100). Scores can be compared
    within one prompt only, which is what GRPO does within a group."""

    range = (-1.0, 1.0)
    usual = "0.2 to 0.35"
    checkpoint = "xswu/HPSv2"
    gigabytes = 3.9
    reference = "HPSv2, arXiv:2306.09341"
    file = "HPS_v2.1_compressed.pt"
    how = f"hf download {checkpoint} {file} && hf download {CLIP_H} '*.json' merges.txt"
    make_square = staticmethod(pixels.fit_in_square)

    def __init__(self, device="cpu", checkpoint=None):
        folder = checkpoint or self.checkpoint
        file = download(folder, self.file)
        weights = read_weights(file, "state_dict")
        base = folder if Path(folder).is_dir() else CLIP_H  # which the published weights lack
        model = CLIPModel(load_part(CLIPConfig, base))
        self.prepare(fill(model, from_open_clip(weights), file), base, device)


class PickScore(Clip):
    """PickScore v1 (arXiv:2305.01569): CLIP's temperature times the cosine, about 18 to 24.

    (The code released with ArtifactReward leaves out the temperature of 100. In a plain sum,
    PickScore then counts a hundredth.)"""

    range = (-100.0, 100.0)
    usual = "18 to 24"
    checkpoint = "yuvalkirstain/PickScore_v1"
    gigabytes = 3.9
    reference = "PickScore, arXiv:2305.01569"
    how = f"hf download {checkpoint} && hf download {CLIP_H} '*.json' merges.txt"

    def __init__(self, device="cpu", checkpoint=None):
        folder = checkpoint or self.checkpoint
        base = folder if Path(folder).is_dir() else CLIP_H
        self.prepare(load_model(CLIPModel, folder), base, device)

    def similarity(self, image_embeddings, prompts):
        return self.model.logit_scale.exp() * super().similarity(image_embeddings, prompts)


class Aesthetic(Clip):
    """LAION's linear aesthetic predictor: w . e + b, e the picture's embedding by CLIP ViT-L/14.

    About 4 to 7. It never sees the prompt. If it is the only reward in training, every prompt gets
    the same pretty picture."""

    range = (-math.inf, math.inf)
    usual = "4 to 7"
    needs = ()
    checkpoint = "openai/clip-vit-large-patch14"
    gigabytes = 1.7
    reference = "github.com/LAION-AI/aesthetic-predictor"
    make_square = staticmethod(functools.partial(pixels.crop_to_square, halve=round))
    file = "sa_0_4_vit_l_14_linear.pth"
    how = f"hf download {checkpoint} && "
    how += f"curl -LO https://github.com/LAION-AI/aesthetic-predictor/raw/main/{file}"

    def __init__(self, device="cpu", checkpoint=None):
        self.downloaded = head = Path(checkpoint or ".") / self.file
        if not head.is_file():
            usage_error(f"aesthetic: {head} is missing; it is 4 kB: {self.how}")
        base = head.parent if (head.parent / "config.json").is_file() else self.checkpoint
        self.prepare(load_model(CLIPModel, base), base, device)
        linear = torch.nn.Linear(self.model.config.projection_dim, 1)
        self.linear = fill(linear, read_weights(head), head).to(device).requires_grad_(False)

    def similarity(self, image_embeddings, prompts):
        return self.linear(image_embeddings)[:, 0]
