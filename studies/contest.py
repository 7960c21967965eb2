"""Which cure works? Those that the literature proposes, on the same budget of pictures.

HPS alone is hacked. Papers propose different cures: penalise the distance from the base policy, add
a second preference model, normalise, rank, round, select, constrain, add a judge, let the reward
learn, imitate the best picture, seek flat optima, average the weights, stop early. Here each cure
trains the same tiny policy for the same 80 steps of 128 pictures, from several seeds. Gold, which
is held out, measures what became of the pictures:

    hps            after - before: the gain of the proxy
    aligned        change of gold's first factor: does the picture show what the prompt says
    artifact-free  change of the share of pictures without artifacts
    gold           change of gold = aligned * clean
    against none   change of gold minus that of "no cure" with the same seed
    gold per hps   change of gold for each unit of proxy gain

Run:   python -m studies.contest              train what is missing (hours; a stopped contest goes
                                              on), then print two tables, draw docs/contest.png
       python -m studies.contest --seeds 0    the tables of docs/contest/, nothing is trained
       python -m studies.contest --cures "no cure" control    train these two only

You should see:  a progress bar over all runs, then one line for each alarm of evaluation/alarms.py
and one for each cure. Each run's numbers and command are kept in docs/contest/, so the tables can
be printed again without training.

Read next: docs/results.md, "Which cure works?"
"""

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import tyro
from tqdm import tqdm

import rewards
from evaluation import alarms, hacking
from evaluation.tables import interval, markdown
from training.files import ROOT, atomic, lock, usage_error
from training.records import read_json
from training.run_folder import checkpoints

BUDGET = "--eval-steps 10 --save-steps 25 --best-of 0"
# Measured in every run: held out, unless the run trains on it.
MEASURED = ("hps", "artifact", "gold", "gold-clean", "gold-aligned")
# name -> {"from": where the idea is from, "family": of its colour, "flags": of grpo.py}
CURES = json.loads((ROOT / "studies/cures.json").read_text())
FAMILIES = {  # colours of at least 3:1 on white, told apart by colour-blind readers
    "none": "#000000",
    "control": "#767676",
    "stop early": "#767676",
    "KL": "#8C5A9E",
    "ensemble": "#B36B00",
    "transformed": "#8A7000",
    "flat": "#A0522D",
    "judge": "#0072B2",
    "adversarial": "#00805F",
    "imitation": "#C0392B",
}
STOPPED = "early stopping"  # computed from the runs of "no cure", without training


@dataclass
class Config:
    cures: tuple[str, ...] = tuple(CURES)  # those that are trained; names in studies/cures.json
    seeds: int = 5  # of each cure
    workers: int = os.cpu_count()  # runs at a time, a core each
    output_dir: str = "runs/contest"  # run folders go here
    results: str = str(ROOT / "docs" / "contest")  # their numbers go here
    figure: str = str(ROOT / "docs" / "contest.png")


def result_file(cfg, cure, seed):
    return Path(cfg.results) / f"{file_name(cure)}_seed{seed}.json"


def file_name(text):
    return re.sub("[^a-z0-9.]+", "_", text.lower())


# --- one run ------------------------------------------------------------------------------------


def command(cfg, cure, seed):
    """The flags of one run, as grpo.py takes them."""
    flags = shlex.split(CURES[cure]["flags"])
    trained = rewards.parse(flags[1])
    heldout = ",".join(name for name in MEASURED if name not in trained)
    flags += ["--eval-rewards", heldout, *BUDGET.split()]
    flags += ["--seed", str(seed), "--output-dir", cfg.output_dir]
    return [*flags, "--run-name", result_file(cfg, cure, seed).stem, "--resume", "latest"]


def train(flags, result, facts):
    """Run grpo.py with these flags on one core; write its numbers, and these facts, into the file
    `result`. Returns an error message or None."""
    run = Path(flags[flags.index("--output-dir") + 1]) / result.stem
    run.parent.mkdir(parents=True, exist_ok=True)
    if run.exists() and not checkpoints(run):  # nothing to resume from
        with lock(run, "--output-dir"):  # unless it is at work there: exit code 2
            shutil.rmtree(run)
    script, one_core = str(ROOT / "grpo.py"), os.environ | {"OMP_NUM_THREADS": "1"}
    screen = run.with_name(f"{run.name}.log")
    with open(screen, "w") as log:
        done = subprocess.run(
            [sys.executable, script, *flags], stdout=log, stderr=log, env=one_core
        )
    if done.returncode:
        return f"{result.stem}: ended with {done.returncode}, see {screen}"
    made = read_json(run / "config.json")
    facts |= {name: made[name] for name in ("date", "commit", "hardware") if name in made}
    numbers = facts | {"command": shlex.join(["torchrun", "grpo.py", *flags])}
    with atomic(result) as file:
        json.dump(numbers | measure(run), file, indent=1)


