"""Automatic prompt optimisation: the judge's question learns from the judge's mistakes (ProTeGi).

ArtifactReward has one parameter, the question, and a question has no gradient. ProTeGi
(arXiv:2305.03495) descends in words instead: show a language model the pictures that a question judged
wrongly and ask for the reason (the "textual gradient"), have the question rewritten accordingly (the
step), say the result in other words (so that it does not get stuck), and keep the best few (a beam):

    for each round:
        for each question of the beam:   mistakes -> reasons -> rewrites -> paraphrases
        beam = the best by   mean over pictures of  y log p + (1 - y) log(1 - p),    p = P(broken), y = is broken

Most candidates are bad, and finding that out should not cost a look at every picture: choosing the best
few by few judge calls is a problem of its own, see bandits.py; `--select` has four ways.

Run:   python apo.py                          the tiny world: three seeds, two ways to select, about 4 minutes
       python apo.py --data FOLDER --checkpoint none --judge-url http://127.0.0.1:8000/v1

You should see:  the plain question's accuracy on the test split, then the optimised one's, with
intervals, and what each way cost in judge calls; runs/apo/*/question.txt and report.html.

The data are split by prompt; the test split is opened once, at the end. (The released code reports on
the split it optimised on.) Every answer is kept on disk: the same command again costs nothing twice.

Left out: the writing model in the tiny world. Nothing so small can write, so there a scripted editor
proposes the changes; the judge, the mistakes, the beam and the selection are the real thing.
Read next: evaluate.py
"""

import hashlib
import json
import math
import random
import sqlite3
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from PIL import Image

from artifact_reward import ArtifactReward, ServedJudge, ask, picture_part, read_question
from evaluation import pages as report
from evaluation.best_arm import SELECT, Race, log_likelihoods
from generate import pick_device
from training.files import HERE, atomic, json_line, read_jsonl, usage_error

LONGEST = 1200  # characters of a question; longer ones are essays, not questions


@dataclass
class Config:
    data: str = str(HERE / "tiny_world" / "pairs")  # labelled pictures, see `load_examples`
    question: str = (
        "Are there artifacts in this picture? Answer yes or no."  # the first one, or a file with it
    )
    rounds: int = 4  # each expands and selects once; 6 in the paper's code
    beam: int = 4  # questions that survive a round
    minibatch: int = 60  # pictures among which mistakes are looked for
    gradients: int = 4  # reasons asked for, each from `errors` mistakes
    errors: int = 4  # mistakes shown for one reason
    max_expansion: int = 5  # new questions of each old one that are tried
    # how the beam is chosen; several: one after the other, to compare (bandits.py)
    select: tuple[Literal["full", "ucb", "successive-rejects", "successive-halving"], ...] = (
        "full",
        "successive-rejects",
    )
    budget: float = 0.35  # judge calls of a round, as a share of what "full" would ask
    seeds: tuple[int, ...] = (0, 1, 2)  # one search each
    checkpoint: str = (
        "tiny"  # in-process judge: "tiny", a folder or hub name, or "none": ask --judge-url
    )
    judge_url: tuple[str, ...] = ()  # judge server(s)
    judge_model: str | None = None  # the served model's name [the first that is served]
    writer_url: str | None = None  # who writes questions [the judge; tiny: a scripted editor]
    writer_model: str | None = None  # its name [the judge's]
    output_dir: str = "runs/apo"  # a folder for each search, and the answers


# --- labelled pictures --------------------------------------------------------------------------


