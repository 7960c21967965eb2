"""The code as a book: a page for each file, what is said at the left, how it is done at the right.

What is said is in the files already: the docstring of a file, then those of its functions and
classes. This script puts each beside its code, and links the files in reading order.

Run:   python -m studies.literate                  then open site/index.html

You should see:  the number of pages. Each opens from disk, and loads nothing else. (To show
them to others: `python -m http.server -d site`.)

Read next: citations.py
"""

import ast
import functools
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import tyro
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from studies.citations import FOLDERS, SCRIPTS, all_files, files_in, first_line
from training.files import ROOT, atomic

FIGURES = ("hacking.png", "group.png", "contest.png")
ENVIRONMENT = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)


@dataclass
class Config:
    output_dir: str = "site"  # the pages go here


def page_name(path):
    """training/log.py -> training-log.html."""
    return path.relative_to(ROOT).as_posix().replace("/", "-").replace(".py", ".html")


@functools.cache
def places_near(folder):
    """Name of a file, as a docstring in this folder may write it -> the file."""
    files = all_files()
    places = {other.relative_to(ROOT).as_posix(): other for other in files}
    near = sorted(files, key=lambda other: other.parent == folder)  # of two, that of the folder
    return places | {other.name: other for other in near}


def links(text, path):
    """The text, escaped; names of our other files become links, `words` in backquotes code."""
    places = places_near(path.parent)

    def link(match):
        other = places.get(match[0])
        if other is None or other == path:
            return match[0]
        return f'<a href="{page_name(other)}">{match[0]}</a>'

    linked = re.sub(r"[\w/]+\.py\b", link, str(escape(text)))
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", linked))


def prose(docstring, path):
    """A docstring as HTML: a paragraph with an indented line keeps its lines, as a formula does."""
    html = Markup()
    for paragraph in (docstring or "").split("\n\n"):
        keeps = re.search(r"^ {2,}\S|^\w+:  ", paragraph, re.MULTILINE)
        shape = Markup("<pre>{}</pre>\n" if keeps else "<p>{}</p>\n")
        html += shape.format(links(paragraph, path)) if paragraph.strip() else ""
    return html


def split(path):
    """[(heading or "", prose, code)] of a file, in order. Code between two definitions is one part;
    a comment above a definition belongs to it."""
    source = path.read_text(encoding="utf-8")
    lines, tree = source.splitlines(), ast.parse(source)
    said, body = ast.get_docstring(tree), list(tree.body)
    at = body.pop(0).end_lineno if said else 0
    parts = [("", prose(said, path), "")] if said else []
    for node in [n for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]:
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
        while first > at and lines[first - 1].startswith("#") and "---" not in lines[first - 1]:
            first -= 1
        parts += between(lines[at:first])
        docstring, start = ast.get_docstring(node), node.body[0]
        kept = lines[first : node.end_lineno]
        if docstring and len(node.body) > 1:
            kept = lines[first : start.lineno - 1] + lines[start.end_lineno : node.end_lineno]
        parts.append(("", prose(docstring, path), "\n".join(kept)))
        at = node.end_lineno
    return parts + between(lines[at:])


def between(lines):
    """The parts of what stands between two definitions: headings, and code without prose."""
    parts, code = [], []
    for line in [*lines, "# --- end ---"]:
        heading = re.match(r"# -+ (.*?) -+$", line)
        if not heading:
            code.append(line)
            continue
        if "\n".join(code).strip():
            parts.append(("", "", "\n".join(code).strip("\n")))
        code = []
        if heading[1] != "end":
            parts.append((heading[1], "", ""))
    return parts


def write_pages(folder):
    """All pages, an index, and the figures; returns how many pages."""
    files, template = all_files(), ENVIRONMENT.get_template("literate.html.j2")
    look = HtmlFormatter(cssclass="code", style="friendly")
    dark = HtmlFormatter(cssclass="code", style="github-dark")
    styles = Markup(look.get_style_defs(".code"))
    styles += Markup("@media (prefers-color-scheme: dark) {{ {} }}").format(
        Markup(dark.get_style_defs(".code"))
    )
    for path, after in zip(files, [*files[1:], None]):
        parts = [
            (heading, said, Markup(highlight(code, PythonLexer(), look)) if code else "")
            for heading, said, code in split(path)
        ]
        title, following = path.relative_to(ROOT).as_posix(), after and page_name(after)
        with atomic(folder / page_name(path)) as file:
            file.write(template.render(title=title, parts=parts, after=following, styles=styles))
    chapters = {"The method, in reading order": [ROOT / f"{name}.py" for name in SCRIPTS]}
    chapters |= {first_line(ROOT / name / "__init__.py"): files_in(name) for name in FOLDERS}
    chapters = {
        title: [(page_name(p), p.relative_to(ROOT).as_posix(), first_line(p)) for p in paths]
        for title, paths in chapters.items()
    }
    figures = [name for name in FIGURES if (ROOT / "docs" / name).is_file()]
    for name in figures:
        shutil.copyfile(ROOT / "docs" / name, folder / name)
    with atomic(folder / "index.html") as file:
        title = "Why do the pictures go wrong?"
        file.write(template.render(title=title, chapters=chapters, figures=figures, styles=styles))
    return len(files) + 1


def main(cfg):
    folder = Path(cfg.output_dir)
    print(f"{write_pages(folder)} pages: {folder / 'index.html'}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
