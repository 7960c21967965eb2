"""Everything that is read from and written to disk: prompt files in, run folders out.

Three promises. A file appears whole or not at all. File names come from numbers and ids, never from
prompts. Wrong input costs one line that says the rule, the value and the remedy, and exit code 2.

    runs/<name>/  config.json            flags, command, versions
                  metrics.jsonl          a line a step;  test.jsonl  a line a test
                  rollouts/, tests/      every picture's scores
                  samples/               the fixed prompts through training
                  checkpoints/step-*/    the policy, open with from_pretrained; the optimizer

Read next: generate.py
"""

import contextlib
import csv
import fcntl
import io
import json
import math
import os
import platform
import re
import shlex
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

HERE = Path(__file__).parents[1]


def usage_error(message):
    """Wrong usage: one line with the rule, the value and the remedy; exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def atomic(path, mode="w"):
    """Open a file that appears whole or not at all: written beside its place, then renamed into it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, mode, encoding=None if "b" in mode else "utf-8") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_jsonl(path):
    """Lines of JSON objects; null is a number that could not be had: NaN."""
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return [
        {name: math.nan if value is None else value for name, value in row.items()} for row in rows
    ]


def json_line(record):
    """A record as a line of JSON, with null for NaN, which JSON has no word for."""
    failed = {
        name
        for name, value in record.items()
        if isinstance(value, float) and not math.isfinite(value)
    }
    return json.dumps(record | dict.fromkeys(failed)) + "\n"


# --- prompts ----------------------------------------------------------------------------------

ALIASES = {  # our field -> what the benchmarks call it, first match wins
    "prompt": ("prompt", "Prompt", "Prompts", "caption", "text"),
    "id": ("id", "prompt_id", "item_id"),
    "tag": ("tag", "task_type", "Subcategory", "Category", "Challenge"),
}


def load_prompts(path):
    """Read any prompt file of the field: list of dicts with `id`, `prompt`, `tag`, and every other
    column kept. The content decides, never the extension (T2I-R1's training file is JSONL called
    .json): JSONL, a JSON list of objects or strings, a table (TSV or CSV with a header that names a
    prompt column), plain lines, or a folder of .txt files (DPG-Bench). Wrong input: exit code 2."""
    path = Path(path)
    if path.is_dir():
        rows = [
            {"id": f.stem, "prompt": f.read_text(encoding="utf-8")}
            for f in sorted(path.glob("*.txt"))
        ]
    elif path.is_file():
        rows = parse_prompts(path.read_text(encoding="utf-8-sig"), path)
    else:
        usage_error(f"--prompts {path}: no such file or folder")
    prompts, seen = [], set()
    for number, row in enumerate(rows):
        row = {"prompt": row} if isinstance(row, str) else row
        if not isinstance(row, dict):
            usage_error(
                f"{path}, entry {number + 1}: a prompt is a text or an object, not {str(row)[:60]!r}"
            )
        known = {
            ours: next((row[name] for name in names if row.get(name) not in (None, "")), None)
            for ours, names in ALIASES.items()
        }
        if not isinstance(known["prompt"], str) or not known["prompt"].strip():
            usage_error(
                f"{path}, entry {number + 1}: no prompt in it; it needs one of the fields "
                f"{', '.join(ALIASES['prompt'])}: {str(row)[:100]}"
            )
        known["id"] = str(known["id"] if known["id"] is not None else number)
        if known["id"] in seen:
            usage_error(
                f"{path}, entry {number + 1}: id {known['id']!r} occurs twice; ids name files"
            )
        seen.add(known["id"])
        prompts.append(
            {**row, **known, "prompt": known["prompt"].strip(), "tag": known["tag"] or ""}
        )
    if not prompts:
        usage_error(f"{path}: no prompts in it; one per line is enough")
    return prompts


def parse_prompts(text, path):
    """The rows of one prompt file, not yet checked: dicts or strings."""
    lines = [line for line in text.splitlines() if line.strip()]
    if text.lstrip()[:1] in ("{", "["):
        try:  # one JSON value
            whole = json.loads(text)
            return whole if isinstance(whole, list) else [whole]
        except json.JSONDecodeError:  # or one a line
            rows = []
            for number, line in enumerate(text.splitlines(), 1):
                if line.strip():
                    try:
                        rows.append(json.loads(line))
                    except json.JSONDecodeError as problem:
                        usage_error(
                            f"{path}, line {number}: not JSON ({problem.msg}): {line[:80]!r}"
                        )
            return rows
    delimiter = "\t" if lines and "\t" in lines[0] else ","
    header = next(csv.reader(lines[:1], delimiter=delimiter), [])
    if set(header) & set(ALIASES["prompt"]):
        return list(csv.DictReader(io.StringIO(text), delimiter=delimiter))
    return [line.split("\t")[0] for line in lines]


# --- the run folder -----------------------------------------------------------------------------


