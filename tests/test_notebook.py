"""docs/hacking.ipynb is made from its source, and its cells run: here in a short form."""

import json
import re
import subprocess
import sys
import types
from pathlib import Path

from studies import notebook
from training.files import ROOT

TEXT = notebook.SOURCE.read_text(encoding="utf-8")


def test_the_notebook_is_that_of_its_source():
    assert notebook.TARGET.read_text(encoding="utf-8") == notebook.notebook(TEXT)
    made = json.loads(notebook.notebook(TEXT))
    assert (made["nbformat"], made["nbformat_minor"]) == (4, 5)
    kinds = [cell["cell_type"] for cell in made["cells"]]
    assert kinds[:3] == ["markdown", "code", "markdown"] and kinds.count("code") >= 5
    names = [cell["id"] for cell in made["cells"]]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"[\w-]{1,64}", n) for n in names)
    lines = "".join("".join(cell["source"]) for cell in made["cells"])
    assert "def " not in lines  # no copy of what the scripts hold


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
    for kind, part in notebook.cells(TEXT.replace("runs/notebook-", f"{tmp_path}/")):
        code = re.sub(r"^(\s*)!(.*)$", r"\1shell(f'''\2''')", part, flags=re.MULTILINE)
        if kind == "code":
            exec(code, space)
    assert len(pictures) >= 5 and all(Path(path).stat().st_size > 0 for path in pictures)