def load_examples(path):
    """Labelled pictures -> {"train", "validation", "test"}: lists of {"path", "prompt", "broken"}.

    * a folder with train.jsonl, validation.jsonl and test.jsonl, or one JSONL file, whose lines are pairs
      {"prompt", "clean": file, "broken": file} or labelled pictures {"prompt", "path": file, "label": 0 or 1};
    * a folder with clean/ and broken/: the file's name, without what follows "__", counts as its prompt.

    What comes in one piece is split by prompt, 5 : 2 : 3. Wrong input: exit code 2."""
    path = Path(path)
    if (path / "train.jsonl").is_file():
        splits = {
            name: read_labels(path / f"{name}.jsonl") for name in ("train", "validation", "test")
        }
    elif path.is_file() or (path / "clean").is_dir():
        examples = (
            read_labels(path)
            if path.is_file()
            else [
                {"path": file, "prompt": file.stem.split("__")[0], "broken": kind == "broken"}
                for kind in ("clean", "broken")
                for file in sorted((path / kind).glob("*.*"))
            ]
        )
        splits = {"train": [], "validation": [], "test": []}
        for example in examples:
            place = zlib.crc32(example["prompt"].encode()) % 10
            splits["train" if place < 5 else "validation" if place < 7 else "test"].append(example)
    else:
        usage_error(
            f"--data {path}: neither train.jsonl, nor a JSONL file, nor clean/ and broken/ in it"
        )
    for name, examples in splits.items():
        if {example["broken"] for example in examples} != {True, False}:
            usage_error(
                f"--data {path}: the {name} split needs clean pictures and broken ones; it has "
                f"{len(examples)} pictures, and not both kinds"
            )
    for a, b in (("train", "test"), ("validation", "test"), ("train", "validation")):
        shared = {e["prompt"] for e in splits[a]} & {e["prompt"] for e in splits[b]}
        if shared:
            usage_error(
                f"--data {path}: {len(shared)} prompts are in {a} and in {b}, such as {min(shared)!r}; "
                "what is optimised on cannot be reported on, split by prompt"
            )
    return splits


def read_labels(path):
    examples = []
    for number, row in enumerate(read_jsonl(path), 1):
        sides = (
            [("clean", False), ("broken", True)]
            if "clean" in row
            else [("path", bool(row.get("label")))]
        )
        for field, broken in sides:
            if field not in row or not (path.parent / row[field]).is_file():
                usage_error(
                    f"{path}, line {number}: no picture {row.get(field)!r}; a line needs clean and "
                    "broken, or path and label; files lie relative to it"
                )
            examples.append(
                {
                    "path": path.parent / row[field],
                    "prompt": row.get("prompt", ""),
                    "broken": broken,
                }
            )
    return examples


class Answers:
    """The judge, and a memory of all it ever said: nothing is asked twice, not even by tomorrow's run.

    `used` is what this search needed, `asked` what the memory had to ask the judge for."""

    def __init__(self, path, judge, name):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.db = sqlite3.connect(
            path, isolation_level=None
        )  # each answer is kept as soon as it is given
        self.judge, self.name = judge, name
        self.db.execute(
            "PRAGMA synchronous = OFF"
        )  # a killed process loses nothing; only a power cut could
        self.db.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, value TEXT)")
        self.used, self.asked, self.pictures = set(), 0, {}

    def __call__(self, question, examples):
        """P(broken) for each example, (N,); NaN where the judge gave no answer, which is not remembered."""
        keys = [f"{self.name}\n{question}\n{self.digest(example)}" for example in examples]
        self.used.update(keys)
        missing = [
            i for key, i in dict(zip(keys, range(len(keys)))).items() if self.recall(key) is None
        ]
        if missing:
            self.asked += len(missing)
            scores = ask(
                self.judge,
                question,
                [Image.open(examples[i]["path"]).convert("RGB") for i in missing],
            )
            for i, score in zip(missing, scores):
                if math.isfinite(score):
                    self.remember(keys[i], repr(1 - score))
        return np.array([float(self.recall(key) or "nan") for key in keys])

    def digest(self, example):
        if example["path"] not in self.pictures:
            self.pictures[example["path"]] = hashlib.sha256(
                example["path"].read_bytes()
            ).hexdigest()
        return self.pictures[example["path"]]

    def recall(self, key):
        row = self.db.execute("SELECT value FROM answers WHERE key = ?", (key,)).fetchone()
        return row and row[0]

    def remember(self, key, value):
        self.db.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, value))


# --- how good is a question? --------------------------------------------------------------------