def train_missing(jobs, workers):
    """jobs: [(flags, result, facts)] of `train`. Trains those without a result, `workers` at a
    time; returns error messages."""
    if workers < 1:
        usage_error(f"--workers {workers}: must be 1 or more")
    todo, errors = [job for job in jobs if not job[1].is_file()], []
    with ThreadPoolExecutor(workers) as pool:
        pending = [pool.submit(train, *job) for job in todo]
        try:
            for done in tqdm(as_completed(pending), total=len(todo), desc="runs", disable=not todo):
                errors += filter(None, [done.result()])
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    return errors


def measure(run):
    """The numbers of a finished run that the table needs."""
    _, steps, tests, _ = hacking.read_run(run)
    seconds = [line[name] for line in steps for name in line if name.startswith("seconds/")]
    names = ("step", "kl", "artifact-free", *MEASURED)
    first = hacking.read_test(run, "first")
    return {
        "tests": [{name: test[name] for name in names} for test in tests],
        "deviation": hacking.within_prompt_std(first, "hps"),
        "seconds": sum(seconds),
        "alarms": alarm_steps(run),
        "onset": hacking.onset(run),
    }


def alarm_steps(run):
    """Alarm -> the step at which it went off first, or None; those that were measured."""
    values = {name: alarm(run) for name, alarm in alarms.ALARMS.items()}
    return {name: alarms.first_alarm(name, found) for name, found in values.items() if found}


def first_step(alarm_steps):
    """The step at which the first of them went off, or None."""
    return min((step for step in alarm_steps.values() if step is not None), default=None)


def stopping_time(run):
    """Early stopping without gold: the index of the last test before the first alarm goes off
    (evaluation/alarms.py; the judge is held out)."""
    first, tests = first_step(run["alarms"]), run["tests"]
    return max(i for i, t in enumerate(tests) if i == 0 or first is None or t["step"] < first)


# --- all runs -----------------------------------------------------------------------------------


def read_results(cfg):
    """cure -> numbers of all its finished runs, whatever --seeds is. Early stopping is "no cure" up
    to its stopping time."""
    results = defaultdict(list)
    for cure in CURES:
        files = sorted(Path(cfg.results).glob(f"{file_name(cure)}_seed*.json"))
        results[cure] = [json.loads(file.read_text()) for file in files]
    for run in results["no cure"]:
        tests = run["tests"][: stopping_time(run) + 1]
        share = tests[-1]["step"] / run["tests"][-1]["step"]
        results[STOPPED].append(run | {"tests": tests, "seconds": run["seconds"] * share})
    return {cure: results[cure] for cure in ["no cure", STOPPED, *CURES] if results[cure]}


def gain(run, name):
    return run["tests"][-1][name] - run["tests"][0][name]


MEASURES = {
    "hps": lambda run: gain(run, "hps"),
    "aligned": lambda run: gain(run, "gold-aligned"),
    "artifact-free": lambda run: gain(run, "artifact-free"),
    "gold": lambda run: gain(run, "gold"),
    "KL": lambda run: run["tests"][-1]["kl"],
    "minutes": lambda run: run["seconds"] / 60,
}


def against_none(results, runs):
    """Changes of gold beyond those of "no cure". Seed by seed, since runs of one seed have the same
    prompts and random numbers, so that their difference varies less."""
    none = {run["seed"]: gain(run, "gold") for run in results.get("no cure", ())}
    return [gain(run, "gold") - none[run["seed"]] for run in runs if run["seed"] in none]


def changes(runs):
    """The runs of a cure -> measure -> (mean, half the width of its 95 % interval over seeds)."""
    return {name: interval([value(run) for run in runs]) for name, value in MEASURES.items()}


def with_interval(center, width, runs):
    """The interval of two runs is 12.7 standard errors wide, and says nothing."""
    return f"{center:+.3f} ± {width:.3f}" if runs > 2 else f"{center:+.3f}"


def contest_table(results):
    """A row for each cure: the most gold for each unit of hps first, those without a rise last."""
    rows = []
    for cure, runs in results.items():
        source = CURES[cure]["from"] if cure != STOPPED else "at the first alarm"
        row, columns = {"cure": cure, "from": source, "runs": len(runs)}, changes(runs)
        for name, (center, width) in columns.items():
            row[name] = with_interval(center, width, len(runs))
        for name in ("KL", "minutes"):
            row[name] = f"{columns[name][0]:.1f}"
        pairs = against_none(results, runs) if cure != "no cure" else []
        row["against none"] = with_interval(*interval(pairs), len(pairs)) if pairs else ""
        # A ratio of means, only where the proxy rose: divided by noise it would mean nothing.
        (proxy, width), (gold, _) = columns["hps"], columns["gold"]
        rose = proxy > (width if len(runs) > 2 else 0.02)
        row["gold per hps"] = f"{gold / proxy:+.2f}" if rose else "-"
        rows.append((-gold / proxy if rose else math.inf, row))
    return [row for _, row in sorted(rows, key=lambda pair: pair[0])]


