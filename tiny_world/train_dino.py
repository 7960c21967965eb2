"""Trains the tiny DINOv2, the feature extractor of the discriminator (adversarial_reward.py).

It needs no labels: self-distillation (DINO, arXiv:2104.14294; iBOT, arXiv:2111.07832; both in
DINOv2, arXiv:2304.07193). A student sees one random crop of a picture and predicts what its teacher
says about another crop, and what the teacher says about patches that are masked in the student's
input. The teacher is a moving average of the student's weights.

    loss = CE(teacher(crop a), student(crop b)) on the class token  +  CE on the masked patches

Both answer with a distribution over K categories that have no given meaning.

Read next: pairs.py
"""

import copy

import numpy as np
import torch
import torch.nn.functional as F
from transformers import Dinov2Config, Dinov2Model

from reward_models.pixels import IMAGENET_MEAN, IMAGENET_STD, normalize
from tiny_world.learning import SHIPPED, Training

CATEGORIES = 256  # K


class Student(torch.nn.Module):
    """A DINOv2 with a head that predicts categories; only the DINOv2 is kept after training."""

    def __init__(self):
        super().__init__()
        self.body = Dinov2Model(Dinov2Config.from_pretrained(SHIPPED / "dino"))
        layers = torch.nn.Linear(96, 192), torch.nn.GELU(), torch.nn.Linear(192, 64)
        self.head = torch.nn.Sequential(*layers)
        self.prototypes = torch.nn.Parameter(torch.randn(CATEGORIES, 64))

    def forward(self, pixels, masked=None):
        """(B, 1 + patches, K): cosines between each token and each category."""
        tokens = self.body(pixels, bool_masked_pos=masked).last_hidden_state
        return F.normalize(self.head(tokens), dim=-1) @ F.normalize(self.prototypes, dim=-1).T


def balance(cosines_MK, rounds=3):
    """Sharp distributions that use all categories equally, by Sinkhorn-Knopp, as in DINOv2. Without
    it all answers collapse onto a few categories (with the moving centre of the first DINO, 13 of
    the 256 remained)."""
    shares = (cosines_MK / 0.02).exp()
    for _ in range(rounds):
        shares = shares / shares.sum(0)
        shares = shares / shares.sum(1, keepdim=True)
    return shares


def random_crop(pixels, rng):
    """A random window of each picture (B, 3, 32, 32), at least 0.7 of its side, scaled to full size
    and mirrored half of the time. Colours stay: in this world the prompts name them."""
    B = len(pixels)
    scale, mirror = rng.uniform(0.7, 1, B), rng.choice([-1.0, 1.0], B)
    shift = rng.uniform(-1, 1, (B, 2)) * (1 - scale)[:, None]
    x_row = np.stack([scale * mirror, 0 * scale, shift[:, 0]], 1)
    y_row = np.stack([0 * scale, scale, shift[:, 1]], 1)
    theta = torch.from_numpy(np.stack([x_row, y_row], 1)).float()
    grid = F.affine_grid(theta, pixels.shape, align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def random_masks(B, rng):
    """(B, 64) bool: a block of 3 x 3 to 5 x 5 patches is masked. It is so large that its content
    must be inferred from the rest of the shape, not from the next pixel."""
    masked = torch.zeros(B, 8, 8, dtype=torch.bool)
    for picture, (h, w), (y, x) in zip(masked, rng.integers(3, 6, (B, 2)), rng.random((B, 2))):
        y, x = int(y * (9 - h)), int(x * (9 - w))
        picture[y : y + h, x : x + w] = True
    return masked.view(B, 64)


def train_dino(folder, pixels, seed, steps=2000, batch=48, unfinished=None):
    """pixels: uint8 (n, 32, 32, 3), clean and corrupted. Saves the teacher, as DINOv2 does."""
    torch.manual_seed(seed)
    rng, student = np.random.default_rng(seed), Student().train()
    teacher = copy.deepcopy(student).requires_grad_(False)
    weights, options = student.named_parameters(), dict(more=[teacher], weight_decay=0.04)
    training = Training("dino", weights, steps, 1e-3, 0.1, rng, unfinished, **options)
    data = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    data = normalize(data, IMAGENET_MEAN, IMAGENET_STD)
    for step in training:
        pictures = data[torch.from_numpy(rng.integers(len(data), size=batch))]
        crops = torch.cat([random_crop(pictures, rng), random_crop(pictures, rng)])
        masked = random_masks(2 * batch, rng)
        predicted = student(crops, masked) / 0.1
        with torch.no_grad():
            target = teacher(crops)
            class_target = balance(target[:, 0])
            patch_target = balance(target[:, 1:].flatten(0, 1)).view(target[:, 1:].shape)
        swapped = class_target.roll(batch, 0)  # the target from the other crop of the same picture
        class_loss = -(swapped * predicted[:, 0].log_softmax(-1)).sum(-1).mean()
        patch_loss = -(patch_target * predicted[:, 1:].log_softmax(-1)).sum(-1)[masked].mean()
        share = class_target.mean(0).clamp(min=1e-9)
        used = (-(share * share.log()).sum()).exp()  # categories in use; 1 is a collapse
        training.update(class_loss + patch_loss, cls=class_loss, patch=patch_loss, used=used)
        rate = 0.01 * (1 - step / steps) + 1e-4
        with torch.no_grad():
            for slow, fast in zip(teacher.parameters(), student.parameters()):
                slow.lerp_(fast, rate)
    teacher.body.eval().save_pretrained(folder)
