"""Pictures as squares, tensors and texts.

A picture that is cut or scaled in another way gets another score. So each reward model must see
pictures as it did in training. Pillow does the scaling, and smooths when it shrinks. (Older code
scaled tensors with torchvision, without smoothing: its scores differ a little.)

Imports only what an environment of 2023 has, for deqa_server.py.   Read next: hub.py
"""

import base64
import io

import torch
from PIL import Image

from training.decode import BadPicture, decode, to_rgb

# Mean and standard deviation per channel: of CLIP and the models built on it, and of DINOv2.
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# --- three ways to a square ---------------------------------------------------------------------


def crop_to_square(image, size, halve=int):
    """CLIP's way: scale the shorter side to `size` and keep the middle. The rest is cut off.

    halve: of an odd rest transformers cuts the smaller half first (int), torchvision the one that
    is even (round)."""
    image = to_rgb(image)
    shape = [size * side // min(image.size) for side in image.size]
    left, top = (halve((side - size) / 2) for side in shape)
    scaled = image.resize(shape, Image.BICUBIC)
    return scaled.crop((left, top, left + size, top + size))


def fit_in_square(image, size):
    """HPS's way: scale the longer side to `size` and add black borders."""
    image = to_rgb(image)
    scale = size / max(image.size)
    shape = [max(1, round(side * scale)) for side in image.size]
    return add_borders(image.resize(shape, Image.BICUBIC), size, "black")


def pad_to_square(image, size, color):
    """LLaVA's way: add borders of one color, then scale to `size`."""
    square = add_borders(to_rgb(image), max(image.size), color)
    return square.resize((size, size), Image.BICUBIC)


def add_borders(image, side, color):
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


# --- tensors and texts --------------------------------------------------------------------------


def to_tensor(image):
    """A picture in RGB -> (3, H, W) float32 in [0, 1]."""
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return (data.view(image.height, image.width, 3) / 255).permute(2, 0, 1)


def normalize(pixels, mean, std):
    """(..., 3, H, W), each channel minus its mean, divided by its standard deviation."""
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def in_batches(score, size, prompts, images):
    """All scores, (N,), on the CPU: `score(prompts, images)` for `size` pictures at a time."""
    batches = [slice(i, i + size) for i in range(0, len(images), size)]
    return torch.cat([score(prompts[batch], images[batch]) for batch in batches]).cpu()


def data_url(image):
    """A picture as text. PNG, not JPEG: a judge would see JPEG's own artifacts."""
    buffer = io.BytesIO()
    to_rgb(image).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def from_data_url(url):
    """The picture in RGB. Raises BadPicture if the text is not a picture."""
    try:
        data = base64.b64decode(url.partition(",")[2])
    except (AttributeError, ValueError) as problem:
        raise BadPicture(f"not a data URL ({problem})") from problem
    return decode(data)
