"""Where benchmarks keep their pictures: finding them, exporting ours, reading official scores.

Every benchmark has a folder layout of its own and a scorer that reads no other. `find_images` recognises
the layout by trying them all; `export` writes the same pictures anew for an official scorer, which then
runs unchanged; `summarize` turns the official result files into the tables that papers print.

    GenEval         00000/samples/0000.png beside 00000/metadata.jsonl      (also what generate.py writes)
    T2I-CompBench   samples/{prompt}_{number:06d}.png, numbered through in the order of the prompt file
    WISE            {prompt_id}.png
    DPG-Bench       {item_id}.png, four pictures tiled two by two
    HPDv2           {style}/{number:05d}.jpg, style being the name of the prompt file
    ArtifactReward  ID{number}_{prompt}_{k}.jpg, the released code's

Read next: evaluate.py
"""

import json
import re
from collections import defaultdict
from pathlib import Path

from PIL import Image

from evaluation.pages import mean
from training.files import atomic, read_jsonl, usage_error

PICTURES = {".png", ".jpg", ".jpeg", ".webp"}
EXPORTS = ("t2i-compbench", "wise", "dpg", "hpdv2")


# --- finding ------------------------------------------------------------------------------------


def find_images(root, rows):
    """Match the pictures under `root` with the prompts `rows`, whatever the layout.

    Returns (layout, matched, missing, extra): matched is a list of (row, k, path), k being the number of the
    picture among those of its prompt; missing lists rows without a picture; extra, pictures that belong to no
    row. The layout under which most files match is taken to be the one; nothing matched: exit code 2."""
    root = Path(root)
    paths = sorted(
        p for p in root.rglob("*") if p.suffix.lower() in PICTURES and not p.name.startswith(".")
    )
    if not paths:
        usage_error(f"--images {root}: no pictures there (*.png, *.jpg, *.webp)")
    best = ("none", [])
    for layout, match in (
        ("GenEval", geneval),
        ("id", by_id),
        ("T2I-CompBench", compbench),
        ("ArtifactReward", released),
        ("HPDv2", hpdv2),
    ):
        find, seen, matched = match(root, rows), defaultdict(int), []
        for path in paths:
            row = find(path)
            if row is not None:
                matched.append((row, seen[row["id"]], path))
                seen[row["id"]] += 1
        if len(matched) > len(best[1]):
            best = (layout, matched)
    layout, matched = best
    if not matched:
        usage_error(
            f"--images {root}: none of its {len(paths)} pictures, such as {paths[0].relative_to(root)}, belongs "
            f"to a prompt of --prompts ({len(rows)} prompts, the first with id {rows[0]['id']!r})"
        )
    having, used = {row["id"] for row, _, _ in matched}, {path for _, _, path in matched}
    return (
        layout,
        matched,
        [r for r in rows if r["id"] not in having],
        [p for p in paths if p not in used],
    )


def geneval(root, rows):
    """The folder's number is the prompt's place; its metadata.jsonl must agree."""
    known = {}

    def find(path):
        folder = path.parent.parent
        if path.parent.name != "samples" or not re.fullmatch(r"\d+", folder.name):
            return None
        if folder not in known:
            known[folder], place = None, int(folder.name)
            metadata = folder / "metadata.jsonl"
            row = rows[place] if place < len(rows) else None
            if (
                row
                and metadata.is_file()
                and json.loads(metadata.read_text())["prompt"].strip() == row["prompt"]
            ):
                known[folder] = row
        return known[folder]

    return find


def by_id(root, rows):
    """WISE, DPG-Bench: the file is called after the prompt's id."""
    ids = {row["id"]: row for row in rows}
    return lambda path: ids.get(path.stem) if path.parent == root else None


def compbench(root, rows):
    prompts = {row["prompt"]: row for row in rows}
    return lambda path: (
        prompts.get(path.stem.rpartition("_")[0]) if re.search(r"_\d{6}$", path.stem) else None
    )


def hpdv2(root, rows):
    def find(path):
        place = (
            int(path.stem)
            if re.fullmatch(r"\d{5}", path.stem) and path.suffix == ".jpg"
            else len(rows)
        )
        return rows[place] if place < len(rows) and path.parent.name != "samples" else None

    return find


