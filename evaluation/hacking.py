"""What a run did: the hacking figure, its onset, who drove it, and the page that shows the pictures.

A reward model is a proxy for what we want. Optimise it, and for a while what we want comes along; go
on, and it stays behind: over-optimisation (Gao et al., arXiv:2210.10760). The picture to look at has
the distance from the starting policy on the x axis, sqrt(KL), and on the y axis the proxy and the
truth. Best-of-n, which optimises the same proxy by choosing and trains nothing, lies on the same axes:

    KL(best of n || base) = log n - (n - 1) / n,      its reward estimated without bias from one pool

Onset, the rule: the test at which gold was highest, if at the last one gold is lower by more than two
standard errors (of the difference, picture by picture: all tests use the same prompts and noise) and
the first training reward is higher. Before it, reward and truth went together; after it they parted.

Run:   python evaluate.py runs/*      (this file is what evaluate.py and grpo.py draw with)

Read next: evaluate.py
"""

import html
import json
import math
import re
import statistics
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from evaluation import pages as report
from evaluation.pages import interval, mean
from tiny_world.world import CLEAN_ENOUGH
from training.files import atomic, read_jsonl, usage_error

STRIP = 12  # pictures in the strip of fixed prompts
COLUMNS = 16  # pictures in a row of a sheet


def read_run(run):
    """(flags, training metrics, test metrics, best-of-n pool) of a run folder."""
    run = Path(run)
    if not ((run / "test.jsonl").is_file() and (run / "config.json").is_file()):
        usage_error(
            f"{run}: no run to be evaluated there (no test.jsonl); make one with torchrun grpo.py"
        )
    config = json.loads((run / "config.json").read_text())
    pool = read_jsonl(run / "best_of_n.jsonl") if (run / "best_of_n.jsonl").is_file() else []
    steps = read_jsonl(run / "metrics.jsonl") if (run / "metrics.jsonl").is_file() else []
    return config, steps, read_jsonl(run / "test.jsonl"), pool


def parse_names(text):
    return [re.split("[:@]", part)[0].strip() for part in (text or "").split(",") if part.strip()]


def names_in(config, flag):
    return parse_names(config["flags"][flag])


# --- numbers ------------------------------------------------------------------------------------


def test_means(records):
    """The records of one test -> the mean of every score, KL, and the share of artifact-free pictures."""
    names = [name for name, value in records[0].items() if isinstance(value, float)]
    means = {name: mean(r[name] for r in records) for name in names}
    if "gold-clean" in means:
        means["artifact-free"] = mean(artifact_free(r) for r in records)
    return means


def artifact_free(record):
    return (
        math.nan
        if math.isnan(record["gold-clean"])
        else float(record["gold-clean"] >= CLEAN_ENOUGH)
    )


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
            draws = [math.comb(N - 1 - i, n - 1) * value(r) for i, r in enumerate(ranked)]
            expected.append(sum(draws) / math.comb(N, n))
    return mean(expected)


def within_prompt_std(pool, name):
    """How far apart the base policy's pictures of one prompt score: sqrt of the mean variance."""
    prompts = defaultdict(list)
    for r in pool:
        if math.isfinite(r[name]):
            prompts[r["id"]].append(r[name])
    return math.sqrt(
        mean(statistics.variance(scores) for scores in prompts.values() if len(scores) > 1)
    )


def paired(before, after, name):
    """Mean and standard error of after - before, picture by picture: records with the same id and sample."""
    known = {(r["id"], r["sample"]): r[name] for r in before if math.isfinite(r[name])}
    gains = [
        r[name] - known[r["id"], r["sample"]]
        for r in after
        if (r["id"], r["sample"]) in known and math.isfinite(r[name])
    ]
    return mean(gains), statistics.stdev(gains) / math.sqrt(len(gains)) if len(
        gains
    ) > 1 else math.nan


def onset(run, truth="gold"):
    """The step at which proxy and truth part company, or None; the rule is in this file's header."""
    config, _, tests, _ = read_run(run)
    if truth not in tests[0]:
        return None
    proxy, peak, last = (
        names_in(config, "rewards")[0],
        max(tests, key=lambda t: t[truth]),
        tests[-1],
    )
    records = [
        read_jsonl(Path(run) / "tests" / f"step_{t['step']:06d}.jsonl") for t in (peak, last)
    ]
    change, error = paired(*records, truth)
    return peak["step"] if change < -2 * error and last[proxy] > peak[proxy] else None


