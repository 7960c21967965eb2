"""Was the reward hacked? Numbers of finished runs: gains over seeds, best-of-n, onset of hacking.

A reward model is a proxy for what we want. Under optimisation the true quality (here: gold) first
rises with the proxy; then it falls while the proxy goes on rising: over-optimisation (Gao et al.,
arXiv:2210.10760). The distance from the base policy is sqrt(KL). Best-of-n optimises the same proxy
without training: draw n pictures and keep the one with the highest reward,

    KL(best of n || base) <= log n - (n - 1) / n

(equal where no two pictures and no two rewards are alike, arXiv:2401.01879).

Onset of hacking, the rule: take the test at which gold is highest. It is the onset if, from there
to the last test, gold falls by more than three standard errors and the first training reward rises.
The standard error is of the differences picture by picture, because all tests use the same prompts
and the same noise. Three and not two, because the highest of many tests is high by chance, too:
where gold does not change while the proxy rises, two find an onset in 11 % of runs with 9 tests,
three in 1 %; with 31 tests, 24 % and 3 % (tests/test_evaluation.py simulates it). A reward that
learns along with the policy is no proxy: its scores of two tests cannot be compared.

Read next: curves.py
"""

import contextlib
import json
import math
import re
import statistics
import sys
from collections import defaultdict
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from evaluation.tables import interval, t_95
from training.files import usage_error
from training.flags import LEARNING, cure_flags, reward_names
from training.records import artifact_free, mean, mean_over_prompts, read_json, read_jsonl
from training.run_folder import MAY_DIFFER

ERRORS = 3  # of the rule for the onset
# Flags in which two seeds of one experiment may differ: where they ran, not what they computed.
PLACE = MAY_DIFFER - {"max_steps"} | {"seed"}
# Flags in which two runs may differ and still be the same experiment on other rewards.
REWARD_FLAGS = set("rewards eval_rewards combine floor question judge_url judge_model".split())
REWARD_FLAGS |= set("run_name output_dir resume best_of".split())


class RunRecords(NamedTuple):
    """What a run folder holds, apart from its pictures."""

    config: dict  # config.json: the flags, the command, the versions
    steps: list  # a dict for each training step
    tests: list  # a dict of means for each test
    pool: list  # a record for each picture of the best-of-n pool; empty if there is none


# Flags without which a folder is of another version.
NEEDED = {"rewards", "eval_rewards", "num_generations"}


def read_run(run):
    """The RunRecords of a run folder. No run folder, or a damaged one: exit code 2."""
    run = Path(run)
    if not ((run / "test.jsonl").is_file() and (run / "config.json").is_file()):
        usage_error(
            f"{run}: a run folder has test.jsonl and config.json; make one with torchrun grpo.py"
        )
    optional = [run / "metrics.jsonl", run / "best_of_n.jsonl"]
    steps, pool = (read_jsonl(path) if path.is_file() else [] for path in optional)
    config, tests = read_json(run / "config.json"), read_jsonl(run / "test.jsonl")
    flags = config.get("flags")
    if not isinstance(flags, dict) or not NEEDED <= flags.keys():
        usage_error(f"{run}/config.json: damaged, or of another version; train the run again")
    if not tests or not all({"step", "kl"} <= test.keys() for test in tests):
        usage_error(f"{run}/test.jsonl: holds no test, or a damaged one; train the run again")
    config["flags"] = cure_flags() | flags
    return RunRecords(config, steps, tests, pool)


def runs_by_rewards(runs):
    """Run folders -> dict: training rewards -> [(folder, RunRecords)], its seeds.

    Runs are seeds of one experiment if all flags agree but the seed and those that say where a run
    goes. Two experiments on the same rewards are told apart by the flags in which they differ. Of
    two runs of one seed the newer one counts."""
    experiments = defaultdict(dict)
    for run in sorted(map(Path, runs), key=age):
        records = read_run(run)
        flags = {k: v for k, v in records.config["flags"].items() if k not in PLACE}
        seed = records.config["flags"].get("seed")
        known = experiments[json.dumps(flags, sort_keys=True)]
        if seed in known:
            print(f"{known[seed][0]} and {run} are one seed; the newer counts", file=sys.stderr)
        known[seed] = run, records
    all_flags = {key: json.loads(key) for key in experiments}
    groups = {}
    for key, flags in all_flags.items():
        others = [f for f in all_flags.values() if f["rewards"] == flags["rewards"]]
        differs = [k for k in flags if any(other.get(k) != flags[k] for other in others)]
        details = ", ".join(f"{name} {flags[name]}" for name in differs)
        title = flags["rewards"] + (f" ({details})" if details else "")
        groups[title] = [experiments[key][seed] for seed in sorted(experiments[key], key=str)]
    order = {Path(run): i for i, run in enumerate(runs)}
    return dict(sorted(groups.items(), key=lambda item: order[item[1][0][0]]))


