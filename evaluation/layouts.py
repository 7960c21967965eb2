"""The folder layouts of the benchmarks: which picture belongs to which prompt.

Each benchmark has its own layout, and its scorer reads no other. `find_images` tries all layouts;
exports.py copies our pictures into one of them.

    GenEval         00000/samples/0000.png, 00000/metadata.jsonl    (generate.py writes this one)
    T2I-CompBench   samples/{prompt}_{number:06d}.png, one numbering for the whole prompt file
    T2I-R1          {prompt}_{k}.jpg
    WISE            {prompt_id}.png
    DPG-Bench       {item_id}.png, four pictures tiled two by two
    HPDv2           {style}/{number:05d}.jpg, style being the name of the prompt file
    ArtifactReward  ID{number}_{prompt}_{k}.jpg, of the released code, underscores for blanks

Read next: official_scores.py
"""

import functools
import json
import re
import sys
import unicodedata
from collections import defaultdict
from pathlib import Path

import numpy as np

from evaluation.exports import record_of, write_files
from training.decode import SUFFIXES, open_picture
from training.files import usage_error

STYLES = {"anime", "concept-art", "paintings", "photo"}  # of HPDv2

# --- finding --------------------------------------------------------------------------------------
# One function for each layout: (root, prompt rows, name of the prompt file) -> a function from a
# path to the rows that it may belong to: none, one, or all rows of a prompt that occurs repeatedly.


def geneval(root, rows, _):
    """The folder's number is the row's index; the prompt in its metadata.jsonl must agree."""

    @functools.cache
    def rows_of(folder):
        index = int(folder.name) if re.fullmatch(r"\d{1,9}", folder.name) else len(rows)
        metadata = folder / "metadata.jsonl"
        if index >= len(rows) or not metadata.is_file():
            return []
        try:
            prompt = json.loads(metadata.read_text(encoding="utf-8"))["prompt"].strip()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
            print(f"error: {metadata}: no prompt in it ({problem})", file=sys.stderr)
            return []
        return [rows[index]] if prompt == rows[index]["prompt"] else []

    def find(path):
        sample = path.parent.name == "samples" and re.fullmatch(r"\d+", path.stem)
        return rows_of(path.parent.parent) if sample else []

    return find


def by_id(root, rows, _):
    """WISE and DPG-Bench: the file's name is the prompt's id."""
    ids = {normal(row["id"]): [row] for row in rows}
    return lambda path: ids.get(normal(path.stem), []) if path.parent == root else []


def normal(name):
    """One spelling of accents: some file systems write them as letters of their own."""
    return unicodedata.normalize("NFC", name)


def loose(name):
    """What stays of a prompt in a file name: blanks, slashes, dots, ... become underscores."""
    return re.sub(r"[\W_]+", "_", normal(name)).strip("_")


def loose_names(prompt):
    return {loose(prompt), loose(prompt[:100])}  # the released code cuts at 100


def by_prompt(digits):
    """T2I-CompBench and T2I-R1: the file's name is the prompt, and a number of so many digits."""

    def layout(root, rows, _):
        exact, similar = defaultdict(list), defaultdict(list)
        for row in rows:
            exact[normal(row["prompt"])].append(row)
            for name in loose_names(row["prompt"]):
                similar[name].append(row)

        def find(path):
            name = re.fullmatch(rf"(.+)_\d{digits}", path.stem, re.DOTALL)
            if not name:
                return []
            found = exact.get(normal(name[1])) or similar.get(loose(name[1]), [])
            one_prompt = len({row["prompt"] for row in found}) == 1
            return found if one_prompt else []  # two prompts with one name: not certain

        return find

    return layout


def released(by_index):
    """ArtifactReward: the number is the row's index or its id; the prompt, cut at 100, agrees."""

    def layout(root, rows, _):
        ids = {str(index) if by_index else row["id"]: row for index, row in enumerate(rows)}

        def find(path):
            name = re.fullmatch(r"ID(.+)_\d+", path.stem, re.DOTALL)
            for underscore in re.finditer("_", name[1]) if name else []:
                row = ids.get(name[1][: underscore.start()])
                if row and loose(name[1][underscore.end() :]) in loose_names(row["prompt"]):
                    return [row]
            return []

        return find

    return layout


