"""Pictures on disk: written as GenEval reads them, kept in strips and sheets.

Read next: log.py
"""

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from tqdm import tqdm

from training.decode import file_digest, to_rgb
from training.files import atomic, lock, usage_error
from training.records import write_jsonl

STRIP = 12  # pictures in the strip of fixed prompts
STRIP_SIDE, STRIP_GAP = 96, 4  # pixels: of each picture, and to the next one
COLUMNS = 16  # pictures in a row of a sheet
MAX_SHEET = 2**30  # pixels of a sheet: 7,000 pictures of 384 x 384, 9 GB in memory


def save_png(image, path):
    with atomic(path, "wb") as file:
        image.save(file, "PNG")


def save_strip(images, path):
    """The pictures of the fixed prompts, side by side, in one PNG."""
    side, pitch = STRIP_SIDE, STRIP_SIDE + STRIP_GAP
    strip = Image.new("RGB", (pitch * len(images), side), "white")
    for i, image in enumerate(images):
        resample = Image.NEAREST if image.width < side else Image.LANCZOS  # small: keep the pixels
        strip.paste(image.resize((side, side), resample), (i * pitch, 0))
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
    try:  # neither `open_picture` nor Image.open: a sheet may be larger than any picture
        sheet = PngImageFile(path)
        if sheet.width * sheet.height > MAX_SHEET:
            raise ValueError("no sheet of ours is as large")
        sheet, rows = sheet.convert("RGB"), -(-max(1, n) // COLUMNS)
    except Exception:  # no file, or a damaged one
        return [None] * n
    width, height = sheet.width // COLUMNS, sheet.height // rows
    corners = [(i % COLUMNS * width, i // COLUMNS * height) for i in range(n)]
    return [sheet.crop((x, y, x + width, y + height)) for x, y in corners]


def distances(images, group_size):
    """(groups, G, G) in [0, 1]: the distance between each two pictures of a group, as root mean
    square over the pixels at 32 x 32."""
    small = [np.asarray(to_rgb(image).resize((32, 32)), np.float32) for image in images]
    groups = torch.tensor(np.stack(small)) / 255
    groups = groups.view(len(images) // group_size, group_size, -1)
    return torch.cdist(groups, groups) / groups.shape[-1] ** 0.5


def diversity(images, group_size):
    """Mean distance between two pictures of a group: one number in [0, 1] for each group. It is 0
    if the policy draws one picture for all."""
    sums = distances(images, group_size).sum((1, 2))
    return (sums / (group_size * (group_size - 1))).tolist()


# --- a folder of pictures, in GenEval's layout --------------------------------------------------


SAMPLE = re.compile(r"\d+/samples/\d+\.png")  # what GenEval's scorer reads


def write_pictures(
    rows, sample_batch, settings, output_dir, num_images, batch_size, overwrite=False
):
    """Sample `num_images` pictures for each prompt row; write only what is missing.

        <output_dir>/00000/metadata.jsonl       the prompt row
        <output_dir>/00000/samples/0000.png     its pictures, named by numbers, never by prompts
        <output_dir>/manifest.jsonl             a line for each picture: prompt, settings, sha256

    sample_batch: (prompts, keys) -> (images, thoughts). settings: a dict with "seed", noted in each
    line; a picture that was made with other settings is replaced. A stopped run goes on where it
    stopped: the manifest is whole after each batch. Afterwards the folder holds these pictures and
    no others: those of earlier commands are set aside, unknown ones are refused with exit code 2.
    """
    root = Path(output_dir)
    _lock = lock(root, "--output-dir")  # held while this variable exists
    wanted = {
        f"{i:05d}/samples/{k:04d}.png": (i, k) for i in range(len(rows)) for k in range(num_images)
    }
    entries = set_aside(root, wanted)
    todo = pictures_to_make(root, rows, wanted, entries, settings, overwrite)
    there = {i for path, (i, _) in wanted.items() if (root / path).exists()}
    for i, row in enumerate(rows):
        if i in there:
            write_metadata(root, i, row)
        else:
            remove_empty(root / f"{i:05d}")
    write_manifest(root, entries)
    for start in tqdm(range(0, len(todo), batch_size), disable=len(todo) <= batch_size):
        batch = todo[start : start + batch_size]
        keys = [(settings["seed"], 0, i, k) for i, k, _ in batch]
        images, thoughts = sample_batch([entry["prompt"] for *_, entry in batch], keys)
        for (i, _, entry), image, thought in zip(batch, images, thoughts):
            path = root / entry["path"]
            write_metadata(root, i, rows[i])  # not before: GenEval's scorer needs both, or none
            save_png(image, path)
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            entries[entry["path"]] = entry | {"thought": thought, "sha256": digest}
            if len(todo) <= 8:
                print(f"{path}  {thought}")
        write_manifest(root, entries)
    there = len(wanted) - len(todo)
    print(f"{len(todo)} pictures made, {there} were there already, in {root}/")


def write_metadata(root, i, row):
    with atomic(root / f"{i:05d}" / "metadata.jsonl") as file:
        file.write(json.dumps(row))


def is_alone(file):
    """Is it the only file in its folder?"""
    return not any(path.is_file() and path != file for path in file.parent.rglob("*"))


def remove_empty(folder):
    """Remove a prompt's folder that holds no pictures: GenEval's scorer ends at one. What is not
    ours stays."""
    (folder / "metadata.jsonl").unlink(missing_ok=True)
    for emptied in (folder / "samples", folder):
        if emptied.is_dir() and not any(emptied.iterdir()):
            emptied.rmdir()


def pictures_to_make(root, rows, wanted, entries, settings, overwrite):
    """[(row's index, sample number, line of the manifest)] of what is missing or made otherwise."""
    todo, replaced = [], 0
    for path, (i, k) in wanted.items():
        row, old = rows[i], entries.get(path, {})
        entry = {"path": path, "id": row["id"], "prompt": row["prompt"], "sample": k, **settings}
        if old and old.get("prompt") != row["prompt"]:  # nobody may take it for this prompt's
            (root / path).unlink(missing_ok=True)
        same = (root / path).exists() and entry.items() <= old.items()
        if overwrite or not same or file_digest(root / path) != old.get("sha256"):
            todo.append((i, k, entry))
            replaced += bool(old)
    if replaced:
        print(f"{replaced} pictures in {root}/ had other prompts or settings; they are replaced")
    return todo


def read_manifest(root):
    """Path -> line of a folder's manifest, which lists the pictures that we wrote; {} if none."""
    manifest, entries = Path(root) / "manifest.jsonl", {}
    text = manifest.read_text(encoding="utf-8", errors="replace") if manifest.is_file() else ""
    for number, line in enumerate(text.split("\n"), 1):
        try:  # not read_jsonl: a setting that is null must stay equal to itself, and NaN is not
            entry = json.loads(line) if line else None
            if entry is None or not SAMPLE.fullmatch(entry["path"]):  # nothing outside the folder
                continue
            kinds = {"id": str, "prompt": str, "sample": int}
            if not all(isinstance(entry[name], kind) for name, kind in kinds.items()):
                raise ValueError(f"not {kinds}")
            entries[entry["path"]] = entry
        except (ValueError, KeyError, TypeError):
            print(f"{manifest}, line {number}: damaged, its picture is made again", file=sys.stderr)
    return entries


def write_manifest(root, entries):
    write_jsonl(Path(root) / "manifest.jsonl", [entries[path] for path in sorted(entries)])


def set_aside(root, wanted):
    """Move the pictures that an earlier command made and this one does not to <root>-earlier/:
    GenEval's scorer would average them with ours. Returns the lines of the manifest that stay.

    Pictures that are not ours (no line in the manifest): exit code 2, nothing is touched."""
    entries = read_manifest(root)
    there = {path.relative_to(root).as_posix() for path in root.glob("*/samples/*.png")}
    unknown = {path for path in there - entries.keys() if SAMPLE.fullmatch(path)}
    if (root / "manifest.jsonl").is_file():  # else a stopped run has left them
        unknown -= wanted.keys()
    if unknown:
        usage_error(
            f"--output-dir {root}: {len(unknown)} pictures there, such as {min(unknown)}, are not "
            "in its manifest.jsonl and would be scored as ours; move them, or name another folder"
        )
    stale = {path: entry for path, entry in entries.items() if path not in wanted}
    moved = sorted(stale.keys() & there)
    folders = {path.split("/")[0] for path in moved}
    if moved:
        place, n = root.resolve(), 1
        while (aside := place.with_name(f"{place.name}-earlier{n if n > 1 else ''}")).exists():
            n += 1
        for folder in folders:
            (aside / folder / "samples").mkdir(parents=True)
            metadata = root / folder / "metadata.jsonl"
            if metadata.is_file():
                shutil.copy(metadata, aside / folder)
        for path in moved:
            (root / path).replace(aside / path)
        write_manifest(aside, {path: stale[path] for path in moved})
        print(f"{len(moved)} pictures of an earlier command are now in {aside}/")
    # A stopped command may have left a folder with nothing but metadata, too.
    lone = {f.parent.name for f in root.glob("[0-9]" * 5 + "/metadata.jsonl") if is_alone(f)}
    for name in (folders | lone) - {path.split("/")[0] for path in wanted}:
        remove_empty(root / name)
    return {path: entry for path, entry in entries.items() if path in wanted}
