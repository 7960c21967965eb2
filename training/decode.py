"""One function that opens a picture, for everything that reads one.

A score belongs to what a person sees. So a picture is turned upright as its EXIF data say,
transparency lies over white, 16-bit and float pictures are scaled to 8 bits, and of several frames
the first one counts. An ordinary 8-bit RGB picture keeps its pixels.

Imports only what an environment of 2023 has, for deqa_server.py.   Read next: pictures.py
"""

import hashlib
import io
import sys
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

SUFFIXES = frozenset(".png .jpg .jpeg .webp .gif .bmp .tif .tiff .avif .heic".split())
MAX_PIXELS = 2**26  # 8192 x 8192: no model sees more, and 64 pictures are open at a time
MAX_BYTES = 2**28  # of a file: MAX_PIXELS in RGB and some
MAX_RATIO = 200  # of the longer side to the shorter one; Qwen's image processor takes no more

ORIENTATION = 0x0112  # the EXIF tag. Its values, and what turns a picture upright:
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What Pillow has to say about a file, it says in lines without the file's name.
warnings.filterwarnings("ignore", module=r"PIL\.")


class BadPicture(ValueError):
    """A picture that cannot be opened, or must not be. Its text is the reason."""


# --- pixels -------------------------------------------------------------------------------------


def refusal(size):
    """Why no picture of this size (width, height) is opened or judged, or None."""
    short, long = min(size), max(size)
    if short < 1:
        return f"it has no pixels ({size[0]} x {size[1]})"
    if short * long > MAX_PIXELS:
        return f"{size[0]} x {size[1]} pixels are too many; at most {MAX_PIXELS:,}"
    if long > MAX_RATIO * short:
        return f"{size[0]} x {size[1]} is too narrow; at most {MAX_RATIO} to 1"


def to_rgb(image):
    """A Pillow image of any mode -> RGB as a person sees it. Raises BadPicture.

    An image in RGB without EXIF data and without a transparent color only gets copied."""
    problem = refusal(image.size)
    if problem:
        raise BadPicture(problem)
    try:
        image.load()  # before the EXIF data: in a PNG they may follow the pixels
        turn = UPRIGHT.get(orientation(image))
        image = to_8_bits(image) if image.mode[0] in "IF" else over_white(image)
        image = image.transpose(turn) if turn is not None else image
    except BadPicture:
        raise
    except Exception as problem:  # for damaged files Pillow raises a dozen kinds
        raise BadPicture(str(problem) or type(problem).__name__) from problem
    image.info = {}  # it is upright and opaque now; what is left here would be applied again
    return image


def orientation(image):
    """EXIF's number for how the camera was held, 1 to 8; 1, upright, if the data are damaged."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # as many kinds; the pixels are good all the same
        return 1


def over_white(image):
    """Any 8-bit mode -> RGB. What is transparent shows white, as on a page."""
    palette = getattr(image.palette, "mode", "")
    alpha = image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or palette.endswith("A")
    if not alpha and "transparency" not in image.info:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def to_8_bits(image):
    """Modes I;16, I and F: gray pictures with more than 8 bits -> RGB.

    The range is not in the file. Of integers it is 16 bits, or 31 where a value is larger. Of
    floats it is 1, 255 or 65535: the first of which no value is more than the double, because
    scaling overshoots. Other floats, and numbers well below 0: BadPicture."""
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    top = next((top for top in (1, 255, 65535) if high <= 2 * top), None)
    if not low >= -0.25 * max(high, 1.0) or (image.mode == "F" and top is None):
        raise BadPicture(f"values from {low:g} to {high:g} are no gray levels; save it in 8 bits")
    if image.mode == "F":
        gray = values.astype(np.float64).clip(0, top) / top * 255 + 0.5
    else:  # the upper 8 bits, as Pillow takes them of 16-bit RGB
        gray = values.clip(0) >> (8 if high < 2**16 else 23)
    gray = Image.fromarray(gray.astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        gray.paste(255, mask=Image.fromarray(values == transparent))
    return gray.convert("RGB")


# --- files --------------------------------------------------------------------------------------


def decode(data):
    """The bytes of a picture file -> its first frame in RGB, upright. Raises BadPicture.

    The size is in the first bytes: a decompression bomb is refused before it is decoded."""
    try:
        image = Image.open(io.BytesIO(data))
    except Exception as problem:
        raise BadPicture(no_picture(data, problem)) from problem
    jpeg = image.format in ("JPEG", "MPO")
    if jpeg and data.endswith(bytes(64)) and not data.rstrip(b"\0").endswith(b"\xff\xd9"):
        raise BadPicture("the file ends in zeros")  # which Pillow would decode, to gray
    with image:
        return to_rgb(image)


def no_picture(data, problem):
    """Why Pillow did not recognise these bytes, in words that help."""
    if not data:
        return "the file is empty"
    if data.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the picture; get it with `git lfs pull`"
    if data[4:8] == b"ftyp":
        return "HEIC or a video, which Pillow does not read; save it as PNG"
    if isinstance(problem, Image.UnidentifiedImageError):
        return f"no format that Pillow knows; the file begins with {data[:12]!r}"
    return str(problem)


def read(path):
    """The bytes of a picture file. Raises BadPicture if it cannot be read."""
    path = Path(path)
    try:
        if not path.is_file():  # a pipe would be waited for, forever
            raise BadPicture("not a file" if path.exists() else "no such file")
        if path.stat().st_size > MAX_BYTES:
            raise BadPicture(f"the file has over {MAX_BYTES:,} bytes")
        return path.read_bytes()
    except OSError as problem:
        raise BadPicture(problem.strerror or str(problem)) from problem


def open_picture(path):
    """The picture in RGB, or None and a line on stderr: one damaged file costs one score."""
    try:
        return decode(read(path))
    except BadPicture as problem:
        print(f"error: {path}: not a readable picture ({problem})", file=sys.stderr)
        return None


def file_digest(path):
    """sha256 of a picture file; "" if it cannot be read."""
    try:
        return hashlib.sha256(read(path)).hexdigest()
    except BadPicture:
        return ""