def age(run):
    """When its last test was written."""
    file = Path(run) / "test.jsonl"
    return file.stat().st_mtime if file.is_file() else 0


def names_in(config, flag):
    """The names of a flag's rewards."""
    return reward_names(config["flags"].get(flag))


def proxy_of(config):
    """The first training reward that stays the same during training; None if there is none."""
    return next((name for name in names_in(config, "rewards") if name not in LEARNING), None)


def score_of(name):
    """The function record -> its score `name`."""
    return artifact_free if name == "artifact-free" else itemgetter(name)


# --- numbers of one run ---------------------------------------------------------------------------


def by_prompt(pool, name):
    """The records whose score `name` is finite: a list for each prompt."""
    prompts = defaultdict(list)
    for record in pool:
        if math.isfinite(record[name]):
            prompts[record["id"]].append(record)
    return prompts.values()


def best_of_n(pool, n, value):
    """Expected value(record) of the best of n pictures by "total", averaged over the prompts.

    Unbiased, from a pool of N >= n pictures for each prompt: the i-th best picture of the pool (i
    from 0) is the best one in C(N-1-i, n-1) of the C(N, n) ways to draw n pictures. Prompts that
    lack a score count for no n: else two n would be means over different prompts."""
    groups = [[r for r in g if math.isfinite(value(r))] for g in by_prompt(pool, "total")]
    N, expected = max(map(len, groups), default=0), []
    for group in groups:
        if n <= N == len(group):
            ranked = sorted(group, key=lambda record: -record["total"])
            terms = [math.comb(N - 1 - i, n - 1) * value(record) for i, record in enumerate(ranked)]
            expected.append(sum(terms) / math.comb(N, n))
    return mean(expected)


def within_prompt_std(pool, name):
    """Standard deviation of a score among the base policy's pictures of one prompt."""
    groups = [[record[name] for record in group] for group in by_prompt(pool, name)]
    return math.sqrt(mean(statistics.variance(scores) for scores in groups if len(scores) > 1))


def gains_of(before, after, name):
    """[(prompt id, after - before)] of the records with the same id and sample, where both have
    this score."""
    value = score_of(name)
    known = {(r["id"], r["sample"]): value(r) for r in before}
    gains = [(r["id"], value(r) - known.get((r["id"], r["sample"]), math.nan)) for r in after]
    return [(prompt, gain) for prompt, gain in gains if math.isfinite(gain)]


def paired(before, after, name):
    """Mean and standard error over prompts of after - before, of records with the same id and
    sample."""
    prompts, gains = zip(*gains_of(before, after, name) or [("", math.nan)])
    return mean_over_prompts(gains, prompts)


def test_files(run):
    """step -> the file of its test's records, in order. None there: exit code 2."""
    files = sorted((Path(run) / "tests").glob("step_*.jsonl"))
    files = {int(f.stem[5:]): f for f in files if re.fullmatch(r"step_\d{6,}", f.stem)}
    if not files:
        usage_error(f"{run}: tests/step_*.jsonl are missing; a run folder has one for each test")
    return files


def read_test(run, step):
    """The records of the test at this step, or of the "first" or the "last" one. Missing or empty:
    exit code 2."""
    files = test_files(run)
    step = {"first": min(files), "last": max(files)}.get(step, step)
    records = read_jsonl(files[step]) if step in files else []
    if not records:
        usage_error(f"{run}/tests/step_{step:06d}.jsonl: missing or empty; train the run again")
    return records


def change(run, name):
    """Mean and standard error of last test minus first test, picture by picture."""
    return paired(read_test(run, "first"), read_test(run, "last"), name)


def after_the_peak(run):
    """What happens from the test with the highest gold to the last one: (its step, change of gold,
    standard error of this change, change of the proxy). NaN for what has no score."""
    config, _, tests, _ = read_run(run)
    proxy, last = proxy_of(config), tests[-1]
    height = lambda test: test.get("gold", math.nan)
    peak = max([test for test in tests if math.isfinite(height(test))] or tests, key=height)
    fall = paired(read_test(run, peak["step"]), read_test(run, last["step"]), "gold")
    return peak["step"], *fall, last.get(proxy, math.nan) - peak.get(proxy, math.nan)


