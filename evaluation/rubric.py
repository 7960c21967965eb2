"""Several weighted questions in place of one: a rubric (AutoRubric-T2I, arXiv:2605.17602).

Question k gives a picture P_k(broken). For each pair of a broken and a clean picture of one prompt,
d_k is the difference. A logistic regression learns how much each question counts:

    minimise over w >= 0     mean over pairs of  log(1 + exp(-w . d))  +  penalty * sum_k w_k

A weight is not negative: a question must not count against its own answer. The penalty (L1) sets
most weights to exactly 0, so a few questions remain, and the judge stays cheap. The reward is
sum_k w_k P_k(no) with weights that sum to 1, so it is in [0, 1], as that of one question.

Read next: apo.py, which calls `learn` (--rubric)
"""

import math

import numpy as np

from evaluation.labels import with_intervals
from training.files import atomic, usage_error

# Shapes:  K questions   M pairs   N pictures


def pair_differences(p_NK, examples):
    """(M, K): P(broken) of the broken picture minus that of the clean one, for all pairs of one
    prompt. A missing answer (NaN) counts as .5: it says nothing."""
    clean, rows, p_NK = {}, [], np.nan_to_num(p_NK, nan=0.5)
    for p, example in zip(p_NK, examples):
        if not example["broken"]:
            clean.setdefault(example["prompt"], []).append(p)
    for p, example in zip(p_NK, examples):
        if example["broken"]:
            rows += [p - other for other in clean.get(example["prompt"], ())]
    return np.array(rows).reshape(-1, p_NK.shape[1])


def log_loss(d_MK, w_K):
    return np.logaddexp(0, -d_MK @ w_K).mean()


def fit(d_MK, penalty, start=0.0, steps=1000):
    """The minimum, w_K, by projected gradient descent from `start`. The problem is convex; a step
    of 1 / L never overshoots, L being the largest curvature."""
    M, K = d_MK.shape
    step = 4 * M / (np.linalg.norm(d_MK, 2) ** 2 or 1.0)  # 0 if all questions say nothing
    w_K = np.zeros(K) + start
    for _ in range(steps):
        wrong = 1 / (1 + np.exp(d_MK @ w_K))  # the probability that the regression is wrong
        gradient = -(wrong @ d_MK) / M + penalty
        w_K = np.maximum(w_K - step * gradient, 0)
    return w_K


def choose(train_MK, validation_MK, most):
    """The w_K, of at most `most` questions, that explains the validation pairs best. The penalty
    falls from where all weights are 0, until more questions would be needed. All weights are 0 if
    no question tells broken from clean."""
    highest, found = max(train_MK.mean(0).max() / 2, 0), [np.zeros(train_MK.shape[1])]
    for penalty in highest / 1.1 ** np.arange(1, 40):
        w_K = fit(train_MK, penalty, start=found[-1])
        if (w_K > 0).sum() > most:
            break
        found.append(w_K)
    return min(found, key=lambda w_K: log_loss(validation_MK, w_K))


def check(data, most):
    """Refuse a rubric, before the search, if no prompt has both kinds of pictures."""
    for split in ("train", "validation") if most else ():
        pairs = pair_differences(np.zeros((len(data[split]), 1)), data[split])
        if not len(pairs):
            usage_error(
                f"--rubric {most}: in the {split} split no prompt has a clean and a broken picture"
            )


def learn(questions, judge, data, most, file):
    """A rubric of at most `most` of these questions, written to `file` as lines "weight question",
    which `--question` takes, if any of them helps. judge(question, examples) -> P(broken). Returns
    how many were chosen, and measures on the test split, name -> (value, low, high)."""
    answers = {
        split: np.stack([judge(question, data[split]) for question in questions], 1)
        for split in ("train", "validation")
    }
    differences = [pair_differences(p_NK, data[split]) for split, p_NK in answers.items()]
    w_K = choose(*differences, most)
    chosen = sorted(((w, question) for w, question in zip(w_K, questions) if w > 0), reverse=True)
    chosen = [(w / w_K.sum(), question) for w, question in chosen]
    measured = dict.fromkeys(("accuracy", "pairs", "auroc"), (math.nan,) * 3)
    if chosen:
        with atomic(file) as out:
            out.writelines(f"{weight:.4f} {question}\n" for weight, question in chosen)
        p_N = sum(weight * judge(question, data["test"]) for weight, question in chosen)
        measured |= with_intervals(p_N, data["test"])
    else:
        print("no rubric: no question that was tried tells broken pictures from clean ones")
    return {"questions": len(chosen)} | {
        f"{name} of the rubric": measured[name] for name in ("accuracy", "pairs", "auroc")
    }
