"""MANIQA (arXiv:2204.08958): how good is this photograph? It never sees the prompt.

A ViT encodes a crop. The outputs of four of its middle blocks are concatenated, then mixed across
channels (TAB) and across places (Swin), twice. Every place gets a score and a weight:

    crop = sum_places weight * score / sum_places weight     picture = mean over crops, about 0 to 1

The released reward takes 20 random crops, so a picture has many scores. Here the crops lie on a
fixed grid. A crop costs 200 GFLOP: on a CPU, MANIQA is a metric; on a GPU it can be a reward.

Written from the behavior of the original (IIGROUP/MANIQA at f573d86), with the weight names of its
checkpoint, and compared with it (tests/data/maniqa).   Read next: grounding_dino.py
"""

import math
from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn

from reward_models.pixels import normalize, to_tensor
from training.decode import to_rgb
from training.files import usage_error
from training.weights import fill, read_weights

# Shapes:  B crops   N places (side x side)   C channels   W windows of w x w places

PATCH, DEPTH, TAPPED = 8, 12, (6, 7, 8, 9)  # of the ViT; outputs of the tapped blocks are used
HEADS, WINDOW = 4, 4  # of Swin's attention
SCALE = 0.8  # of a Swin layer, before its input is added again


def mlp(width, hidden):
    layers = dict(fc1=nn.Linear(width, hidden), act=nn.GELU(), fc2=nn.Linear(hidden, width))
    return nn.Sequential(OrderedDict(layers))


class Attention(nn.Module):
    """Self-attention. In Swin: among the places of a window, with a bias per relative position."""

    def __init__(self, width, heads, in_windows=False):
        super().__init__()
        self.heads, self.in_windows = heads, in_windows
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        if in_windows:
            side = torch.arange(WINDOW)
            places = torch.cartesian_prod(side, side)  # (w*w, 2): row, column
            row, column = (places[:, None] - places[None] + WINDOW - 1).unbind(-1)
            self.register_buffer("relative_position_index", row * (2 * WINDOW - 1) + column)
            table = torch.zeros((2 * WINDOW - 1) ** 2, heads)
            self.relative_position_bias_table = nn.Parameter(table)

    def forward(self, x, mask=None):
        B, N, C = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        logits = q @ k.mT * q.shape[-1] ** -0.5
        if self.in_windows:
            bias = self.relative_position_bias_table[self.relative_position_index]
            logits = logits + bias.permute(2, 0, 1)
        if mask is not None:  # (W, w*w, w*w), the same for every crop and head
            logits = (logits.view(-1, len(mask), *logits.shape[1:]) + mask[:, None]).view_as(logits)
        return self.proj((logits.softmax(-1) @ v).transpose(1, 2).reshape(B, N, C))


