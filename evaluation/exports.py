"""Export our pictures into the folder layout of a benchmark, whose official scorer then runs.

A scorer averages whatever it finds, so a folder holds one export and nothing else. What we wrote is
listed with its sha256 beside the folder, in FOLDER.manifest.json (in it, a scorer would stumble
over the list). The next export removes what is listed and unchanged. It never removes or replaces
another file: then it is refused.

Read next: layouts.py, which has all layouts
"""

import functools
import hashlib
import json
import re
from collections import defaultdict
from pathlib import Path

from PIL import Image

from training.decode import open_picture
from training.files import atomic, usage_error
from training.pictures import read_manifest

# For each prompt, as the official scorers expect. DPG-Bench's four are tiled into one.
PICTURES = {"geneval": 4, "t2i-compbench": 10, "wise": 1, "dpg": 4, "hpdv2": 1}


def export(root, layout, out, style="photo"):
    """Copy the pictures of generate.py under `root` into a benchmark's layout under `out`.

    layout: t2i-compbench, wise, dpg or hpdv2. Returns the number of pictures written. Wrong input
    (see check_names, tiled and write_files): exit code 2."""
    groups, style = defaultdict(list), style or "photo"
    for path, entry in read_manifest(root).items():
        groups[int(path.split("/")[0])].append(entry)
    if not groups:
        usage_error(f"{root}/manifest.jsonl lists no pictures; generate.py makes both")
    check_names(groups.values(), layout)
    make, made = {}, 0  # file name -> function that returns its picture
    for index in sorted(groups):
        entries = sorted(groups[index], key=lambda entry: entry["sample"])
        paths = [Path(root) / entry["path"] for entry in entries]
        prompt, id_ = entries[0]["prompt"], entries[0]["id"]
        if layout == "t2i-compbench":  # ten pictures for each prompt, numbered through
            for path in paths:
                name = f"samples/{prompt}_{made:06d}.png"
                make[name], made = functools.partial(opened, path), made + 1
        elif layout == "dpg":
            if len(paths) < 4:
                usage_error(
                    f"--layout dpg tiles four pictures of a prompt; {id_} has {len(paths)}, "
                    "use --num-images 4"
                )
            make[f"{id_}.png"] = functools.partial(tiled, paths[:4])
        else:  # one picture for each prompt
            name = f"{style}/{index:05d}.jpg" if layout == "hpdv2" else f"{id_}.png"
            make[name] = functools.partial(opened, paths[0])
    place = {"t2i-compbench": "samples", "hpdv2": style}.get(layout, ".")
    if layout == "t2i-compbench" and {len(entries) for entries in groups.values()} != {10}:
        print("3_in_1.py of T2I-CompBench takes ten pictures of each prompt: --num-images 10")
    write_files(Path(out), layout, place, make)
    return len(make)


def check_layout(rows, layout, num_images):
    """Refuse, before anything is drawn, prompts and numbers that cannot be exported."""
    if layout == "dpg" and num_images < 4:
        usage_error(f"--layout dpg tiles four pictures of a prompt, not --num-images {num_images}")
    check_names([[row] for row in rows], layout)


def check_names(groups, layout):
    """Refuse prompts or ids that cannot be file names, before any file is written. T2I-CompBench's
    scorer ends the prompt at the first underscore, DPG-Bench's the id at the first dot."""
    field = {"t2i-compbench": "prompt", "wise": "id", "dpg": "id"}.get(layout)
    forbidden = "/" + {"t2i-compbench": "_", "dpg": "."}.get(layout, "")
    for name in [group[0][field] for group in groups] if field else []:
        control = any(ord(letter) < 32 for letter in name)
        long = len(name.encode()) > 200  # most file systems allow 255 bytes
        if control or long or name.startswith(".") or set(forbidden) & set(name):
            usage_error(
                f"--layout {layout} names files after the {field}, and {name[:60]!r} is no file "
                "name that its scorer reads; --layout geneval takes any prompt"
            )


def opened(path):
    picture = open_picture(path) if path.is_file() else None
    if picture is None:
        usage_error(f"{path}: missing or damaged; generate.py makes it again once it is removed")
    return picture


def tiled(paths):
    """Four pictures in one, where DPG-Bench's scorer cuts: top left, top right, bottom left, ..."""
    pictures = [opened(path) for path in paths]
    width, height = pictures[0].size
    tile = Image.new("RGB", (2 * width, 2 * height))
    for i, picture in enumerate(pictures):
        tile.paste(picture, (i % 2 * width, i // 2 * height))
    return tile


# --- a folder that holds one export ---------------------------------------------------------------


def record_of(out):
    """(file, layout, name -> sha256) of the list beside an export; ("", {}) if there is none."""
    file = out.resolve().with_name(out.resolve().name + ".manifest.json")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        return file, record["layout"], dict(record["files"])
    except (OSError, ValueError, KeyError, TypeError):  # damaged: then no file counts as ours
        return file, "", {}


def write_files(out, layout, place, make):
    """Write the pictures make() under `out`, and remove those of an earlier export. place: the
    folder that a scorer reads as a whole; exports into other places of one layout stay."""
    file, earlier_layout, written = record_of(out)
    digest = lambda name: hashlib.sha256((out / name).read_bytes()).hexdigest()
    inside = lambda name: place == "." or name.startswith(f"{place}/")
    for partial in out.rglob(".*.partial"):  # of an export that was killed
        if re.fullmatch(r".+\.[0-9a-f]{8}\.partial", partial.name) and partial.is_file():
            partial.unlink()
    there = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    going = {name for name in there & written.keys() if inside(name) or layout != earlier_layout}
    unknown = {name for name in there - written.keys() if inside(name)}
    # None: an export was stopped before it noted the sha256.
    unknown |= {name for name in going if written[name] not in (None, digest(name))}
    if unknown:
        usage_error(
            f"{out}/ holds {len(unknown)} files that this export did not write, such as "
            f"{min(unknown)}; a scorer would count them. Move them, or use another --output-dir"
        )
    kept = {name: value for name, value in written.items() if name in there - going}
    files = kept | dict.fromkeys(going) | dict.fromkeys(make)
    save_record(file, layout, files)
    for name in going - make.keys():
        (out / name).unlink()
        if (folder := (out / name).parent) != out and not any(folder.iterdir()):
            folder.rmdir()
    for name, picture in make.items():
        options = {"format": "PNG"}
        if name.endswith(".jpg"):
            options = {"format": "JPEG", "quality": 95}
        image = picture()
        with atomic(out / name, "wb") as target:
            image.save(target, **options)
        files[name] = digest(name)
    save_record(file, layout, {name: files[name] for name in kept | make})


def save_record(file, layout, files):
    with atomic(file) as target:
        json.dump({"layout": layout, "files": files}, target, indent=0)
