"""Six exercises: write the body of a function of this project; the grader says whether it is right.

Each docstring says what the function must do and where this project has it: that is the solution.

Run:   python -m studies.exercises

You should see:  six lines, "not yet" at first, "right" at the end.

Read next: the file that the exercise names, after you have solved it
"""

import math

import numpy as np
import torch

from evaluation.best_arm import Race

# --- the exercises ------------------------------------------------------------------------------


def group_advantages(total_N, group_size):
    """grpo.py. Rewards of N rollouts, group after group -> advantages (N,): (r - mean) / (std +
    1e-4) within each group, std with n - 1. A NaN reward gets 0 and does not change the mean."""
    raise NotImplementedError


def apply_cfg(logits, cfg_weight):
    """generate.py. Rows [with prompt; without] (2N, V) -> guided logits (N, V): u + w (c - u). With
    weight 1 there are no rows without the prompt: return the logits (N, V) unchanged."""
    raise NotImplementedError


def kl_k3(logprobs, reference_logprobs):
    """grpo.py. exp(d) - d - 1 with d = log pi_ref - log pi, for each token."""
    raise NotImplementedError


def prob_no(top_logprobs):
    """artifact_reward.py. [(token, log-probability)] of an answer's first token -> P(no) / (P(yes)
    + P(no)), summed over all spellings ("No", " no", "NO", ...). NaN if yes and no together have
    less than 1 %: their ratio is noise then."""
    raise NotImplementedError


def dominated(values_NK, group_size):
    """training/cures.py. Rewards (N, K) -> (N,) bool: is another rollout of the group at least as
    good in every reward and better in one?"""
    raise NotImplementedError


def successive_rejects(race, keep, budget):
    """evaluation/best_arm.py. Return the best `keep` of K questions. In phase k = 1, 2, ... run all
    survivors on n_k = (budget - K) / (logbar(K) (K + 1 - k)) pictures in total, logbar(K) = 1/2 +
    sum_{i=2..K} 1/i; then the worst one leaves. race: a best_arm.Race with scores, run and best."""
    raise NotImplementedError


# --- the graders --------------------------------------------------------------------------------


def close(got, expected):
    got, expected = torch.as_tensor(got).float(), torch.as_tensor(expected).float()
    same = got.shape == expected.shape and torch.allclose(got, expected, atol=1e-3, equal_nan=True)
    assert same, f"{got.tolist()} where {expected.tolist()} was expected"


def grade_group_advantages(f):
    close(f(torch.tensor([1.0, 2, 3, 10, 10, 40]), 3), [-1.0, 0, 1, -0.57735, -0.57735, 1.1547])
    close(f(torch.tensor([0.5, 0.5]), 2), [0.0, 0])
    close(f(torch.tensor([1.0, math.nan, 3]), 3), [-0.7071, 0, 0.7071])


def grade_apply_cfg(f):
    logits = torch.tensor([[1.0, 0], [0, 1]])  # with the prompt; without
    close(f(logits, 5.0), [[5.0, -4]])
    close(f(logits, 0.0), [[0.0, 1]])
    close(f(logits[:1], 1), [[1.0, 0]])


def grade_kl_k3(f):
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.4, 0.4, 0.2])
    close((p * f(p.log(), q.log())).sum(), (p * (p / q).log()).sum())  # its mean under p is the KL
    assert (f(torch.randn(100), torch.randn(100)) >= 0).all(), "k3 is never negative"


def grade_prob_no(f):
    words = {"No": 0.6, " no": 0.2, "Yes": 0.2, "Maybe": 0.0001}
    close(f([(word, math.log(p)) for word, p in words.items()]), 0.8)
    close(f([("yes", -0.1)]), 0.0)
    close(f([("NO", -4.0), ("no", -4.0), ("yes", -4.0)]), 2 / 3)
    assert math.isnan(f([("The", -0.1)])), "neither yes nor no is no score, and not 0 or 1"
    assert math.isnan(f([("So", -0.6), ("Yes", -13.0)])), "a millionth of an answer is none"


def grade_dominated(f):
    values = torch.tensor([[0, 0.3], [1, 0.3], [2, 0.1], [1, 0.1], [5, 5], [5, 5], [6, 0], [0, 0]])
    close(f(values, 4), [1, 0, 0, 1, 0, 0, 0, 1])


def grade_successive_rejects(f):
    chances = {"a": 0.9, "b": 0.8, "c": 0.7, "d": 0.6}  # of the right answer, on every picture
    answers = lambda question, examples: np.full(len(examples), chances[question])
    race = Race(list(chances), [{"broken": True}] * 160, answers)
    assert f(race, 1, 160) == ["a"], "a is the best one"
    # logbar(4) = 1/2 + 1/2 + 1/3 + 1/4 = 1.5833; n_k = 156 / (1.5833 * (5 - k)), rounded up
    close([len(scores) for scores in race.scores.values()], [50, 50, 33, 25])


GRADERS = {
    group_advantages: grade_group_advantages,
    apply_cfg: grade_apply_cfg,
    kl_k3: grade_kl_k3,
    prob_no: grade_prob_no,
    dominated: grade_dominated,
    successive_rejects: grade_successive_rejects,
}


def main():
    for function, grade in GRADERS.items():
        try:
            grade(function)
            verdict = "right"
        except NotImplementedError:
            verdict = "not yet"
        except Exception as problem:  # a reader's code may raise anything
            verdict = f"wrong: {type(problem).__name__} {problem}"
        print(f"{function.__name__:20s} {verdict}")


if __name__ == "__main__":
    main()