def measures(p_broken, examples):
    """dict of numbers. accuracy: pictures on the right side of 1/2 (no answer: wrong). pairs: how often, of
    two pictures of one prompt, the broken one is called more broken, ties half (the paper's Table 2). auroc:
    the same over any two pictures. calibration: mean distance of P(broken) from the frequency, 10 bins."""
    broken = np.array([example["broken"] for example in examples])
    known = np.isfinite(p_broken)
    p, y = p_broken[known], broken[known]
    prompts = np.array([hash(example["prompt"]) for example in examples])[known]

    def above(same):  # share of (broken, clean) couples in the right order
        order = np.sign(p[y][:, None] - p[~y][None]) / 2 + 0.5
        return float(order[same].mean()) if same.any() else math.nan

    bins = np.minimum((p * 10).astype(int), 9)
    distance = sum(abs(p[bins == b].sum() - y[bins == b].sum()) for b in range(10)) / max(len(p), 1)
    return {
        "accuracy": float(((p > 0.5) == y).sum() / len(broken)),
        "pairs": above(prompts[y][:, None] == prompts[~y][None]),
        "auroc": above(np.ones((y.sum(), (~y).sum()), bool)),
        "log-likelihood": float(log_likelihoods(p_broken, broken).mean()),
        "calibration error": float(distance),
        "unanswered": float((~known).mean()),
    }


def with_intervals(p_broken, examples):
    """measures, each with its 95 % interval over prompts: name -> (value, low, high)."""

    def values(pick):
        return list(measures(p_broken[pick], [examples[i] for i in pick]).values())

    low, high = report.bootstrap(values, [example["prompt"] for example in examples], draws=200)
    return {
        name: (value, low[i], high[i])
        for i, (name, value) in enumerate(measures(p_broken, examples).items())
    }


# --- who writes: reasons, rewrites, paraphrases ---------------------------------------------------


class Writer:
    """A language model behind an OpenAI-compatible server, as in the paper; by default the judge itself."""

    def __init__(self, served, answers):
        self.served, self.answers = served, answers

    def write(self, text, mistakes, rng):
        """What the model says to this text and these pictures; remembered like the judge's answers. The seed
        makes the second reason for the same mistakes another one. A failure is an empty text: refused, counted."""
        content = [{"type": "text", "text": text}]
        content += [picture_part(Image.open(example["path"])) for example, _ in mistakes]
        seed = rng.randrange(2**31)
        key = hashlib.sha256(json.dumps([self.served.model, seed, content]).encode()).hexdigest()
        said = self.answers.recall(key) or self.served.write(content, temperature=0.7, seed=seed)
        if said:
            self.answers.remember(key, said)
        return said.strip().strip('"').strip()

    def reason(self, question, mistakes, rng):
        shown = "\n".join(
            f"Picture {i}: it is {'broken' if e['broken'] else 'not broken'}; the answer gave "
            f"{p:.0%} for broken."
            for i, (e, p) in enumerate(mistakes, 1)
        )
        return self.write(
            "A vision model is asked this question about pictures, to find those with artifacts, "
            f"that is, faults of construction:\n\n{question}\n\nAbout these pictures it was wrong.\n"
            f"{shown}\n\nIn two or three sentences: what about the question led it astray?",
            mistakes,
            rng,
        )

    def rewrite(self, question, reason, mistakes, rng):
        return self.write(
            f"A vision model is asked this question about pictures:\n\n{question}\n\nIt led to "
            f"mistakes. The reason given was: {reason}\n\nWrite a better question. It must ask for "
            "the answer yes (faults) or no (none). Write the question only.",
            mistakes,
            rng,
        )

    def paraphrase(self, question, rng):
        return self.write(
            "Say this in other words, with the same meaning, keeping that the answer is yes or "
            f"no. Write the new text only.\n\n{question}",
            [],
            rng,
        )