class Block(nn.Module):
    """A block of the ViT."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = Attention(width, heads), mlp(width, 4 * width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    def __init__(self, width, heads, side, classes):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, side * side + 1, width))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, PATCH, PATCH)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(DEPTH))
        # These two are in the checkpoint, and never used:
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, pixels):
        """(B, 3, S, S) -> (B, N, 4C): the outputs of the tapped blocks, without the class token."""
        x = self.patch_embed.proj(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        outputs = []
        for block in self.blocks[: max(TAPPED) + 1]:
            x = block(x)
            outputs.append(x[:, 1:])
        return torch.cat([outputs[i] for i in TAPPED], -1)


class TAB(nn.Module):
    """Attention among channels: each channel is a vector over all places."""

    def __init__(self, places):
        super().__init__()
        self.c_q, self.c_k, self.c_v = (nn.Linear(places, places) for _ in range(3))

    def forward(self, x):  # (B, C, N)
        attention = (self.c_q(x) @ self.c_k(x).mT * x.shape[-1] ** -0.5).softmax(-1)
        # As released: transposed, then read as if it were not. This mixes channels with places, but
        # the weights were trained with it.
        return (attention @ self.c_v(x)).transpose(1, 2).reshape(x.shape) + x


class SwinBlock(nn.Module):
    """Attention within windows, which are first shifted by `shift` places."""

    def __init__(self, width, hidden, side, shift):
        super().__init__()
        self.side, self.shift = side, shift
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = Attention(width, HEADS, in_windows=True), mlp(width, hidden)
        # Shifted windows wrap around the edge. Places from opposite edges are masked (-100).
        regions = torch.zeros(side)
        regions[side - WINDOW : side - shift], regions[side - shift :] = 1, 2
        number = self.to_windows((3 * regions[:, None] + regions)[None, :, :, None])[..., 0]
        mask = (number[:, None] != number[:, :, None]).float() * -100
        self.register_buffer("attn_mask", mask if shift else None)

    def to_windows(self, x):
        """(B, side, side, C) -> (B*W, w*w, C)"""
        B, C, w, n = len(x), x.shape[-1], WINDOW, self.side // WINDOW
        return x.view(B, n, w, n, w, C).transpose(2, 3).reshape(-1, w * w, C)

    def to_places(self, x):
        """The inverse: (B*W, w*w, C) -> (B, side, side, C)"""
        C, w, n = x.shape[-1], WINDOW, self.side // WINDOW
        return x.view(-1, n, n, w, w, C).transpose(2, 3).reshape(-1, self.side, self.side, C)

    def forward(self, x):  # (B, N, C)
        y = self.norm1(x).unflatten(1, (self.side, self.side))
        y = y.roll((-self.shift, -self.shift), (1, 2))
        y = self.to_places(self.attn(self.to_windows(y), self.attn_mask))
        x = x + y.roll((self.shift, self.shift), (1, 2)).reshape(x.shape)
        return x + self.mlp(self.norm2(x))


class SwinLayer(nn.Module):
    def __init__(self, width, hidden, side):
        super().__init__()
        self.side, shifts = side, (0, WINDOW // 2)
        self.blocks = nn.Sequential(*(SwinBlock(width, hidden, side, shift) for shift in shifts))
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        y = self.blocks(x).transpose(1, 2).unflatten(2, (self.side, self.side))
        return SCALE * self.conv(y).relu().flatten(2).transpose(1, 2) + x


class Swin(nn.Module):
    def __init__(self, width, hidden, side):
        super().__init__()
        self.layers = nn.Sequential(*(SwinLayer(width, hidden, side) for _ in range(2)))
        self.downsample = nn.Conv2d(width, width, 3)  # in the checkpoint, never used

    def forward(self, x):
        return self.layers(x)


def head(width):
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Identity(), nn.Linear(width, 1))


class MANIQA(nn.Module):
    """The network. The defaults are the published sizes; the tests have a smaller one."""

    def __init__(self, width=768, vit_heads=12, side=28, classes=1000, hidden=768):
        super().__init__()
        self.side, self.size, half = side, side * PATCH, width // 2
        self.vit = ViT(width, vit_heads, side, classes)
        self.tablock1 = nn.Sequential(TAB(side * side), TAB(side * side))
        self.tablock2 = nn.Sequential(TAB(side * side), TAB(side * side))
        self.conv1, self.conv2 = nn.Conv2d(4 * width, width, 1), nn.Conv2d(width, half, 1)
        self.swintransformer1 = Swin(width, hidden, side)
        self.swintransformer2 = Swin(half, hidden, side)
        self.fc_score, self.fc_weight = head(half), head(half)

    def mix(self, x, tabs, conv, swin):
        """(B, N, C) -> (B, N, C'): across channels, to fewer channels, across places."""
        x = tabs(x.transpose(1, 2)).unflatten(2, (self.side, self.side))  # (B, C, side, side)
        return swin(conv(x).flatten(2).transpose(1, 2))

    def forward(self, crops):
        """(B, 3, S, S) in [-1, 1] -> (B,)"""
        x = self.mix(self.vit(crops), self.tablock1, self.conv1, self.swintransformer1)
        x = self.mix(x, self.tablock2, self.conv2, self.swintransformer2)
        score, weight = self.fc_score(x).relu()[..., 0], self.fc_weight(x).sigmoid()[..., 0]
        return (score * weight).sum(1) / weight.sum(1)


def crop_starts(length, size, n=3):
    """Where n crops of `size` begin along `length`: from edge to edge, fewer if some coincide.

    (Released: at random, and never at the last row or column.)"""
    return sorted({round(i * (length - size) / (n - 1)) for i in range(n)})


class MANIQAReward:
    """The reward `maniqa`: mean over a 3 x 3 grid of crops."""

    range = (0.0, math.inf)  # of ReLU's values a weighted mean
    usual = "0 to 1"
    needs = ()
    checkpoint = "IIGROUP/MANIQA"
    gigabytes = 0.6
    reference = "MANIQA, arXiv:2204.08958"
    file = "ckpt_koniq10k.pt"
    how = f"curl -LO https://github.com/IIGROUP/MANIQA/releases/download/Koniq10k/{file}"

    def __init__(self, device="cpu", checkpoint=None, **sizes):
        self.downloaded = path = Path(checkpoint or ".") / self.file
        self.device = device
        if not path.is_file():
            usage_error(f"maniqa: {path} is missing; it is 543 MB: {self.how}")
        self.model = fill(MANIQA(**sizes), read_weights(path), path)
        self.model.float().eval().requires_grad_(False).to(device)

    def crops(self, image):
        """(9, 3, S, S) in [-1, 1]. A picture smaller than a crop is enlarged first."""
        image, size, shorter = to_rgb(image), self.model.size, min(image.size)
        if shorter < size:
            image = image.resize([max(size, round(side * size / shorter)) for side in image.size])
        pixels = normalize(to_tensor(image), (0.5,) * 3, (0.5,) * 3)
        rows, columns = (crop_starts(length, size) for length in pixels.shape[1:])
        return torch.stack([pixels[:, y : y + size, x : x + size] for y in rows for x in columns])

    @torch.inference_mode()
    def __call__(self, prompts, images, metadata=None):
        scores = [self.model(self.crops(image).to(self.device)).mean() for image in images]
        return torch.stack(scores).float().cpu()
