"""Which cure works? Every one that the literature claims, on the same budget of pictures.

HPS alone is hacked. The papers of this field each propose what to do about it: penalise the distance, ask a
second preference model, normalise, select, constrain, ask a judge, let the reward learn, imitate the best, stop in
time. Here each trains the same tiny policy for the same 50 steps of 128 pictures, from several seeds, and gold,
which nobody trained on, says what became of the pictures:

    proxy gain     hps after - before, the thing everybody wants to have risen
    aligned        the change of gold's first factor: does the picture show what was asked
    artifact-free  the change in the share of pictures that are whole
    gold           the change of gold = aligned * clean
    gold per hps   the change of gold for one unit of proxy gain: what the gain is worth

Run:   python contest.py                 what is missing is trained (hours; it goes on where it was stopped), then
                                         the table and docs/contest.png
       python contest.py --seeds 1       one seed, a table without intervals

You should see:  a bar over all runs; then one line a cure. Every run's numbers and its command are kept in
docs/contest/, a small file each, so the table can be made again without training anything.

Read next: README.md, "Which cure works?"
"""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import tyro
from tqdm import tqdm

from evaluation import hacking
from evaluation import pages as report
from evaluation.pages import interval, mean
from training.files import HERE, atomic, read_jsonl

PLAIN = "Are there artifacts in this picture? Answer yes or no."
BUDGET = "--max-steps 50 --eval-steps 10 --save-steps 25 --save-total-limit 1 --best-of 0"
MEASURED = (
    "hps",
    "artifact",
    "gold",
    "gold-clean",
    "gold-aligned",
)  # watched in every run, unless they train it

# What is tried: name -> (where the idea is from, flags).
CURES = {
    "no cure": ("", "--rewards hps"),
    "KL, beta .05": ("Gao et al.", "--rewards hps --beta .05"),
    "KL, beta .1": ("", "--rewards hps --beta .1"),
    "KL, beta .2": ("", "--rewards hps --beta .2"),
    "two preferences, mean": ("Helping or Herding", "--rewards hps,pickscore --combine mean"),
    "two preferences, min": ("Coste et al.", "--rewards hps,pickscore --combine min"),
    "two preferences, mean - variance": ("Coste et al.", "--rewards hps,pickscore --combine uwo"),
    "judge, summed, weight .5": ("ArtifactReward", "--rewards hps,artifact:.5"),
    "judge, summed": ("ArtifactReward", "--rewards hps,artifact"),
    "judge, summed, weight 2": ("ArtifactReward", "--rewards hps,artifact:2"),
    "judge, summed, plain question": (
        "ArtifactReward",
        f"--rewards hps,artifact --question '{PLAIN}'",
    ),
    "judge, normalised": ("GDPO", "--rewards hps,artifact --combine normalized"),
    "judge, Pareto": ("Parrot", "--rewards hps,artifact --combine pareto"),
    "judge, constraint": ("constrained RLHF", "--rewards hps,artifact --combine constrained"),
    "adversarial alone": ("Adv-GRPO", "--rewards adversarial"),
    "adversarial": ("Adv-GRPO", "--rewards hps,adversarial --combine normalized"),
    "adversarial PickScore": (
        "Adv-GRPO",
        "--rewards hps,adversarial-pickscore --combine normalized",
    ),
    "judge and adversarial": ("", "--rewards hps,artifact,adversarial --combine normalized"),
    "best-of-8 fine-tuning": ("RAFT", "--rewards hps --advantage best --beta 0"),
}
STOPPED = "early stopping"  # made of the runs of "no cure": nothing more is trained


@dataclass
class Config:
    seeds: int = 3  # of each cure
    workers: int = os.cpu_count()  # runs at a time, a core each
    output_dir: str = "runs/contest"  # their run folders
    results: str = str(HERE / "docs" / "contest")  # their numbers
    figure: str = str(HERE / "docs" / "contest.png")


def file_of(cfg, cure, seed):
    return Path(cfg.results) / f"{re.sub('[^a-z0-9.]+', '_', cure.lower())}_seed{seed}.json"


def command(cfg, cure, seed):
    """The flags of one run, as grpo.py takes them."""
    flags = shlex.split(CURES[cure][1])
    trained = flags[flags.index("--rewards") + 1]
    watched = [
        name for name in MEASURED if name not in [part.split(":")[0] for part in trained.split(",")]
    ]
    name = file_of(cfg, cure, seed).stem
    return [
        *flags,
        "--eval-rewards",
        ",".join(watched),
        *BUDGET.split(),
        "--seed",
        str(seed),
        "--output-dir",
        cfg.output_dir,
        "--run-name",
        name,
        "--resume",
        "latest",
    ]


# --- one run --------------------------------------------------------------------------------------