class ScriptedEditor:
    """Stands in for the writer in the tiny world. It knows phrases, some of them beside the point, but not
    which matter; it sees whether the mistakes are misses or false alarms, and adds, drops or swaps one."""

    BESIDE_THE_POINT = (
        "bright colors",
        "small shapes",
        "round shapes",
        "an empty ground",
        "two shapes",
    )

    def __init__(self):
        from tiny_world.train_judge import (
            ASKING,
            FAULTS,
            ORDER,
        )  # what the tiny judge learned to read

        self.frames, self.order = ASKING, ORDER
        self.phrases = [name for names in FAULTS.values() for name in names] + [
            *self.BESIDE_THE_POINT
        ]

    def parse(self, question):
        frame = next(
            (f for f in self.frames if question.startswith(f.split("{}")[0])), self.frames[0]
        )
        return frame, [phrase for phrase in self.phrases if phrase in question]

    def compose(self, frame, phrases):
        listed = ", ".join(phrases[:-1]) + " or " + phrases[-1] if len(phrases) > 1 else phrases[0]
        return frame.format(listed) + self.order

    def reason(self, question, mistakes, rng):
        misses = sum(example["broken"] for example, _ in mistakes)
        return (
            "it overlooks faults" if 2 * misses >= len(mistakes) else "it suspects whole pictures"
        )

    def rewrite(self, question, reason, mistakes, rng):
        frame, phrases = self.parse(question)
        new = rng.choice([phrase for phrase in self.phrases if phrase not in phrases])
        if not phrases or (reason == "it overlooks faults" and rng.random() < 0.7):
            phrases.append(new)
        elif reason == "it suspects whole pictures" and len(phrases) > 1 and rng.random() < 0.7:
            phrases.remove(rng.choice(phrases))
        else:
            phrases[rng.randrange(len(phrases))] = new
        return self.compose(frame, phrases)

    def paraphrase(self, question, rng):
        _, phrases = self.parse(question)
        return (
            self.compose(rng.choice(self.frames), rng.sample(phrases, len(phrases)))
            if phrases
            else question
        )


def refusal(question):
    """Why a text cannot be put to the judge, or None."""
    words = {word.strip(".,:;!?\"'()/").lower() for word in question.replace("/", " ").split()}
    if not words:
        return "empty"
    if len(question) > LONGEST:
        return f"longer than {LONGEST} characters"
    return None if {"yes", "no"} <= words else "does not ask for yes or no"


# --- the algorithm --------------------------------------------------------------------------------


def expand(question, batch, answers, editor, cfg, rng, refused):
    """New questions from the mistakes of an old one: [(question, reason)]."""
    judged = [(e, p) for e, p in zip(batch, answers(question, batch)) if math.isfinite(p)]
    wrong = [(e, p) for e, p in judged if (p > 0.5) != e["broken"]]
    proposed = []
    for _ in range(cfg.gradients if wrong else 0):  # without a mistake there is no reason to be had
        mistakes = rng.sample(wrong, min(cfg.errors, len(wrong)))
        reason = editor.reason(question, mistakes, rng)
        proposed.append((editor.rewrite(question, reason, mistakes, rng), reason))
    for text in [question, *(text for text, _ in proposed)]:
        if not refusal(text):
            proposed.append((editor.paraphrase(text, rng), "in other words"))
    for text, _ in proposed:
        if refusal(text):
            refused[refusal(text)] = refused.get(refusal(text), 0) + 1
    usable = list(dict(entry for entry in proposed if not refusal(entry[0])).items())
    return rng.sample(usable, min(cfg.max_expansion, len(usable)))


