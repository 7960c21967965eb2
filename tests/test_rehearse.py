"""The rehearsal walks every recipe with flags that are understood, and notices what fails."""

import json
import shlex

import pytest
import tyro

import artifact_reward
import evaluate
import generate
import grpo
import rewards
from studies import recipes, rehearse

CONFIGS = {
    "grpo.py": grpo.Config,
    "generate.py": generate.Config,
    "evaluate.py": evaluate.Config,
    "artifact_reward.py": artifact_reward.Config,
    "rewards.py": rewards.Config,
}


def script_and_flags(command):
    words = shlex.split(command)
    at = next(i for i, word in enumerate(words) if word in CONFIGS)
    return words[at], words[at + 1 :]


@pytest.mark.parametrize("part", rehearse.parts("vllm"), ids=lambda part: part[0])
def test_every_command_of_the_rehearsal_is_understood(part):
    _, _, command, server = part
    for text in filter(None, (command, "" if "vllm" in server else server)):
        script, flags = script_and_flags(text)
        cfg = tyro.cli(CONFIGS[script], args=flags)
        if script == "grpo.py" and not cfg.dry_run:
            assert cfg.num_generations == 2 and cfg.eval_images == 1 and cfg.device == "cpu"


def test_every_recipe_is_rehearsed_with_its_own_flags():
    commands = [command for _, _, command, _ in rehearse.parts("vllm")]
    for recipe in recipes.RECIPES:
        flags = rehearse.flags_of(recipe.title)
        assert any(flags in command for command in commands), recipe.title
    (served,) = [server for name, *_, server in rehearse.parts("vllm") if name == "judge"]
    assert "--max-model-len 4096 --gpu-memory-utilization 0.92" in served


def test_a_part_that_failed_is_repeated_and_one_that_passed_is_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rehearse, "make_cache", lambda hub: None)
    parts = [("good", "it", "-c 'print(41 + 1)'", ""), ("bad", "that", "-c 'exit(2)'", "")]
    monkeypatch.setattr(rehearse, "parts", lambda vllm, device: parts)
    cfg = rehearse.Config(folder=str(tmp_path))
    for repeated in ("good: ", ""):
        with pytest.raises(SystemExit) as stop:
            rehearse.main(cfg)
        said = capsys.readouterr().out
        assert stop.value.code == 3 and said.count("good: ") == bool(repeated)
        assert "bad: -c" in said and "| it | passed |" in said and "| that | exit code 2 |" in said
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["good"]["last"] == "42" and results["good"]["exit"] == 0


def test_a_server_that_does_not_start_ends_the_rehearsal_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        with rehearse.server("python3", "-c 'exit(1)' --port 18123", tmp_path / "x.log", None):
            pass
    assert stop.value.code == 2 and "no answer at http://127.0.0.1:18123/about" in (
        capsys.readouterr().err
    )