def hpdv2(root, rows, style):
    """The folder has the prompt file's name; each style has its own prompts with the same numbers.
    Pictures that lie in `root` itself count, unless it has the name of another style."""
    spelled = lambda name: name.lower().replace("_", "-")

    def find(path):
        folder = path.parent.resolve().name
        right = not style or spelled(folder) == spelled(style)
        right |= path.parent == root and spelled(folder) not in STYLES
        if folder == "samples" or not right or not re.fullmatch(r"\d{5}\.jpg", path.name):
            return []
        return rows[int(path.stem) :][:1]

    return find


LAYOUTS = {
    "GenEval": geneval,
    "id": by_id,
    "T2I-CompBench": by_prompt("{6}"),
    "T2I-R1": by_prompt("{1,5}"),
    "ArtifactReward": released(by_index=True),
    "ArtifactReward, by id": released(by_index=False),
    "HPDv2": hpdv2,
}
# Where the number in a file's name counts the pictures of its prompt.
OWN_NUMBERS = {"GenEval", "T2I-R1", "ArtifactReward", "ArtifactReward, by id"}


def find_images(root, rows, prompts="", tile=0):
    """Match the pictures under `root` with the prompts `rows`, in the layout that matches most.

    prompts: the file of the rows. tile: 1 if each file is one picture, 4 if it is DPG-Bench's tile
    of four, which is then cut; 0: refuse what may be a tile. Returns (layout, matched, missing,
    extra). matched: a list of (row, k, path), the path being the k-th picture of its prompt.
    missing: the rows without a picture. extra: the paths that belong to no row. Exit code 2 if
    nothing matches, or if it is not certain what does."""
    root, found = Path(root), {}
    paths = list_pictures(root)
    for layout, match in LAYOUTS.items():
        find = match(root, rows, Path(prompts).stem)
        found[layout] = [(owners, path) for path in paths if (owners := find(path))]
    layout = max(found, key=lambda name: len(found[name]))
    if not found[layout]:
        usage_error(
            f"--images {root}: none of its {len(paths)} pictures, such as "
            f"{paths[0].relative_to(root)}, belongs to a prompt of --prompts ({len(rows)} prompts, "
            f"the first with id {rows[0]['id']!r}); layouts: {', '.join(LAYOUTS)} (its folder has "
            "the prompt file's name)"
        )
    matched = dealt_out(in_one_folder(root, layout, found[layout]), layout in OWN_NUMBERS)
    ids, used = {row["id"] for row, _, _ in matched}, {path for _, _, path in matched}
    missing = [row for row in rows if row["id"] not in ids]
    if layout == "id" and is_tiled(root, matched, prompts, tile):
        matched = cut_tiles(root, rows, matched)
    return layout, matched, missing, [path for path in paths if path not in used]


def list_pictures(root):
    """All pictures under a folder, without hidden files and those of macOS; exit code 2 if none."""
    if not root.is_dir():
        usage_error(f"--images {root}: no such folder")
    paths = [path for path in sorted(root.rglob("*")) if path.suffix.lower() in SUFFIXES]
    hidden = lambda part: part.startswith((".", "__MACOSX"))
    paths = [path for path in paths if not any(map(hidden, path.relative_to(root).parts))]
    paths = [path for path in paths if path.is_file()]
    if not paths:
        usage_error(f"--images {root}: no pictures in it (*{', *'.join(sorted(SUFFIXES))})")
    return paths


