"""The pictures of finished runs: the hacking figure, the training grid, the page report.html.

The hacking figure shows each training reward and gold twice: against the step, and against the
distance from the base policy, sqrt(KL), with best-of-n on the same axes. The reward is hacked where
it rises while gold falls.

Read next: evaluate.py
"""

import math
from collections import defaultdict
from pathlib import Path

import numpy as np
from markupsafe import Markup
from PIL import Image, ImageDraw

from evaluation import hacking, pages
from evaluation.hacking import names_in
from evaluation.tables import interval
from training.decode import open_picture
from training.files import atomic
from training.pictures import cut_sheet, save_png
from training.records import read_jsonl


def strips_of(run):
    """The strips of the fixed prompts: a PNG for each test, in order."""
    return sorted((Path(run) / "samples").glob("step_*.png"))


def open_strip(file):
    """A strip; one white picture for a damaged file, which is named on stderr."""
    return open_picture(file) or Image.new("RGB", (96, 96), "white")


def training_grid(run, path, rows=11):
    """Draw the fixed prompts, a row for each test: the same prompts and noise throughout training.

    Of more tests than `rows` it takes evenly spaced ones, with the first and the last."""
    files = strips_of(run)
    if len(files) > rows:
        files = [files[round(i * (len(files) - 1) / (rows - 1))] for i in range(rows)]
    strips = [open_strip(file) for file in files]
    margin, gap = 70, 4
    height = sum(strip.height + gap for strip in strips)
    grid = Image.new("RGB", (margin + max(strip.width for strip in strips), height), "white")
    pen, y = ImageDraw.Draw(grid), 0
    for file, strip in zip(files, strips):
        step = int(file.stem.split("_")[1])
        pen.text((4, y + strip.height // 2 - 6), f"step {step}", fill="black")
        grid.paste(strip, (margin, y))
        y += strip.height + gap
    save_png(grid, path)


# --- the hacking figure ---------------------------------------------------------------------------


def hacking_figure(runs, path):
    """Draw all training rewards and held-out scores, a column each; a colour for each reward set.

    Above: against the step, mean and 95 % band over seeds. Middle: against sqrt(KL), a line for
    each seed, and best-of-n of the base policy. Below: the same prompts and noise before and
    after."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = hacking.runs_by_rewards(runs)
    configs = [records.config for members in groups.values() for _, records in members]
    proxies = dict.fromkeys(name for c in configs for name in names_in(c, "rewards"))
    heldout = dict.fromkeys(name for c in configs for name in names_in(c, "eval_rewards"))
    panels = list(proxies) + [n if n != "gold-clean" else "artifact-free" for n in heldout]
    figure = plt.figure(figsize=(3 * len(panels), 7.5 + 0.8 * len(groups)), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[6.5, 0.8 * (1 + len(groups))])
    axes = above.subplots(2, len(panels), squeeze=False)
    handles = {}
    for (by_step, by_kl), name in zip(axes.T, panels):
        for number, (trained, members) in enumerate(groups.items()):
            draw_steps(by_step, name, members, f"C{number}")
            draw_distances(by_kl, name, trained, members, f"C{number}")
        by_step.set_title(f"{name} ({'a proxy' if name in proxies else 'held out'})", size=10)
        for axis, label in ((by_step, "step"), (by_kl, "sqrt(KL to the base policy)")):
            axis.set_xlabel(label)
            axis.grid(alpha=0.3)
        drawn, labels = by_kl.get_legend_handles_labels()
        handles |= dict(zip(labels, drawn))
    above.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8)
    draw_strips(below, runs, groups)
    with atomic(path, "wb") as file:
        figure.savefig(file, format="png", dpi=90)
    plt.close(figure)


def draw_steps(axis, name, members, color):
    """One measure of one reward set against the step: mean and 95 % band over seeds."""
    by_step = defaultdict(list)
    for _, records in members:
        for test in records.tests:
            if name in test:
                by_step[test["step"]].append(test[name])
    if by_step:
        steps = sorted(by_step)
        center, width = np.array([interval(by_step[step]) for step in steps]).T
        axis.plot(steps, center, "o-", color=color, markersize=3)
        axis.fill_between(steps, center - width, center + width, color=color, alpha=0.15)


def draw_distances(axis, name, trained, members, color):
    """One measure of one reward set against sqrt(KL): a line for each seed, and best-of-n."""
    style = {"color": color, "markersize": 3}
    label = f"GRPO on {trained}"
    for _, records in members:
        tests = [test for test in records.tests if name in test]
        distances = [math.sqrt(max(0.0, test["kl"])) for test in tests]
        if tests:
            axis.plot(distances, [t[name] for t in tests], "o-", linewidth=1, label=label, **style)
        label = None  # one entry in the legend for all seeds
    pool = members[0][1].pool
    if pool and (name in pool[0] or name == "artifact-free"):
        largest = max(record["sample"] for record in pool) + 1
        ns = [2**i for i in range(10) if 2**i <= largest]
        distances = [math.sqrt(math.log(n) - (n - 1) / n) for n in ns]
        chosen = [hacking.best_of_n(pool, n, hacking.score_of(name)) for n in ns]
        label = f"best of n by {trained}, n to {ns[-1]}"
        axis.plot(distances, chosen, "s--", alpha=0.6, label=label, **style)


def draw_strips(figure, runs, groups):
    """The fixed prompts before training, and after it by the first seed of each reward set."""
    strips = {"before": strips_of(runs[0])[0]}
    for trained, members in groups.items():
        strips[f"after GRPO on {trained}"] = strips_of(members[0][0])[-1]
    axes = figure.subplots(len(strips), 1, squeeze=False)[:, 0]
    for axis, (title, strip) in zip(axes, strips.items()):
        axis.imshow(open_strip(strip))
        axis.set_title(title, fontsize=9, loc="left", pad=2)
        axis.axis("off")


# --- the page -------------------------------------------------------------------------------------


def report_page(run):
    """Write hacking.png, training.png and report.html of a run; returns the page's path."""
    run, page = Path(run), Path(run) / "report.html"
    config, _, tests, _ = hacking.read_run(run)
    hacking_figure([run], run / "hacking.png")
    training_grid(run, run / "training.png")
    trained, step = names_in(config, "rewards"), hacking.onset(run)
    verdict = f"Onset of hacking: step {step}."
    if step is None:
        verdict = "No onset of hacking: gold did not fall beyond its error while the reward rose."
    if "gold" not in tests[0]:
        verdict = "Gold was not measured, so no onset of hacking can be given."
    contents = {
        "Proxy and gold": pages.picture(run / "hacking.png"),
        "The same prompts and noise, test by test": pages.picture(run / "training.png"),
        "Where the rewards exceed gold most, last test": worst_gaps(run, trained),
        "One step of GRPO: groups, best first": groups_of_last_step(run, config),
        "Which reward dominates the advantage": hacking.reward_drivers(run),
        "Means over the test prompts, test by test": tests,
    }
    intro = "<p><code>{}</code></p>\n<p>Trained on {}. The other scores are held out. {}</p>\n"
    intro = Markup(intro).format(config["command"], ", ".join(trained), verdict)
    with atomic(page) as file:
        file.write(pages.page(run.name, intro + pages.sections(contents)))
    return page


def worst_gaps(run, trained, n=24):
    """Rows: the test pictures whose rewards exceed gold most, before and after training.

    The gap is in standard deviations over the last test: sum over the training rewards of
    z(reward) - z(gold), or of z(reward) alone if there is no gold."""
    records = read_jsonl(sorted((run / "tests").glob("step_*.jsonl"))[-1])
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
    pictures = map(pages.picture, cut_sheet(sheets[-1], len(records))[: n * G])
    records = [record | {"picture": picture} for record, picture in zip(records, pictures)]
    cell = Markup(
        "<td>{picture}<br>reward {total:.2f}<br>A {advantage:+.2f}<br><small>{thought}</small></td>"
    )
    row = Markup('<p>{}</p><div class="wide"><table><tr>{}</tr></table></div>\n')
    groups = Markup()
    for start in range(0, len(records), G):
        ranked = sorted(records[start : start + G], key=lambda record: -record["advantage"])
        cells = Markup().join(cell.format(**record) for record in ranked)
        groups += row.format(ranked[0]["prompt"], cells)
    return groups
