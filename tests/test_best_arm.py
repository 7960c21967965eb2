"""Selection of questions: each method asks exactly what its formula says and finds the best."""

import math

import numpy as np
import pytest

from evaluation import best_arm
from evaluation.best_arm import Race, log_likelihoods


class Constant:
    """A question's log-likelihood is its name, on every picture; logs (question, pictures)."""

    def __init__(self):
        self.pulls = []

    def __call__(self, question, examples):
        self.pulls.append((question, len(examples)))
        return np.full(len(examples), math.exp(float(question)))


def race(questions, pictures):
    return Race(questions, [{"broken": True}] * pictures, Constant())


def seen(race):
    return [len(scores) for scores in race.scores.values()]


# --- the score ------------------------------------------------------------------------------------


def test_the_log_likelihood_is_of_the_right_answer():
    got = log_likelihoods(np.array([0.9, 0.9]), np.array([True, False]))
    assert got.tolist() == pytest.approx([math.log(0.9), math.log(0.1)])


def test_a_certain_mistake_costs_a_finite_amount():
    got = log_likelihoods(np.array([0.0, 1.0]), np.array([True, False]))
    assert got.tolist() == pytest.approx([math.log(1e-8)] * 2)


def test_a_missing_answer_counts_as_one_half_whatever_is_right():
    got = log_likelihoods(np.array([math.nan, math.nan]), np.array([True, False]))
    assert got.tolist() == pytest.approx([math.log(0.5)] * 2)


# --- the race -------------------------------------------------------------------------------------


def test_a_question_is_not_asked_twice_about_a_picture():
    r = race(["-1"], pictures=10)
    for upto in (3, 3, 2, 4.2, 100):  # 4.2 is rounded up, 100 is cut to all pictures
        r.run("-1", upto)
    assert r.answers.pulls == [("-1", 3), ("-1", 2), ("-1", 5)]


def test_the_best_are_ranked_by_their_mean_not_by_their_sum():
    r = race(["-3", "-1", "-2"], pictures=10)
    for question, pictures in (("-3", 1), ("-1", 10), ("-2", 1)):
        r.run(question, pictures)
    assert r.best(2) == ["-1", "-2"]
    assert r.best(5, among=["-3", "-2"]) == ["-2", "-3"]


# --- the methods ----------------------------------------------------------------------------------


def test_ucb_pulls_in_the_order_of_its_bounds():
    """mean + sqrt(log t / n), n in batches. The means are 0, -.35, -.55; each is pulled once, then

        t = 3   1.048   .698   .498   the first
        t = 4    .833   .827   .627   the first, n = 2
        t = 5    .732   .919   .719   the second, n = 1
        t = 6    .773   .597   .789   the third, n = 1
        t = 7    .805   .636   .436   the first, n = 3

    The margin at t = 4 is small on purpose: log(t + 1) or another c would change the order."""
    a, b, c = questions = ["0", "-.35", "-.55"]
    r = race(questions, pictures=100)
    assert best_arm.ucb(r, 2, budget=16, batch=2) == [a, b]  # 8 batches of 2
    assert r.answers.pulls == [(question, 2) for question in (a, b, c, a, a, b, c, a)]


def test_ucb_starts_with_sixteen_pictures_for_each_question_or_what_the_budget_allows():
    for budget, first in ((100, 16), (32, 16), (10, 5), (0, 1)):
        r = race(["0", "-1"], pictures=100)
        best_arm.ucb(r, 1, budget=min(budget, 32))
        assert seen(r) == [first, first]


def test_ucb_goes_on_with_the_others_when_the_best_has_seen_every_picture():
    r = race(["0", "-5"], pictures=4)
    assert best_arm.ucb(r, 1, budget=100, batch=2) == ["0"]
    assert r.answers.pulls == [("0", 2), ("-5", 2), ("0", 2), ("-5", 2)]


def test_successive_rejects_spends_what_its_formula_says():
    """K = 4, budget 104: logbar = 1/2 + 1/2 + 1/3 + 1/4 = 19/12, n_k = 100 * 12/19 / (5 - k)."""
    r = race(["-4", "-3", "-2", "-1"], pictures=1000)
    assert best_arm.successive_rejects(r, 1, 104) == ["-1"]
    assert seen(r) == [16, 22, 32, 32]  # 15.8, 21.1, 31.6
    r = race(["-4", "-3", "-2", "-1"], pictures=1000)
    assert best_arm.successive_rejects(r, 2, 104) == ["-1", "-2"]
    assert seen(r) == [16, 22, 22, 22]


def falling(questions, pictures):
    """A race in which a question's log-likelihood is its name on the first pictures, and -9 from
    picture 20 on. So who has seen few pictures has the higher mean."""

    def answers(question, rows):
        scores = [float(question) if row["n"] < 20 else -9.0 for row in rows]
        return np.exp(scores)

    return Race(questions, [{"broken": True, "n": n} for n in range(pictures)], answers)


@pytest.mark.parametrize("method", ["successive-rejects", "successive-halving"])
def test_a_question_that_left_does_not_come_back(method):
    r = falling(["-4", "-3", "-2", "-1"], pictures=1000)
    assert best_arm.SELECT[method](r, 1, 400) == ["-1"]
    assert r.scores["-1"].mean() < r.scores["-4"].mean()  # by its mean alone it would


def test_the_first_of_equal_questions_is_preferred():
    r = race(["-1", "-1.0", "-2"], pictures=10)
    assert best_arm.full(r, 2, 0) == ["-1", "-1.0"]


def test_successive_halving_spends_the_same_in_every_round():
    """K = 5, keep 1: 3 rounds of 30 answers, among 5, 3 and 2 questions: 6, 10 and 15 each."""
    r = race(["-5", "-4", "-3", "-2", "-1"], pictures=1000)
    assert best_arm.successive_halving(r, 1, 90) == ["-1"]
    assert seen(r) == [6, 6, 16, 31, 31]


def test_successive_halving_never_keeps_fewer_than_it_shall():
    """K = 7, keep 3: 2 rounds of 28 answers, among 7 and 4 questions: 4 and 7 each."""
    r = race([str(-i) for i in range(7)], pictures=1000)
    assert best_arm.successive_halving(r, 3, 56) == ["0", "-1", "-2"]
    assert seen(r) == [11, 11, 11, 11, 4, 4, 4]


@pytest.mark.parametrize("method", best_arm.SELECT)
def test_every_method_finds_the_best_of_noisy_questions_within_its_budget(method):
    rng, calls = np.random.default_rng(0), []

    def answers(question, rows):  # a question is named after its mean P(right answer)
        calls.append(len(rows))
        right = np.clip(float(question) + rng.normal(0, 0.1, len(rows)), 0.01, 0.99)
        return np.where([row["broken"] for row in rows], right, 1 - right)

    rows = [{"broken": i % 2 == 0} for i in range(200)]
    questions = [str(q) for q in np.linspace(0.1, 0.9, 16).round(3)]
    kept = best_arm.SELECT[method](Race(questions, rows, answers), 4, budget=0.35 * 16 * 200)
    assert kept[0] == "0.9" and len(kept) == 4
    assert sum(calls) == 3200 if method == "full" else sum(calls) <= 0.36 * 3200
