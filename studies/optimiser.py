"""How much reward does an optimiser gain for each nat of KL, and how much of its KL is drift?

The gradient of GRPO is mostly noise: one advantage for all tokens of a picture. AdamW turns noise
into steps of full size, a random walk of all weights. The control measures this walk: the same
training on the reward `noise`, in which there is nothing to learn. A calm optimiser gains hps at a
small KL, and its control stays where it was. Each variant here trains twice, on hps and on noise,
with the same number of rollouts. The KL at which hps has gained half a deviation compares them,
and not the gain per nat at the end: the KL grows faster than the gain, so a run that stops early
would win.

Run:   python -m studies.optimiser              train what is missing (hours; a stopped study goes
                                                on), then print the table, draw docs/optimiser.png
       python -m studies.optimiser --seeds 1    one seed, a table without intervals

You should see:  a progress bar over all runs, then one line for each variant.

Read next: docs/results.md, "Learning rate and drift"
"""

import json
import math
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

import tyro

from evaluation.curves import HACK, OTHERS
from evaluation.tables import interval
from studies import contest
from studies.contest import file_name, gain, print_table, train_missing, with_interval
from training.files import ROOT, atomic
from training.records import mean

# Variant -> flags of grpo.py. The first is the default; the contest trains it.
VARIANTS = json.loads((ROOT / "studies/optimisers.json").read_text())
REWARDS = {"hps": "no cure", "noise": "control"}  # reward -> its name in the contest


@dataclass
class Config:
    seeds: int = 3  # of each variant
    workers: int = os.cpu_count()  # runs at a time, a core each
    output_dir: str = "runs/optimiser"  # run folders go here
    results: str = str(ROOT / "docs" / "optimiser")  # their numbers go here
    figure: str = str(ROOT / "docs" / "optimiser.png")


def job(cfg, variant, reward, seed):
    """(flags, result file, facts) of one run, for `train_missing`."""
    entry = contest.Config(output_dir=cfg.output_dir)
    flags = contest.command(entry, REWARDS[reward], seed)
    if not VARIANTS[variant]:
        file = contest.result_file(entry, REWARDS[reward], seed)
        return flags, file, {"cure": REWARDS[reward], "seed": seed}
    name = file_name(f"{variant} {reward} seed{seed}")
    flags[flags.index("--run-name") + 1] = name
    flags += shlex.split(VARIANTS[variant])
    facts = {"variant": variant, "reward": reward, "seed": seed}
    return flags, Path(cfg.results) / f"{name}.json", facts


def read_results(jobs):
    """jobs: (variant, reward, seed) -> job. (variant, reward) -> numbers of its finished runs."""
    results = {}
    for (variant, reward, _), (_, file, _) in jobs.items():
        if file.is_file():
            results.setdefault((variant, reward), []).append(json.loads(file.read_text()))
    return results


def kl_at(run, wanted=0.5):
    """The KL at which hps had gained so many deviations, on a line between two tests; NaN if it did
    not."""
    tests, points = run["tests"], []
    for test in tests:
        gained = (test["hps"] - tests[0]["hps"]) / run["deviation"]
        if gained >= wanted:
            before, kl = points[-1]
            share = (wanted - before) / (gained - before)
            return kl + share * (test["kl"] - kl)
        points.append((gained, test["kl"]))
    return math.nan


def table(results):
    """A row for each variant; the gain of hps in standard deviations within a prompt."""
    rows = []
    for variant in VARIANTS:
        runs, control = (results.get((variant, reward), []) for reward in REWARDS)
        if not (runs and control):
            continue
        gained = [gain(run, "hps") / run["deviation"] for run in runs]
        nats, drift = (mean(run["tests"][-1]["kl"] for run in some) for some in (runs, control))
        row = {"variant": variant, "flags": f"`{VARIANTS[variant] or '(default)'}`"}
        row |= {"runs": len(runs), "hps, deviations": plus_minus(gained), "KL": f"{nats:.1f}"}
        row |= {"KL of the control": f"{drift:.1f}"}
        row["KL at .5 deviations"] = f"{mean(map(kl_at, runs)):.2f}"
        for name in ("gold", "artifact-free"):
            row[name] = plus_minus([gain(run, name) for run in runs])
            row[f"{name}, control"] = plus_minus([gain(run, name) for run in control])
        rows.append(row)
    return rows


def plus_minus(values):
    return with_interval(*interval(values), len(values))


def figure(results, path):
    """Gain of hps against sqrt(KL), the distance, test by test: up and left is better. The end of
    each variant's control is a cross, its drift."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawing, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    colors = iter([HACK, *OTHERS, "#0072B2", "#000000", "#8C5A9E"] * 3)
    for variant in VARIANTS:
        runs, control = (results.get((variant, reward), []) for reward in REWARDS)
        if not (runs and control):
            continue
        color, tests = next(colors), range(len(runs[0]["tests"]))
        start = [run["tests"][0]["hps"] for run in runs]
        distance = [mean(math.sqrt(max(0.0, run["tests"][i]["kl"])) for run in runs) for i in tests]
        gained = [
            mean((r["tests"][i]["hps"] - s) / r["deviation"] for r, s in zip(runs, start))
            for i in tests
        ]
        axis.plot(distance, gained, "o-", color=color, markersize=4, label=variant)
        drift = mean(math.sqrt(run["tests"][-1]["kl"]) for run in control)
        walked = mean(gain(run, "hps") / run["deviation"] for run in control)
        axis.plot(drift, walked, "x", color=color, markersize=8, markeredgewidth=2)
    axis.axhline(0, color="#767676", linewidth=0.8)
    axis.set(xlabel="sqrt(KL to the base policy)", ylabel="gain of hps, deviations within a prompt")
    axis.set_title("Lines: training on hps. Crosses: the drift of the control", loc="left")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    with atomic(path, "wb") as file:
        drawing.savefig(file, format="png", dpi=90)
    plt.close(drawing)


def all_jobs(cfg):
    """(variant, reward, seed) -> job."""
    return {
        (variant, reward, seed): job(cfg, variant, reward, seed)
        for seed in range(1, cfg.seeds + 1)
        for variant in VARIANTS
        for reward in REWARDS
    }


def main(cfg):
    jobs = all_jobs(cfg)
    errors = train_missing(list(jobs.values()), cfg.workers)
    results = read_results(jobs)
    figure(results, cfg.figure)
    print_table(table(results), errors)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
