"""One run against another, picture by picture.

Two pictures of the same prompt and the same random numbers differ by the policies alone. Their
difference is free of the difficulty of the prompt, so its interval is several times narrower than
that of two means.

Read next: alarms.py
"""

import math
from pathlib import Path

from markupsafe import Markup

from evaluation import hacking, pages
from evaluation.tables import bootstrap
from training.decode import open_picture
from training.files import atomic, usage_error
from training.pictures import cut_sheet
from training.records import mean, read_jsonl


def read_scored(path):
    """(records, pictures): of the last test of a run, or of a file of scores."""
    path = Path(path)
    if path.is_file():
        records = read_jsonl(path)
        return records, [Path(record["path"]) for record in records]
    hacking.read_run(path)  # exits with the reason if it is no run
    records = read_jsonl(hacking.test_files(path)[-1])
    return records, cut_sheet(path / "tests" / "last.png", len(records))


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
    names = [n for n, value in first[0].items() if isinstance(value, float) and n in second[0]]
    if not names:
        usage_error(f"--compare: {a} and {b} have no score in common")
    table = [row for name in names if (row := difference(name, first, second, couples))]
    key = "gold" if "gold" in names else names[0]
    couples.sort(key=lambda ij: -abs(second[ij[1]][key] - first[ij[0]][key]))

    def opened(picture):
        return open_picture(picture) if isinstance(picture, Path) else picture or ""

    gallery = []
    for i, j in couples[:48]:
        row = {"A": opened(pictures_a[i]), "B": opened(pictures_b[j]), "prompt": first[i]["prompt"]}
        gallery.append(row | {f"{key} A": first[i][key], f"{key} B": second[j][key]})
    names = Markup("<p>A: {}<br>B: {}</p>").format(a, b)
    changes = f"Side by side, the largest changes of {key} first"
    body = names + pages.table(table) + pages.sections({changes: gallery})
    with atomic(output) as file:
        file.write(pages.page("Two runs, picture by picture", body))
    return table


def difference(name, first, second, couples):
    """The row of one score, or None if no picture has it in both."""
    known = [(i, j) for i, j in couples if math.isfinite(first[i][name] + second[j][name])]
    if not known:
        return None
    gains = [second[j][name] - first[i][name] for i, j in known]
    prompts = [first[i]["prompt"] for i, _ in known]
    low, high = bootstrap(lambda pick: mean(gains[k] for k in pick), prompts, draws=400)
    row = {"measured": name, "A": mean(first[i][name] for i, _ in known)}
    row |= {"B": mean(second[j][name] for _, j in known), "B - A": mean(gains)}
    return row | {"95 %": f"{low:+.3f} to {high:+.3f}", "n": len(gains)}
