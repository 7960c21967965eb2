"""Evaluate: runs, folders of pictures, pairs of pictures, one run against another.

A number is worth what was done to avoid fooling oneself with it. So: what trained the policy is never
called evidence; the mean of a folder comes with its standard error *over prompts* (four pictures of one
prompt are not four opinions) and with the number of pictures that could not be scored; two runs are
compared picture by picture, same prompt and same noise, because that takes the prompts' difficulty out;
and a reward is tested on pairs, a clean and a broken picture of one prompt, before it is trusted:

    accuracy = (pairs where the clean picture scores higher + ties / 2) / pairs        the paper's Table 2

Run:   python evaluate.py                                      the newest run: figure, table, report.html
       python evaluate.py runs/* --figure hacking.png          all of them, and a table over their seeds
       python evaluate.py --images outputs --prompts tiny_world/prompts/test.jsonl --rewards hps,artifact
       python evaluate.py --pairs tiny_world/pairs                   which reward notices what is broken?
       python evaluate.py --compare RUN_A RUN_B                paired differences, and the pictures
       python evaluate.py --summarize results.jsonl            GenEval's, WISE's, DPG's own result files
       python evaluate.py --images outputs --prompts wise.json --wise verified --judge-url URL

You should see:  tables in Markdown, ready to be pasted; pages that open from disk.

Left out: the detectors of GenEval and T2I-CompBench. Their own scorers run on `generate.py --layout`.
Read next: hacking.py (the figure), layouts.py (where benchmarks keep their pictures)
"""

import hashlib
import html
import math
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from PIL import Image
from tqdm import tqdm

import rewards as reward_models
from artifact_reward import DEFAULT_URL, ServedJudge
from evaluation import hacking, layouts, wise
from evaluation import pages as report
from generate import pick_device
from training import files
from training.files import atomic, json_line, read_jsonl, usage_error

# The paper's Table 2 (arXiv:2601.03468): accuracy on its 202 pairs.
PAPER = {
    "hps": 0.53,
    "aesthetic": 0.42,
    "imagereward": 0.68,
    "maniqa": 0.39,
    "deqa": 0.51,
    "gdino": 0.58,
    "orm": 0.56,
    "unified": 0.65,
    "artifact": 0.80,
}


@dataclass
class Config:
    runs: Annotated[
        tuple[str, ...], tyro.conf.Positional
    ] = ()  # run folders; none: the newest in runs/
    figure: str = ""  # also draw all these runs into one figure, here
    images: str = ""  # a folder of pictures, in any layout of layouts.py
    prompts: str = ""  # their prompts, a file of any format
    rewards: str = "hps,artifact"  # what to score pictures and pairs with
    wise: Literal["", "legacy", "verified"] = (
        ""  # judge the pictures by this protocol of WISE instead
    )
    pairs: str = ""  # a folder of pairs with test.jsonl, such as tiny_world/pairs
    compare: tuple[str, str] | None = None  # two run folders, or two score files of --images
    summarize: str = ""  # a result file of an official scorer
    output: str = ""  # where the scores or the comparison go [beside the pictures; compare.html]
    model: str = "tiny"  # "tiny" for our reward checkpoints, "real" for the published ones
    judge_url: tuple[str, ...] = ()  # judge server(s) [tiny: in-process]
    strict: bool = False  # a prompt without pictures is an error


# --- a folder of pictures -------------------------------------------------------------------------


def load_rewards(cfg):
    checkpoint = "tiny" if cfg.model == "tiny" else None
    options, parsed = (
        {"artifact": dict(judge_urls=cfg.judge_url)},
        reward_models.parse_all(cfg.rewards),
    )
    reward_models.refuse_learners(parsed)
    return {
        name: reward_models.load(
            name, pick_device("auto")[0], checkpoint, url, **options.get(name, {})
        )
        for name, _, url in parsed
    }


