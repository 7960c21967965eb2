"""Each of the faults in faults.py has tests, and nothing that is read is executed."""

import ast
import pickle

import pytest
import torch
from faults import FAULTS

from training.files import ROOT
from training.weights import read_weights

PRODUCT = [p for p in ROOT.rglob("*.py") if not {"tests", ".ci"} & set(p.relative_to(ROOT).parts)]
BUILT_IN = {"eval", "exec", "compile", "__import__"}
OTHERS = {("os", "fork"), ("os", "system"), ("os", "popen"), ("", "ProcessPoolExecutor")}


def test_every_fault_has_tests_that_exist():
    names = set()
    for path in ROOT.glob("tests/test_*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names |= {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert list(FAULTS) == list(range(1, 40))
    for fault, tests in FAULTS.values():
        for test in tests:
            assert any(name.startswith(test) for name in names), (fault, test)


def calls_of(path):
    """(object, function, keyword arguments) of every call in a file, as they are written."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            plain = isinstance(node.func, ast.Name)
            owner = "" if plain else ast.unparse(getattr(node.func, "value", node.func))
            name = node.func.id if plain else getattr(node.func, "attr", "")
            yield owner, name, {k.arg: ast.unparse(k.value) for k in node.keywords}


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_is_read_is_executed(path):
    """No eval, no shell, no fork, no code that comes with a model, no pickle but of tensors."""
    for owner, name, options in calls_of(path):
        assert owner or name not in BUILT_IN
        assert (owner, name) not in OTHERS and owner not in ("pickle", "multiprocessing")
        assert "trust_remote_code" not in options and "shell" not in options
        if (owner, name) == ("torch", "load"):
            assert options["weights_only"] == "True"


def test_a_checkpoint_that_executes_code_is_refused(tmp_path, capsys):
    target = tmp_path / "made"
    bomb = type("Bomb", (), {"__reduce__": lambda self: (open, (str(target), "w"))})
    torch.save({"weight": bomb()}, tmp_path / "bomb.pt", pickle_module=pickle)
    with pytest.raises(SystemExit, match="2"):
        read_weights(tmp_path / "bomb.pt")
    assert not target.exists() and "cannot be loaded" in capsys.readouterr().err


def test_no_table_is_written_for_a_spreadsheet():
    """Tables are Markdown, HTML and JSON: none of these computes a cell that begins with "="."""
    for path in PRODUCT:
        for owner, name, _ in calls_of(path):
            assert (owner, name) not in (("csv", "writer"), ("csv", "DictWriter")), path
            assert name not in ("to_csv", "to_excel"), path