def in_one_folder(root, layout, found):
    """The pictures of one model: those directly in `root`, else those of its only folder. Two
    folders of one layout are two models, or two categories, and their mean means nothing."""
    place = lambda path: path.parents[2] if layout == "GenEval" else path.parent
    places = sorted({place(path) for _, path in found})
    if root in places:
        return [(owners, path) for owners, path in found if place(path) == root]
    if len(places) > 1:
        usage_error(
            f"--images {root}: pictures of these prompts in {len(places)} folders ({places[0]}, "
            f"{places[1]}); they are not scored as one, give one of them: --images {places[0]}"
        )
    return found


def dealt_out(found, own_numbers):
    """[(rows, path)] -> [(row, k, path)]. The pictures of a prompt that occurs repeatedly are dealt
    out in the order of their numbers, as the benchmarks number them: first all of the first row.
    own_numbers: the number in a file's name is k, also where some files are missing."""
    groups, place = defaultdict(list), {}
    number = lambda path: (int(re.findall(r"\d+", f"0 {path.stem}")[-1]), str(path))
    owners_of = {tuple(row["id"] for row in owners): owners for owners, _ in found}
    for owners, path in found:
        groups[tuple(row["id"] for row in owners)].append(path)
    for ids, paths in groups.items():
        share, rest = divmod(len(paths), len(ids))
        if rest:
            usage_error(
                f"--images: {len(paths)} pictures, such as {paths[0].name!r}, for a prompt that "
                f"occurs {len(ids)} times; each time needs as many. Make the missing ones, or "
                "remove the repeated prompt"
            )
        for n, path in enumerate(sorted(paths, key=number)):
            k = number(path)[0] if own_numbers and len(ids) == 1 else n % share
            place[path] = owners_of[ids][n // share], k
    return [(*place[path], path) for _, path in found]


# --- the tiles of DPG-Bench -----------------------------------------------------------------------


def is_tiled(root, matched, prompts, tile):
    """Whether each file holds four pictures. Our own export says so; for others --tile must."""
    if tile or record_of(root)[1] == "dpg":
        return tile != 1
    dpg = (prompts and Path(prompts).is_dir()) or "propositions" in matched[0][0]
    tiles = [has_seams(path) for _, _, path in matched[:8]]
    if dpg or sum(tiles) * 4 >= len(tiles) * 3:
        usage_error(
            f"--images {root}: {matched[0][2].name} may be four pictures tiled two by two, as "
            "DPG-Bench's scorer reads them, which are not one picture; say --tile 4 to cut them, "
            "or --tile 1 if each file is one picture"
        )
    return False


def has_seams(path):
    """Whether the largest steps between neighbouring lines are in the middle, both ways."""
    picture = open_picture(path)
    if picture is None or picture.width % 2 or picture.height % 2 or min(picture.size) < 4:
        return False
    pixels = np.asarray(picture.convert("L"), np.float32)
    for lines in (pixels, pixels.T):
        steps = np.abs(np.diff(lines, axis=0)).mean(1)
        others = np.delete(steps, len(steps) // 2)
        if steps[len(steps) // 2] <= others.max():
            return False
    return True


def cut_tiles(root, rows, matched):
    """Cut each tile into <root>-cut/00000/samples/0000.png, ...; a damaged file stays one."""
    make, cut = {}, []
    out = root.resolve().with_name(root.resolve().name + "-cut")
    index_of = {row["id"]: index for index, row in enumerate(rows)}
    for row, k, path in matched:
        picture = open_picture(path)
        if picture is None:
            cut.append((row, 4 * k, path))
            continue
        width, height = picture.width // 2, picture.height // 2
        if picture.size != (2 * width, 2 * height):
            usage_error(f"--tile 4: {path} has {picture.size} pixels, no two by two pictures")
        for i in range(4):
            name = f"{index_of[row['id']]:05d}/samples/{4 * k + i:04d}.png"
            x, y = i % 2 * width, i // 2 * height
            make[name] = functools.partial(quarter, path, (x, y, x + width, y + height))
            cut.append((row, 4 * k + i, out / name))
    write_files(out, "cut", ".", make)
    return cut


def quarter(path, box):
    return open_picture(path).crop(box)