def optimize(first, data, answers, editor, how, seed, cfg):
    """One search: returns (best question, every question tried, rounds, refusals). Sees train and
    validation, never test."""
    rng, refused = random.Random(seed), {}
    train = rng.sample(data["train"], len(data["train"]))
    tree = {first: {"round": 0, "question": first, "parent": "", "reason": "the first one"}}
    beam, rounds = [first], []
    for number in range(1, cfg.rounds + 1):
        batch = rng.sample(train, min(cfg.minibatch, len(train)))
        for question in list(beam):
            for text, reason in expand(question, batch, answers, editor, cfg, rng, refused):
                tree.setdefault(
                    text, {"round": number, "question": text, "parent": question, "reason": reason}
                )
        race = Race(
            [*beam, *(q for q, node in tree.items() if node["round"] == number and q not in beam)],
            train,
            answers,
        )
        beam = SELECT[how](race, cfg.beam, cfg.budget * len(race.scores) * len(train))
        for question, scores in race.scores.items():
            tree[question] |= {"log-likelihood": float(scores.mean()), "pictures": len(scores)}
        rounds.append(
            with_intervals(answers(beam[0], data["validation"]), data["validation"])
            | {"round": number, "question": beam[0], "candidates": len(race.scores)}
        )
        print(
            f"  round {number}: validation accuracy {rounds[-1]['accuracy'][0]:.3f}, "
            f"{len(answers.used)} judge calls  {beam[0]}",
            flush=True,
        )
    # The beam's best on training pictures was chosen on them: let fresh ones decide.
    labels = np.array([example["broken"] for example in data["validation"]])
    best = max(
        [*beam, first], key=lambda q: log_likelihoods(answers(q, data["validation"]), labels).mean()
    )
    return best, list(tree.values()), rounds, refused


def main(cfg):
    first = read_question(cfg.question)
    if refusal(first):
        usage_error(
            f"--question {first[:60]!r}: {refusal(first)}; the judge is read by its first word"
        )
    data, out = load_examples(cfg.data), Path(cfg.output_dir)
    judge, name = load_judge(cfg)
    scripted = cfg.checkpoint == "tiny" and not (cfg.judge_url or cfg.writer_url)
    if scripted:
        print("the tiny world has no model that writes: a scripted editor proposes the changes")
    elif cfg.writer_url:
        writer = ServedJudge([cfg.writer_url], cfg.writer_model)
    elif isinstance(judge, ServedJudge):
        writer = judge  # as in the paper: the model that answers also thinks about the question
    else:
        usage_error(
            "a judge in this process answers yes or no, it does not write: give --writer-url as well"
        )
    results = []
    for seed in cfg.seeds:
        for how in cfg.select:
            print(f"{how}, seed {seed}")
            answers = Answers(out / "answers.sqlite", judge, name)
            editor = ScriptedEditor() if scripted else Writer(writer, answers)
            best, tree, rounds, refused = optimize(first, data, answers, editor, how, seed, cfg)
            calls, asked = len(answers.used), answers.asked
            tested = {
                q: answers(q, data["test"]) for q in (first, best)
            }  # the one time that test is opened
            result = {
                "select": how,
                "seed": seed,
                "calls": calls,
                "asked": asked,
                "refused": refused,
                "question": best,
                **compare(tested[first], tested[best], data["test"]),
            }
            save(out / f"{how}_seed{seed}", result, tree, rounds, tested[best], data["test"], first)
            results.append(result)
    for line in report.markdown(
        [
            {
                name: shown(value)
                for name, value in result.items()
                if name not in ("refused", "question", "asked")
            }
            for result in results
        ]
    ):
        print(line)
    for how in cfg.select:
        mine = [result for result in results if result["select"] == how]
        for measure in ("accuracy", "pairs"):
            gain, width = report.interval(
                [r[f"{measure} after"][0] - r[f"{measure} before"][0] for r in mine]
            )
            print(
                f"{how}: {measure} {gain:+.3f} ± {width:.3f} over {len(mine)} seeds, "
                f"{sum(r['calls'] for r in mine) / len(mine):.0f} judge calls a search"
            )
    print(
        f"the questions, their histories and a page each are in {out}/*/; train with one of them by "
        f"torchrun grpo.py --question {out}/{cfg.select[-1]}_seed{cfg.seeds[0]}/question.txt"
    )


