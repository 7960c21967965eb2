"""Trains the tiny DINOv2: eyes that nobody told what to look for.

A discriminator (adversarial_reward.py) needs features in which a broken star differs from a whole one, and
nobody has labelled any. Self-distillation (DINO, arXiv:2104.14294; iBOT, arXiv:2111.07832; both in DINOv2,
arXiv:2304.07193): a student must say about one view of a picture what a teacher, the slow average of its
own past, says about another view; and about patches that are hidden from it, what the teacher sees there.

    loss = CE(teacher(view a), student(view b)) on the class token  +  the same on hidden patches

Both answer in K made-up categories, all of which the teacher has to use alike. The pictures come as they are, whole
and broken, without labels.

Run:   python tiny.py --only dino                    Read next: adversarial_reward.py
"""

import copy

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import trange
from transformers import Dinov2Config, Dinov2Model

from adversarial_reward import IMAGENET_MEAN, IMAGENET_STD

CONFIG = dict(
    hidden_size=96,
    num_hidden_layers=4,
    num_attention_heads=3,
    image_size=32,
    patch_size=4,
    layerscale_value=1.0,
    use_mask_token=True,
)
CATEGORIES = 256  # K


class Answers(torch.nn.Module):
    """A DINOv2 and the head that names categories; the head is thrown away afterwards."""

    def __init__(self):
        super().__init__()
        self.body, width = Dinov2Model(Dinov2Config(**CONFIG)), CONFIG["hidden_size"]
        self.head = torch.nn.Sequential(
            torch.nn.Linear(width, 192), torch.nn.GELU(), torch.nn.Linear(192, 64)
        )
        self.prototypes = torch.nn.Parameter(torch.randn(CATEGORIES, 64))

    def forward(self, pixels, hidden=None):
        """(B, 1 + patches, K): cosines between each token and each category."""
        tokens = self.body(pixels, bool_masked_pos=hidden).last_hidden_state
        return F.normalize(self.head(tokens), dim=-1) @ F.normalize(self.prototypes, dim=-1).T


def balance(cosines_MK, rounds=3):
    """Sharp answers that use all categories alike: Sinkhorn-Knopp, as DINOv2. Divide by the sum over the answers,
    then over the categories, and again. Without it everybody soon gives the same answer, which is always right
    (we tried the moving centre of the first DINO: 13 of 256 categories were left)."""
    shares = (cosines_MK / 0.02).exp()
    for _ in range(rounds):
        shares = shares / shares.sum(0)
        shares = shares / shares.sum(1, keepdim=True)
    return shares


def view(pixels, rng):
    """A random window of each picture, seven tenths of its side or more, scaled to full size and mirrored one
    time in two. Colours stay: in this world they are half of what a picture says."""
    B = len(pixels)
    scale, mirror = rng.uniform(0.7, 1, B), rng.choice([-1.0, 1.0], B)
    shift = rng.uniform(-1, 1, (B, 2)) * (1 - scale)[:, None]
    theta = np.stack(
        [
            np.stack([scale * mirror, 0 * scale, shift[:, 0]], 1),
            np.stack([0 * scale, scale, shift[:, 1]], 1),
        ],
        1,
    )
    grid = F.affine_grid(torch.from_numpy(theta).float(), pixels.shape, align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def hide(B, rng):
    """(B, 64) bool: a block of 3 x 3 to 5 x 5 patches of each picture is hidden, large enough that what was there
    must be inferred from the rest of the shape and not from the next pixel."""
    hidden = torch.zeros(B, 8, 8, dtype=torch.bool)
    for picture, (h, w), (y, x) in zip(hidden, rng.integers(3, 6, (B, 2)), rng.random((B, 2))):
        y, x = int(y * (9 - h)), int(x * (9 - w))
        picture[y : y + h, x : x + w] = True
    return hidden.view(B, 64)


def train_dino(folder, pixels, steps, seed, batch=48, lr=1e-3):
    """pixels: uint8 (n, 32, 32, 3). Saves the teacher, as DINOv2 does."""
    torch.manual_seed(seed)
    rng, student = np.random.default_rng(seed), Answers().train()
    teacher = copy.deepcopy(student).requires_grad_(False)
    opt = torch.optim.AdamW(student.parameters(), lr=lr, weight_decay=0.04)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=steps, pct_start=0.1)
    mean, std = (
        torch.tensor(IMAGENET_MEAN),
        torch.tensor(IMAGENET_STD),
    )  # with which every DINOv2 was trained
    data, bar = (
        ((torch.from_numpy(pixels) / 255 - mean) / std).permute(0, 3, 1, 2),
        trange(steps, desc="dino"),
    )
    for step in bar:
        pictures = data[torch.from_numpy(rng.integers(len(data), size=batch))]
        views = torch.cat([view(pictures, rng), view(pictures, rng)])
        hidden = hide(2 * batch, rng)
        said = student(views, hidden) / 0.1
        with torch.no_grad():
            told = teacher(views)
            sharp_class, sharp_patch = (
                balance(told[:, 0]),
                balance(told[:, 1:].flatten(0, 1)).view(told[:, 1:].shape),
            )
        other = sharp_class.roll(
            batch, 0
        )  # what the teacher says about the *other* view of the same picture
        class_loss = -(other * said[:, 0].log_softmax(-1)).sum(-1).mean()
        patch_loss = -(sharp_patch * said[:, 1:].log_softmax(-1)).sum(-1)[hidden].mean()
        opt.zero_grad(), (class_loss + patch_loss).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        opt.step(), schedule.step()
        with torch.no_grad():  # the slow average; slower and slower
            rate = 0.01 * (1 - step / steps) + 1e-4
            for slow, fast in zip(teacher.parameters(), student.parameters()):
                slow.lerp_(fast, rate)
        if step % 10 == 0:
            used = sharp_class.mean(0)  # e^entropy of the average answer: 1 would be collapse
            bar.set_postfix(
                cls=f"{class_loss.item():.2f}",
                patch=f"{patch_loss.item():.2f}",
                used=f"{(-(used * used.clamp(min=1e-9).log()).sum()).exp().item():.0f}",
            )
    teacher.body.eval().save_pretrained(folder)
