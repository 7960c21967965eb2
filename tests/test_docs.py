"""The documents and the layout cannot be out of date: every command is understood, every link leads
somewhere, imports go one way, files and functions have a readable length."""

import ast
import importlib
import re
import shlex
import sys
import textwrap
from graphlib import TopologicalSorter

import pytest
import torch
import tyro
from cogapp import Cog
from PIL import Image

import grpo
import rewards
from studies import citations
from training.files import ROOT

DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = sorted(ROOT.glob("*.py"))
PRODUCT = SCRIPTS + sorted(
    path for folder in citations.FOLDERS for path in (ROOT / folder).glob("*.py")
)
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in PRODUCT}

# A module imports only from layers above it in this list, or from its own folder. As in the README.
LAYERS = [
    ["training"],
    ["evaluation"],
    ["reward_models"],
    ["generate"],
    ["tiny_world"],
    ["artifact_reward", "adversarial_reward"],
    ["rewards"],
    ["apo", "evaluate", "grpo"],
    ["studies"],
]
LAYER = {name: place for place, names in enumerate(LAYERS) for name in names}


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(tree):
    """The modules of this project that a file imports, anywhere in it: lazy imports count too."""
    found = set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {name for name in names if name.split(".")[0] in LAYER}
    return found


def uphill(name, tree):
    own = name.split(".")[0]
    others = {imported.split(".")[0] for imported in imports_of(tree)} - {own}
    return sorted(other for other in others if LAYER[other] >= LAYER[own])


# --- the layout ---------------------------------------------------------------------------------


def test_only_the_seven_scripts_lie_at_the_top():
    assert {path.stem for path in SCRIPTS} == set(citations.SCRIPTS) and len(SCRIPTS) == 7


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_one_way(name):
    assert uphill(name, tree_of(MODULES[name])) == []


