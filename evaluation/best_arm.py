"""Which of these questions is best? Selection that does not need every picture for every question.

This is best-arm identification in a multi-armed bandit: an arm is a question, a pull is one answer
of the judge, and it pays the log-likelihood of the right answer. `full` spends as many pulls on bad
questions as on good ones; the other methods save on the bad ones:

    full                 every question on every picture, as in the released code
    ucb                  upper confidence bound (the choice of ProTeGi, arXiv:2305.03495)
    successive-rejects   in phases; after each one the worst question leaves (Audibert et al. 2010)
    successive-halving   in rounds; after each one the worse half leaves (Karnin et al. 2013)

Read next: apo.py, which calls `SELECT[method]`
"""

import math

import numpy as np


def log_likelihoods(p_broken, broken):
    """y log p + (1 - y) log(1 - p), as in the released code; p at least 1e-8. Two arrays (N,).

    A missing answer (NaN) counts as log 1/2: a question that the judge cannot answer must not gain
    from it."""
    right = np.where(broken, p_broken, 1 - p_broken)
    return np.log(np.where(np.isfinite(right), right, 0.5).clip(1e-8))


class Race:
    """Questions, each with its log-likelihoods on the first pictures of the training split.

    All questions see the pictures in one order, so two of them are compared on the same pictures
    (ProTeGi draws new ones for each). answers(question, examples): P(broken), an array (N,)."""

    def __init__(self, questions, examples, answers):
        self.scores = {question: np.empty(0) for question in questions}
        self.examples, self.answers = examples, answers

    def run(self, question, upto):
        """Score this question on the first `upto` pictures, at least one; those it has seen cost
        nothing."""
        seen, upto = len(self.scores[question]), min(max(1, math.ceil(upto)), len(self.examples))
        if upto > seen:
            new = self.examples[seen:upto]
            broken = np.array([example["broken"] for example in new])
            gained = log_likelihoods(self.answers(question, new), broken)
            self.scores[question] = np.concatenate([self.scores[question], gained])

    def best(self, n, among=None):
        """The n questions with the highest mean so far, best first."""
        return sorted(among or self.scores, key=lambda q: -self.scores[q].mean())[:n]


# Each method: (race, how many to keep, budget in answers) -> the best questions, best first.


def full(race, keep, budget):
    """Every question on every picture, whatever the budget."""
    for question in race.scores:
        race.run(question, len(race.examples))
    return race.best(keep)


def ucb(race, keep, budget, batch=16, c=1.0):
    """The next batch goes to the question with the highest mean + c sqrt(log t / n).

    t counts the batches of all questions so far, n those of this question."""
    batch = max(1, min(batch, int(budget / len(race.scores))))
    for question in race.scores:
        race.run(question, batch)
    for t in range(len(race.scores), int(budget / batch)):
        bounds = {
            q: scores.mean() + c * math.sqrt(math.log(t) / (len(scores) / batch))
            for q, scores in race.scores.items()
            if len(scores) < len(race.examples)
        }
        if not bounds:
            break
        chosen = max(bounds, key=bounds.get)
        race.run(chosen, len(race.scores[chosen]) + batch)
    return race.best(keep)


def successive_rejects(race, keep, budget):
    """Audibert et al. 2010: in phase k all survivors have seen n_k pictures; the worst one leaves.

        n_k = (budget - K) / (logbar(K) (K + 1 - k)),      logbar(K) = 1/2 + sum_{i=2..K} 1/i

    So the last questions, which are hard to tell apart, see the most pictures."""
    K, survivors = len(race.scores), list(race.scores)
    logbar = 0.5 + sum(1 / i for i in range(2, K + 1))
    for k in range(1, max(K - keep, 1) + 1):
        for question in survivors:
            race.run(question, (budget - K) / (logbar * (K + 1 - k)))
        survivors = race.best(max(keep, len(survivors) - 1), survivors)
    return survivors[:keep]


def successive_halving(race, keep, budget):
    """Karnin et al. 2013: log2(K / keep) rounds of equal budget; after each, half of them leave."""
    survivors, seen = list(race.scores), 0
    rounds = max(1, math.ceil(math.log2(len(survivors) / keep)))
    for _ in range(rounds):
        seen += budget / (rounds * len(survivors))
        for question in survivors:
            race.run(question, seen)
        survivors = race.best(max(keep, math.ceil(len(survivors) / 2)), survivors)
    return survivors[:keep]


SELECT = {
    "full": full,
    "ucb": ucb,
    "successive-rejects": successive_rejects,
    "successive-halving": successive_halving,
}
