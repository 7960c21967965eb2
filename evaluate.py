"""Evaluate: runs, folders of pictures, pairs of pictures, one run against another.

Rules against fooling oneself. A training reward is never used as evidence. The mean of a
folder comes with its standard error *over prompts* (four pictures of one prompt are not four
independent samples) and with the number of pictures that got no score. Two runs are compared
picture by picture, same prompt and same random numbers, which removes the difficulty of the
prompts. A reward is tested on pairs, a clean and a broken picture of one prompt, before it is
trusted:

    accuracy = (pairs where the clean picture scores higher + ties / 2) / pairs    Table 2 of
                                                                                   arXiv:2601.03468

Run:   python evaluate.py                                  the newest run: figure, table, report
       python evaluate.py runs/* --figure hacking.png      all of them, and a table over seeds
       python evaluate.py --images outputs --prompts tiny_world/prompts/test.jsonl
       python evaluate.py --pairs tiny_world/pairs         which reward notices broken pictures?
       python evaluate.py --compare RUN_A RUN_B            paired differences, and the pictures
       python evaluate.py --audit RUN                      alarms of hacking that need no gold
       python evaluate.py --summarize a.jsonl b.jsonl      result files of GenEval, WISE, DPG
       python evaluate.py --images outputs --prompts wise.json --wise verified --judge-url URL

You should see:  tables in Markdown; HTML pages that open from disk.

Left out: the detectors of GenEval and T2I-CompBench. Their own scorers read what
`generate.py --layout` writes.   Read next: adversarial_reward.py
"""

import functools
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tqdm import tqdm

import rewards as reward_lib
from evaluation import alarms, comparison, hacking, official_scores, wise
from evaluation.figures import hacking_figure, report_page
from evaluation.layouts import find_images
from evaluation.tables import bootstrap, markdown
from reward_models import guards
from reward_models.judge import DEFAULT_URL, ServedJudge
from training.decode import file_digest, open_picture
from training.files import lock, usage_error
from training.flags import JudgeUrls
from training.processes import bar, pick_device
from training.prompts import load_prompts
from training.records import mean, mean_over_prompts, read_jsonl, write_jsonl

# The paper's Table 2 (arXiv:2601.03468): accuracy on its 202 pairs.
PAPER = dict(hps=0.53, aesthetic=0.42, imagereward=0.68, maniqa=0.39, deqa=0.51, gdino=0.58)
PAPER |= dict(orm=0.56, unified=0.65, artifact=0.80)


@dataclass
class Config:
    runs: Annotated[tuple[str, ...], tyro.conf.Positional] = ()  # run folders [newest in runs/]
    figure: str = ""  # also draw all these runs into one figure, here
    images: str = ""  # a folder of pictures, in any layout of evaluation/layouts.py
    prompts: str = ""  # their prompts, a file of any format
    tile: Literal[0, 1, 4] = 0  # pictures in a file: 4 in DPG-Bench's tiles [1, or an error]
    rewards: str = "hps,artifact"  # what to score pictures and pairs with
    wise: Literal["", "legacy", "verified"] = ""  # score by this protocol of WISE instead
    pairs: str = ""  # a folder of pairs with test.jsonl, such as tiny_world/pairs
    compare: tuple[str, str] | None = None  # two run folders, or two score files of --images
    # run folders [newest in runs/]: was it hacked? exit code 4 if an alarm goes off
    audit: tuple[str, ...] | None = None
    summarize: tuple[str, ...] = ()  # result files of official scorers
    output: str = ""  # file of the scores or of the comparison [beside the pictures; compare.html]
    model: Literal["tiny", "real"] = "tiny"  # tiny: our reward checkpoints; real: the published
    judge_url: JudgeUrls = ()  # judge server; again for more [tiny: in this process]
    strict: bool = False  # a prompt without pictures is an error


def load_rewards(cfg):
    """name -> reward, of --rewards."""
    parts = reward_lib.parse_parts(cfg.rewards)
    if not parts:
        usage_error("--rewards is empty; name at least one, such as hps,artifact")
    reward_lib.refuse_learners(reward_lib.unweighted(cfg.rewards))
    if cfg.judge_url and "artifact" not in (name for name, _, url in parts if not url):
        usage_error("--judge-url: no reward `artifact` here uses it")
    checkpoint, device = "tiny" if cfg.model == "tiny" else None, pick_device("auto")[0]
    loaded = {}
    for name, _, url in parts:
        options = {"judge_urls": cfg.judge_url} if name == "artifact" else {}
        loaded[name] = reward_lib.load(name, device, checkpoint, url, **options)
    return loaded


# --- a folder of pictures -----------------------------------------------------------------------


