"""The pages of studies/literate.py: no line of code is lost, and each link leads somewhere."""

import ast
import re

import pytest

from studies import literate
from studies.citations import all_files
from training.files import ROOT


def test_a_file_is_split_into_what_is_said_and_what_is_done(tmp_path):
    path = tmp_path / "demo.py"
    path.write_text(
        '"""Demo.\n\n    a = b\n\nRead next: grpo.py\n"""\n\nimport os\n\n# --- part two ---\n\n\n'
        '# about f\n@cache\ndef f(x):\n    """Says <this>."""\n    # why\n    return x\n\n\n'
        "Y = f(1)\n"
    )
    parts = literate.split(path)
    assert [heading for heading, _, _ in parts] == ["", "", "part two", "", ""]
    assert [code for _, _, code in parts[1:]] == [
        "import os",
        "",
        "# about f\n@cache\ndef f(x):\n    # why\n    return x",
        "Y = f(1)",
    ]
    assert "<pre>    a = b</pre>" in parts[0][1] and '<a href="grpo.html">' in parts[0][1]
    assert "<p>Says &lt;this&gt;.</p>" in parts[3][1]


def without_docstrings(path):
    """The lines of a file that are neither empty, nor a heading, nor of a docstring that is shown
    beside its code."""
    lines = path.read_text(encoding="utf-8").splitlines()
    tree = ast.parse("\n".join(lines))
    for node in [tree, *tree.body]:
        is_definition = isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef))
        if is_definition and ast.get_docstring(node) and len(node.body) > 1:
            first = node.body[0]
            lines[first.lineno - 1 : first.end_lineno] = [""] * (
                first.end_lineno - first.lineno + 1
            )
    return [line for line in lines if line.strip() and not re.match(r"# -+ .* -+$", line)]


@pytest.mark.parametrize("path", all_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_line_of_code_is_lost(path):
    shown = [line for _, _, code in literate.split(path) for line in code.splitlines()]
    assert [line for line in shown if line.strip()] == without_docstrings(path)


def test_every_link_leads_to_a_page(tmp_path):
    assert literate.write_pages(tmp_path) == len(all_files()) + 1
    pages = {path.name: path.read_text() for path in tmp_path.glob("*.html")}
    assert len(pages) == len(all_files()) + 1
    for text in pages.values():
        for target in re.findall(r'<(?:a|img) [^>]*?(?:href|src)="([^"]*)"', text):
            assert (tmp_path / target).is_file(), target
    assert pages["index.html"].count('<a href="training-') == len(
        list((ROOT / "training").glob("[a-z]*.py"))
    )
    assert 'Next: <a href="generate.html">' in pages["grpo.html"]