def drivers(run, steps=10):
    """Who drives the policy? For each reward, over the first and the last training steps: its spread within a
    group, how many couples of a group it cannot tell apart, and how it correlates with the advantage. With a
    plain sum the reward with the largest spread is the one that is heard."""
    config, _, _, _ = read_run(run)
    files, rows = sorted((Path(run) / "rollouts").glob("step_*.jsonl")), []
    names = [*names_in(config, "rewards"), *names_in(config, "eval_rewards")]
    for title, chosen in (("first", files[:steps]), ("last", files[-steps:])):
        records = [read_jsonl(file) for file in chosen]
        G = config["flags"]["num_generations"]
        for name in names if records else []:
            scores = np.array([[r[name] for r in step] for step in records]).reshape(-1, G)
            advantages = np.array([[r["advantage"] for r in step] for step in records]).reshape(
                -1, G
            )
            centered = scores - np.nanmean(scores, 1, keepdims=True)
            known = np.isfinite(centered)
            ties = np.isclose(scores[:, :, None], scores[:, None], atol=1e-6, rtol=0)[
                :, *np.triu_indices(G, 1)
            ]
            moving = known.sum() > 1 and centered[known].std() > 0 and advantages[known].std() > 0
            rows.append(
                {
                    "steps": f"{title} {len(records)}",
                    "reward": name,
                    "role": "trains" if name in names_in(config, "rewards") else "only watched",
                    "std within a group": float(
                        np.sqrt((centered[known] ** 2).mean() * G / (G - 1))
                    ),
                    "ties": float(ties.mean()),
                    "correlation with the advantage": float(
                        np.corrcoef(centered[known], advantages[known])[0, 1]
                    )
                    if moving
                    else math.nan,
                }
            )
    return rows


def seeds_table(runs):
    """Rows: for each set of training rewards, first test -> last test and the change with its 95 % interval
    over seeds. The gain of a reward is also given in its deviations within a prompt: what would make an
    average picture the best of a few."""
    groups = defaultdict(list)
    for run in runs:
        config, _, tests, pool = read_run(run)
        groups[config["flags"]["rewards"]].append((run, tests, pool))
    rows = []
    for trained, members in groups.items():
        title = f"`{trained}`, {len(members)} seed{'s' if len(members) > 1 else ''}"
        for name in (
            key for key in members[0][1][0] if key != "step" and not key.startswith("image/")
        ):
            before, after = ([tests[i][name] for _, tests, _ in members] for i in (0, -1))
            change, width = interval([b - a for a, b in zip(before, after)])
            text = f"{change:+.3f}" + (
                f" ± {width:.3f}" if math.isfinite(width) else ", one seed: no interval"
            )
            if all(pool and name in pool[0] for *_, pool in members) and "gold" not in name:
                spread = mean(within_prompt_std(pool, name) for *_, pool in members)
                text += f" ({change / spread:+.1f} within-prompt deviations)"
            rows.append(
                {
                    "trained on": title,
                    "measured": name,
                    "before": mean(before),
                    "after": mean(after),
                    "change, 95 % over seeds": text,
                }
            )
            title = ""
        parted = [onset(run) for run, *_ in members]
        if "gold" in members[0][1][0]:
            rows.append(
                {
                    "trained on": "",
                    "measured": "onset of hacking",
                    "before": "",
                    "after": "",
                    "change, 95 % over seeds": ", ".join(
                        "none" if p is None else f"step {p}" for p in parted
                    ),
                }
            )
        if all(pool for *_, pool in members):
            rows += best_of_rows([pool for *_, pool in members], trained)
    return rows


def best_of_rows(pools, trained):
    """The same reward, optimised by choosing among n pictures of the policy before RL."""
    n = max(r["sample"] for r in pools[0]) + 1
    names = [name for name in pools[0][0] if name in [*parse_names(trained), "gold"]]
    values = {name: lambda r, name=name: r[name] for name in names}
    if "gold-clean" in pools[0][0]:
        values["artifact-free"] = artifact_free
    rows = []
    for name, value in values.items():
        before, after = ([best_of_n(pool, k, value) for pool in pools] for k in (1, n))
        change, width = interval([b - a for a, b in zip(before, after)])
        rows.append(
            {
                "trained on": "",
                "measured": f"best of {n}: {name}",
                "before": mean(before),
                "after": mean(after),
                "change, 95 % over seeds": f"{change:+.3f}"
                + (f" ± {width:.3f}" if math.isfinite(width) else ""),
            }
        )
    return rows


# --- pictures -----------------------------------------------------------------------------------