def train(cfg, cure, seed):
    """Run grpo.py, on one core, and keep its numbers. Returns an error message, or None."""
    flags = command(cfg, cure, seed)
    run = Path(cfg.output_dir) / file_of(cfg, cure, seed).stem
    run.parent.mkdir(parents=True, exist_ok=True)
    with open(run.with_suffix(".log"), "w") as log:
        done = subprocess.run(
            [sys.executable, str(HERE / "grpo.py"), *flags],
            stdout=log,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    if done.returncode:
        return f"{cure}, seed {seed}: ended with {done.returncode}, see {run.with_suffix('.log')}"
    numbers = {
        "cure": cure,
        "seed": seed,
        "command": shlex.join(["torchrun", "grpo.py", *flags]),
        **measure(run),
    }
    with atomic(file_of(cfg, cure, seed)) as file:
        json.dump(numbers, file, indent=1)


def measure(run):
    """A finished run -> its tests, and what the tests do not hold."""
    _, steps, tests, _ = hacking.read_run(run)
    seconds = sum(
        value for line in steps for name, value in line.items() if name.startswith("seconds/")
    )
    kept = [{name: t[name] for name in ("step", "kl", "artifact-free", *MEASURED)} for t in tests]
    return {
        "tests": kept,
        "seconds": seconds,
        "stop": stopping_time(run, tests),
        # Of the groups of every training step: the tests paint one picture a prompt.
        "diversity": [line["diversity"] for line in steps],
    }


def stopping_time(run, tests, watched="artifact"):
    """Early stopping without the truth: the last test before one at which the watched judge has fallen by more than
    two standard errors (picture by picture, against the first test). Returns its place among the tests."""
    records = [read_jsonl(Path(run) / "tests" / f"step_{t['step']:06d}.jsonl") for t in tests]
    for place in range(1, len(tests)):
        change, error = hacking.paired(records[0], records[place], watched)
        if change < -2 * error:
            return place - 1
    return len(tests) - 1


# --- all of them ----------------------------------------------------------------------------------


def read_results(cfg):
    """cure -> the numbers of its runs so far; early stopping is "no cure" up to its stopping time."""
    results = defaultdict(list)
    for cure in CURES:
        for seed in range(1, cfg.seeds + 1):
            if file_of(cfg, cure, seed).is_file():
                results[cure].append(json.loads(file_of(cfg, cure, seed).read_text()))
    for run in results["no cure"]:
        kept, last = run["tests"][: run["stop"] + 1], run["tests"][-1]["step"]
        share = kept[-1]["step"] / last
        results[STOPPED].append(run | {"tests": kept, "seconds": run["seconds"] * share})
    return {cure: results[cure] for cure in ["no cure", STOPPED, *CURES] if results[cure]}


def changes(runs):
    """The runs of a cure -> column -> (mean, half width of the 95 % interval) of after - before."""

    def over(value):
        return interval([value(run) for run in runs])

    def gain(name):
        return lambda run: run["tests"][-1][name] - run["tests"][0][name]

    def diversity(run):
        step = run["tests"][-1]["step"]  # the five steps up to it, against the first two
        return (
            mean(run["diversity"][max(0, step - 5) : step]) - mean(run["diversity"][:2])
            if step
            else 0.0
        )

    return {
        "hps": over(gain("hps")),
        "aligned": over(gain("gold-aligned")),
        "artifact-free": over(gain("artifact-free")),
        "gold": over(gain("gold")),
        "diversity": over(diversity),
        "KL": over(lambda run: run["tests"][-1]["kl"]),
        "minutes": over(lambda run: run["seconds"] / 60),
    }


def contest_table(results):
    rows = []
    for cure, runs in results.items():
        row = {
            "cure": cure,
            "from": CURES.get(cure, ("the onset, seen by the judge",))[0],
            "runs": len(runs),
        }
        columns = changes(runs)
        for name, (center, width) in columns.items():
            digits = 1 if name in ("KL", "minutes") else 3
            sign = "" if name in ("KL", "minutes") else "+"
            sure = math.isfinite(width) and name not in ("diversity", "KL", "minutes")
            row[name] = f"{center:{sign}.{digits}f}" + (f" ± {width:.{digits}f}" if sure else "")
        # A ratio of means, only where the proxy did rise: a thousandth of nothing protects nothing.
        (proxy, width), (gold, _) = columns["hps"], columns["gold"]
        row["gold per hps"] = (
            f"{gold / proxy:+.2f}" if proxy > (width if math.isfinite(width) else 0.02) else "-"
        )
        rows.append(row)
    return rows


def contest_figure(results, path):
    """Proxy gain against the truth: a marker a cure, with a thin line to each of its seeds. Up and right is better."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(14, 6.5), layout="constrained")
    for number, (cure, runs) in enumerate(results.items(), 1):
        center, each = changes(runs), [changes([run]) for run in runs]
        for axis, name in zip(axes, ("artifact-free", "gold")):
            x, y = center["hps"][0], center[name][0]
            for seed in each:
                axis.plot(
                    [x, seed["hps"][0]],
                    [y, seed[name][0]],
                    color=f"C{number % 10}",
                    linewidth=0.8,
                    alpha=0.5,
                )
            axis.plot(
                x,
                y,
                "os^Dv"[number // 10],
                color=f"C{number % 10}",
                markersize=8,
                label=f"{number}  {cure}" if axis is axes[0] else None,
            )
            axis.annotate(
                str(number), (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8
            )
    for axis, name in zip(axes, ("the share of artifact-free pictures", "gold")):
        axis.axhline(0, color="black", linewidth=0.6)
        axis.axvline(0, color="black", linewidth=0.6)
        axis.set(xlabel="change of hps (the proxy)", ylabel=f"change of {name} (the truth)")
        axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    with atomic(path, "wb") as file:
        figure.savefig(file, format="png", dpi=80)
    plt.close(figure)


def main(cfg):
    # Seeds outside, cures inside: stopped at any time, every cure has had about as many runs as any other.
    todo = [
        (cure, seed)
        for seed in range(1, cfg.seeds + 1)
        for cure in CURES
        if not file_of(cfg, cure, seed).is_file()
    ]
    failed = []
    with ThreadPoolExecutor(cfg.workers) as pool:
        running = [pool.submit(train, cfg, cure, seed) for cure, seed in todo]
        try:
            for done in tqdm(as_completed(running), total=len(todo), desc="runs", disable=not todo):
                failed += [done.result()] if done.result() else []
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    results = read_results(cfg)
    contest_figure(results, cfg.figure)
    print("\n".join(report.markdown(contest_table(results))))
    for message in failed:
        print(f"error: {message}", file=sys.stderr)
    sys.exit(3 if failed else 0)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
