"""The README cannot lie about the files: every script is in its map, every command in it is one, every link leads
somewhere, and files and functions are as long as they are allowed to be."""

import ast
import importlib
import re
import shlex
import textwrap
from pathlib import Path

import pytest
import torch
import tyro
from cogapp import Cog
from PIL import Image

import rewards
from studies import citations

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SCRIPTS = sorted(path for path in ROOT.glob("*.py"))
STAND_INS = {
    "$seed": "1",
    "$r": "hps",
    "$g": "cond",
    "RUN_A": "runs/a",
    "RUN_B": "runs/b",
    "FILE": "prompts/test.jsonl",
    "FOLDER": "outputs",
}


def commands():
    """(script, arguments) of every `python X.py ...` and `torchrun ... grpo.py ...` in the README and in the headers."""
    text = README.replace("\\\n", " ")
    for script in SCRIPTS:
        text += "\n" + "\n".join(
            line
            for line in ast.get_docstring(ast.parse(script.read_text())).splitlines()
            if re.match(r"\s*(Run:)?\s*(python|torchrun) ", line)
        )
    found = []
    for line in re.findall(r"(?:python|torchrun[^\n|`]*?) ([a-z_]+\.py(?:[^\n|`;#]*))", text):
        for stand_in, value in STAND_INS.items():
            line = line.replace(stand_in, value)
        line = re.split(r"\s{3,}|, then|&&|\)", line)[
            0
        ]  # what follows many blanks is an explanation
        try:
            script, *arguments = shlex.split(line)
        except ValueError:  # half of a sentence
            continue
        found.append((script, tuple(arguments)))
    return sorted(set(found))


@pytest.mark.parametrize(
    "script, arguments",
    commands(),
    ids=lambda part: " ".join(part) if isinstance(part, tuple) else part,
)
def test_every_command_of_the_readme_and_the_headers_is_understood(script, arguments):
    module = importlib.import_module(script.removesuffix(".py"))
    kind = (
        importlib.import_module("tiny_train").Config
        if script == "tiny.py"
        else getattr(module, "Config", None)
    )
    if kind is None:
        assert not arguments  # a script without flags
    elif arguments != ("--help",):
        tyro.cli(kind, args=list(arguments))


def test_there_are_commands_to_be_tested():
    assert len(commands()) > 25 and {"grpo.py", "evaluate.py", "apo.py", "contest.py"} <= {
        script for script, _ in commands()
    }


def test_every_script_is_in_the_map():
    assert [path.name for path in SCRIPTS if f"`{path.name}`" not in README] == []


def test_every_local_link_leads_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README) + re.findall(
        r"`((?:docs|tests|prompts|tiny|servers)/[\w/.-]+)`", README
    )
    assert [
        link for link in links if not link.startswith("http") and not (ROOT / link).exists()
    ] == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_file_says_what_it_is_and_where_to_go_next_and_is_no_book(script):
    text = script.read_text()
    header = ast.get_docstring(ast.parse(text))
    assert "Read next:" in header and len(header.splitlines()) >= 5
    assert len(text.splitlines()) <= (700 if script.name == "rewards.py" else 540)
    longest = (
        max(
            (node.end_lineno - node.lineno + 1, node.name)
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.FunctionDef)
        )
        if "def " in text
        else (0, "")
    )
    assert longest[0] <= 50, longest
    assert [number for number, line in enumerate(text.splitlines(), 1) if len(line) > 130] == []


def test_importing_a_file_does_no_work():
    for script in SCRIPTS:
        for node in ast.parse(script.read_text()).body:
            assert not isinstance(node, (ast.For, ast.While, ast.With)), (
                f"{script.name}, line {node.lineno}"
            )


def test_what_a_command_can_print_stands_in_the_readme_as_it_prints_it():
    """Tables of files, papers, rewards and the contest are filled in by cog; `cog -r README.md` mends them."""
    assert Cog().main(["cog", "--check", "-I", str(ROOT), str(ROOT / "README.md")]) == 0


def test_every_script_has_a_place_in_the_reading_order():
    assert sorted(citations.READING) == [path.stem for path in SCRIPTS]


def test_the_readmes_example_of_a_reward_is_one(monkeypatch):
    code = re.search(r"(?ms)^    class Blue.*?^    REWARDS\[.*?$", README).group()
    monkeypatch.setattr(rewards, "REWARDS", dict(rewards.REWARDS))
    exec(textwrap.dedent(code), vars(rewards) | {"__name__": "rewards"})
    blue, images = (
        rewards.load("blue"),
        [Image.new("RGB", (8, 8), color) for color in ("blue", "white", "red")],
    )
    scores = blue(["a star"] * 3, images)
    assert (
        scores.dtype == torch.float32
        and scores.tolist() == [1.0, 0.0, -0.5]
        and len(code.strip().splitlines()) <= 10
    )


def test_where_it_is_decided_is_where_the_readme_says():
    places = re.findall(r"\| `(\w+\.py)` `(\w+)` \|", README)
    named = {
        name: {
            node.name
            for node in ast.walk(ast.parse((ROOT / name).read_text()))
            if isinstance(node, ast.FunctionDef)
        }
        for name, _ in places
    }
    assert (
        len(places) >= 12 and [place for place in places if place[1] not in named[place[0]]] == []
    )
