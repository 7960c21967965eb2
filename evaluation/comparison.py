"""One run against another, picture by picture.

Two pictures of the same prompt and the same random numbers differ by the policies alone. Their
difference is free of the difficulty of the prompt, so its interval is several times narrower than
that of two means.

Read next: alarms.py
"""

import math
import sys
from pathlib import Path

from markupsafe import Markup

from evaluation import hacking, pages
from evaluation.tables import bootstrap
from training.decode import file_digest, open_picture
from training.files import atomic, usage_error
from training.pictures import cut_sheet
from training.records import mean, read_jsonl


def read_scored(path):
    """(records, pictures): of the last test of a run, or of a file of scores. Wrong input: exit
    code 2."""
    path = Path(path)
    if path.is_file():
        records = read_jsonl(path)
        if not all({"id", "sample", "prompt", "path", "sha256"} <= r.keys() for r in records):
            usage_error(f"--compare {path}: not a file of scores of evaluate.py --images")
        pictures = [unchanged_picture(record) for record in records]
    else:
        hacking.read_run(path)  # exits with the reason if it is no run
        records = hacking.read_test(path, "last")
        pictures = cut_sheet(path / "tests" / "last.png", len(records))
    if len({(record["id"], record["sample"]) for record in records}) < len(records):
        usage_error(f"--compare {path}: holds two lines of one prompt and sample; score it anew")
    return records, pictures


def unchanged_picture(record):
    """The path of the picture that has this score; None, said once, if the file is another now."""
    if is_unchanged(record):
        return Path(record["path"])
    path = record["path"]
    print(f"{path}: missing, or not the picture that was scored; not shown", file=sys.stderr)


def is_unchanged(record):
    path = Path(record["path"])
    return path.is_file() and file_digest(path) == record["sha256"]


def known_scores(file):
    """The records of a file of scores whose pictures are still there, unchanged; [] if there is no
    such file. A file of another kind: exit code 2."""
    records = read_jsonl(file) if Path(file).is_file() else []
    if not all({"path", "sha256", "prompt"} <= record.keys() for record in records):
        usage_error(f"--output {file}: there is another file of this name; give another name")
    return [record for record in records if is_unchanged(record)]


def merged(records, known):
    """These records, and those known ones that are of other pictures."""
    place = lambda record: Path(record["path"]).resolve()
    new = set(map(place, records))
    return [*records, *(record for record in known if place(record) not in new)]


def seed_of(path):
    """The seed of a run; None for a file of scores."""
    return hacking.read_run(path)[0]["flags"]["seed"] if Path(path).is_dir() else None


def compare(a, b, output):
    """B minus A, picture by picture: a table with 95 % intervals, and a page of pictures. Runs of
    one seed were tested with the same random numbers; of two seeds only the prompts are the same,
    and the intervals are wider."""
    (first, pictures_a), (second, pictures_b) = read_scored(a), read_scored(b)
    place = {(record["id"], record["sample"]): i for i, record in enumerate(first)}
    couples = [(place.get((r["id"], r["sample"])), j) for j, r in enumerate(second)]
    couples = [(i, j) for i, j in couples if i is not None]
    if not couples or any(first[i]["prompt"] != second[j]["prompt"] for i, j in couples):
        usage_error(f"--compare: {a} and {b} have no pictures of the same prompts and samples")
    scores = lambda records: {n: 0 for r in records for n, v in r.items() if isinstance(v, float)}
    names = [name for name in scores(first) if name in scores(second)]
    if not names:
        usage_error(f"--compare: {a} and {b} have no score in common")
    table = [row for name in names if (row := difference(name, first, second, couples))]
    key = "gold" if "gold" in names else names[0]
    size = lambda ij: abs(second[ij[1]].get(key, math.nan) - first[ij[0]].get(key, math.nan))
    couples = sorted((ij for ij in couples if math.isfinite(size(ij))), key=size, reverse=True)

    def opened(picture):
        return open_picture(picture) if isinstance(picture, Path) else picture or ""

    gallery = []
    for i, j in couples[:48]:
        row = {"A": opened(pictures_a[i]), "B": opened(pictures_b[j]), "prompt": first[i]["prompt"]}
        gallery.append(row | {f"{key} A": first[i][key], f"{key} B": second[j][key]})
    title = Markup("<p>A: {}<br>B: {}</p>").format(a, b)
    changes = f"Side by side, the largest changes of {key} first"
    body = title + pages.table(table) + pages.sections({changes: gallery})
    with atomic(output) as file:
        file.write(pages.page("Two runs, picture by picture", body))
    return table


def difference(name, first, second, couples):
    """The row of one score, or None if no picture has it in both."""
    value = lambda record: record.get(name, math.nan)
    known = [(i, j) for i, j in couples if math.isfinite(value(first[i]) + value(second[j]))]
    if not known:
        return None
    gains = [second[j][name] - first[i][name] for i, j in known]
    prompts = [first[i]["prompt"] for i, _ in known]
    low, high = bootstrap(lambda pick: mean(gains[k] for k in pick), prompts, draws=400)
    row = {"measured": name, "A": mean(first[i][name] for i, _ in known)}
    row |= {"B": mean(second[j][name] for _, j in known), "B - A": mean(gains)}
    return row | {"95 %": f"{low:+.3f} to {high:+.3f}", "n": len(gains)}