def save_checkpoint(run, state, policy, weights, extra, keep):
    """checkpoints/step-000100: the policy in the Hugging Face format with a model card, the counters, and a .pt file for
    each of `extra` (the optimizer, the rewards that learn). Written under another name and renamed when complete, so
    that a kill leaves the previous one whole."""
    folder = run / "checkpoints" / f"step-{state['step']:06d}"
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    policy.save(partial, weights)
    for name, value in extra.items():
        torch.save(value, partial / f"{name}.pt")
    (partial / "README.md").write_text(model_card(run, state["step"]), encoding="utf-8")
    with atomic(partial / "state.json") as file:
        json.dump(state, file)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old)


def model_card(run, step):
    """What this checkpoint is: the command that made it, and its last test; what trained it is named as such."""
    config, tests = json.loads((run / "config.json").read_text()), read_jsonl(run / "test.jsonl")
    flags, rows = (
        config["flags"],
        "\n".join(f"| {k} | {v:.4f} |" for k, v in tests[-1].items() if "/" not in k),
    )
    return (
        f"# {run.name}, step {step}\n\nMade from `{flags['model']}` by\n\n    {config['command']}\n\n"
        f"Trained on `{flags['rewards']}`; only watched: `{flags['eval_rewards'] or 'nothing'}`. Last test:\n\n"
        f"| measured | mean |\n|---|---|\n{rows}\n"
    )


def checkpoints(run):
    return sorted((run / "checkpoints").glob("step-*"))


def run_folder(cfg):
    """(run folder, checkpoint to go on from or None). A name that is taken gets a number: nothing is overwritten."""
    root = Path(cfg.output_dir)
    trained = re.sub("@https?://[^,:]+:[0-9]+", "", cfg.rewards).replace(",", "+").replace(":", "=")
    name = cfg.run_name or f"{Path(cfg.model).name}_{trained}_seed{cfg.seed}"
    if Path(name).name != name:
        usage_error(
            f"--run-name {name}: a name, not a path; the folder is made in --output-dir {root}"
        )
    if cfg.resume not in ("never", "latest"):
        run = Path(cfg.resume)
        if not checkpoints(run):
            usage_error(
                f"--resume {run}: no checkpoints/step-* in it; give a run folder, 'latest' or 'never'"
            )
        return run, checkpoints(run)[-1]
    numbered = re.compile(re.escape(name) + r"(-\d+)?")
    made = [folder for folder in root.glob("*") if numbered.fullmatch(folder.name)]
    if cfg.resume == "latest" and made:
        run = max(made, key=lambda p: p.stat().st_ctime)
        return run, checkpoints(run)[-1] if checkpoints(run) else None
    run, number = root / name, 2
    while run.exists():
        run, number = root / f"{name}-{number}", number + 1
    return run, None


def lock(run):
    """Keep this run folder for this process; whoever else wants to write there is refused. The system lets go of the
    lock when the process ends, however it ends. Returns the open file, which is the lock."""
    run.mkdir(parents=True, exist_ok=True)
    file = open(run / ".lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        usage_error(
            f"{run}: another run is writing there; wait for it, or choose another --run-name"
        )
    return file


# What may differ when a run goes on: where it runs and what it writes, not what it computes. (With other
# --max-steps the learning rate falls along another line from here on: that is what extending a run means.)
FREE = set(
    "resume output_dir run_name max_steps save_steps save_total_limit eval_steps best_of judge_url device "
    "max_failures micro_batch rollout_batch cuda_graph shard gradient_checkpointing report_to "
    "world_size gpu_memory".split()
)


def check_same_run(run, cfg):
    """A run that goes on keeps its flags; otherwise its log would tell two stories as one."""
    if not (run / "config.json").is_file():
        return
    then, now = (
        json.loads((run / "config.json").read_text())["flags"],
        json.loads(json.dumps(asdict(cfg))),
    )
    for name in sorted(then.keys() - FREE):
        if then[name] != now.get(name):
            usage_error(
                f"--resume: {run} was started with --{name.replace('_', '-')} {then[name]}, this is "
                f"{now.get(name)}; start anew under another --run-name, or use the flags it had"
            )


def begin_log(run, start, cfg, world):
    """Make the run folder. Lines of steps that will be made again are dropped, so that the log of a resumed
    run equals that of an uninterrupted one."""
    run.mkdir(parents=True, exist_ok=True)
    for name, first in (("metrics.jsonl", start), ("test.jsonl", start + 1 if start else 0)):
        if (run / name).exists():
            lines = [
                line for line in (run / name).read_text().splitlines(True) if line.endswith("\n")
            ]
            with atomic(run / name) as file:
                file.writelines(line for line in lines if json.loads(line)["step"] < first)
    config = {
        "flags": asdict(cfg),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "processes": world,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    with atomic(run / "config.json") as file:
        json.dump(config, file, indent=2)


def log_line(path, line):
    with open(path, "a", encoding="utf-8") as file:
        file.write(json_line(line))


def log_records(path, records):
    with atomic(path) as file:
        file.writelines(map(json_line, records))
