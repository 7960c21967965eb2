"""The pictures of finished runs: the hacking figure, the training grid, the page report.html.

The hacking figure shows each training reward and gold twice: against the step, and against the
distance from the base policy, sqrt(KL), with best-of-n on the same axes. The reward is hacked where
it rises while gold falls.

Read next: evaluate.py
"""

import io
import math
import textwrap
from pathlib import Path

import numpy as np
from markupsafe import Markup
from PIL import Image, ImageDraw

from evaluation import alarms, curves, hacking, pages
from evaluation.hacking import names_in
from training.decode import open_picture
from training.files import atomic, usage_error
from training.pictures import STRIP, STRIP_GAP, STRIP_SIDE, cut_sheet, save_png
from training.records import read_jsonl


def strips_of(run):
    """The strips of the fixed prompts: a PNG for each test, in order. None there: exit code 2."""
    strips = sorted((Path(run) / "samples").glob("step_*.png"))
    if not strips:
        usage_error(f"{run}: samples/step_*.png are missing; a run folder has one for each test")
    return strips


def open_strip(file):
    """A strip; one white picture for a damaged file, which is named on stderr."""
    return open_picture(file) or Image.new("RGB", (96, 96), "white")


def cut_strip(strip):
    """A strip -> its pictures."""
    starts = range(0, strip.width, STRIP_SIDE + STRIP_GAP)
    return [strip.crop((x, 0, x + STRIP_SIDE, strip.height)) for x in starts]


