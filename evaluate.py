"""What a run did: the hacking figure, the table, the page.

A reward model is a proxy for what we want. Optimise it, and for a while what we want comes along; go
on, and it stays behind: over-optimisation (Gao et al., arXiv:2210.10760). The picture to look at has
the distance from the starting policy on the x axis, sqrt(KL), and on the y axis the proxy and the
truth. Best-of-n, which optimises the same proxy by choosing and trains nothing, lies on the same axes:

    KL(best of n || base) = log n - (n - 1) / n,      its reward estimated without bias from one pool

Run:   python evaluate.py                       the newest run: writes its hacking.png and report.html
       python evaluate.py runs/*                all of them, and a table over their seeds

You should see:  for each set of training rewards, before -> after with a 95 % interval over seeds.

Read next: tiny.py (how gold is measured)
"""

import base64
import html
import json
import math
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from PIL import Image, ImageDraw

from files import atomic, read_jsonl, usage_error

CLEAN_ENOUGH = 0.5  # gold-clean from here on counts as artifact-free (the tiny world's definition)
STRIP = 12  # pictures in the strip of fixed prompts
BLIND = "only watched"


def read_run(run):
    """(flags, training metrics, test metrics, best-of-n pool) of a run folder."""
    run = Path(run)
    if not ((run / "test.jsonl").is_file() and (run / "config.json").is_file()):
        usage_error(f"{run}: no run to be evaluated there (no test.jsonl); make one with torchrun grpo.py")
    config = json.loads((run / "config.json").read_text())
    pool = read_jsonl(run / "best_of_n.jsonl") if (run / "best_of_n.jsonl").is_file() else []
    steps = read_jsonl(run / "metrics.jsonl") if (run / "metrics.jsonl").is_file() else []
    return config, steps, read_jsonl(run / "test.jsonl"), pool


# --- numbers ------------------------------------------------------------------------------------


def mean(values):
    """Of the finite ones: a score that failed is NaN and belongs to no mean."""
    known = [v for v in values if math.isfinite(v)]
    return sum(known) / len(known) if known else math.nan


def test_means(records):
    """The records of one test -> the mean of every score, KL, and the share of artifact-free pictures."""
    names = [name for name, value in records[0].items() if isinstance(value, float)]
    means = {name: mean(r[name] for r in records) for name in names}
    if "gold-clean" in means:
        means["artifact-free"] = mean(artifact_free(r) for r in records)
    return means


def artifact_free(record):
    return math.nan if math.isnan(record["gold-clean"]) else float(record["gold-clean"] >= CLEAN_ENOUGH)


def best_of_n(pool, n, value):
    """Expected value(record) of the best of n by "total", without bias, from a pool of N >= n pictures a
    prompt: the i-th best of the pool (i from 0) is the best of n of them in C(N-1-i, n-1) of C(N, n) draws."""
    prompts = defaultdict(list)
    for r in pool:
        if math.isfinite(r["total"]):
            prompts[r["id"]].append(r)
    expected = []
    for group in prompts.values():
        ranked, N = sorted(group, key=lambda r: -r["total"]), len(group)
        if N >= n:
            expected.append(
                sum(math.comb(N - 1 - i, n - 1) * value(r) for i, r in enumerate(ranked)) / math.comb(N, n)
            )
    return mean(expected)


def interval(values):
    """Mean and half width of its 95 % interval over seeds (Student's t)."""
    n, center = len(values), sum(values) / len(values)
    if n < 2:
        return center, math.nan
    t = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}.get(n, 2.3)
    return center, t * math.sqrt(sum((v - center) ** 2 for v in values) / (n - 1) / n)


def within_prompt_std(pool, name):
    """How far apart the untrained policy's pictures of one prompt score: sqrt of the mean variance."""
    prompts = defaultdict(list)
    for r in pool:
        if math.isfinite(r[name]):
            prompts[r["id"]].append(r[name])
    return math.sqrt(mean(statistics.variance(scores) for scores in prompts.values() if len(scores) > 1))


