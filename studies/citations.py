"""Tables for the README and docs/code.md: the files in reading order, and from paper to code.

A citation in a comment stands where the paper's idea is used, and the first line of a file says
what it is about. So these tables are computed from the code and cannot be out of date.

Run:   python -m studies.citations
       cog -r -I . README.md docs/*.md     write them into the documents

You should see:  four tables: the scripts, the folders, all files, the papers.

Read next: any row
"""

import ast
import json
import re
from collections import defaultdict

from evaluation.tables import markdown
from training.files import ROOT

SCRIPTS = "grpo generate rewards artifact_reward apo evaluate adversarial_reward".split()
FOLDERS = "training evaluation reward_models tiny_world studies".split()
# arXiv number -> title of every paper that the code cites
TITLES = json.loads((ROOT / "studies/papers.json").read_text(encoding="utf-8"))
LINES_PER_MINUTE = 20  # code that is read line by line, with its comments


def files_in(folder):
    return [path for path in sorted((ROOT / folder).glob("*.py")) if path.name != "__init__.py"]


def all_files():
    """Every file of the product: the scripts in reading order, then folder by folder."""
    scripts = [ROOT / f"{name}.py" for name in SCRIPTS]
    return scripts + [path for folder in FOLDERS for path in files_in(folder)]


def first_line(path):
    """The first paragraph of a file's docstring, on one line."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    return docstring.split("\n\n")[0].replace("\n", " ")


def row_of(path):
    minutes = round(len(path.read_text(encoding="utf-8").splitlines()) / LINES_PER_MINUTE)
    name = f"`{path.relative_to(ROOT).as_posix()}`"
    return {"file": name, "what": first_line(path), "minutes": max(1, minutes)}


def scripts_table():
    return markdown([row_of(path) for path in all_files()[: len(SCRIPTS)]])


def files_table():
    return markdown([row_of(path) for path in all_files()])


def folders_table():
    what = {folder: first_line(ROOT / folder / "__init__.py") for folder in FOLDERS}
    return markdown([{"folder": f"`{name}/`", "what": text} for name, text in what.items()])


def place(tree, line):
    """The innermost class or function around a line, as Class.function; "" outside of all."""
    for node in ast.iter_child_nodes(tree):
        is_definition = isinstance(node, (ast.FunctionDef, ast.ClassDef))
        if is_definition and node.lineno <= line <= node.end_lineno:
            inner = place(node, line)
            return f"{node.name}.{inner}" if inner else node.name
    return ""


def citations():
    """arXiv number -> the places that cite it, in the order of the files."""
    places = defaultdict(dict)  # dicts as ordered sets
    for path in all_files():
        text, file = path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
        tree = ast.parse(text)
        for number, line in enumerate(text.splitlines(), 1):
            for paper in re.findall(r"arXiv:(\d{4}\.\d{5})", line):
                places[paper][f"`{file}` {place(tree, number)}".strip()] = True
    return places


def papers_table():
    found = citations()
    order = sorted(found, key=list(TITLES).index)  # ValueError: papers.json lacks a title
    titles = {paper: f"{TITLES[paper]}, arXiv:{paper}" for paper in order}
    return markdown([{"paper": titles[p], "where": ", ".join(found[p])} for p in order])


def main():
    for table in (scripts_table, folders_table, files_table, papers_table):
        print(table() + "\n")


if __name__ == "__main__":
    main()
