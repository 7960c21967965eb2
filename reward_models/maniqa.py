"""MANIQA (arXiv:2204.08958): how good is this photograph, by someone who never reads the prompt.

A ViT looks at a crop; what four of its middle blocks think is laid side by side, mixed once across channels (TAB)
and once across places (Swin), twice over, and every place gets a score and a weight:

    crop = sum_places weight * score / sum_places weight          picture = mean over crops, about 0 to 1

The released reward takes 20 random crops, and so gives one picture many scores; here they lie on a fixed grid. Slow:
a crop is 200 GFLOP, some seconds on a CPU core. A metric; on a GPU a reward, too.

Written from the original's behaviour (IIGROUP/MANIQA at f573d86) into the names of its checkpoint, and compared with it
(tests/data/maniqa). Parts that are in the checkpoint but never used are read and left alone.   Read next: rewards.py
"""

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from training.files import usage_error

# Shapes:  B crops   N places (28 x 28)   C channels   W windows of w x w places

TAPPED = (6, 7, 8, 9)  # blocks of the ViT whose outputs are used
SCALE = 0.8  # of a Swin stage, before its input is added again


class Mlp(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Attention(nn.Module):
    """Self-attention; with `window`, among the places of a window, with a bias for each relative position."""

    def __init__(self, width, heads, window=None):
        super().__init__()
        self.heads, self.qkv, self.proj = (
            heads,
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )
        if window:
            self.relative_position_bias_table = nn.Parameter(
                torch.zeros((2 * window - 1) ** 2, heads)
            )
            places = torch.cartesian_prod(
                torch.arange(window), torch.arange(window)
            )  # (w*w, 2): row, column
            apart = places[:, None] - places[None] + window - 1
            self.register_buffer(
                "relative_position_index", apart[..., 0] * (2 * window - 1) + apart[..., 1]
            )

    def forward(self, x, mask=None):
        B, N, C = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        logits = q @ k.mT * q.shape[-1] ** -0.5
        if hasattr(self, "relative_position_bias_table"):
            logits = logits + self.relative_position_bias_table[
                self.relative_position_index
            ].permute(2, 0, 1)
        if mask is not None:  # (W, w*w, w*w), the same for every crop and head
            logits = (logits.view(-1, len(mask), *logits.shape[1:]) + mask[:, None]).view_as(logits)
        return self.proj((logits.softmax(-1) @ v).transpose(1, 2).reshape(B, N, C))


class Block(nn.Module):
    """A block of the ViT."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in "12")
        self.attn, self.mlp = Attention(width, heads), Mlp(width, 4 * width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    def __init__(self, width, heads, depth, side, patch, classes):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, side * side + 1, width))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, patch, patch)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = (
            nn.LayerNorm(width),
            nn.Linear(width, classes),
        )  # in the checkpoint, never used

    def forward(self, pixels):
        """(B, 3, S, S) -> (B, N, 4C): what the tapped blocks think, side by side."""
        x = self.patch_embed.proj(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        seen = []
        for block in self.blocks[: max(TAPPED) + 1]:
            x = block(x)
            seen.append(x[:, 1:])
        return torch.cat([seen[i] for i in TAPPED], -1)


class TAB(nn.Module):
    """Attention among channels: each channel is a vector over all places."""

    def __init__(self, places):
        super().__init__()
        self.c_q, self.c_k, self.c_v = (nn.Linear(places, places) for _ in "qkv")

    def forward(self, x):  # (B, C, N)
        attention = (self.c_q(x) @ self.c_k(x).mT * x.shape[-1] ** -0.5).softmax(-1)
        # As released: transposed, then read as if it were not. Channels and places are scrambled, and the weights
        # were trained that way.
        return (attention @ self.c_v(x)).transpose(1, 2).reshape(x.shape) + x


class SwinBlock(nn.Module):
    """Attention within windows; in every second block the windows are shifted by half their side."""

    def __init__(self, width, heads, window, hidden, side, shift):
        super().__init__()
        self.side, self.window, self.shift = side, window, shift
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = Attention(width, heads, window), Mlp(width, hidden)
        # Shifted windows wrap around the edge: what was not together before must not look at each other (-100).
        regions = torch.zeros(side)
        regions[side - window : side - shift], regions[side - shift :] = 1, 2
        number = self.windows((3 * regions[:, None] + regions)[None, :, :, None])[..., 0]
        apart = (number[:, None] != number[:, :, None]).float() * -100
        self.register_buffer("attn_mask", apart if shift else None)

    def windows(self, x):
        """(B, side, side, C) -> (B*W, w*w, C)"""
        B, C, w, n = len(x), x.shape[-1], self.window, self.side // self.window
        return x.view(B, n, w, n, w, C).transpose(2, 3).reshape(-1, w * w, C)

    def places(self, x):
        """The way back: (B*W, w*w, C) -> (B, side, side, C)"""
        n, w = self.side // self.window, self.window
        return (
            x.view(-1, n, n, w, w, x.shape[-1])
            .transpose(2, 3)
            .reshape(-1, self.side, self.side, x.shape[-1])
        )

    def forward(self, x):  # (B, N, C)
        y = (
            self.norm1(x)
            .view(len(x), self.side, self.side, -1)
            .roll((-self.shift, -self.shift), (1, 2))
        )
        y = self.places(self.attn(self.windows(y), self.attn_mask)).roll(
            (self.shift, self.shift), (1, 2)
        )
        x = x + y.reshape(x.shape)
        return x + self.mlp(self.norm2(x))


class SwinLayer(nn.Module):
    def __init__(self, width, heads, window, hidden, side, depth):
        super().__init__()
        self.blocks = nn.ModuleList(
            SwinBlock(width, heads, window, hidden, side, window // 2 * (j % 2))
            for j in range(depth)
        )
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        y, side = x, self.blocks[0].side
        for block in self.blocks:
            y = block(y)
        y = self.conv(y.transpose(1, 2).unflatten(2, (side, side))).relu()
        return SCALE * y.flatten(2).transpose(1, 2) + x


class Swin(nn.Module):
    def __init__(self, width, heads, window, hidden, side, depths):
        super().__init__()
        self.layers = nn.ModuleList(
            SwinLayer(width, heads, window, hidden, side, depth) for depth in depths
        )
        self.downsample = nn.Conv2d(width, width, 3)  # in the checkpoint, never used

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class MANIQA(nn.Module):
    """sizes: all read off the checkpoint, but for the ViT's number of heads, which leaves no trace there."""

    def __init__(
        self,
        width=768,
        vit_heads=12,
        vit_depth=12,
        side=28,
        patch=8,
        classes=1000,
        heads=4,
        window=4,
        hidden=768,
        depths=(2, 2),
        tabs=2,
    ):
        super().__init__()
        self.vit, half = ViT(width, vit_heads, vit_depth, side, patch, classes), width // 2
        self.tablock1, self.tablock2 = (
            nn.ModuleList(TAB(side * side) for _ in range(tabs)) for _ in "12"
        )
        self.conv1, self.conv2 = nn.Conv2d(4 * width, width, 1), nn.Conv2d(width, half, 1)
        self.swintransformer1 = Swin(width, heads, window, hidden, side, depths)
        self.swintransformer2 = Swin(half, heads, window, hidden, side, depths)
        self.fc_score, self.fc_weight = (
            nn.Sequential(nn.Linear(half, half), nn.ReLU(), nn.Identity(), nn.Linear(half, 1))
            for _ in "sw"
        )
        self.side, self.size = side, side * patch

    def forward(self, crops):
        """(B, 3, S, S) in [-1, 1] -> (B,)"""
        x = self.vit(crops)
        for tabs, conv, swin in (
            (self.tablock1, self.conv1, self.swintransformer1),
            (self.tablock2, self.conv2, self.swintransformer2),
        ):
            x = x.transpose(1, 2)  # (B, C, N)
            for tab in tabs:
                x = tab(x)
            x = swin(conv(x.unflatten(2, (self.side, self.side))).flatten(2).transpose(1, 2))
        score, weight = self.fc_score(x).relu()[..., 0], self.fc_weight(x).sigmoid()[..., 0]
        return (score * weight).sum(1) / weight.sum(1)


def sizes_of(state):
    """The sizes of a MANIQA, from its state dict."""

    def count(pattern):
        return 1 + max(int(found[1]) for name in state if (found := re.match(pattern, name)))

    proj, table = (
        state["vit.patch_embed.proj.weight"],
        "swintransformer1.layers.0.blocks.0.attn.relative_position_bias_table",
    )
    depths = [
        count(rf"swintransformer1\.layers\.{i}\.blocks\.(\d+)")
        for i in range(count(r"swintransformer1\.layers\.(\d+)"))
    ]
    return dict(
        width=proj.shape[0],
        patch=proj.shape[-1],
        vit_depth=count(r"vit\.blocks\.(\d+)"),
        side=round((state["vit.pos_embed"].shape[1] - 1) ** 0.5),
        classes=len(state["vit.head.weight"]),
        heads=state[table].shape[1],
        window=(round(len(state[table]) ** 0.5) + 1) // 2,
        depths=depths,
        hidden=len(state["swintransformer1.layers.0.blocks.0.mlp.fc1.weight"]),
        tabs=count(r"tablock1\.(\d+)"),
    )


def corners(length, size, n):
    """Where n crops of `size` begin along `length`: from the first pixel to the last, evenly. (Released: random, and
    never at the last row or column.)"""
    return sorted({round(i * (length - size) / max(1, n - 1)) for i in range(n)})


class ManiqaReward:
    """The reward `maniqa`: mean over a 3 x 3 grid of crops."""

    range = (0.0, 1.0)
    needs = ()
    checkpoint = "IIGROUP/MANIQA"
    reference = "MANIQA, arXiv:2204.08958"
    file = "ckpt_koniq10k.pt"
    how = f"curl -LO https://github.com/IIGROUP/MANIQA/releases/download/Koniq10k/{file}"
    grid, batch = 3, 9

    def __init__(self, device="cpu", checkpoint=None, vit_heads=12):
        path = Path(checkpoint or ".") / self.file
        if not path.is_file():
            usage_error(f"maniqa: {path} is missing; it is 543 MB: {self.how}")
        state, self.device = torch.load(path, weights_only=True, map_location="cpu"), device
        self.model = MANIQA(vit_heads=vit_heads, **sizes_of(state))
        self.model.load_state_dict(state)  # strict: every name is used, every weight filled
        self.model.float().eval().requires_grad_(False).to(device)

    def crops(self, image):
        """(9, 3, S, S) in [-1, 1]. A picture smaller than a crop is enlarged first."""
        image, size = image.convert("RGB"), self.model.size
        if min(image.size) < size:
            image = image.resize(
                [max(size, round(side * size / min(image.size))) for side in image.size]
            )
        width, height = image.size
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(
            height, width, 3
        )
        pixels = pixels.permute(2, 0, 1) / 127.5 - 1
        return torch.stack(
            [
                pixels[:, y : y + size, x : x + size]
                for y in corners(height, size, self.grid)
                for x in corners(width, size, self.grid)
            ]
        )

    @torch.inference_mode()
    def __call__(self, prompts, images, metadata=None):
        scores = []
        for image in images:
            parts = [
                self.model(part.to(self.device)) for part in self.crops(image).split(self.batch)
            ]
            scores.append(torch.cat(parts).mean())
        return torch.stack(scores).float().cpu()