def diversity(images, group_size):
    """Mean distance of two pictures of one group, at 32 x 32: root mean square over pixels, in [0, 1]. A
    policy that paints one picture for all has none. Returns one number a group."""
    small = torch.tensor(
        np.stack(
            [np.asarray(image.convert("RGB").resize((32, 32)), np.float32) for image in images]
        )
    )
    groups = (small / 255).view(len(images) // group_size, group_size, -1)
    distances = torch.cdist(groups, groups) / groups.shape[-1] ** 0.5
    return (distances.sum((1, 2)) / (group_size * (group_size - 1))).tolist()


def save_strip(images, path, side=96):
    """The pictures of the fixed prompts, side by side, in one PNG."""
    strip = Image.new("RGB", ((side + 4) * len(images), side), "white")
    for i, image in enumerate(images):
        how = (
            Image.NEAREST if image.width < side else Image.LANCZOS
        )  # small pictures keep their pixels
        strip.paste(image.resize((side, side), how), (i * (side + 4), 0))
    with atomic(path, "wb") as file:
        strip.save(file, "PNG")


def save_sheet(images, path):
    """Many pictures of one size in one PNG, pixel by pixel; `cut_sheet` has them back."""
    width, height = images[0].size
    sheet = Image.new("RGB", (COLUMNS * width, -(-len(images) // COLUMNS) * height))
    for i, image in enumerate(images):
        sheet.paste(image, (i % COLUMNS * width, i // COLUMNS * height))
    with atomic(path, "wb") as file:
        sheet.save(file, "PNG")


def cut_sheet(path, n):
    """The first n pictures of a sheet; none if it was never made."""
    if not Path(path).is_file():
        return [None] * n
    sheet, rows = Image.open(path).convert("RGB"), -(-n // COLUMNS)
    width, height = sheet.width // COLUMNS, sheet.height // rows
    corners = [(i % COLUMNS * width, i // COLUMNS * height) for i in range(n)]
    return [sheet.crop((x, y, x + width, y + height)) for x, y in corners]


def training_grid(run, path, rows=11):
    """The same prompts with the same noise, a row a test (of many tests some, the first and the last always): what training
    did to them."""
    strips = sorted((Path(run) / "samples").glob("step_*.png"))
    if len(strips) > rows:
        strips = [strips[round(i * (len(strips) - 1) / (rows - 1))] for i in range(rows)]
    rows = [Image.open(strip) for strip in strips]
    margin, gap = 70, 4
    grid = Image.new(
        "RGB", (margin + rows[0].width, sum(row.height + gap for row in rows)), "white"
    )
    pen, y = ImageDraw.Draw(grid), 0
    for strip, row in zip(strips, rows):
        pen.text(
            (4, y + row.height // 2 - 6), f"step {int(strip.stem.split('_')[1])}", fill="black"
        )
        grid.paste(row, (margin, y))
        y += row.height + gap
    with atomic(path, "wb") as file:
        grid.save(file, "PNG")


def hacking_figure(runs, path):
    """Every trained reward and the truth: above against the step, mean and 95 % band over seeds; below
    against sqrt(KL), a line a seed, with best-of-n of the base policy on the same axes; then the same
    prompts and noise before and after. A colour for each set of training rewards."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    read = [(Path(run), *read_run(run)) for run in runs]
    kinds = defaultdict(list)  # training rewards -> [(run, tests, pool)]
    for run, config, _, tests, pool in read:
        kinds[config["flags"]["rewards"]].append((run, tests, pool))
    proxies = list(
        dict.fromkeys(name for _, config, *_ in read for name in names_in(config, "rewards"))
    )
    watched = dict.fromkeys(
        name for _, config, *_ in read for name in names_in(config, "eval_rewards")
    )
    truths = ["artifact-free" if name == "gold-clean" else name for name in watched]
    panels = [*proxies, *truths]
    figure = plt.figure(figsize=(3 * len(panels), 7.5 + 0.8 * len(kinds)), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[6.5, 0.8 * (1 + len(kinds))])
    axes = above.subplots(2, len(panels), squeeze=False)
    for column, name in zip(axes.T, panels):
        for number, (kind, members) in enumerate(kinds.items()):
            draw_kind(column, name, kind, members, f"C{number}")
        column[0].set_title(
            f"{name} ({'a proxy' if name in proxies else 'only watched'})", fontsize=10
        )
        column[0].set_xlabel("step")
        column[1].set_xlabel("sqrt(KL to the base policy)")
        for axis in column:
            axis.grid(alpha=0.3)
    handles = {
        label: handle
        for axis in axes[1]
        for handle, label in zip(*axis.get_legend_handles_labels())
    }
    above.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8)
    strips = [("before", sorted((read[0][0] / "samples").glob("step_*.png"))[0])]
    strips += [
        (f"after GRPO on {kind}", sorted((members[0][0] / "samples").glob("step_*.png"))[-1])
        for kind, members in kinds.items()
    ]
    for axis, (title, strip) in zip(below.subplots(len(strips), 1, squeeze=False)[:, 0], strips):
        axis.imshow(Image.open(strip))
        axis.set_title(title, fontsize=9, loc="left", pad=2)
        axis.axis("off")
    with atomic(path, "wb") as file:
        figure.savefig(file, format="png", dpi=90)
    plt.close(figure)


def draw_kind(column, name, kind, members, color):
    """One set of training rewards in the two panels of one measure."""
    by_step = defaultdict(list)
    for number, (_, tests, pool) in enumerate(members):
        known = [t for t in tests if name in t]
        for t in known:
            by_step[t["step"]].append(t[name])
        label = f"GRPO on {kind}" if number == 0 else None
        points = [(math.sqrt(max(0.0, t["kl"])), t[name]) for t in known]
        if points:
            column[1].plot(*zip(*points), "o-", color=color, markersize=3, linewidth=1, label=label)
    if by_step:
        center, width = np.array([interval(values) for _, values in sorted(by_step.items())]).T
        column[0].plot(sorted(by_step), center, "o-", color=color, markersize=3)
        column[0].fill_between(
            sorted(by_step), center - width, center + width, color=color, alpha=0.15
        )
    pool = members[0][2]
    if pool and (name in pool[0] or name == "artifact-free"):
        ns = [2**i for i in range(10) if 2**i <= max(r["sample"] for r in pool) + 1]
        chosen = [
            best_of_n(pool, n, artifact_free if name == "artifact-free" else lambda r: r[name])
            for n in ns
        ]
        column[1].plot(
            [math.sqrt(math.log(n) - (n - 1) / n) for n in ns],
            chosen,
            "s--",
            color=color,
            alpha=0.6,
            markersize=3,
            label=f"best of n by {kind}, n to {ns[-1]}",
        )


# --- the page -----------------------------------------------------------------------------------


def report_page(run):
    """Write hacking.png, training.png and report.html of a run; returns the page's path."""
    run = Path(run)
    config, _, tests, _ = read_run(run)
    hacking_figure([run], run / "hacking.png")
    training_grid(run, run / "training.png")
    trained, parted = names_in(config, "rewards"), onset(run)
    said = (
        f"Reward and truth part company at step {parted}."
        if parted is not None
        else "No onset of hacking by the rule: gold did not fall from its highest value, or no reward rose meanwhile."
    )
    body = f"""<p><code>{html.escape(config["command"])}</code></p>
<p>Trained on {html.escape(", ".join(trained))}. Everything else was only watched. {said}</p>
<h2>Proxy and truth</h2>{report.picture(run / "hacking.png")}
<h2>The same prompts and noise through training</h2><div class="wide">{report.picture(run / "training.png")}</div>
<h2>Where the reward and the truth differ most, last test</h2>{report.table(worst_gaps(run, trained))}
<h2>One step of GRPO: groups, best first</h2>{groups_of_last_step(run, config)}
<h2>Who drives the policy</h2>{report.table(drivers(run))}
<h2>Test prompts, step by step</h2>{report.table(tests)}
"""
    with atomic(run / "report.html") as file:
        file.write(report.page(run.name, body))
    return run / "report.html"


def worst_gaps(run, trained, n=24):
    """The test pictures that the reward likes more than the truth does, in deviations: before and after."""
    records = read_jsonl(sorted((run / "tests").glob("step_*.jsonl"))[-1])
    before, after = (
        cut_sheet(run / "tests" / f"{name}.png", len(records)) for name in ("first", "last")
    )
    truth = "gold" if "gold" in records[0] else None

    def z(name):
        values = np.array([r[name] for r in records])
        return (values - np.nanmean(values)) / (np.nanstd(values) + 1e-9)

    gap = sum(z(name) for name in trained) - (len(trained) * z(truth) if truth else 0)
    order = [i for i in np.argsort(-gap) if math.isfinite(gap[i])][:n]
    return [
        {"before": before[i] or "", "after": after[i] or ""}
        | {
            name: value
            for name, value in records[i].items()
            if name not in ("id", "sample") and "/" not in name
        }
        for i in order
    ]


def groups_of_last_step(run, config, n=6):
    """A group, its rewards and its advantages in one picture are what GRPO is."""
    sheets = sorted((run / "rollouts").glob("step_*.png"))
    if not sheets:
        return "<p>none</p>"
    records, G = read_jsonl(sheets[-1].with_suffix(".jsonl")), config["flags"]["num_generations"]
    pictures, parts = cut_sheet(sheets[-1], len(records)), []
    for start in range(0, min(n * G, len(records)), G):
        ranked = sorted(range(start, start + G), key=lambda i: -records[i]["advantage"])
        shown = "".join(
            f"<td>{report.picture(pictures[i])}<br>reward {records[i]['total']:.2f}<br>"
            f"A {records[i]['advantage']:+.2f}<br><small>{html.escape(records[i]['thought'])}</small></td>"
            for i in ranked
        )
        parts.append(
            f"<p>{html.escape(records[start]['prompt'])}</p><div class='wide'><table><tr>{shown}</tr></table></div>"
        )
    return "\n".join(parts)