def detection_table(results):
    """Do the alarms, which know no gold, find the runs that gold calls hacked? A row for each
    alarm; a column for each kind of run: in how many it went off, and when, after the onset."""
    runs = [(cure, run) for cure, found in results.items() if cure != STOPPED for run in found]
    control = lambda cure: CURES[cure]["family"] == "control"
    kinds = {"hacked": [run for _, run in runs if run["onset"] is not None]}
    kinds["not hacked"] = [r for cure, r in runs if r["onset"] is None and not control(cure)]
    kinds["control"] = [run for cure, run in runs if control(cure)]
    rows = []
    measured = [name for name in alarms.LIMITS if any(name in run["alarms"] for _, run in runs)]
    for name in [*measured, "any of them"]:
        row = {"alarm": name, "limit": f"{alarms.LIMITS[name]:g}" if name in alarms.LIMITS else ""}
        for kind, members in kinds.items():
            steps = [r["alarms"] | {"any of them": first_step(r["alarms"])} for r in members]
            known = [(r, step[name]) for r, step in zip(members, steps) if name in step]
            off = [(r, step) for r, step in known if step is not None]
            row[kind] = f"{len(off)} of {len(known)}"
            if kind == "not hacked":  # no onset; but are there more faults than before training?
                worse = sum(gain(r, "artifact-free") < -0.01 for r, _ in off)
                row["of these with more faults"] = str(worse)
            if kind == "hacked":
                delays = [step - r["onset"] for r, step in off]
                row["after the onset (median)"] = f"{median(delays):+g} steps" if off else ""
        rows.append(row)
    return rows


def color_of(cure):
    return FAMILIES[CURES[cure]["family"] if cure != STOPPED else "stop early"]


def contest_figure(results, path):
    """A row for each cure, the most gold first: a dot for each seed; with three or more, a line for
    the 95 % interval of their mean. Left the proxy, then two measures of the truth."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    order = sorted(results, key=lambda cure: changes(results[cure])["gold"][0])
    panels = {"hps": " (the proxy)", "gold": " (the truth)", "artifact-free": ""}
    size = {"figsize": (10, 1.2 + 0.27 * len(order)), "layout": "constrained"}
    figure, axes = plt.subplots(1, len(panels), sharey=True, **size)
    for axis, (name, role) in zip(axes, panels.items()):
        for y, cure in enumerate(order):
            values, color = [MEASURES[name](run) for run in results[cure]], color_of(cure)
            center, width = interval(values)
            if len(values) > 2:
                axis.hlines(y, center - width, center + width, color=color, linewidth=5, alpha=0.35)
            axis.scatter(values, [y] * len(values), 30, color=color, edgecolors="white", zorder=2)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_title(f"change of {name}{role}", fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(order)), order, fontsize=9)
    for label, cure in zip(axes[0].get_yticklabels(), order):
        label.set_color(color_of(cure))
    for axis in axes[1:]:  # worse than before training
        left, right = axis.get_xlim()
        axis.axvspan(left, 0, color="#D55E00", alpha=0.08, linewidth=0)
        axis.set(xlim=(left, right), ylim=(-0.7, len(order) - 0.3))
    with atomic(path, "wb") as file:
        figure.savefig(file, format="png", dpi=80)
    plt.close(figure)


def print_table(rows, errors):
    """The table, then the runs that failed: exit code 3 if there are any."""
    print(markdown(rows))
    for message in errors:
        print(f"error: {message}", file=sys.stderr)
    sys.exit(3 if errors else 0)


def main(cfg):
    for cure in cfg.cures:
        if cure not in CURES:
            usage_error(f"--cures {cure!r}: must be of studies/cures.json: {', '.join(CURES)}")
    # Seeds in the outer loop: a stopped contest has about as many runs of each cure.
    jobs = [
        (command(cfg, cure, seed), result_file(cfg, cure, seed), {"cure": cure, "seed": seed})
        for seed in range(1, cfg.seeds + 1)
        for cure in cfg.cures
    ]
    errors = train_missing(jobs, cfg.workers)
    results = read_results(cfg)
    contest_figure(results, cfg.figure)
    print(markdown(detection_table(results)), end="\n\n")
    print_table(contest_table(results), errors)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