def open_picture(path):
    """The picture, or None if the file is damaged: one bad file costs one score."""
    try:
        return Image.open(path).convert("RGB")
    except (OSError, SyntaxError, ValueError) as problem:  # Pillow has all three for broken files
        print(f"error: {path}: not a readable picture ({problem})", file=sys.stderr)
        return None


def score_images(matched, scorers, known, save, batch=64):
    """Score matched pictures [(row, k, path)]; returns records, one dict a picture. `known` are records of
    earlier times: what they hold is not scored again. save(records) is called now and then."""
    earlier, records = {(r["path"], r["sha256"]): r for r in known}, []
    for start in tqdm(range(0, len(matched), batch), desc=f"scoring, {batch} at a time"):
        rows, ks, paths = zip(*matched[start : start + batch])
        new = []
        for row, k, path in zip(rows, ks, paths):
            digest = hashlib.sha256(
                path.read_bytes()
            ).hexdigest()  # a picture made again is another picture
            record = {
                "path": str(path),
                "id": row["id"],
                "prompt": row["prompt"],
                "tag": row["tag"],
                "sample": k,
                "sha256": digest,
            }
            new.append(earlier.get((str(path), digest), {}) | record)
        images = {}  # opened when the first reward wants them, closed with the batch
        for name, scorer in scorers.items():
            todo = [i for i, record in enumerate(new) if math.isnan(record.get(name, math.nan))]
            for i in todo:
                new[i][name] = math.nan
                if i not in images:
                    images[i] = open_picture(paths[i])
            good = [i for i in todo if images[i] is not None]
            if good:
                scores = reward_models.score(
                    {name: scorer},
                    [new[i]["prompt"] for i in good],
                    [images[i] for i in good],
                    [rows[i] for i in good],
                )
                for i, value in zip(good, scores[name].tolist()):
                    new[i][name] = value
        records += new
        if start // batch % 16 == 15:
            save(records)
    return records


def score_table(records, names, tags=False):
    """Mean, standard error over prompts, n and failures of each score; with tags, a row for each tag."""
    rows = []
    for name in names:
        groups = {"all": records}
        for r in records if tags else []:
            groups.setdefault(r["tag"], []).append(r)
        for tag, members in groups.items():
            by_prompt = defaultdict(list)
            for r in members:
                if math.isfinite(r[name]):
                    by_prompt[r["id"]].append(r[name])
            means = [report.mean(values) for values in by_prompt.values()]
            error = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else math.nan
            n = sum(map(len, by_prompt.values()))
            rows.append(
                {
                    "score": name,
                    "prompts": tag or "untagged",
                    "mean": report.mean(means),
                    "standard error": error,
                    "n": n,
                    "failed": len(members) - n,
                }
            )
    return rows


def summary(path):
    """An official result file as a table, beside the published rows."""
    benchmark, columns, failed = layouts.summarize(path)
    rows = [{"model": Path(path).name, **columns}]
    rows += [
        {"model": f"{name} (published)", **{c: scores.get(c, math.nan) for c in columns}}
        for name, scores in layouts.REFERENCES.get(benchmark, {}).items()
    ]
    print(benchmark)
    print("\n".join(report.markdown(rows)))
    if failed:
        print(
            f"{len(failed)} without a score, in no mean: {', '.join(map(str, failed[:20]))}",
            file=sys.stderr,
        )
    return failed


def evaluate_wise(cfg, matched):
    judge = ServedJudge(cfg.judge_url or (DEFAULT_URL,))
    output = Path(cfg.output or f"{Path(cfg.images)}-wise-{cfg.wise}_scores_results.jsonl")
    with atomic(output) as file:
        file.writelines(map(json_line, wise.judge_folder(judge, cfg.wise, matched, open_picture)))
    failed = summary(output)
    print(f"judged by {judge.model}, in our wording; a line a prompt: {output}")
    sys.exit(3 if failed else 0)


