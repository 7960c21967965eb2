"""docs/hacking.ipynb is made from studies/hacking_notebook.md by jupytext (docs/code.md has the
command), and its cells run: here in a short form."""

import re
import subprocess
import sys
import types
from pathlib import Path

import jupytext
import nbformat

from training.files import ROOT

SOURCE = jupytext.read(ROOT / "studies/hacking_notebook.md").cells


def test_the_notebook_is_that_of_its_source():
    made = nbformat.read(ROOT / "docs/hacking.ipynb", as_version=4)
    nbformat.validate(made)
    contents = [(cell.cell_type, cell.source) for cell in made.cells]
    assert contents == [(cell.cell_type, cell.source) for cell in SOURCE]
    assert [kind for kind, _ in contents].count("code") >= 5
    assert not any("def " in text for _, text in contents)  # no copy of what the scripts hold
    assert made.metadata.kernelspec.name == "python3"


def shell(command):
    """A command of the notebook, with this Python in the place of `python`; pip has run before."""
    program, *words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', command)]
    if program == "python":
        done = subprocess.run([sys.executable, *words], cwd=ROOT)
        assert done.returncode in ((0, 4) if "--audit" in words else (0,)), command


def test_the_cells_run(tmp_path, monkeypatch):
    shown, pictures = types.ModuleType("IPython.display"), []
    shown.Image = lambda path, **options: path
    shown.display = pictures.append
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", shown)
    monkeypatch.setenv("STEPS", "1")
    monkeypatch.setenv("PICTURES", "4")
    monkeypatch.chdir(ROOT / "docs")  # where it is opened; it goes to the root itself
    space = {"shell": shell}
    for cell in SOURCE:
        text = cell.source.replace("runs/notebook-", f"{tmp_path}/")
        code = re.sub(r"^(\s*)!(.*)$", r"\1shell(f'''\2''')", text, flags=re.MULTILINE)
        if cell.cell_type == "code":
            exec(code, space)
    assert len(pictures) >= 5 and all(Path(path).stat().st_size > 0 for path in pictures)