def training_grid(run, path, rows=11):
    """Draw the fixed prompts, a column each and a row for each test: the same prompts and noise
    throughout training.

    Of more tests than `rows` it takes evenly spaced ones, with the first and the last."""
    files = strips_of(run)
    if len(files) > rows:
        files = [files[round(i * (len(files) - 1) / (rows - 1))] for i in range(rows)]
    strips = [open_strip(file) for file in files]
    margin, gap, y = 70, 4, 46
    height = y + sum(strip.height + gap for strip in strips)
    grid = Image.new("RGB", (margin + max(strip.width for strip in strips), height), "white")
    pen = ImageDraw.Draw(grid)
    write_prompts(pen, prompts_of(run), margin, 0)
    for file, strip in zip(files, strips):
        step = int(file.stem.split("_")[1])
        pen.text((4, y + strip.height // 2 - 6), f"step {step}", fill="black")
        grid.paste(strip, (margin, y))
        y += strip.height + gap
    save_png(grid, path)


# --- strips of pictures with their prompts ------------------------------------------------------


def prompts_of(run):
    """The prompts of the pictures in a run's strips."""
    tests = sorted((Path(run) / "tests").glob("step_*.jsonl"))
    return [record["prompt"] for record in read_jsonl(tests[0])[:STRIP]] if tests else []


def add_strips(above, strips, prompts):
    """A picture with strips [(title, file)] below it, and the prompts above the first."""
    opened = [(title, open_strip(file)) for title, file in strips]
    width = max(above.width, *(strip.width for _, strip in opened))
    head = 46
    height = above.height + head + sum(strip.height + 22 for _, strip in opened)
    whole = Image.new("RGB", (width, height), "white")
    whole.paste(above, ((width - above.width) // 2, 0))
    left, y = (width - max(strip.width for _, strip in opened)) // 2, above.height
    write_prompts(ImageDraw.Draw(whole), prompts, left, y)
    y += head
    for title, strip in opened:
        ImageDraw.Draw(whole).text((left, y + 3), title, fill="black")
        whole.paste(strip, (left, y + 18))
        y += strip.height + 22
    return whole


def write_prompts(pen, prompts, left, top, pitch=100):
    """The prompts above their columns, in lines of 16 letters, four at most."""
    for i, prompt in enumerate(prompts):
        lines = textwrap.wrap(prompt, 16, max_lines=4, placeholder=" ...")
        pen.multiline_text((left + i * pitch, top), "\n".join(lines), fill="black", spacing=0)


def hacking_figure(runs, path):
    """The curves as a PNG, and below them the same prompts and noise before and after training.
    Returns the curves, a matplotlib figure."""
    figure, buffer = curves.hacking_curves(runs), io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    groups = hacking.runs_by_rewards(runs)
    strips = [("before training", strips_of(runs[0])[0])]
    for trained, members in groups.items():
        strips.append((f"after GRPO on {trained}", strips_of(members[0][0])[-1]))
    above = Image.open(buffer).convert("RGB")
    save_png(add_strips(above, strips, prompts_of(runs[0])), path)
    return figure


# --- the page -------------------------------------------------------------------------------------


def report_page(run):
    """Write hacking.png, training.png and report.html of a run; returns the page's path."""
    run, page = Path(run), Path(run) / "report.html"
    others = hacking.companions(run)
    config, _, tests, _ = records = hacking.read_run(run)
    figure = hacking_figure([run, *others], run / "hacking.png")
    training_grid(run, run / "training.png")
    control = [other for other in others if hacking.is_control(other)]
    trained = names_in(config, "rewards")
    contents = {
        "Before and after": before_and_after([run, *others]),
        "First and last test": first_and_last(run),
        "Proxy and truth": pages.svg(figure),
        "Alarms that need no gold": alarms.audit([run])[0],
        "Every training step": pages.svg(curves.training_curves(records)),
        "The same prompts and noise, test by test": pages.scrolling(
            pages.picture(run / "training.png")
        ),
        "Where the rewards exceed gold most, last test": worst_gaps(run, trained),
        "One step of GRPO: groups, best first": groups_of_last_step(run, config),
        "Which reward dominates the advantage": hacking.reward_drivers(run),
        "Means over the test prompts, test by test": [
            {name: value for name, value in test.items() if "/" not in name} for test in tests
        ],
    }
    intro = Markup("<p><strong>{}</strong></p>\n<p>Trained on {}; the other scores are held out. ")
    intro += Markup("Command: <code>{}</code></p>\n")
    verdict = hacking.verdict(run, *control[:1])
    intro = intro.format(verdict, ", ".join(trained), config["command"])
    with atomic(page) as file:
        file.write(pages.page(run.name, intro + pages.sections(contents)))
    return page


def before_and_after(runs):
    """Rows: the fixed prompts, with a picture before training and one after each run."""
    titles = {"before": strips_of(runs[0])[0]}
    for run in runs:
        trained = hacking.read_run(run).config["flags"]["rewards"]
        titles[f"after {trained}"] = strips_of(run)[-1]
    cut = {title: cut_strip(open_strip(file)) for title, file in titles.items()}
    prompts = prompts_of(runs[0])
    heads = Markup().join(Markup("<th>{}</th>").format(prompt) for prompt in prompts)
    rows = Markup('<tr><th scope="col"></th>{}</tr>').format(heads)
    for title, strip in cut.items():
        cells = [
            Markup("<td>{}</td>").format(pages.picture(image, f"{prompt}, {title}"))
            for prompt, image in zip(prompts, strip)
        ]
        rows += Markup('<tr><th scope="row">{}</th>{}</tr>').format(title, Markup().join(cells))
    return Markup('<div class="wide"><table class="strips">{}</table></div>').format(rows)


def first_and_last(run):
    """Rows: each measure at the first and at the last test, and the change with its error."""
    tests = hacking.read_run(run).tests
    names = [name for name in tests[0] if name != "step" and "/" not in name]
    rows = []
    for name in names:
        gain, error = hacking.change(run, name)
        row = {"measure": name, "before": tests[0][name], "after": tests[-1][name]}
        rows.append(row | {"change": f"{gain:+.3f}", "standard error": f"{error:.3f}"})
    return rows


def worst_gaps(run, trained, n=24):
    """Rows: the test pictures whose rewards exceed gold most, before and after training.

    The gap is in standard deviations over the last test: sum over the training rewards of
    z(reward) - z(gold), or of z(reward) alone if there is no gold."""
    records = hacking.read_test(run, "last")
    sheets = [run / "tests" / "first.png", run / "tests" / "last.png"]
    before, after = (cut_sheet(sheet, len(records)) for sheet in sheets)

    def z(name):
        values = np.array([record[name] for record in records])
        return (values - np.nanmean(values)) / (np.nanstd(values) + 1e-9)

    gap = sum(z(name) for name in trained)
    if "gold" in records[0]:
        gap = gap - len(trained) * z("gold")
    names = [name for name in records[0] if name not in ("id", "sample") and "/" not in name]
    order = [i for i in np.argsort(-gap) if math.isfinite(gap[i])]
    return [
        {"before": before[i] or "", "after": after[i] or "", **{k: records[i][k] for k in names}}
        for i in order[:n]
    ]


def groups_of_last_step(run, config, n=6):
    """The first n groups of the last stored step: pictures, rewards, advantages, thoughts."""
    sheets = sorted((run / "rollouts").glob("step_*.png"))
    if not sheets:
        return Markup("<p>none</p>")
    records, G = read_jsonl(sheets[-1].with_suffix(".jsonl")), config["flags"]["num_generations"]
    cut = cut_sheet(sheets[-1], len(records))
    records, cut = records[: n * G], cut[: n * G]
    pictures = [pages.picture(i, r["prompt"]) if i else "" for i, r in zip(cut, records)]
    names, line = [*names_in(config, "rewards"), "total"], Markup("{} {:.2f}<br>")
    for record, picture in zip(records, pictures):
        record["picture"] = picture
        record["scores"] = Markup().join(line.format(name, record[name]) for name in names)
    cell = Markup("<td>{picture}<br>{scores}A {advantage:+.2f}<br><small>{thought}</small></td>")
    row = Markup('<p>{}</p><div class="wide"><table><tr>{}</tr></table></div>\n')
    groups = Markup()
    for start in range(0, len(records), G):
        ranked = sorted(records[start : start + G], key=lambda record: -record["advantage"])
        cells = Markup().join(cell.format(**record) for record in ranked)
        groups += row.format(ranked[0]["prompt"], cells)
    return groups