def released(root, rows):
    """ID{n}_{prompt}_{k}.jpg: n is the prompt's id or its place, and the text, cut at 100, must agree."""
    ids = {row["id"]: row for row in rows} | {str(place): row for place, row in enumerate(rows)}

    def find(path):
        name = re.fullmatch(r"ID(\w+?)_(.*)_\d+", path.stem)
        row = ids.get(name[1]) if name else None
        return (
            row
            if row and row["prompt"][:100].replace("/", "_").startswith(name[2][:100].rstrip())
            else None
        )

    return find


# --- exporting ----------------------------------------------------------------------------------


def export(root, layout, out, style="photo"):
    """Copy what generate.py wrote under `root` into the layout of an official scorer, under `out`.

    A layout that names files after prompts refuses prompts that are no file names, before writing any."""
    groups = defaultdict(list)
    for entry in read_jsonl(Path(root) / "manifest.jsonl"):
        groups[entry["path"].split("/")[0]].append(entry)
    groups = [
        sorted(group, key=lambda entry: entry["sample"]) for _, group in sorted(groups.items())
    ]
    wanted = {"t2i-compbench": "prompt", "wise": "id", "dpg": "id"}.get(layout)
    for group in groups:
        name = group[0][wanted] if wanted else "0"
        if "/" in name or "\0" in name or name.startswith(".") or len(name) > 200:
            usage_error(
                f"--layout {layout} names files after the {wanted}, and {name[:60]!r} is no file name; "
                "the pictures themselves are whole, use --layout geneval"
            )
    number, made = 0, 0
    for place, group in enumerate(groups):
        pictures = [Image.open(Path(root) / entry["path"]).convert("RGB") for entry in group]
        first = group[0]
        if (
            layout == "t2i-compbench"
        ):  # its scorers number all pictures through, and take ten for each prompt
            targets = []
            for picture in pictures:
                targets.append((f"samples/{first['prompt']}_{number:06d}.png", picture))
                number += 1
        elif layout == "wise":  # one picture a prompt
            targets = [(f"{first['id']}.png", pictures[0])]
        elif layout == "dpg":
            targets = [(f"{first['id']}.png", tiled(pictures, first))]
        else:
            targets = [(f"{style}/{place:05d}.jpg", pictures[0])]
        for name, picture in targets:
            with atomic(Path(out) / name, "wb") as file:
                picture.save(
                    file,
                    "JPEG" if name.endswith(".jpg") else "PNG",
                    **({"quality": 95} if layout == "hpdv2" else {}),
                )
            made += 1
    return made


