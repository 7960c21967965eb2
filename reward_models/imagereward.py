"""ImageReward: BLIP encodes the prompt with cross-attention to the picture; an MLP gives the score.

    score = (MLP(h) - mean) / deviation,      h: the text encoder's output for the first token

CLIP encodes picture and text separately. Here every word attends to the picture's patches.
Read next: image_statistics.py
"""

import math
from pathlib import Path

import torch
import transformers
from torch import nn

from reward_models import pixels
from reward_models.hub import NAMES, count, download, rename, submodule
from training.weights import fill, load_part, read_weights, readable


def sizes(width):
    """Of any BLIP: attention heads are 64 wide. All other sizes are read off the weights."""
    return dict(hidden_size=width, intermediate_size=4 * width, num_attention_heads=width // 64)


def build_vision(state):
    width, _, _, patch = state["embeddings.patch_embedding.weight"].shape
    side = round((state["embeddings.position_embedding"].shape[1] - 1) ** 0.5)
    config = transformers.BlipVisionConfig(
        **sizes(width),
        num_hidden_layers=count(state, r"encoder\.layers\.(\d+)"),
        image_size=side * patch,
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )
    return transformers.BlipVisionModel(config)


def build_text(state, vision_width):
    vocabulary, width = state["embeddings.word_embeddings.weight"].shape
    config = transformers.BlipTextConfig(
        **sizes(width),
        num_hidden_layers=count(state, r"encoder\.layer\.(\d+)"),
        vocab_size=vocabulary,
        encoder_hidden_size=vision_width,
        max_position_embeddings=len(state["embeddings.position_embeddings.weight"]),
        is_decoder=True,  # for the cross-attention; the forward pass has it off: no causal mask
    )
    return transformers.BlipTextModel(config, add_pooling_layer=False)


def build_mlp(state):
    """Linear layers without activations; the layers in between were dropout."""
    shapes = [state[f"{i}.weight"].T.shape if f"{i}.weight" in state else None for i in range(8)]
    return nn.Sequential(*(nn.Linear(*shape) if shape else nn.Identity() for shape in shapes))


class ImageReward:
    """ImageReward v1.0 (arXiv:2304.05977), about -2.3 to 2. Prompts are cut at 35 tokens."""

    range = (-math.inf, math.inf)
    usual = "-2.3 to 2"
    needs = ("text",)
    checkpoint = "zai-org/ImageReward"
    gigabytes = 1.8
    reference = "ImageReward, arXiv:2304.05977"
    how = f"hf download {checkpoint} ImageReward.pt && hf download bert-base-uncased vocab.txt"
    mean, deviation, length = 0.16717362830052426, 1.0333394966054072, 35

    def __init__(self, device="cpu", checkpoint=None):
        folder, self.device = Path(checkpoint or self.checkpoint), device
        file = download(folder, "ImageReward.pt")
        state = read_weights(file)
        vision = rename(submodule(state, "blip.visual_encoder."), NAMES["blip_vision"])
        text, mlp = submodule(state, "blip.text_encoder."), submodule(state, "mlp.layers.")
        text.pop("embeddings.position_ids", None)  # a constant, not a weight
        with readable(file):
            self.vision = build_vision(vision)
            self.text = build_text(text, self.vision.config.hidden_size)
            self.mlp = build_mlp(mlp)
        for module, weights in ((self.vision, vision), (self.text, text), (self.mlp, mlp)):
            fill(module, weights, file).eval().requires_grad_(False).to(device)
        base = folder if (folder / "vocab.txt").is_file() else "bert-base-uncased"
        self.tokenizer = load_part(transformers.BertTokenizer, base)

    def preprocess(self, image):
        square = pixels.crop_to_square(image, self.vision.config.image_size, round)
        return pixels.normalize(pixels.to_tensor(square), pixels.CLIP_MEAN, pixels.CLIP_STD)

    def score(self, prompts, images):
        batch = torch.stack([self.preprocess(image) for image in images])
        patches = self.vision(batch.to(self.device)).last_hidden_state
        options = dict(padding="max_length", truncation=True, max_length=self.length)
        words = self.tokenizer(list(prompts), return_tensors="pt", **options).to(self.device)
        encoded = self.text(
            input_ids=words.input_ids,
            attention_mask=words.attention_mask,
            encoder_hidden_states=patches,
            encoder_attention_mask=torch.ones(patches.shape[:2], device=self.device),
        )
        return (self.mlp(encoded.last_hidden_state[:, 0])[:, 0] - self.mean) / self.deviation

    @torch.inference_mode()
    def __call__(self, prompts, images, metadata=None):
        return pixels.in_batches(self.score, 64, prompts, images)
