"""The folder layouts of the benchmarks: find pictures in them, and export ours into them.

Each benchmark has its own layout, and its scorer reads no other. `find_images` tries all layouts;
`export` copies our pictures into one of them, and the official scorer then runs unchanged.

    GenEval         00000/samples/0000.png, 00000/metadata.jsonl    (generate.py writes this one)
    T2I-CompBench   samples/{prompt}_{number:06d}.png, one numbering for the whole prompt file
    WISE            {prompt_id}.png
    DPG-Bench       {item_id}.png, four pictures tiled two by two
    HPDv2           {style}/{number:05d}.jpg, style being the name of the prompt file
    ArtifactReward  ID{number}_{prompt}_{k}.jpg, of the released code

Read next: official_scores.py
"""

import functools
import json
import re
from collections import defaultdict
from pathlib import Path

from PIL import Image

from training.files import atomic, usage_error
from training.records import read_jsonl

PICTURES = {".png", ".jpg", ".jpeg", ".webp"}

# --- finding --------------------------------------------------------------------------------------
# One function for each layout: (root, prompt rows) -> a function from a path to its row, or None.


def geneval(root, rows):
    """The folder's number is the row's index; the prompt in its metadata.jsonl must agree."""

    @functools.cache
    def row_of(folder):
        index = int(folder.name) if re.fullmatch(r"\d+", folder.name) else len(rows)
        metadata = folder / "metadata.jsonl"
        if index >= len(rows) or not metadata.is_file():
            return None
        prompt = json.loads(metadata.read_text())["prompt"].strip()
        return rows[index] if prompt == rows[index]["prompt"] else None

    return lambda path: row_of(path.parent.parent) if path.parent.name == "samples" else None


def by_id(root, rows):
    """WISE and DPG-Bench: the file's name is the prompt's id."""
    ids = {row["id"]: row for row in rows}
    return lambda path: ids.get(path.stem) if path.parent == root else None


def compbench(root, rows):
    prompts = {row["prompt"]: row for row in rows}
    return lambda path: prompts.get(path.stem[:-7]) if re.search(r"_\d{6}$", path.stem) else None


def released(root, rows):
    """ArtifactReward: the number is the row's id or index; the prompt, cut at 100, must agree."""
    ids = {row["id"]: row for row in rows} | {str(index): row for index, row in enumerate(rows)}

    def find(path):
        name = re.fullmatch(r"ID(\w+?)_(.*)_\d+", path.stem)
        row = ids.get(name[1]) if name else None
        if row and row["prompt"][:100].replace("/", "_").startswith(name[2][:100].rstrip()):
            return row
        return None

    return find


def hpdv2(root, rows):
    def find(path):
        numbered = re.fullmatch(r"\d{5}\.jpg", path.name) and path.parent.name != "samples"
        return rows[int(path.stem)] if numbered and int(path.stem) < len(rows) else None

    return find


LAYOUTS = {
    "GenEval": geneval,
    "id": by_id,
    "T2I-CompBench": compbench,
    "ArtifactReward": released,
    "HPDv2": hpdv2,
}


def find_images(root, rows):
    """Match the pictures under `root` with the prompts `rows`, in the layout that matches most.

    Returns (layout, matched, missing, extra). matched: a list of (row, k, path), the path being the
    k-th picture of its prompt. missing: the rows without a picture. extra: the paths that belong to
    no row. No match at all: exit code 2."""
    root, found = Path(root), {}
    paths = [path for path in sorted(root.rglob("*")) if path.suffix.lower() in PICTURES]
    paths = [path for path in paths if not path.name.startswith(".")]
    if not paths:
        usage_error(f"--images {root}: no pictures in it (*.png, *.jpg, *.webp)")
    for layout, match in LAYOUTS.items():
        find, count, found[layout] = match(root, rows), defaultdict(int), []
        for path in paths:
            row = find(path)
            if row is not None:
                found[layout].append((row, count[row["id"]], path))
                count[row["id"]] += 1
    layout = max(found, key=lambda name: len(found[name]))
    matched = found[layout]
    if not matched:
        usage_error(
            f"--images {root}: none of its {len(paths)} pictures, such as "
            f"{paths[0].relative_to(root)}, belongs to a prompt of --prompts ({len(rows)} prompts, "
            f"the first with id {rows[0]['id']!r})"
        )
    ids, used = {row["id"] for row, _, _ in matched}, {path for _, _, path in matched}
    missing = [row for row in rows if row["id"] not in ids]
    return layout, matched, missing, [path for path in paths if path not in used]


# --- exporting ------------------------------------------------------------------------------------


def export(root, layout, out, style="photo"):
    """Copy the pictures of generate.py under `root` into a benchmark's layout under `out`.

    layout: t2i-compbench, wise, dpg or hpdv2. Returns the number of pictures written. Wrong input
    (see check_names and tiled): exit code 2."""
    groups = defaultdict(list)
    for entry in read_jsonl(Path(root) / "manifest.jsonl"):
        groups[entry["path"].split("/")[0]].append(entry)
    check_names(groups.values(), layout)
    made = 0
    for index, folder in enumerate(sorted(groups)):
        entries = sorted(groups[folder], key=lambda entry: entry["sample"])
        pictures = [Image.open(Path(root) / entry["path"]).convert("RGB") for entry in entries]
        prompt, id_ = entries[0]["prompt"], entries[0]["id"]
        names, options = [f"{id_}.png"], {"format": "PNG"}  # one picture for each prompt
        if layout == "t2i-compbench":  # ten pictures for each prompt, numbered through
            names = [f"samples/{prompt}_{made + k:06d}.png" for k in range(len(pictures))]
        elif layout == "dpg":
            pictures = [tiled(pictures, id_)]
        elif layout == "hpdv2":
            names, options = [f"{style}/{index:05d}.jpg"], {"format": "JPEG", "quality": 95}
        for name, picture in zip(names, pictures):
            with atomic(Path(out) / name, "wb") as file:
                picture.save(file, **options)
            made += 1
    return made


def check_names(groups, layout):
    """Refuse prompts or ids that cannot be file names, before any file is written."""
    field = {"t2i-compbench": "prompt", "wise": "id", "dpg": "id"}.get(layout)
    for name in [group[0][field] for group in groups] if field else []:
        if "/" in name or "\0" in name or name.startswith(".") or len(name) > 200:
            usage_error(
                f"--layout {layout} names files after the {field}, and {name[:60]!r} is no file "
                "name; --layout geneval takes any prompt"
            )


def tiled(pictures, id_):
    """Four pictures in one, where DPG-Bench's scorer cuts: top left, top right, bottom left, ..."""
    if len(pictures) < 4:
        usage_error(
            f"--layout dpg tiles four pictures of a prompt; {id_} has {len(pictures)}, "
            "use --num-images 4"
        )
    width, height = pictures[0].size
    tile = Image.new("RGB", (2 * width, 2 * height))
    for i, picture in enumerate(pictures[:4]):
        tile.paste(picture, (i % 2 * width, i // 2 * height))
    return tile