def seeds_table(runs):
    """Lines of a Markdown table: for each set of training rewards, first test -> last test and the change
    with its 95 % interval over seeds. The gain of the first reward is also given in its deviations within a
    prompt: what would make an average picture the best of a few."""
    groups = defaultdict(list)
    for run in runs:
        config, _, tests, pool = read_run(run)
        groups[config["flags"]["rewards"]].append((tests, pool))
    lines = ["| trained on | measured | before | after | change, 95 % over seeds |", "|---|---|---|---|---|"]
    for trained, members in groups.items():
        title = f"`{trained}`, {len(members)} seeds"
        for name in (key for key in members[0][0][0] if key != "step"):
            before, after = ([tests[i][name] for tests, _ in members] for i in (0, -1))
            change, width = interval([b - a for a, b in zip(before, after)])
            row = f"| {title} | {name} | {mean(before):.3f} | {mean(after):.3f} | {change:+.3f} ± {width:.3f}"
            if all(pool and name in pool[0] for _, pool in members) and "gold" not in name:
                spread = mean(within_prompt_std(pool, name) for _, pool in members)
                row += f" ({change / spread:+.1f} within-prompt deviations)"
            lines.append(row + " |")
            title = ""
    return lines


# --- pictures -----------------------------------------------------------------------------------


def save_strip(images, path, side=96):
    """The pictures of the fixed prompts, side by side, in one PNG."""
    strip = Image.new("RGB", ((side + 4) * len(images), side), "white")
    for i, image in enumerate(images):
        how = Image.NEAREST if image.width < side else Image.LANCZOS  # small pictures keep their pixels
        strip.paste(image.resize((side, side), how), (i * (side + 4), 0))
    with atomic(path, "wb") as file:
        strip.save(file, "PNG")


def training_grid(run):
    """The same prompts with the same noise, a row per test: what training did to them."""
    strips = sorted((Path(run) / "samples").glob("step_*.png"))
    rows = [Image.open(path) for path in strips]
    margin, gap = 70, 4
    grid = Image.new("RGB", (margin + rows[0].width, sum(row.height + gap for row in rows)), "white")
    pen, y = ImageDraw.Draw(grid), 0
    for path, row in zip(strips, rows):
        pen.text((4, y + row.height // 2 - 6), f"step {int(path.stem.split('_')[1])}", fill="black")
        grid.paste(row, (margin, y))
        y += row.height + gap
    with atomic(Path(run) / "training.png", "wb") as file:
        grid.save(file, "PNG")


def hacking_figure(runs, path):
    """Proxy and truth against sqrt(KL), a colour for each set of training rewards (one line a seed), with
    best-of-n of the base policy on the same axes; below, the same prompts and noise before and after."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    read = [(Path(run), *read_run(run)) for run in runs]
    trained = [config["flags"]["rewards"] for _, config, *_ in read]
    kinds = list(dict.fromkeys(trained))
    proxies = list(dict.fromkeys(part.split(":")[0] for kind in kinds for part in kind.split(",")))
    panels = [
        *proxies,
        *(name for name in ("artifact-free", "gold") if any(name in tests[0] for *_, tests, _ in read)),
    ]
    figure = plt.figure(figsize=(3.3 * len(panels), 4.3 + 0.8 * len(kinds)), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[3.5, 0.8 * (1 + len(kinds))])
    for axis, name in zip(above.subplots(1, len(panels), squeeze=False)[0], panels):
        labelled = set()
        for kind, (_, _, _, tests, pool) in zip(trained, read):
            style = dict(color=f"C{kinds.index(kind)}", markersize=4)
            points = [(math.sqrt(max(0.0, t["kl"])), t[name]) for t in tests if name in t]
            if points:
                axis.plot(*zip(*points), "o-", label=None if kind in labelled else f"GRPO on {kind}", **style)
            value = artifact_free if name == "artifact-free" else lambda r: r[name]
            if pool and kind not in labelled and (name in pool[0] or name == "artifact-free"):
                largest = max(r["sample"] for r in pool) + 1
                ns = [2**i for i in range(10) if 2**i <= largest]
                axis.plot(
                    [math.sqrt(math.log(n) - (n - 1) / n) for n in ns],
                    [best_of_n(pool, n, value) for n in ns],
                    "s--",
                    alpha=0.6,
                    label=f"best of n by {kind}, n to {ns[-1]}",
                    **style,
                )
            labelled.add(kind)
        axis.set_title(f"{name} ({'a proxy' if name in proxies else 'the truth'})", fontsize=10)
        axis.set_xlabel("sqrt(KL to the base policy)")
        axis.grid(alpha=0.3)
    above.axes[-1].legend(fontsize=7)
    rows = [("before", sorted((read[0][0] / "samples").glob("step_*.png"))[0])]
    rows += [
        (f"after GRPO on {kind}", sorted((read[trained.index(kind)][0] / "samples").glob("step_*.png"))[-1])
        for kind in kinds
    ]
    for axis, (title, strip) in zip(below.subplots(len(rows), 1, squeeze=False)[:, 0], rows):
        axis.imshow(Image.open(strip))
        axis.set_title(title, fontsize=9, loc="left", pad=2)
        axis.axis("off")
    with atomic(path, "wb") as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)


# --- the page -----------------------------------------------------------------------------------


def picture(path):
    """A picture as part of the page itself: the page opens from disk, alone, with no network."""
    data = base64.b64encode(Path(path).read_bytes()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(Path(path).name)}">'


def table(rows):
    """Dicts with the same keys -> an HTML table; every text escaped, for prompts are anybody's."""

    def cell(value):
        return f"{value:.3f}" if isinstance(value, float) else html.escape(str(value))

    if not rows:
        return "<p>none</p>"
    head = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0])
    return (
        f"<table><tr>{head}</tr>"
        + "".join("<tr>" + "".join(f"<td>{cell(v)}</td>" for v in row.values()) + "</tr>" for row in rows)
        + "</table>"
    )


