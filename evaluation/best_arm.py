"""Which of these questions is best? Finding out should not cost a look at every picture.

A question is a slot machine, a picture a coin, and what it pays is the log-likelihood of the right answer. To find the
few best machines with a given number of coins is *best-arm identification*. The wasteful way is to play all of them
equally often; the others spend on the good ones, which are hard to tell apart, what they save on the bad ones:

    full                 every question on every picture, as the released code does
    ucb                  the next coins to the one that could still be best (ProTeGi's choice, arXiv:2305.03495)
    successive-rejects   in phases; after each the worst one leaves (Audibert et al. 2010)
    successive-halving   in rounds; after each the worse half leaves (Karnin et al. 2013)

Run:   python apo.py --select full ucb successive-rejects successive-halving

You should see:  a line for each search: what it cost in judge calls, what its question is worth on the test split.

Read next: apo.py, which calls `SELECT[how]`
"""

import math

import numpy as np


def log_likelihoods(p_broken, broken):
    """y log p + (1 - y) log(1 - p), as released; a missing answer is a coin's, log 1/2: it must not pay to
    ask what the judge cannot answer."""
    right = np.where(broken, p_broken, 1 - p_broken)
    return np.log(np.where(np.isfinite(right), right, 0.5).clip(1e-8))


class Race:
    """Questions, each with its log-likelihoods on the first pictures of the training split. All run the
    same course, so two questions are compared on the same pictures (ProTeGi draws new ones for each)."""

    def __init__(self, questions, examples, answers):
        self.scores = {question: np.empty(0) for question in questions}
        self.examples, self.answers = examples, answers

    def run(self, question, upto):
        """Look at this question's score on the first `upto` pictures."""
        done, upto = len(self.scores[question]), min(math.ceil(upto), len(self.examples))
        if upto > done:
            new = self.examples[done:upto]
            p = self.answers(question, new)
            gained = log_likelihoods(p, np.array([example["broken"] for example in new]))
            self.scores[question] = np.concatenate([self.scores[question], gained])

    def best(self, n, among=None):
        return sorted(among or self.scores, key=lambda q: -self.scores[q].mean())[:n]


def full(race, keep, budget):
    """Every question on every picture: the released code."""
    for question in race.scores:
        race.run(question, len(race.examples))
    return race.best(keep)


def ucb(race, keep, budget, batch=16, c=1.0):
    """Optimism: the next pictures go to the question that could be best, mean + c sqrt(log t / n)."""
    for question in race.scores:
        race.run(question, batch)
    for t in range(len(race.scores), max(len(race.scores), int(budget / batch))):
        hopes = {
            q: s.mean() + c * math.sqrt(math.log(t) / (len(s) / batch))
            for q, s in race.scores.items()
            if len(s) < len(race.examples)
        }
        if not hopes:
            break
        chosen = max(hopes, key=hopes.get)
        race.run(chosen, len(race.scores[chosen]) + batch)
    return race.best(keep)


def successive_rejects(race, keep, budget):
    """Audibert et al. 2010: in phase k all survivors have seen n_k pictures, and the worst one leaves;

        n_k = (budget - K) / (logbar(K) (K + 1 - k)),      logbar(K) = 1/2 + sum_{i=2..K} 1/i

    so that the pictures are spent on the last few, which are hard to tell apart."""
    K, survivors = len(race.scores), list(race.scores)
    logbar = 0.5 + sum(1 / i for i in range(2, K + 1))
    for k in range(1, max(K - keep, 1) + 1):
        for question in survivors:
            race.run(question, (budget - K) / (logbar * (K + 1 - k)))
        survivors = race.best(max(keep, len(survivors) - 1), survivors)
    return survivors[:keep]


def successive_halving(race, keep, budget):
    """Karnin et al. 2013: the same budget for each of log2(K) rounds, and the worse half leaves."""
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
