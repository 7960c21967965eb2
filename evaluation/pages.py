"""HTML pages that open anywhere: one file, with its pictures inside.

A page loads nothing. Every text in it is escaped, because a prompt or a thought can contain HTML.
Its Content-Security-Policy allows one script, the one that sorts tables, by its SHA-256.

The functions return `Markup`: a string that is HTML already and is not escaped again. Adding a
plain string to Markup escapes the plain string, on either side.

Read next: hacking.py
"""

import base64
import difflib
import hashlib
import io
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from PIL import Image

LOADER = FileSystemLoader(Path(__file__).parent)
ENVIRONMENT = Environment(loader=LOADER, autoescape=True, trim_blocks=True, lstrip_blocks=True)
ENVIRONMENT.filters["sha256"] = lambda text: base64_text(hashlib.sha256(text.encode()).digest())


def base64_text(data):
    return base64.b64encode(data).decode()


def macros():
    """The macros of page.html.j2, as functions that return Markup."""
    return ENVIRONMENT.get_template("page.html.j2").module


def page(title, body):
    """A whole page. title: text. body: HTML, Markup or a string."""
    return macros().page(title, Markup(body))


def table(rows):
    """Dicts with the same keys -> a table; a click on a column's head sorts it.

    Values: text, numbers, PIL images, Markup."""

    def shown(row, name):
        is_picture = isinstance(row[name], Image.Image)
        return picture(row[name], f"{row.get('prompt', '')} {name}") if is_picture else row[name]

    return macros().table([{name: shown(row, name) for name in row} for row in rows])


def sections(contents):
    """Dict heading -> HTML (Markup) or the rows of a table: all of them, one below the other."""
    html = Markup()
    for heading, content in contents.items():
        content = content if isinstance(content, Markup) else table(content)
        html += Markup("<h2>{}</h2>{}\n").format(heading, content)
    return html


def picture(source, alt=""):
    """A PIL image, or the path of a PNG, as an <img> with a data URL. alt: what it shows [the
    file's name]."""
    if isinstance(source, Image.Image):
        buffer = io.BytesIO()
        source.save(buffer, "PNG")
        data = buffer.getvalue()
    else:
        data, alt = Path(source).read_bytes(), alt or Path(source).name
    image = Markup('<img src="data:image/png;base64,{}" alt="{}">')
    return image.format(base64_text(data), alt.strip())


def svg(figure):
    """A matplotlib figure as a drawing inside the page, without background, in the page's colour of
    text."""
    import matplotlib.pyplot as plt

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :].replace("#767676", "currentColor")
    return scrolling(Markup(drawing))


def scrolling(content):
    """Something wide, at least 700 pixels: on a narrower screen it scrolls."""
    return Markup('<div class="wide figure">{}</div>').format(content)


def word_diff(before, after):
    """Two texts -> Markup that shows, word by word, what was deleted and what was inserted."""
    a, b, parts = before.split(), after.split(), []
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
    for operation, i, j, k, m in matcher.get_opcodes():
        deleted, inserted = " ".join(a[i:j]), " ".join(b[k:m])
        if operation == "equal":
            parts.append(deleted)
        else:
            parts += [Markup("<del>{}</del>").format(deleted)] if deleted else []
            parts += [Markup("<ins>{}</ins>").format(inserted)] if inserted else []
    return Markup(" ").join(parts)
