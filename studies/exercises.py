"""Six blanks. Each is one function of this project, without its body; the file it comes from is named.

Write the bodies, run this file, and it says which are right. The solutions are the code itself.

Run:   python exercises.py

You should see:  six lines, "not yet" at first, "right" at the end.

Read next: the file a blank comes from, when you have filled it or given up
"""

import math

import torch

# --- the blanks -----------------------------------------------------------------------------------


def group_advantages(total_N, group_size):
    """grpo.py. Rewards of N = P * G rollouts, group after group -> advantages (N,): the z-score within the group, with
    n - 1 in the deviation and 1e-4 added to it. A NaN reward gets 0, and does not move the mean of the others."""
    raise NotImplementedError


def guide(logits, cfg_weight):
    """generate.py. Rows [with the prompt; without] (2N, V) -> guided logits (N, V): u + w (c - u). With a weight of 1
    there are no rows without the prompt: logits (N, V) come back as they are."""
    raise NotImplementedError


def kl_k3(logprobs, reference):
    """grpo.py. Schulman's k3, exp(d) - d - 1 with d = log pi_ref - log pi: per token, never negative."""
    raise NotImplementedError


def p_no(top_logprobs):
    """artifact_reward.py. [(token, log-probability)] of an answer's first token -> P(no) / (P(yes) + P(no)), over all
    spellings ("No", " no", "NO", ...). NaN if neither word is there."""
    raise NotImplementedError


def dominated(values_NK, group_size):
    """rewards.py. (N, K) rewards -> (N,) bool: who is beaten by another one of the group, that is nowhere better and
    somewhere worse?"""
    raise NotImplementedError


def successive_rejects(race, keep, budget):
    """bandits.py. Find the best `keep` questions with about `budget` pictures each: in phase k = 1, 2, ... all survivors are
    run up to n_k = (budget - K) / (logbar(K) (K + 1 - k)) pictures, logbar(K) = 1/2 + sum_{i=2..K} 1/i, K being the
    number of questions at first, and the worst one leaves.

    race.scores: a dict, question -> what it scored so far.   race.run(question, n): let it see n pictures in all.
    race.best(n, among): the n best of these, so far."""
    raise NotImplementedError


# --- the graders ----------------------------------------------------------------------------------


def close(got, expected):
    got, expected = torch.as_tensor(got), torch.as_tensor(expected)
    assert got.shape == expected.shape and torch.allclose(
        got.float(), expected.float(), atol=1e-3, equal_nan=True
    ), f"{got.tolist()} where {expected.tolist()} was expected"


def grade_group_advantages(f):
    close(f(torch.tensor([1.0, 2, 3, 10, 10, 40]), 3), [-1.0, 0, 1, -0.57735, -0.57735, 1.1547])
    close(f(torch.tensor([0.5, 0.5]), 2), [0.0, 0])
    close(f(torch.tensor([1.0, math.nan, 3]), 3), [-0.7071, 0, 0.7071])


def grade_guide(f):
    with_and_without = torch.tensor([[1.0, 0], [0, 1]])
    close(f(with_and_without, 5.0), [[5.0, -4]])
    close(f(with_and_without, 0.0), [[0.0, 1]])
    close(f(with_and_without[:1], 1), [[1.0, 0]])


def grade_kl_k3(f):
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.4, 0.4, 0.2])
    close(
        (p * f(p.log(), q.log())).sum(), (p * (p / q).log()).sum()
    )  # over samples of p it is the KL divergence
    assert (f(torch.randn(100), torch.randn(100)) >= 0).all(), "k3 is never negative"


def grade_p_no(f):
    close(
        f([("No", math.log(0.6)), (" no", math.log(0.2)), ("Yes", math.log(0.2)), ("Maybe", -9.0)]),
        0.8,
    )
    close(f([("yes", -0.1)]), 0.0)
    close(f([("NO", -200.0), ("no", -200.0), ("yes", -200.0)]), 2 / 3)
    assert math.isnan(f([("The", -0.1)])), "neither yes nor no is no score, and not 0 or 1"


def grade_dominated(f):
    values = torch.tensor([[0, 0.3], [1, 0.3], [2, 0.1], [1, 0.1], [5, 5], [5, 5], [6, 0], [0, 0]])
    assert f(values, 4).tolist() == [True, False, False, True, False, False, False, True], f(
        values, 4
    ).tolist()


class Race:
    """Questions a, b, c, d; a is the best, from the first picture on."""

    def __init__(self):
        self.scores, self.seen = dict(zip("abcd", (4.0, 3, 2, 1))), dict.fromkeys("abcd", 0.0)

    def run(self, question, upto):
        self.seen[question] = max(self.seen[question], upto)

    def best(self, n, among=None):
        return sorted(among or self.scores, key=lambda q: -self.scores[q])[:n]


def grade_successive_rejects(f):
    race = Race()
    assert f(race, 1, 160) == ["a"], "a is the best one"
    # logbar(4) = 1/2 + 1/2 + 1/3 + 1/4 = 1.5833; n_1 = 156 / (1.5833 * 4), n_2 = .../3, n_3 = .../2
    close([race.seen[q] for q in "abcd"], [49.263, 49.263, 32.842, 24.632])


GRADERS = {
    group_advantages: grade_group_advantages,
    guide: grade_guide,
    kl_k3: grade_kl_k3,
    p_no: grade_p_no,
    dominated: grade_dominated,
    successive_rejects: grade_successive_rejects,
}


def main():
    for blank, grade in GRADERS.items():
        try:
            grade(blank)
            verdict = "right"
        except NotImplementedError:
            verdict = "not yet"
        except Exception as problem:  # whatever a reader's code may do
            verdict = f"wrong: {type(problem).__name__} {problem}"
        print(f"{blank.__name__:20s} {verdict}")


if __name__ == "__main__":
    main()
