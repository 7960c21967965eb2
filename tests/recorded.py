"""What the original code of a reward computed on small random weights, in tests/data/NAME.

expected.json says what made the numbers. The original code is not needed, and not here."""

import json

import torch
from PIL import Image

from training.files import ROOT

DATA = ROOT / "tests/data"


def recorded(name):
    """(the recorded dict, the pictures as the original got them)"""
    known = json.loads((DATA / name / "expected.json").read_text())
    pictures = [Image.open(ROOT / path).convert("RGB") for path in known["pictures"]]
    return known, [image.resize(known["resized to"], Image.LANCZOS) for image in pictures]


def scores_of(reward, expected, images):
    """(ours, recorded), both (prompts, pictures). expected: prompt -> recorded scores."""
    ours = [reward([prompt] * len(images), images) for prompt in expected]
    return torch.stack(ours), torch.tensor(list(expected.values()))
