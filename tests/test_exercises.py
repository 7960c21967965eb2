"""The project's own functions pass the graders; empty bodies and the usual mistakes do not."""

import math

import pytest
import torch

import artifact_reward
import generate
import grpo
from evaluation import best_arm
from studies import exercises
from training import cures

SOLUTIONS = {
    "group_advantages": grpo.group_advantages,
    "apply_cfg": generate.apply_cfg,
    "kl_k3": grpo.kl_k3,
    "prob_no": artifact_reward.prob_no,
    "dominated": cures.dominated,
    "successive_rejects": best_arm.successive_rejects,
}


def advantages_by_the_std_of_the_batch(total_N, group_size):
    groups = total_N.view(-1, group_size)
    return ((groups - groups.mean(1, keepdim=True)) / total_N.std()).view(-1)


def prob_no_of_one_spelling(top_logprobs):
    return math.exp({token.strip().lower(): p for token, p in top_logprobs}.get("no", -math.inf))


MISTAKES = {
    "group_advantages": advantages_by_the_std_of_the_batch,
    "apply_cfg": lambda logits, w: logits.chunk(2)[0] * w if w != 1 else logits,
    "kl_k3": lambda logprobs, reference_logprobs: logprobs - reference_logprobs,
    "prob_no": prob_no_of_one_spelling,
    "dominated": lambda values_NK, group_size: torch.zeros(len(values_NK), dtype=torch.bool),
    "successive_rejects": lambda race, keep, budget: list(race.scores)[:keep],
}


@pytest.mark.parametrize("exercise", exercises.GRADERS, ids=lambda function: function.__name__)
def test_the_project_has_the_solution_and_a_mistake_is_found(exercise):
    grade = exercises.GRADERS[exercise]
    grade(SOLUTIONS[exercise.__name__])
    with pytest.raises(AssertionError):
        grade(MISTAKES[exercise.__name__])


def test_each_exercise_gets_a_verdict(capsys, monkeypatch):
    functions = (exercises.kl_k3, grpo.kl_k3, MISTAKES["kl_k3"])
    graders = dict.fromkeys(functions, exercises.grade_kl_k3)
    monkeypatch.setattr(exercises, "GRADERS", graders)
    exercises.main()
    verdicts = [line.split()[1].strip(":") for line in capsys.readouterr().out.splitlines()]
    assert verdicts == ["not", "right", "wrong"]