def load_judge(cfg):
    """(judge, a name that changes with its weights, for the memory)."""
    if cfg.judge_url or cfg.checkpoint == "none":
        judge = ArtifactReward(
            judge_urls=cfg.judge_url, judge_model=cfg.judge_model, question="-"
        ).judge
        return judge, judge.model
    folder = (
        HERE / "tiny_world" / "checkpoints" / "artifact"
        if cfg.checkpoint == "tiny"
        else Path(cfg.checkpoint)
    )
    weights = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for file in folder.glob("*.safetensors")
    ]
    judge = ArtifactReward(pick_device("auto")[0], str(folder), question="-").judge
    return judge, f"{cfg.checkpoint} {sorted(weights)}"


# --- what is left of a search ---------------------------------------------------------------------


def compare(before, after, examples):
    """The measures of two questions on the same pictures, with intervals, and the gain in accuracy with its
    own: paired, for a picture that is hard for one is hard for the other."""
    first, last = with_intervals(before, examples), with_intervals(after, examples)
    rows = {
        f"{name} {when}": values[name]
        for name in ("accuracy", "pairs", "auroc", "calibration error")
        for when, values in (("before", first), ("after", last))
    }

    def gain(pick):
        chosen = [examples[i] for i in pick]
        return (
            measures(after[pick], chosen)["accuracy"] - measures(before[pick], chosen)["accuracy"]
        )

    everything = np.arange(len(examples))
    return rows | {
        "gain": (gain(everything), *report.bootstrap(gain, [e["prompt"] for e in examples], 200))
    }


def shown(value):
    return "{:.3f} [{:.3f}, {:.3f}]".format(*value) if isinstance(value, tuple) else value


def save(folder, result, tree, rounds, p_broken, examples, first):
    """question.txt, tree.jsonl (all that was tried), result.json and report.html of one search."""
    with atomic(folder / "question.txt") as file:
        file.write(result["question"] + "\n")
    with atomic(folder / "tree.jsonl") as file:
        file.writelines(map(json_line, tree))
    with atomic(folder / "result.json") as file:
        json.dump(result | {"rounds": rounds}, file, indent=2)
    story, before = [], first
    for line in rounds:
        numbers = ", ".join(
            f"{name} {shown(value)}" for name, value in line.items() if isinstance(value, tuple)
        )
        story.append(
            f"<p><b>Round {line['round']}</b>, {line['candidates']} candidates; validation: {numbers}<br>"
            f"{report.word_diff(before, line['question'])}</p>"
        )
        before = line["question"]
    said, broken = p_broken > 0.5, np.array([example["broken"] for example in examples])
    known = np.isfinite(p_broken)
    confusion = [
        {
            "test pictures": truth,
            "called clean": int((~said & known & mask).sum()),
            "called broken": int((said & mask).sum()),
            "no answer": int((~known & mask).sum()),
        }
        for truth, mask in (("clean", ~broken), ("broken", broken))
    ]
    wrong = sorted(
        (i for i in range(len(examples)) if known[i] and said[i] != broken[i]),
        key=lambda i: -abs(p_broken[i] - broken[i]),
    )[:40]
    mistakes = [
        {
            "picture": Image.open(examples[i]["path"]),
            "prompt": examples[i]["prompt"],
            "it is": "broken" if broken[i] else "clean",
            "P(broken)": float(p_broken[i]),
        }
        for i in wrong
    ]
    scored = sorted(tree, key=lambda node: -node.get("log-likelihood", -math.inf))
    body = (
        "<h2>Test split, opened once</h2>"
        + report.table(
            [
                {"measure": name, "value [95 %]": shown(value)}
                for name, value in result.items()
                if isinstance(value, tuple)
            ]
        )
        + "<h2>Round by round, by the best question</h2>"
        + "\n".join(story)
        + "<h2>Confusion</h2>"
        + report.table(confusion)
        + "<h2>Still judged wrongly, worst first</h2>"
        + report.table(mistakes)
        + "<h2>Every question that was tried</h2>"
        + report.table(scored)
    )
    with atomic(folder / "report.html") as file:
        file.write(
            report.page(f"{result['select']}, seed {result['seed']}: {result['question']}", body)
        )


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