def score_images(matched, rewards, known, save, batch_size=64):
    """Score matched pictures [(row, k, path)]; returns records, one dict for each picture. known:
    records of earlier calls; what they hold is not scored again. save(records) is called now and
    then. Pictures are open for one batch only, so memory does not grow."""
    records, starts = [], range(0, len(matched), batch_size)
    earlier = {(r["path"], r["sha256"], r["prompt"]): r for r in known}
    for start in tqdm(starts, desc=f"scoring, {batch_size} at a time"):
        batch = matched[start : start + batch_size]
        new = []
        for row, sample, path in batch:
            digest = file_digest(path)  # a redrawn picture is another
            record = {"path": str(path), "id": row["id"], "prompt": row["prompt"]}
            record |= {"tag": row["tag"], "sample": sample, "sha256": digest}
            old = earlier.get((str(path), digest, row["prompt"]), {})
            new.append(record | still_valid(old, rewards))
        scored = score_batch(batch, new, rewards)
        records += new
        if scored:
            save(records)
    return records


def still_valid(old, rewards):
    """The scores of an earlier record: those of these rewards only if they are the same rewards,
    with the same checkpoint, judge and question."""
    scored_by = old.get("scored_by", {})
    same = lambda name, by: name not in rewards or guards.scored_by(rewards[name]) == by
    valid = {name: by for name, by in scored_by.items() if same(name, by)}
    return {name: old[name] for name in valid} | {"scored_by": valid}


def score_batch(batch, records, rewards):
    """Fill in the scores that these records lack; NaN for a picture that cannot be opened. Returns
    how many were tried."""
    images, tried = {}, 0
    for name, reward in rewards.items():
        todo = [i for i, record in enumerate(records) if math.isnan(record.get(name, math.nan))]
        tried += len(todo)
        images |= {i: open_picture(batch[i][2]) for i in todo if i not in images}
        if todo:
            prompts, rows = [records[i]["prompt"] for i in todo], [batch[i][0] for i in todo]
            opened = [images[i] for i in todo]
            scores = reward_lib.score_opened({name: reward}, prompts, opened, rows)
            for i, value in zip(todo, scores[name].tolist()):
                records[i][name] = value
                records[i]["scored_by"][name] = guards.scored_by(reward)
    return tried


def score_table(records, names, by_tag=False):
    """Mean, standard error over prompts, n and failures of each score; with by_tag, one more row
    for each tag."""
    groups, table = {}, []
    for record in records if by_tag else []:
        groups.setdefault(record["tag"] or "untagged", []).append(record)
    for name in names:
        for tag, members in [("all", records), *groups.items()]:
            scores = [record[name] for record in members]
            center, error = mean_over_prompts(scores, [record["id"] for record in members])
            row = {"score": name, "prompts": tag, "mean": center, "standard error": error}
            n = sum(map(math.isfinite, scores))
            table.append(row | {"n": n, "failed": len(members) - n})
    return table


def evaluate_folder(cfg):
    """Score a folder; exit code 3 if some pictures got no score."""
    rows = load_prompts(cfg.prompts)
    layout, matched, missing, extra = find_images(cfg.images, rows, cfg.prompts, cfg.tile)
    print(
        f"{cfg.images}: {layout} layout, {len(matched)} pictures of {len(rows) - len(missing)} "
        f"prompts; {len(missing)} prompts without a picture, {len(extra)} pictures of no prompt"
    )
    if missing and cfg.strict:
        usage_error(f"--strict: {len(missing)} prompts have no picture, such as {missing[0]['id']}")
    if cfg.wise:
        return evaluate_wise(cfg, matched)
    output = Path(cfg.output or f"{Path(cfg.images).resolve()}-scores-{cfg.model}.jsonl")
    rewards = load_rewards(cfg)
    guards.say_cut(rewards, [row["prompt"] for row, _, _ in matched])
    with lock(output.parent, "--output", f".{output.name}.lock"):
        known = comparison.known_scores(output)
        save = lambda records: write_jsonl(output, comparison.merged(records, known))
        records = score_images(matched, rewards, known, save)
        save(records)
    by_tag = len({record["tag"] for record in records}) > 1
    print(markdown(score_table(records, rewards, by_tag)))
    guards.say_failures(rewards)
    print(f"a line for each picture: {output}")
    sys.exit(3 if any(math.isnan(record[name]) for record in records for name in rewards) else 0)


def evaluate_wise(cfg, matched):
    judge = ServedJudge(cfg.judge_url or (DEFAULT_URL,))
    default = f"{Path(cfg.images).resolve()}-wise-{cfg.wise}_scores_results.jsonl"
    output = Path(cfg.output or default)
    known = read_jsonl(output) if output.is_file() else []
    save = functools.partial(write_jsonl, output)
    save(wise.judge_folder(judge, cfg.wise, matched, known, save))
    failed = print_summaries([output])
    print(f"judged by {judge.model}, in our wording; a line for each prompt: {output}")
    sys.exit(3 if failed else 0)