def tiled(pictures, entry):
    if len(pictures) < 4:
        usage_error(
            f"--layout dpg tiles four pictures of a prompt; {entry['id']} has {len(pictures)}, use --num-images 4"
        )
    width, height = pictures[0].size
    tile = Image.new("RGB", (2 * width, 2 * height))
    for i, picture in enumerate(
        pictures[:4]
    ):  # the scorer cuts: top left, top right, bottom left, bottom right
        tile.paste(picture, (i % 2 * width, i // 2 * height))
    return tile


# --- official scores ----------------------------------------------------------------------------

# Reference rows: GenEval and DPG from the Janus-Pro report (arXiv:2501.17811, Tables 4 and 5); WISE from the
# benchmark's own leaderboard; T2I-CompBench and T2I-R1 as reported in the T2I-R1 paper (arXiv:2505.00703).
REFERENCES = {
    "GenEval": {
        "Janus-Pro-1B": dict(
            single_object=0.98,
            two_object=0.82,
            counting=0.51,
            colors=0.89,
            position=0.65,
            color_attr=0.56,
            overall=0.73,
        ),
        "Janus-Pro-7B": dict(
            single_object=0.99,
            two_object=0.89,
            counting=0.59,
            colors=0.90,
            position=0.79,
            color_attr=0.66,
            overall=0.80,
        ),
    },
    "DPG-Bench": {
        "Janus-Pro-1B": dict(
            Global=87.58, Entity=88.63, Attribute=88.17, Relation=88.98, Other=88.30, overall=82.63
        ),
        "Janus-Pro-7B": dict(
            Global=86.90, Entity=88.90, Attribute=89.40, Relation=89.32, Other=89.48, overall=84.19
        ),
    },
    "WISE legacy": {
        "Janus-Pro-1B": dict(
            Cultural=0.20,
            Time=0.28,
            Space=0.45,
            Biology=0.24,
            Physics=0.32,
            Chemistry=0.16,
            overall=0.26,
        ),
        "Janus-Pro-7B": dict(
            Cultural=0.30,
            Time=0.37,
            Space=0.49,
            Biology=0.36,
            Physics=0.42,
            Chemistry=0.26,
            overall=0.35,
        ),
        "T2I-R1-7B": dict(
            Cultural=0.56,
            Time=0.55,
            Space=0.63,
            Biology=0.54,
            Physics=0.55,
            Chemistry=0.30,
            overall=0.54,
        ),
    },
    "WISE verified": {
        "Janus-Pro-1B": dict(
            Cultural=0.3050,
            Time=0.2333,
            Space=0.2333,
            Biology=0.2167,
            Physics=0.3083,
            Chemistry=0.2000,
            overall=0.2650,
        )
    },
}
# The two protocols of WISE: (ids of each category, its weight in the overall score). Not comparable.
WISE = {
    "WISE legacy": dict(
        Cultural=((1, 400), 0.4),
        Time=((401, 567), 0.167),
        Space=((568, 700), 0.133),
        Biology=((701, 800), 0.1),
        Physics=((801, 900), 0.1),
        Chemistry=((901, 1000), 0.1),
    ),
    "WISE verified": dict(
        Cultural=((1, 400), 0.4),
        Time=((401, 520), 0.12),
        Space=((521, 640), 0.12),
        Biology=((641, 760), 0.12),
        Physics=((761, 880), 0.12),
        Chemistry=((881, 1000), 0.12),
    ),
}


def summarize(path):
    """An official result file -> (benchmark, dict column -> score, list of what had no score)."""
    text = Path(path).read_text(encoding="utf-8")
    if "DPG-Bench score:" in text:
        first = text[text.index("L1 category") : text.index("L2 category")]
        columns = {
            name.title(): float(value) for name, value in re.findall(r"\t(.+): ([\d.]+)", first)
        }
        return (
            "DPG-Bench",
            columns | {"overall": float(re.search(r"DPG-Bench score: ([\d.]+)", text)[1])},
            [],
        )
    rows = (
        json.loads(text)
        if text.lstrip().startswith("[")
        else [json.loads(x) for x in text.splitlines() if x.strip()]
    )
    if rows and {"tag", "correct"} <= rows[0].keys():
        tags = defaultdict(list)
        for row in rows:
            tags[row["tag"]].append(float(row["correct"]))
        columns = {tag: mean(values) for tag, values in tags.items()}
        return (
            "GenEval",
            columns | {"overall": mean(columns.values())},
            [],
        )  # the mean of the tasks, not of the pictures
    if rows and {"question_id", "answer"} <= rows[0].keys():
        return "T2I-CompBench", {"overall": mean(float(row["answer"]) for row in rows)}, []
    if rows and "prompt_id" in rows[0] and ("consistency" in rows[0] or "score" in rows[0]):
        return wise_table(rows)
    usage_error(
        f"--summarize {path}: not a result file of GenEval, T2I-CompBench, WISE or DPG-Bench"
    )


def wise_table(rows):
    """WISE's columns. Legacy: (.7 consistency + .2 realism + .1 aesthetics) / 2, each 0, 1 or 2. Verified: 0
    or 1. What is outside that range (the official scorer writes 999) had no score: listed, in no mean."""
    if len({"score" in row for row in rows}) > 1:
        usage_error(
            "scores of WISE's two protocols in one file: they are not comparable, score with one of them"
        )
    protocol = "WISE verified" if "score" in rows[0] else "WISE legacy"
    scores, failed = {}, []
    for row in rows:
        names = (
            ("score",)
            if protocol == "WISE verified"
            else ("consistency", "realism", "aesthetic_quality")
        )
        values, highest = [row.get(name) for name in names], 1 if protocol == "WISE verified" else 2
        if all(isinstance(v, (int, float)) and 0 <= v <= highest for v in values):
            weights = (1.0,) if protocol == "WISE verified" else (0.35, 0.1, 0.05)
            scores[int(row["prompt_id"])] = sum(w * v for w, v in zip(weights, values))
        else:
            failed.append(row["prompt_id"])
    columns = {
        name: mean(s for i, s in scores.items() if low <= i <= high)
        for name, ((low, high), _) in WISE[protocol].items()
    }
    overall = sum(weight * columns[name] for name, (_, weight) in WISE[protocol].items())
    return protocol, columns | {"overall": overall}, failed