def may_have_onset(run):
    """The control has none: what falls there is drift. Nor has a run without gold or a proxy."""
    config, _, tests, _ = read_run(run)
    return "gold" in tests[0] and not is_control(run) and bool(proxy_of(config))


def onset(run):
    """The step of the onset of hacking, by the rule in this file's header; None if there is none,
    or if it cannot be decided."""
    if not may_have_onset(run):
        return None
    step, gold, error, proxy = after_the_peak(run)
    return step if gold < -ERRORS * error and proxy > 0 else None


def is_decided(run):
    """Have gold and the proxy the scores that the rule needs?"""
    if not may_have_onset(run):
        return True
    step, *numbers = after_the_peak(run)
    return step == read_run(run).tests[-1]["step"] or all(map(math.isfinite, numbers))


def onset_in_words(run):
    if not is_decided(run):
        return "unknown"
    step = onset(run)
    return "none" if step is None else f"step {step}"


def verdict(run, control=None):
    """What became of a run, in words. control: the run on `noise` beside it, if there is one."""
    config, _, tests, _ = read_run(run)
    proxy, last = proxy_of(config), tests[-1]["step"]

    def moved(where, name):
        gain, error = change(where, name)
        if math.isnan(gain):
            return "has no score that the first and the last test share"
        how = "rose" if gain > 0 else "fell" if gain < 0 else "changed"
        return f"{how} by {abs(gain):.3f} ± {error:.3f}"

    found = {proxy: proxy, "gold": "gold, the truth,"}
    parts = [f"{title} {moved(run, name)}" for name, title in found.items() if name in tests[0]]
    text = f"In {last} steps {', and '.join(parts)} (± one standard error). " if parts else ""
    if "gold" not in tests[0]:
        return f"{text}Gold was not measured, so no onset of hacking can be given."
    if control and "gold" in read_run(control).tests[0]:
        text += f"Under the control, which learns from noise, gold {moved(control, 'gold')}. "
    if not proxy:
        return f"{text}The training reward learns, too, so no onset of hacking can be given."
    if not is_decided(run):
        return f"{text}Scores are missing, so the onset of hacking cannot be decided."
    step, gold, error, _ = after_the_peak(run)
    if onset(run) is not None:
        fall = f"from there on gold fell by {-gold:.3f} ± {error:.3f} while {proxy} rose"
        return f"{text}Onset of hacking: step {step}; {fall}."
    text += "No onset of hacking: "
    if step == last:
        return f"{text}gold is highest at the last test."
    if gold >= -ERRORS * error:
        fall = f"gold fell by {-gold:.3f} from its highest test, step {step}"
        limit = f"the rule's {ERRORS} standard errors ({ERRORS * error:.3f})"
        return f"{text}{fall}, by less than {limit}."
    return f"{text}after the highest gold, at step {step}, gold fell, but {proxy} did not rise."


def is_control(run):
    return read_run(run).config["flags"]["rewards"] == "noise"


def companions(run):
    """The finished runs beside this one that differ in the rewards only, the newest of each kind:
    the control (noise), the hack (its first reward alone) and the cure (that and the judge)."""
    own, found = read_run(run).config["flags"], {}
    proxy = own["rewards"].split(",")[0]
    kinds = {"noise", proxy, f"{proxy},artifact"} - {own["rewards"]}
    folders = [file.parent for file in Path(run).resolve().parent.glob("*/test.jsonl")]
    for folder in sorted(folders, key=age):
        flags = {}
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # not our run
            flags = cure_flags() | json.loads((folder / "config.json").read_text())["flags"]
        same = all(flags.get(k) == v for k, v in own.items() if k not in REWARD_FLAGS)
        if same and flags["rewards"] in kinds and is_finished(folder):
            found[flags["rewards"]] = folder
    return list(found.values())


def is_finished(run):
    """Is this a whole folder of a finished run? A damaged neighbour must not cost a report."""
    try:
        config, _, tests, _ = read_run(run)
        read_test(run, "first"), read_test(run, "last")
    except SystemExit:
        print(f"{run}: damaged, and left out of the comparison", file=sys.stderr)
        return False
    pictures = any((Path(run) / "samples").glob("step_*.png"))
    return pictures and tests[-1]["step"] == config["flags"].get("max_steps")


