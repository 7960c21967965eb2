"""Rewards without a model: the size of the JPEG, pure noise, and four statistics of pictures.

A policy hacks the JPEG size within minutes. Noise is the control of every experiment. The four
statistics are only logged, never trained on: hacked pictures often get brighter, more saturated,
busier or emptier.   Read next: maniqa.py
"""

import hashlib
import io
import math

import numpy as np
import torch

from training.decode import to_rgb


class Jpeg:
    """Minus the kilobytes of the JPEG: DDPO's "compressibility" (arXiv:2305.13301).

    Training on it shows reward hacking in its pure form."""

    range = (-math.inf, 0.0)
    needs = ()
    checkpoint = None
    reference = "DDPO, arXiv:2305.13301"

    def __init__(self, device="cpu", checkpoint=None):
        pass

    def __call__(self, prompts, images, metadata=None):
        return torch.tensor([-self.kilobytes(image) for image in images])

    def kilobytes(self, image):
        buffer = io.BytesIO()
        to_rgb(image).save(buffer, "JPEG", quality=95)
        return len(buffer.getvalue()) / 1000


class Noise(Jpeg):
    """A hash of the pixels as a number in [0, 1): the control. There is nothing to learn from it.

    What training on it changes is drift: the noise of the gradient moves the policy. Only what
    another reward changes beyond that is the work of this reward. The same picture always has the
    same score, on every process and after a resume."""

    range, reference = (0.0, 1.0), "control"

    def __call__(self, prompts, images, metadata=None):
        digests = [hashlib.sha256(to_rgb(image).tobytes()).digest() for image in images]
        return torch.tensor([int.from_bytes(digest[:3], "big") / 2**24 for digest in digests])


class Statistic:
    """Base of the four statistics. `measure` gives a number in [0, 1] for one picture."""

    range = (0.0, 1.0)
    needs = ()
    checkpoint = None
    reference = "an early sign of hacking"

    def __init__(self, device="cpu", checkpoint=None):
        pass

    def __call__(self, prompts, images, metadata=None):
        return torch.tensor([float(self.measure(image)) for image in images])


class Brightness(Statistic):
    """Mean of the value channel of HSV."""

    def measure(self, image):
        return np.asarray(to_rgb(image).convert("HSV"), np.float32)[..., 2].mean() / 255


class Saturation(Statistic):
    """Mean of the saturation channel of HSV. Preference models often like strong colors."""

    def measure(self, image):
        return np.asarray(to_rgb(image).convert("HSV"), np.float32)[..., 1].mean() / 255


class Edges(Statistic):
    """Mean difference of neighboring pixels in gray: texture, grain, grids."""

    def measure(self, image):
        gray = np.asarray(to_rgb(image).convert("L"), np.float32) / 255
        if min(gray.shape) < 2:  # a line has no neighbors on one axis
            return math.nan
        return np.mean([np.abs(np.diff(gray, axis=axis)).mean() for axis in (0, 1)])


class Entropy(Statistic):
    """Entropy of the colors in 4 x 4 x 4 bins, divided by the largest possible one, log 64."""

    def measure(self, image):
        bins = np.asarray(to_rgb(image), np.int64) // 64 @ (16, 4, 1)
        share = np.bincount(bins.ravel(), minlength=64) / bins.size
        return -(share[share > 0] * np.log(share[share > 0])).sum() / np.log(64)


STATISTICS = dict(brightness=Brightness, saturation=Saturation, edges=Edges, entropy=Entropy)


def image_statistics(images):
    """The four statistics under the names of the log: {"image/brightness": (N,), ...}"""
    return {f"image/{name}": kind()(None, images) for name, kind in STATISTICS.items()}