def evaluate_folder(cfg):
    rows = files.load_prompts(cfg.prompts)
    layout, matched, missing, extra = layouts.find_images(cfg.images, rows)
    print(
        f"{cfg.images}: {layout} layout, {len(matched)} pictures of {len(rows) - len(missing)} prompts; "
        f"{len(missing)} prompts without a picture, {len(extra)} pictures of no prompt"
    )
    if missing and cfg.strict:
        usage_error(
            f"--strict: {len(missing)} prompts have no picture, such as {missing[0]['id']!r}"
        )
    if cfg.wise:
        return evaluate_wise(cfg, matched)
    output = Path(cfg.output or f"{Path(cfg.images)}-scores-{cfg.model}.jsonl")
    known, scorers = read_jsonl(output) if output.is_file() else [], load_rewards(cfg)

    def save(records):  # nothing is lost: what was scored earlier and is not asked about now stays
        new = {r["path"] for r in records}
        with atomic(output) as file:
            file.writelines(map(json_line, [*records, *(r for r in known if r["path"] not in new)]))

    records = score_images(matched, scorers, known, save)
    save(records)
    by_tag = len({r["tag"] for r in records}) > 1
    print("\n".join(report.markdown(score_table(records, scorers, by_tag))))
    print(f"a line a picture: {output}")
    sys.exit(3 if any(math.isnan(r[name]) for r in records for name in scorers) else 0)


# --- pairs --------------------------------------------------------------------------------------


def pair_scores(reward, folder, split="test"):
    """(rows, scores of the clean pictures, scores of the broken ones) of folder/split.jsonl."""
    folder = Path(folder)
    if not (folder / f"{split}.jsonl").is_file():
        usage_error(
            f"--pairs {folder}: no {split}.jsonl there; a line has prompt, clean and broken (two files)"
        )
    rows, scores = read_jsonl(folder / f"{split}.jsonl"), []
    for side in ("clean", "broken"):
        images = [Image.open(folder / row[side]).convert("RGB") for row in rows]
        scores.append(reward([row["prompt"] for row in rows], images, rows).tolist())
    return rows, *scores


def pair_accuracy(clean, broken):
    """How often the clean picture scores higher, ties half; pairs without scores are left out."""
    couples = [(c, b) for c, b in zip(clean, broken) if math.isfinite(c + b)]
    return report.mean((c > b) + (c == b) / 2 for c, b in couples)


def pair_table(scorers, folder):
    """The paper's Table 2 for these rewards: one row each."""
    table = []
    for name, reward in scorers.items():
        rows, clean, broken = pair_scores(reward, folder)
        couples = list(zip(clean, broken))
        low, high = report.bootstrap(
            lambda pick: pair_accuracy(*zip(*(couples[i] for i in pick))),
            [row["prompt"] for row in rows],
        )
        table.append(
            {
                "reward": name,
                "correct": sum(c > b for c, b in couples),
                "tie": sum(c == b for c, b in couples),
                "wrong": sum(c < b for c, b in couples),
                "failed": sum(math.isnan(c + b) for c, b in couples),
                "accuracy": pair_accuracy(clean, broken),
                "95 %": f"{low:.3f} to {high:.3f}",
                "paper": f"{PAPER[name]:.2f}" if name in PAPER else "",
            }
        )
    return table


# --- one against another --------------------------------------------------------------------------


def read_scored(path):
    """Records with id and sample, and their pictures: the last test of a run, or a file of scores."""
    path = Path(path)
    if path.is_file():
        records = read_jsonl(path)
        return records, [Path(r["path"]) for r in records]
    hacking.read_run(path)  # says what is wrong
    records = read_jsonl(sorted((path / "tests").glob("step_*.jsonl"))[-1])
    return records, hacking.cut_sheet(path / "tests" / "last.png", len(records))


def seed_of(path):
    """The seed of a run; None for a file of scores."""
    return hacking.read_run(path)[0]["flags"]["seed"] if Path(path).is_dir() else None


