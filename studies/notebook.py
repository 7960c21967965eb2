"""docs/hacking.ipynb, made from studies/hacking_notebook.md: hack, look, cure, look.

The text is Markdown; what stands between ```python and ``` becomes a cell of code. A line of code
that begins with "!" is a command, as in every notebook. The notebook runs the scripts and holds no
code of theirs; it is stored without results.

Run:   python -m studies.notebook

You should see:  the name of the file. tests/test_notebook.py runs its cells in a short form.

Read next: literate.py
"""

import hashlib
import json
import re

from training.files import ROOT, atomic

SOURCE, TARGET = ROOT / "studies/hacking_notebook.md", ROOT / "docs/hacking.ipynb"


def cells(text):
    """[("markdown" or "code", text)] in order."""
    parts = re.split(r"^```(?:python)?\n", text, flags=re.MULTILINE)
    kinds = ["markdown" if i % 2 == 0 else "code" for i in range(len(parts))]
    return [(kind, part.strip()) for kind, part in zip(kinds, parts) if part.strip()]


def notebook(text):
    """The notebook as JSON, format 4.5. Each cell is named by its contents."""
    made = []
    for kind, part in cells(text):
        name = hashlib.sha256(part.encode()).hexdigest()[:8]
        cell = {"cell_type": kind, "id": name, "metadata": {}, "source": part.splitlines(True)}
        made.append(cell | ({"execution_count": None, "outputs": []} if kind == "code" else {}))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    about = {"kernelspec": kernel, "language_info": {"name": "python"}}
    whole = {"cells": made, "metadata": about, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def main():
    with atomic(TARGET) as file:
        file.write(notebook(SOURCE.read_text(encoding="utf-8")))
    print(TARGET.relative_to(ROOT))


if __name__ == "__main__":
    main()
