"""Numbers with intervals, and tables in Markdown.

A mean without an interval is an anecdote. Over seeds we give Student's t; over prompts, the
bootstrap: draw as many prompts as there are, with replacement, hundreds of times, and see how far
the number moves. Pictures of one prompt resemble each other, so prompts are drawn, not pictures.

Read next: hacking.py
"""

import math
import warnings

import numpy as np

T_95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}  # Student's t, by n


def t_95(n):
    """Student's t of n values, for the 95 % interval; between the known ones a little too large.

    >>> t_95(5), t_95(20), t_95(200)
    (2.776, 2.31, 1.985)"""
    return T_95.get(n, 2.31 if n < 30 else 2.05 if n < 100 else 1.985)


def interval(values):
    """Mean of n values and half the width of its 95 % interval (Student's t; NaN for n = 1).

    >>> interval([1.0, 2.0, 3.0])[0], round(interval([1.0, 2.0, 3.0])[1], 2)
    (2.0, 2.48)"""
    n = len(values)
    if n < 2:
        return (values[0] if values else math.nan), math.nan
    center = sum(values) / n
    variance = sum((value - center) ** 2 for value in values) / (n - 1)
    return center, t_95(n) * math.sqrt(variance / n)


def bootstrap(statistic, groups, draws=1000, seed=0):
    """95 % percentile interval of statistic(indices) when whole groups are drawn with replacement;
    NaN for one group alone.

    groups: the group of each of N items, such as its prompt. statistic: returns a number or a list
    of numbers. Returns (low, high), each of the statistic's shape."""
    members = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    members = [np.array(indices) for indices in members.values()]
    rng, values = np.random.default_rng(seed), []
    for _ in range(draws):
        drawn = rng.integers(len(members), size=len(members))
        values.append(statistic(np.concatenate([members[i] for i in drawn])))
    with warnings.catch_warnings(action="ignore"):  # of a statistic that is always NaN
        low, high = np.nanpercentile(values, [2.5, 97.5], axis=0)
    if len(members) < 2:  # always the same group: the width would be 0, and is unknown
        low, high = np.full_like(low, math.nan), np.full_like(high, math.nan)
    return low.tolist(), high.tolist()


def markdown(rows):
    """Dicts with the same keys -> the text of a Markdown table; floats with three digits."""
    if not rows:
        return ""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    for row in rows:
        cells = [f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
