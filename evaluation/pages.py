"""Numbers that can be believed, and pages that open anywhere: what every script reports with.

A mean without an interval is an anecdote. Over seeds we give Student's t; over prompts, the bootstrap:
draw as many prompts as there are, with replacement, a thousand times, and see how far the number moves.
Pictures of one prompt resemble each other, so prompts are drawn, not pictures.

A page is one HTML file with its pictures inside. It loads nothing, every text in it is escaped (prompts
and a model's thoughts are anybody's), and its policy lets no script run but the one that sorts tables.

Read next: evaluate.py
"""

import base64
import difflib
import hashlib
import html
import io
import math
from pathlib import Path

import numpy as np
from PIL import Image

# --- numbers ------------------------------------------------------------------------------------


def mean(values):
    """Of the finite ones: a score that failed is NaN and belongs to no mean."""
    known = [v for v in values if math.isfinite(v)]
    return sum(known) / len(known) if known else math.nan


def interval(values):
    """Mean and half width of its 95 % interval over seeds (Student's t).

    >>> interval([1.0, 2.0, 3.0])[0], round(interval([1.0, 2.0, 3.0])[1], 2)
    (2.0, 2.48)"""
    n, center = len(values), sum(values) / len(values)
    if n < 2:
        return center, math.nan
    t = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}.get(n, 2.3)
    return center, t * math.sqrt(sum((v - center) ** 2 for v in values) / (n - 1) / n)


def bootstrap(statistic, groups, draws=1000, seed=0):
    """95 % percentile interval of statistic(indices), when whole groups are drawn with replacement.

    groups: the group of each of N items, such as its prompt. statistic: a number or a list of numbers.
    Returns (low, high), each of the statistic's shape."""
    members = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    members = [np.array(indices) for indices in members.values()]
    rng, values = np.random.default_rng(seed), []
    for _ in range(draws):
        drawn = rng.integers(len(members), size=len(members))
        values.append(statistic(np.concatenate([members[i] for i in drawn])))
    return tuple(np.nanpercentile(values, [2.5, 97.5], axis=0).tolist())


# --- pages --------------------------------------------------------------------------------------

STYLE = """:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em }
img { max-width: 100%; background: white } td img { min-width: 64px; image-rendering: pixelated }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .2em .7em; border-bottom: 1px solid #8886; text-align: left; vertical-align: top }
th { cursor: pointer } .long { min-width: 14em } .wide { overflow-x: auto } ins { background: #2a46; text-decoration: none }
del { background: #c336 } code { overflow-wrap: anywhere }"""

SORT = """for (const head of document.querySelectorAll("th")) head.onclick = () => {
  const body = head.closest("table").tBodies[0], at = head.cellIndex, up = head.dataset.up = -(head.dataset.up || 1)
  const key = row => row.cells[at].dataset.value ?? row.cells[at].textContent
  const order = (a, b) => isNaN(key(a)) || isNaN(key(b)) ? key(a).localeCompare(key(b)) : key(a) - key(b)
  body.append(...[...body.rows].sort((a, b) => up * order(a, b)))
}"""


def picture(source):
    """A picture (PIL image, or the path of a PNG) as part of the page itself."""
    if isinstance(source, Image.Image):
        buffer = io.BytesIO()
        source.save(buffer, "PNG")
        data, name = buffer.getvalue(), ""
    else:
        data, name = Path(source).read_bytes(), Path(source).name
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    return f'<img src="{url}" alt="{html.escape(name)}">'


def cell(value):
    if isinstance(value, Image.Image):
        return f"<td>{picture(value)}</td>"
    if isinstance(value, float):
        return f'<td data-value="{value}">{value:.3f}</td>'
    return f'<td class="{"long" if len(str(value)) > 24 else ""}">{html.escape(str(value))}</td>'


def table(rows):
    """Dicts with the same keys -> a table that a click on its head sorts. Values: text, numbers, pictures."""
    if not rows:
        return "<p>none</p>"
    head = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0])
    body = "".join("<tr>" + "".join(map(cell, row.values())) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def markdown(rows):
    """The same dicts as the lines of a Markdown table."""
    if not rows:
        return []
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    shown = [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    return lines + ["| " + " | ".join(values) + " |" for values in shown]


def word_diff(before, after):
    """What became of a text, word by word."""
    a, b, parts = before.split(), after.split(), []
    for what, i, j, k, m in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if what == "equal":
            parts.append(html.escape(" ".join(a[i:j])))
        else:
            parts += [f"<del>{html.escape(' '.join(a[i:j]))}</del>"] if j > i else []
            parts += [f"<ins>{html.escape(' '.join(b[k:m]))}</ins>"] if m > k else []
    return " ".join(parts)


def page(title, body):
    """A whole page around a body that is HTML already."""
    script = base64.b64encode(hashlib.sha256(SORT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{script}'"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<style>{STYLE}</style>\n'
        f"<h1>{html.escape(title)}</h1>\n{body}\n<script>{SORT}</script></html>\n"
    )