def reward_drivers(run, steps=10):
    """Which reward dominates the advantage? A row for each reward, of the first and the last steps.

    "ties" is the share of the pairs in a group that the reward scores alike. In a plain sum the
    reward with the largest standard deviation within a group dominates."""
    config, files = read_run(run).config, sorted((Path(run) / "rollouts").glob("step_*.jsonl"))
    trained, G = names_in(config, "rewards"), config["flags"]["num_generations"]
    rows = []
    for title, chosen in (("first", files[:steps]), ("last", files[-steps:])):
        records = [record for file in chosen for record in read_jsonl(file)]
        for name in [*trained, *names_in(config, "eval_rewards")] if records else []:
            role = "trains" if name in trained else "held out"
            row = {"steps": f"{title} {len(chosen)}", "reward": name, "role": role}
            rows.append(row | group_statistics(records, name, G))
    return rows


def group_statistics(records, name, G):
    """The spread of one reward within groups of G, its ties, its correlation with the advantage."""
    scores = np.array([record[name] for record in records]).reshape(-1, G)
    centered = scores - np.nanmean(scores, 1, keepdims=True)
    known = np.isfinite(centered)
    advantages = np.array([record["advantage"] for record in records]).reshape(-1, G)[known]
    centered = centered[known]
    first, second = np.triu_indices(G, 1)
    ties = np.isclose(scores[:, first], scores[:, second], atol=1e-6, rtol=0)
    varies = len(centered) > 1 and centered.std() > 0 and advantages.std() > 0
    correlation = np.corrcoef(centered, advantages)[0, 1] if varies else math.nan
    return {
        "std within a group": float(np.sqrt((centered**2).mean() * G / (G - 1))),
        "ties": float(ties.mean()),
        "correlation with the advantage": float(correlation),
    }


# --- a table over seeds ---------------------------------------------------------------------------

CHANGE = "change, 95 % interval"


def seeds_table(runs):
    """Rows: for each set of training rewards, the first test, the last test and the change.

    The interval of the change is over seeds; of one seed, over its test prompts. For a reward the
    change is also given in standard deviations within a prompt: about one makes an average picture
    the best of a few."""
    rows = []
    for trained, members in runs_by_rewards(runs).items():
        pools = [records.pool for _, records in members]
        first, last = ([records.tests[i] for _, records in members] for i in (0, -1))
        block, base = [], [read_test(run, "first") for run, _ in members]
        for name in first[0]:
            if name == "step" or "/" in name or name in LEARNING:
                continue
            scale = None
            if "gold" not in name and name not in ("kl", "artifact-free"):
                scale = mean(within_prompt_std(records, name) for records in base)
            before, after = ([test[name] for test in tests] for tests in (first, last))
            # Paired: a picture without a score in one of the two tests does not count.
            gains, errors = zip(*(change(run, name) for run, _ in members))
            if len(members) == 1:
                last_test = read_test(members[0][0], "last")
                prompts = {prompt for prompt, _ in gains_of(base[0], last_test, name)}
                width = t_95(len(prompts)) * errors[0]
            else:
                width = interval([gain for gain in gains if math.isfinite(gain)])[1]
            block.append(change_row(name, before, after, mean(gains), width, scale))
        if "gold" in first[0]:
            text = ", ".join(onset_in_words(run) for run, _ in members)
            block.append({"measured": "onset of hacking", "before": "", "after": "", CHANGE: text})
        if all(pools):
            block += best_of_rows(pools, names_in(members[0][1].config, "rewards"))
        number = f"{len(members)} seeds" if len(members) > 1 else "1 seed, intervals over prompts"
        titles = [f"`{trained}`, {number}"]
        titles += [""] * (len(block) - 1)
        rows += [{"trained on": title} | row for title, row in zip(titles, block)]
    return rows


def change_row(measured, before, after, gain, width, scale=None):
    """One measure, before and after. gain, width: the change and half of its interval; scale: the
    unit in which the change is given as well."""
    text = f"{gain:+.3f}" + (f" ± {width:.3f}" if math.isfinite(width) else "")
    if scale and scale > 0:
        text += f" ({gain / scale:+.1f} within-prompt deviations)"
    return {"measured": measured, "before": mean(before), "after": mean(after), CHANGE: text}


def best_of_rows(pools, trained):
    """Rows: the rewards when nothing is trained, but the best of n of the base policy is chosen."""
    n = max(record["sample"] for record in pools[0]) + 1
    names = [name for name in pools[0][0] if name in [*trained, "gold"]]
    names += ["artifact-free"] if "gold-clean" in pools[0][0] else []
    rows = []
    for name in names:
        before, after = ([best_of_n(pool, k, score_of(name)) for pool in pools] for k in (1, n))
        gain, width = interval([b - a for a, b in zip(before, after)])
        rows.append(change_row(f"best of {n}: {name}", before, after, gain, width))
    return rows