def compare(a, b, output):
    """B minus A, picture by picture: a table with 95 % intervals, and a page of pictures. Runs of one seed are
    tested with the same noise; of two seeds, only the prompts are the same, and the intervals are wider."""
    (first, pictures_a), (second, pictures_b) = read_scored(a), read_scored(b)
    place = {(r["id"], r["sample"]): i for i, r in enumerate(first)}
    couples = [(place.get((r["id"], r["sample"])), j) for j, r in enumerate(second)]
    couples = [(i, j) for i, j in couples if i is not None]
    if not couples or any(first[i]["prompt"] != second[j]["prompt"] for i, j in couples):
        usage_error(
            f"--compare: {a} and {b} have no pictures of the same prompts and samples in common"
        )
    names = [
        name for name, value in first[0].items() if isinstance(value, float) and name in second[0]
    ]
    table = []
    for name in names:
        known = [(i, j) for i, j in couples if math.isfinite(first[i][name] + second[j][name])]
        gains = [second[j][name] - first[i][name] for i, j in known]
        if gains:
            low, high = report.bootstrap(
                lambda pick: report.mean(gains[k] for k in pick),
                [first[i]["prompt"] for i, _ in known],
                draws=400,
            )
            table.append(
                {
                    "measured": name,
                    "A": report.mean(first[i][name] for i, _ in known),
                    "B": report.mean(second[j][name] for _, j in known),
                    "B - A": report.mean(gains),
                    "95 %": f"{low:+.3f} to {high:+.3f}",
                    "n": len(gains),
                }
            )
    key = "gold" if "gold" in names else names[0]
    shown = sorted(couples, key=lambda ij: -abs(second[ij[1]][key] - first[ij[0]][key]))[:48]

    def view(picture):
        return open_picture(picture) if isinstance(picture, Path) else picture or ""

    gallery = [
        {
            "A": view(pictures_a[i]),
            "B": view(pictures_b[j]),
            "prompt": first[i]["prompt"],
            f"{key} A": first[i][key],
            f"{key} B": second[j][key],
        }
        for i, j in shown
    ]
    body = (
        f"<p>A: {html.escape(str(a))}<br>B: {html.escape(str(b))}</p>"
        + report.table(table)
        + f"<h2>Side by side, the largest changes of {html.escape(key)} first</h2>"
        + report.table(gallery)
    )
    with atomic(output) as file:
        file.write(report.page("Two runs, picture by picture", body))
    return table


def main(cfg):
    if bool(cfg.images) != bool(cfg.prompts):
        usage_error("--images and --prompts go together: pictures, and what they were to show")
    if cfg.images:
        return evaluate_folder(cfg)
    if cfg.pairs:
        return print("\n".join(report.markdown(pair_table(load_rewards(cfg), cfg.pairs))))
    if cfg.summarize:
        sys.exit(3 if summary(cfg.summarize) else 0)
    if cfg.compare:
        output = Path(cfg.output or "compare.html")
        if seed_of(cfg.compare[0]) != seed_of(cfg.compare[1]):
            print(
                "the two runs have different seeds: the same prompts, but not the same noise",
                file=sys.stderr,
            )
        print("\n".join(report.markdown(compare(*cfg.compare, output))))
        return print(f"the pictures, side by side: {output}")
    runs = [Path(run) for run in cfg.runs if (Path(run) / "config.json").is_file()]
    if not cfg.runs:
        newest = sorted(Path("runs").glob("*/test.jsonl"), key=lambda path: path.stat().st_mtime)[
            -1:
        ]
        runs = [path.parent for path in newest]
    if not runs:
        usage_error(
            f"no runs in {', '.join(cfg.runs) or 'runs/'}; make one with torchrun grpo.py --rewards hps,artifact"
        )
    for run in runs:
        print(hacking.report_page(run))
    print("\n".join(report.markdown(hacking.seeds_table(runs))))
    if cfg.figure:
        hacking.hacking_figure(runs, cfg.figure)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
