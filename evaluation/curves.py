"""Curves of runs: proxy and truth against the step and against the distance from the base policy.

The headline panel has the training reward and gold, each as its change in standard deviations
within a prompt. The reward is hacked where it rises while gold falls. What also happens in the grey
curves, those of the control, is drift.

Read next: figures.py
"""

import math
from collections import defaultdict

import numpy as np

from evaluation import hacking
from evaluation.hacking import names_in
from evaluation.tables import interval
from training.records import mean

INK = "#767676"  # of text and axes
CONTROL, HACK, CURE = "#888888", "#D55E00", "#0072B2"  # told apart by colour-blind readers, too
OTHERS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def colors_of(groups):
    """Title of a group of runs -> colour: grey for the control, blue with a judge, orange without.
    Of a second group of a kind: another one."""
    colors, others = {}, iter(OTHERS * len(groups))
    for title, members in groups.items():
        judged = "artifact" in names_in(members[0][1].config, "rewards")
        color = CONTROL if is_control(members) else CURE if judged else HACK
        colors[title] = next(others) if color in colors.values() else color
    return colors


def is_control(members):
    return hacking.is_control(members[0][0])


def means_over_seeds(members, name, change=False):
    """(steps, sqrt(KL), mean, half width of the 95 % interval over seeds) of one measure, or of its
    change since the first test; a row for each test that all seeds have."""
    by_step = defaultdict(list)
    for _, records in members:
        for test in records.tests:
            if name in test:
                value = test[name] - (records.tests[0][name] if change else 0)
                by_step[test["step"]].append((math.sqrt(max(0.0, test["kl"])), value))
    rows = [
        (step, mean(kl for kl, _ in pairs), *interval([value for _, value in pairs]))
        for step, pairs in sorted(by_step.items())
        if len(pairs) == len(members)
    ]
    return np.array(rows).reshape(-1, 4).T


def deviation(members, name):
    """The standard deviation of a measure among the base policy's pictures of one prompt, in the
    first test; NaN if it has one picture of each."""
    stds = []
    for run, records in members:
        first = hacking.read_test(run, "first")
        if name in records.tests[0]:
            stds.append(hacking.within_prompt_std(first, name))
    return mean(stds)


def draw_headline(axis, groups, colors):
    """Proxy and truth in one panel: change since the first test, in standard deviations within a
    prompt. A solid line for the proxy, a dashed one for gold."""
    configs = [members[0][1].config for members in groups.values() if not is_control(members)]
    proxy = next((name for name in map(hacking.proxy_of, configs) if name), "noise")
    for trained, members in groups.items():
        for name, style in ((proxy, "-"), ("gold", "--")):
            steps, _, center, width = means_over_seeds(members, name, change=True)
            unit = deviation(members, name)
            if not len(steps) or not unit > 0:
                continue
            line = dict(color=colors[trained], linestyle=style, linewidth=2)
            label = f"{name}, trained on {trained}"
            axis.plot(steps, center / unit, label=label, **line)
            low, high = (center - width) / unit, (center + width) / unit
            axis.fill_between(steps, low, high, color=colors[trained], alpha=0.15, linewidth=0)
        found = [step for step in (hacking.onset(run) for run, _ in members) if step is not None]
        if found:
            axis.axvline(mean(found), color=colors[trained], linestyle=":", linewidth=1.5)
            place = dict(transform=axis.get_xaxis_transform(), va="top", fontsize=9)  # y: 0 to 1
            axis.text(mean(found), 0.98, " onset", color=colors[trained], **place)
    axis.axhline(0, color=INK, linewidth=0.8)
    title = "proxy (solid) and truth (dashed), change in standard deviations within a prompt"
    axis.set_title(title, fontsize=11, loc="left")
    axis.set_xlabel("step")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def draw_measure(by_step, by_kl, name, groups, colors):
    """One measure against the step and against the distance from the base policy."""
    for trained, members in groups.items():
        steps, distance, center, width = means_over_seeds(members, name)
        style = dict(color=colors[trained], markersize=3)
        by_step.plot(steps, center, "o-", **style)
        band = dict(color=colors[trained], alpha=0.15, linewidth=0)
        by_step.fill_between(steps, center - width, center + width, **band)
        by_kl.plot(distance, center, "o-", **style)
        pool = members[0][1].pool
        needed = "gold-clean" if name == "artifact-free" else name
        if pool and not is_control(members) and needed in pool[0]:
            largest = max(record["sample"] for record in pool) + 1
            ns = [2**i for i in range(10) if 2**i <= largest]
            distance = [math.sqrt(math.log(n) - (n - 1) / n) for n in ns]
            chosen = [hacking.best_of_n(pool, n, hacking.score_of(name)) for n in ns]
            by_kl.plot(distance, chosen, "s:", color=colors[trained], markersize=4, alpha=0.7)
    # At least this range around the start, so that noise does not look like a change, and two runs
    # can be compared by eye.
    lows, highs = zip(by_step.get_ylim(), by_kl.get_ylim())
    low, high = min(lows), max(highs)
    lines = [line.get_ydata() for line in by_step.get_lines() if len(line.get_ydata())]
    start = mean(float(line[0]) for line in lines)
    if math.isfinite(start) and abs(start) <= 1:
        low, high = min(low, start - 0.2), max(high, start + 0.2)
    for axis in (by_step, by_kl):
        axis.set_ylim(low, high)
        axis.grid(alpha=0.3)


