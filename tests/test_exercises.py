"""The exercises: the code itself passes them, empty blanks do not, and neither do the usual mistakes."""

import math

import pytest
import torch

import artifact_reward
import generate
import grpo
import rewards
from evaluation import best_arm as bandits
from studies import exercises

SOLUTIONS = {
    "group_advantages": grpo.group_advantages,
    "guide": generate.guide,
    "kl_k3": grpo.kl_k3,
    "p_no": artifact_reward.p_no,
    "dominated": rewards.dominated,
    "successive_rejects": bandits.successive_rejects,
}
MISTAKES = {
    "group_advantages": lambda r, g: (
        (r.view(-1, g) - r.view(-1, g).mean(1, keepdim=True)) / r.std()
    ).view(-1),
    "guide": lambda logits, w: logits.chunk(2)[0] * w if w != 1 else logits,
    "kl_k3": lambda logprobs, reference: logprobs - reference,
    "p_no": lambda top: math.exp(dict((t.strip().lower(), p) for t, p in top).get("no", -math.inf)),
    "dominated": lambda values, g: torch.zeros(len(values), dtype=torch.bool),
    "successive_rejects": lambda race, keep, budget: race.best(keep),
}


@pytest.mark.parametrize("blank", exercises.GRADERS, ids=lambda f: f.__name__)
def test_the_code_itself_is_the_solution_and_a_mistake_is_found(blank):
    grade = exercises.GRADERS[blank]
    grade(SOLUTIONS[blank.__name__])
    with pytest.raises(Exception):
        grade(MISTAKES[blank.__name__])


def test_the_sheet_has_a_verdict_for_each_blank(capsys, monkeypatch):
    def empty(*_):
        raise NotImplementedError

    monkeypatch.setattr(
        exercises,
        "GRADERS",
        {
            empty: exercises.grade_kl_k3,
            grpo.kl_k3: exercises.grade_kl_k3,
            MISTAKES["kl_k3"]: exercises.grade_kl_k3,
        },
    )
    exercises.main()
    assert [line.split()[1].strip(":") for line in capsys.readouterr().out.splitlines()] == [
        "not",
        "right",
        "wrong",
    ]
