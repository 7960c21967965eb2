"""Pictures on disk: written as GenEval reads them, kept in strips and sheets.

Read next: log.py
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from training.decode import to_rgb
from training.files import atomic
from training.records import write_jsonl

STRIP = 12  # pictures in the strip of fixed prompts
COLUMNS = 16  # pictures in a row of a sheet


def save_png(image, path):
    with atomic(path, "wb") as file:
        image.save(file, "PNG")


def save_strip(images, path, side=96):
    """The pictures of the fixed prompts, side by side, in one PNG."""
    strip = Image.new("RGB", ((side + 4) * len(images), side), "white")
    for i, image in enumerate(images):
        resample = Image.NEAREST if image.width < side else Image.LANCZOS  # small: keep the pixels
        strip.paste(image.resize((side, side), resample), (i * (side + 4), 0))
    save_png(strip, path)


def save_sheet(images, path):
    """Many pictures of one size in one PNG, pixel by pixel; `cut_sheet` returns them."""
    width, height = images[0].size
    sheet = Image.new("RGB", (COLUMNS * width, -(-len(images) // COLUMNS) * height))
    for i, image in enumerate(images):
        sheet.paste(image, (i % COLUMNS * width, i // COLUMNS * height))
    save_png(sheet, path)


def cut_sheet(path, n):
    """The first n pictures of a sheet; n times None if there is no such file, or a damaged one."""
    try:  # not `open_picture`: a sheet may be larger than any picture
        sheet, rows = Image.open(path).convert("RGB"), -(-n // COLUMNS)
    except Exception:  # no file, or a damaged one
        return [None] * n
    width, height = sheet.width // COLUMNS, sheet.height // rows
    corners = [(i % COLUMNS * width, i // COLUMNS * height) for i in range(n)]
    return [sheet.crop((x, y, x + width, y + height)) for x, y in corners]


def diversity(images, group_size):
    """Mean distance between two pictures of a group: one number in [0, 1] for each group.

    Root mean square over the pixels at 32 x 32. It is 0 if the policy draws one picture for all."""
    small = [np.asarray(to_rgb(image).resize((32, 32)), np.float32) for image in images]
    groups = torch.tensor(np.stack(small)) / 255
    groups = groups.view(len(images) // group_size, group_size, -1)
    distances = torch.cdist(groups, groups) / groups.shape[-1] ** 0.5
    return (distances.sum((1, 2)) / (group_size * (group_size - 1))).tolist()


# --- a folder of pictures, in GenEval's layout --------------------------------------------------


def write_pictures(
    rows, sample_batch, settings, output_dir, num_images, batch_size, overwrite=False
):
    """Sample `num_images` pictures for each prompt row; write only what is missing.

        <output_dir>/00000/metadata.jsonl       the prompt row
        <output_dir>/00000/samples/0000.png     its pictures, named by numbers, never by prompts
        <output_dir>/manifest.jsonl             a line for each picture: prompt, settings, sha256

    sample_batch: (prompts, keys) -> (images, thoughts). settings: a dict with "seed", noted in each
    line; a picture that was made with other settings is replaced. A stopped run goes on where it
    stopped: the manifest is whole after each batch."""
    root = Path(output_dir)
    manifest = root / "manifest.jsonl"
    lines = manifest.read_text(encoding="utf-8").splitlines() if manifest.exists() else []
    # Not read_jsonl: a setting that is null must stay equal to itself, and NaN is not.
    entries = {entry["path"]: entry for entry in map(json.loads, lines)}
    todo, replaced = [], 0
    for i, row in enumerate(rows):
        with atomic(root / f"{i:05d}" / "metadata.jsonl") as file:
            file.write(json.dumps(row))
        for k in range(num_images):
            path = f"{i:05d}/samples/{k:04d}.png"
            entry = {
                "path": path,
                "id": row["id"],
                "prompt": row["prompt"],
                "sample": k,
                **settings,
            }
            old = entries.get(path, {})
            if overwrite or not (root / path).exists() or not entry.items() <= old.items():
                todo.append((i, k, entry))
                replaced += bool(old)
    if replaced:
        print(f"{replaced} pictures in {root}/ had other prompts or settings; they are replaced")
    for start in tqdm(range(0, len(todo), batch_size), disable=len(todo) <= batch_size):
        batch = todo[start : start + batch_size]
        keys = [(settings["seed"], 0, i, k) for i, k, _ in batch]
        images, thoughts = sample_batch([entry["prompt"] for *_, entry in batch], keys)
        for (*_, entry), image, thought in zip(batch, images, thoughts):
            path = root / entry["path"]
            save_png(image, path)
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            entries[entry["path"]] = entry | {"thought": thought, "sha256": digest}
            if len(todo) <= 8:
                print(f"{path}  {thought}")
        write_jsonl(manifest, [entries[path] for path in sorted(entries)])
    there = len(rows) * num_images - len(todo)
    print(f"{len(todo)} pictures made, {there} were there already, in {root}/")