def test_no_two_files_import_each_other():
    graph = {name: imports_of(tree_of(path)) & MODULES.keys() for name, path in MODULES.items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_an_import_that_goes_the_wrong_way_is_found():
    lazy = ast.parse("def f():\n    from rewards import load\n")
    assert uphill("training.files", lazy) == ["rewards"] and uphill("grpo", lazy) == []
    assert uphill("apo", ast.parse("import evaluate")) == ["evaluate"]


def test_what_is_imported_is_required():
    """But for what is of other environments: DeQA, whose repository's package is called src."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = {re.match(r"[\w-]*", line)[0] for line in lines} | {"PIL", "src", *LAYER}
    for path in set(PRODUCT) - {ROOT / "reward_models/deqa_server.py"}:
        for node in ast.walk(tree_of(path)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            missing = {name.split(".")[0] for name in names} - required - sys.stdlib_module_names
            assert not missing, path


def test_the_readme_states_the_order_of_the_imports():
    text = " ".join(DOCS[0].read_text().split())
    scripts = {"artifact_reward", "adversarial_reward", "rewards", "generate", *LAYERS[-2]}
    stated = " < ".join(
        ", ".join(f"`{name}.py`" if name in scripts else f"`{name}`" for name in layer)
        for layer in LAYERS
    )
    assert stated in text


def test_importing_a_file_does_no_work():
    for path in PRODUCT:
        for node in tree_of(path).body:
            assert not isinstance(node, (ast.For, ast.While, ast.With)), f"{path}:{node.lineno}"


# --- what can be read ---------------------------------------------------------------------------


def functions_of(tree):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_have_a_readable_length(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 450 and all(len(line) <= 100 for line in lines)
    for node in functions_of(tree_of(path)):
        assert node.end_lineno - node.lineno < 50, node.name


def test_the_seven_scripts_are_short_together():
    assert sum(len(path.read_text().splitlines()) for path in SCRIPTS) < 2600


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_says_what_it_is_how_to_run_it_and_what_to_see(path):
    header = ast.get_docstring(tree_of(path))
    for part in ("Run:", "You should see:", "Left out:", "Read next:"):
        assert part in header, part


def test_every_file_says_what_it_is():
    for path in PRODUCT:
        assert len(ast.get_docstring(tree_of(path)) or "") > 40, path


def test_the_readme_is_short():
    text = DOCS[0].read_text()
    assert len(text.splitlines()) <= 200
    assert all(f"docs/{path.name}" in text for path in DOCS[1:])


# --- commands -----------------------------------------------------------------------------------

STAND_INS = {
    "$seed": "1",
    "${g}": "cond",
    "$g": "cond",
    "RUN_A": "runs/a",
    "RUN_B": "runs/b",
    "FILE": "prompts/test.jsonl",
    "FOLDER": "outputs",
}
CONFIG_OF = {"studies.explain": grpo.Config}  # it takes the flags of grpo.py


def command_lines():
    """Lines of the documents, and of the headers of all files, that may hold commands."""
    for path in DOCS:
        yield from path.read_text().replace("\\\n", " ").splitlines()
    for path in PRODUCT:
        header = ast.get_docstring(tree_of(path)) or ""
        lines = header.replace("\\\n", " ").splitlines()
        yield from (line for line in lines if re.match(r"\s*(Run:)?\s*(python|torchrun) ", line))


def commands():
    """(module, arguments) of every `python X.py`, `python -m X.Y` and `torchrun ... grpo.py`."""
    found = set()
    pattern = r"(?:python|torchrun[^\n|`]*?) (?:-m ([a-z_]+\.[a-z_]+)|([a-z_]+)\.py)([^\n|`;#]*)"
    for line in command_lines():
        for module, script, arguments in re.findall(pattern, line):
            for stand_in, value in STAND_INS.items():
                arguments = arguments.replace(stand_in, value)
            # What follows many blanks explains the command.
            arguments = re.split(r"\s{3,}|, then|&&|\)", arguments)[0]
            try:
                found.add((module or script, tuple(shlex.split(arguments))))
            except ValueError:  # half of a sentence
                continue
    return sorted(found)


@pytest.mark.parametrize("name, arguments", commands(), ids=lambda part: str(part)[:80])
def test_every_command_of_the_documents_and_headers_is_understood(name, arguments):
    module = importlib.import_module(name)
    config = CONFIG_OF.get(name) or getattr(module, "Config", None)
    assert hasattr(module, "main")
    if config is None:
        assert not arguments  # a program without flags
    elif arguments != ("--help",):
        tyro.cli(config, args=list(arguments))


def test_there_are_commands_to_be_tested():
    found = commands()
    assert len(found) > 40
    runnable = set(citations.SCRIPTS) - {"adversarial_reward"}  # a reward only
    assert runnable <= {name for name, _ in found}
    studies = {f"studies.{name}" for name in ("contest", "bench", "explain", "exercises", "style")}
    assert studies <= {name for name, _ in found}


# --- links, tables, examples --------------------------------------------------------------------


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_every_local_link_leads_somewhere(path):
    text = path.read_text()
    links = [(path.parent, link) for link in re.findall(r"\]\(([^)#]+)\)", text)]
    folders = "|".join(["docs", "tests", "prompts", *citations.FOLDERS])
    links += [(ROOT, link) for link in re.findall(rf"`((?:{folders})/[\w/.-]+)`", text)]
    assert [link for base, link in links if "://" not in link and not (base / link).exists()] == []


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_what_a_command_can_print_stands_in_the_documents_as_it_prints_it(path):
    """`cog -r -I . README.md docs/*.md` corrects them."""
    assert Cog().main(["cog", "--check", "-I", str(ROOT), str(path)]) == 0


def test_the_readmes_example_of_a_reward_is_one(monkeypatch):
    code = re.search(r"(?ms)^    class Blue.*?^    REWARDS\[.*?$", DOCS[0].read_text()).group()
    monkeypatch.setattr(rewards, "REWARDS", dict(rewards.REWARDS))
    exec(textwrap.dedent(code), vars(rewards) | {"__name__": "rewards"})
    images = [Image.new("RGB", (8, 8), color) for color in ("blue", "white", "red")]
    scores = rewards.load("blue")(["a star"] * 3, images)
    assert scores.dtype == torch.float32 and scores.tolist() == [1.0, 0.0, -0.5]
    assert len(code.strip().splitlines()) <= 10


@pytest.mark.parametrize("script, files", [("artifact_reward", "images"), ("evaluate", "runs")])
def test_a_judges_address_does_not_swallow_the_files_behind_it(script, files):
    module = importlib.import_module(script)
    line = "--judge-url http://one:1/v1 --judge-url http://two:2/v1 a b"
    cfg = tyro.cli(module.Config, args=line.split())
    assert cfg.judge_url == ("http://one:1/v1", "http://two:2/v1")
    assert getattr(cfg, files) == ("a", "b")