def hacking_curves(runs):
    """A matplotlib figure: the headline panel, and below it a column for each reward, against the
    step and against sqrt(KL), with best-of-n of the base policy (dotted, up to n = --best-of)."""
    plt = pyplot()
    groups = hacking.runs_by_rewards(runs)
    colors = colors_of(groups)
    configs = [records.config for members in groups.values() for _, records in members]
    proxies = dict.fromkeys(name for c in configs for name in names_in(c, "rewards"))
    proxies.pop("noise", None)
    heldout = dict.fromkeys(n for c in configs for n in names_in(c, "eval_rewards"))
    names = [*proxies, *(name for name in heldout if name not in proxies)]
    names = ["artifact-free" if name == "gold-clean" else name for name in names] or ["noise"]
    figure = plt.figure(figsize=(2.4 * max(4, len(names)), 8), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[3, 4.6])
    draw_headline(above.subplots(), groups, colors)
    axes = below.subplots(2, len(names), squeeze=False)
    for (by_step, by_kl), name in zip(axes.T, names):
        draw_measure(by_step, by_kl, name, groups, colors)
        by_step.set_title(name if name in proxies else f"{name} (held out)", fontsize=10)
        by_step.set_xlabel("step", fontsize=9)
        by_kl.set_xlabel("sqrt(KL)", fontsize=9)
    return figure


def training_curves(records):
    """A matplotlib figure of metrics.jsonl: what happened in each training step."""
    plt = pyplot()
    first = records.steps[0] if records.steps else {}
    names = [name for name in first if name.startswith("reward/") and name.count("/") == 1]
    panels = {"training rewards": names, "gradient norm": ["grad_norm"], "KL of a rollout": ["kl"]}
    panels |= {"diversity in a group": ["diversity"], "unanimous groups": ["unanimous_groups"]}
    panels["seconds"] = [name for name in first if name.startswith("seconds/")]
    figure, axes = plt.subplots(2, 3, figsize=(10, 5), layout="constrained")
    steps = [line["step"] for line in records.steps]
    for axis, (title, names) in zip(axes.flat, panels.items()):
        for name, color in zip(names, (CURE, HACK, *OTHERS)):
            values = [line.get(name, math.nan) for line in records.steps]
            axis.plot(steps, values, color=color, label=name.split("/")[-1])
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize=8, frameon=False)
    return figure


def pyplot():
    """matplotlib without a screen. All text and lines have one grey, which an SVG in a page
    replaces by the colour of the page's text, dark or light."""
    import matplotlib

    matplotlib.use("Agg")
    for name in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"):
        matplotlib.rcParams[name] = INK
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
    import matplotlib.pyplot as plt

    return plt