def report(run):
    """Write hacking.png, training.png and report.html of a run; returns the page's path."""
    run = Path(run)
    config, _, tests, _ = read_run(run)
    hacking_figure([run], run / "hacking.png")
    training_grid(run)
    trained = [part.split(":")[0] for part in config["flags"]["rewards"].split(",")]
    records = read_jsonl(sorted((run / "tests").glob("step_*.jsonl"))[-1])
    gap = (lambda r: r["gold"] - r[trained[0]]) if "gold" in records[0] else (lambda r: -r[trained[0]])
    known = [r for r in records if math.isfinite(gap(r))]
    worst = sorted(known, key=gap)[:12]  # the reward likes these, and they are not good
    page = f"""<!doctype html><meta charset="utf-8"><title>{html.escape(run.name)}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>:root {{ color-scheme: light dark }} body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em }}
img {{ max-width: 100%; background: white }} table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
td, th {{ padding: .2em .7em; border-bottom: 1px solid #8886; text-align: left }} .wide {{ overflow-x: auto }}</style>
<h1>{html.escape(run.name)}</h1><p><code>{html.escape(config["command"])}</code></p>
<p>Trained on {html.escape(", ".join(trained))}. Everything else was {BLIND}.</p>
<h2>Proxy and truth</h2>{picture(run / "hacking.png")}
<h2>Test prompts, step by step</h2><div class="wide">{table(tests)}</div>
<h2>The same prompts and noise through training</h2><div class="wide">{picture(run / "training.png")}</div>
<h2>Where the reward and the truth differ most, last test</h2><div class="wide">{table(worst)}</div>
"""
    with atomic(run / "report.html") as file:
        file.write(page)
    return run / "report.html"


@dataclass
class Config:
    runs: Annotated[tuple[str, ...], tyro.conf.Positional] = ()  # run folders; none: the newest in runs/
    figure: str = ""  # also draw all these runs into one figure, here


def main(cfg):
    runs = [Path(run) for run in cfg.runs if (Path(run) / "config.json").is_file()]
    if not cfg.runs:
        runs = sorted(Path("runs").glob("*/test.jsonl"), key=lambda path: path.stat().st_mtime)[-1:]
        runs = [path.parent for path in runs]
    if not runs:
        usage_error(
            f"no runs in {', '.join(cfg.runs) or 'runs/'}; make one with torchrun grpo.py --rewards hps,artifact"
        )
    for run in runs:
        print(report(run))
    print("\n".join(seeds_table(runs)))
    if cfg.figure:
        hacking_figure(runs, cfg.figure)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