def print_summaries(paths):
    """Official result files as a table for each benchmark, with published rows; returns the ids
    without score."""
    tables, failed = {}, []
    for path in paths:
        benchmark, columns, without = official_scores.summarize(path)
        name = Path(path).name if len(paths) == 1 else str(path)
        tables.setdefault(benchmark, []).append({"model": name, **columns})
        failed += without
    for benchmark, rows in tables.items():
        names = list(dict.fromkeys(name for row in rows for name in row))
        known = official_scores.published(benchmark)
        rows += [{"model": f"{model} (published)"} | scores for model, scores in known.items()]
        print(benchmark)
        print(markdown([{name: row.get(name, math.nan) for name in names} for row in rows]))
    if failed:
        ids = ", ".join(map(str, failed[:20]))
        print(f"{len(failed)} without a score, in no mean: {ids}", file=sys.stderr)
    return failed


# --- pairs --------------------------------------------------------------------------------------


def read_pairs(folder):
    """(rows, clean pictures, broken ones) of folder/test.jsonl; None for a damaged picture."""
    folder = Path(folder)
    if not (folder / "test.jsonl").is_file():
        usage_error(f"--pairs {folder}: no test.jsonl; a line has prompt, clean and broken (files)")
    rows = read_jsonl(folder / "test.jsonl")
    if not rows:
        usage_error(f"--pairs {folder}: test.jsonl is empty; a line is a pair")
    for number, row in enumerate(rows, 1):
        if not all(isinstance(row.get(name), str) for name in ("prompt", "clean", "broken")):
            usage_error(f"{folder}/test.jsonl, line {number}: needs prompt, clean and broken")
    sides = [[open_picture(folder / row[side]) for row in rows] for side in ("clean", "broken")]
    return rows, *sides


def pair_accuracy(couples):
    """[(score of the clean picture, of the broken one)] -> how often the clean one scores higher;
    ties count half, pairs without scores are left out."""
    couples = [(clean, broken) for clean, broken in couples if math.isfinite(clean + broken)]
    return mean((clean > broken) + (clean == broken) / 2 for clean, broken in couples)


def pair_table(rewards, folder):
    """The paper's Table 2 for these rewards, a row each."""
    rows, clean, broken = read_pairs(folder)
    table, prompts = [], [row["prompt"] for row in rows]
    for name, reward in bar(rewards.items(), "pairs"):
        scores = [
            reward_lib.score_opened({name: reward}, prompts, x, rows)[name] for x in (clean, broken)
        ]
        couples = list(zip(*(values.tolist() for values in scores)))
        low, high = bootstrap(lambda pick, c=couples: pair_accuracy(c[i] for i in pick), prompts)
        table.append(
            {
                "reward": name,
                "correct": sum(c > b for c, b in couples),
                "tie": sum(c == b for c, b in couples),
                "wrong": sum(c < b for c, b in couples),
                "failed": sum(math.isnan(c + b) for c, b in couples),
                "accuracy": pair_accuracy(couples),
                "95 %": f"{low:.3f} to {high:.3f}",
                "paper": f"{PAPER[name]:.2f}" if name in PAPER else "",
            }
        )
    return table


# --- runs -----------------------------------------------------------------------------------------


def run_folders(names):
    """Those of these folders that are runs with a test; without names the newest run."""
    runs = []
    for run in map(Path, names):
        if not run.is_dir():
            usage_error(f"{run}: no such folder; name runs of grpo.py")
        if all((run / name).is_file() for name in ("config.json", "test.jsonl")):
            runs.append(run)
        else:
            print(f"{run}: no run that was tested, and left out", file=sys.stderr)
    if not names:
        tests = sorted(Path("runs").glob("*/test.jsonl"), key=lambda path: path.stat().st_mtime)
        runs = [path.parent for path in tests[-1:]]
    if not runs:
        where = ", ".join(names) or "runs/"
        usage_error(f"no runs in {where}; make one: torchrun grpo.py --rewards hps,artifact")
    return runs


def evaluate_runs(cfg):
    runs = run_folders(cfg.runs)
    for run in runs:
        print(report_page(run))
    print(markdown(hacking.seeds_table(runs)))
    if cfg.figure:
        hacking_figure(runs, cfg.figure)


def main(cfg):
    if bool(cfg.images) != bool(cfg.prompts):
        usage_error("--images and --prompts go together: pictures, and their prompts")
    if cfg.images:
        evaluate_folder(cfg)
    elif cfg.pairs:
        rewards = load_rewards(cfg)
        table = pair_table(rewards, cfg.pairs)
        print(markdown(table))
        guards.say_failures(rewards)
        if any(row["failed"] for row in table):
            sys.exit(3)
    elif cfg.audit is not None:
        rows, off = alarms.audit(run_folders(cfg.audit))
        print(markdown(rows))
        sys.exit(4 if off else 0)
    elif cfg.summarize:
        sys.exit(3 if print_summaries(cfg.summarize) else 0)
    elif cfg.compare:
        output = Path(cfg.output or "compare.html")
        seeds = {comparison.seed_of(path) for path in cfg.compare}
        if len(seeds - {None}) > 1:
            print("the runs have different seeds: the same prompts, other noise", file=sys.stderr)
        print(markdown(comparison.compare(*cfg.compare, output)))
        print(f"the pictures, side by side: {output}")
    else:
        evaluate_runs(cfg)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
