"""The commands for GPUs add up: each GPU holds what runs on it, and no two programs collide."""

import pytest

from studies import recipes


@pytest.mark.parametrize("recipe", recipes.RECIPES, ids=lambda recipe: recipe.title)
def test_what_runs_on_a_gpu_fits_into_it(recipe):
    trainer, judge = recipes.devices(recipe.trainer), recipes.devices(recipe.judge)
    planned, taken = recipes.trainer_gb(recipe), recipes.judge_gb(recipe)
    together = planned + taken if trainer and judge and trainer & judge else max(planned, taken)
    assert together < 0.93 * recipe.memory
    assert planned < 0.9 * recipe.memory  # as grpo.py --dry-run demands
    processes = recipes.option(recipe.trainer, "nproc-per-node", 1)
    assert trainer is None or len(trainer) == processes
    assert bool(recipe.judge) != ("--judge-url" in recipe.trainer)


def test_a_judge_with_its_whole_context_is_refused(capsys):
    recipe = recipes.RECIPES[0]
    with pytest.raises(SystemExit, match="2"):
        recipes.judge_gb(recipe._replace(judge=recipe.judge.replace("--max-model-len 4096", "")))
    assert "the judge needs" in capsys.readouterr().err
