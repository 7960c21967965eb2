"""Automatic prompt optimisation: the judge's question learns from the judge's mistakes (ProTeGi).

ArtifactReward has one parameter, the question, and a question has no gradient. ProTeGi
(arXiv:2305.03495) replaces the gradient by words. Show a language model the pictures that a
question judged wrongly and ask for the reason (the "textual gradient"). Let it rewrite the question
accordingly (the step). Paraphrase the result (to leave local optima). Keep the best few (a beam):

    for each round:
        for each question of the beam:   mistakes -> reasons -> rewrites -> paraphrases
        beam = the best by   mean over pictures of  y log p + (1 - y) log(1 - p),
                             p = P(broken) by the judge, y = 1 if the picture is broken

Most candidates are bad, and finding them should not need the judge on every picture. How to choose
the best few with few judge calls is in evaluation/best_arm.py; `--select` has four ways.

Run:   python apo.py                  the tiny world: three seeds, two ways to select, 4 minutes
       python apo.py --rubric 5       also learn weights for up to five of the questions
       python apo.py --data FOLDER --checkpoint none --judge-url http://127.0.0.1:8000/v1

You should see:  accuracy on the test split of the first question, then of the optimised one, with
intervals, and how many answers of the judge that took; runs/apo/*/question.txt and report.html.

The data are split by prompt. The test split is opened once, at the end. (The released code scores
its test file in every round.) Each answer is kept on disk: the same command again asks for none.

Left out: the writing model in the tiny world. No model that small can write. A scripted editor
(tiny_world/questions.py) proposes the changes; judge, mistakes, beam and selection are real.
Read next: evaluate.py
"""

import functools
import hashlib
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from artifact_reward import judge_images, parse_rubric, read_question
from evaluation import pages, rubric
from evaluation.answers import Answers
from evaluation.best_arm import SELECT, Race, log_likelihoods
from evaluation.labels import compare, load_examples, mistakes, with_intervals
from evaluation.tables import interval, markdown
from reward_models import guards
from reward_models.judge import DEFAULT_URL, LocalJudge, ServedJudge
from tiny_world.questions import ScriptedEditor
from training.decode import file_digest, open_picture
from training.files import ROOT, atomic, fingerprint, usage_error
from training.flags import JudgeUrls
from training.processes import bar, pick_device
from training.records import write_json, write_jsonl

Method = Literal["full", "ucb", "successive-rejects", "successive-halving"]
LONGEST = 1200  # characters of a question; a longer one is an essay


@dataclass
class Config:
    data: str = str(ROOT / "tiny_world/pairs")  # labelled pictures, see labels.load_examples
    question: str = "Are there artifacts in this picture? Answer yes or no."  # first one, or a file
    rounds: int = 4  # each expands and selects once; 6 in the paper's code
    beam: int = 4  # questions that survive a round
    minibatch: int = 60  # pictures among which mistakes are looked for
    gradients: int = 4  # reasons asked for, each from `errors` mistakes
    errors: int = 4  # mistakes shown for one reason
    max_expansion: int = 5  # new questions tried for each old one
    # how the beam is chosen; several ways run one after the other, to compare them
    select: tuple[Method, ...] = ("full", "successive-rejects")
    budget: float = 0.35  # judge calls of a round, as a share of those of "full"
    seeds: tuple[int, ...] = (0, 1, 2)  # one search each
    # also learn weights for up to this many of the questions (evaluation/rubric.py); each question
    # is then asked about all training and validation pictures, whatever the budget
    rubric: int = 0
    checkpoint: str = "tiny"  # judge in this process: "tiny", a folder, a hub name; none: a server
    judge_url: JudgeUrls = ()  # judge server; again for more
    judge_model: str | None = None  # the served model's name [the first that is served]
    writer: Literal["auto", "judge", "scripted"] = "auto"  # writes questions [tiny: scripted]
    writer_url: str | None = None  # server of the writer [the judge's]
    writer_model: str | None = None  # its name [the first that is served]
    output_dir: str = "runs/apo"  # a folder for each search, and the answers


# --- the judge, with a memory -------------------------------------------------------------------


class CachedJudge:
    """The judge, with all its answers on disk: nothing is asked twice, not even in a later run.

    used: keys of all answers that this search needed. calls: those the judge had to give."""

    def __init__(self, path, judge, name):
        self.memory = Answers(path)
        self.judge, self.name = judge, name
        self.used, self.calls, self.digests, self.damaged = set(), 0, {}, set()

    def __call__(self, question, examples):
        """P(broken) for each example, (N,); NaN, which is not saved, where there is no answer."""
        keys = [f"{self.name}\n{question}\n{self.digest(example)}" for example in examples]
        self.used.update(keys)
        last = dict(zip(keys, range(len(keys))))
        missing = [i for key, i in last.items() if math.isnan(self.memory.number(key))]
        self.calls += len(missing)
        starts = range(0, len(missing), 64)
        for start in bar(starts, "judging"):  # saved as it goes: a stop loses few answers
            batch = missing[start : start + 64]
            images = [self.open(examples[i]) for i in batch]
            guards.refuse_photographs({self.name: self.judge}, images)
            for i, score in zip(batch, judge_images(self.judge, question, images)):
                if math.isfinite(score):
                    self.memory.save(keys[i], repr(1 - score))
        return np.array([self.memory.number(key) for key in keys])

    def open(self, example):
        """The picture, or None: a damaged one is named once."""
        image = None if example["path"] in self.damaged else open_picture(example["path"])
        self.damaged |= set() if image else {example["path"]}
        return image

    def digest(self, example):
        path = example["path"]
        if path not in self.digests:
            self.digests[path] = file_digest(path)
        return self.digests[path]


# --- the writer: reasons, rewrites, paraphrases -------------------------------------------------


class Writer:
    """A language model behind an OpenAI-compatible server; by default the judge's own model (as
    released: a smaller one)."""

    def __init__(self, served, judge):
        self.served, self.judge = served, judge  # a CachedJudge, for its memory

    def write(self, text, mistakes, rng):
        """What the model writes to this text and these pictures; saved like the judge's answers.
        The seed makes a second reason for the same mistakes differ. "" if it fails."""
        seed = rng.randrange(2**31)
        parts = [self.served.model, seed, text, [self.judge.digest(e) for e, _ in mistakes]]
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        answer = self.judge.memory.recall(key)
        if answer is None:
            images = [self.judge.open(example) for example, _ in mistakes]  # judged: readable
            write = functools.partial(self.served.write, text, images, temperature=0.7, seed=seed)
            (answer,) = self.served.ask([write])
            if answer:
                self.judge.memory.save(key, answer)
        return " ".join((answer or "").split()).strip('" ')  # a question is one line

    def reason(self, question, mistakes, rng):
        shown = "\n".join(
            f"Picture {i}: it is {'broken' if e['broken'] else 'not broken'}; the answer gave "
            f"{p:.0%} for broken."
            for i, (e, p) in enumerate(mistakes, 1)
        )
        text = (
            "A vision model is asked this question about pictures, to find those with artifacts, "
            f"that is, faults of construction:\n\n{question}\n\nAbout these pictures it was wrong."
            f"\n{shown}\n\nIn two or three sentences: what about the question led it astray?"
        )
        return self.write(text, mistakes, rng)

    def rewrite(self, question, reason, mistakes, rng):
        text = (
            f"A vision model is asked this question about pictures:\n\n{question}\n\nIt led to "
            f"mistakes. The reason given was: {reason}\n\nWrite a better question. It must ask for "
            "the answer yes (faults) or no (none). Write the question only."
        )
        return self.write(text, mistakes, rng)

    def paraphrase(self, question, rng):
        text = (
            "Say this in other words, with the same meaning, keeping that the answer is yes or no. "
            f"Write the new text only.\n\n{question}"
        )
        return self.write(text, [], rng)


def refusal(question):
    """Why a text cannot be a question to the judge, or None."""
    words = {word.strip(".,:;!?\"'()/").lower() for word in question.replace("/", " ").split()}
    if not words:
        return "empty"
    if parse_rubric(question) != [(1.0, question)]:
        return "a rubric, and not one question"
    if len(question) > LONGEST:
        return f"longer than {LONGEST} characters"
    return None if {"yes", "no"} <= words else "does not ask for yes or no"


# --- the algorithm ------------------------------------------------------------------------------


def expand(question, batch, judge, writer, cfg, rng, refused):
    """New questions from the mistakes of an old one: [(question, reason)]. refused: a dict that
    counts the unusable proposals by their reason."""
    judged = [(e, p) for e, p in zip(batch, judge(question, batch)) if math.isfinite(p)]
    wrong = [(e, p) for e, p in judged if (p > 0.5) != e["broken"]]
    proposed = []
    for _ in range(cfg.gradients if wrong else 0):  # without mistakes there is nothing to ask
        mistakes = rng.sample(wrong, min(cfg.errors, len(wrong)))
        reason = writer.reason(question, mistakes, rng)
        rewrite = writer.rewrite(question, reason, mistakes, rng) if reason else ""
        proposed.append((rewrite, reason))
    for text in [question, *(text for text, _ in proposed)]:
        if not refusal(text):
            proposed.append((writer.paraphrase(text, rng), "in other words"))
    usable = {}
    for text, reason in proposed:
        why = refusal(text)
        if why:
            refused[why] = refused.get(why, 0) + 1
        else:
            usable[text] = reason
    return rng.sample(list(usable.items()), min(cfg.max_expansion, len(usable)))


def optimize(first, data, judge, writer, how, seed, cfg):
    """One search. Returns (best question, all questions tried, rounds, refusals). It sees the train
    and validation splits, never test."""
    rng, refused = random.Random(seed), {}
    train = rng.sample(data["train"], len(data["train"]))
    tree = {first: {"round": 0, "question": first, "parent": "", "reason": "the first one"}}
    beam, rounds = [first], []
    for number in range(1, cfg.rounds + 1):
        batch = rng.sample(train, min(cfg.minibatch, len(train)))
        for parent in list(beam):
            for text, reason in expand(parent, batch, judge, writer, cfg, rng, refused):
                node = {"round": number, "question": text, "parent": parent, "reason": reason}
                tree.setdefault(text, node)
        new = [text for text, node in tree.items() if node["round"] == number and text not in beam]
        race = Race([*beam, *new], train, judge)
        beam = SELECT[how](race, cfg.beam, cfg.budget * len(race.scores) * len(train))
        for question, scores in race.scores.items():
            tree[question] |= {"log-likelihood": float(scores.mean()), "pictures": len(scores)}
        measured = with_intervals(judge(beam[0], data["validation"]), data["validation"])
        about = {"round": number, "question": beam[0], "candidates": len(race.scores)}
        rounds.append(measured | about)
        progress = f"accuracy {measured['accuracy'][0]:.3f}, {len(judge.used)} judge answers"
        print(f"  round {number}: validation {progress}  {beam[0]}", flush=True)
    # The best of the beam was chosen on training pictures: let the validation split decide.
    labels = np.array([example["broken"] for example in data["validation"]])

    def validation_score(question):
        return log_likelihoods(judge(question, data["validation"]), labels).mean()

    return max([*beam, first], key=validation_score), list(tree.values()), rounds, refused


def load_judge(cfg):
    """(judge, a name for the memory that changes with its weights)."""
    if cfg.judge_url or cfg.checkpoint == "none":
        judge = ServedJudge(cfg.judge_url or (DEFAULT_URL,), cfg.judge_model)
        return judge, f"{judge.model} at {judge.address}"
    tiny = ROOT / "tiny_world/checkpoints/artifact"
    folder = tiny if cfg.checkpoint == "tiny" else Path(cfg.checkpoint)
    name = f"{cfg.checkpoint} {fingerprint(folder)}"
    return LocalJudge(str(folder), pick_device("auto")[0]), name


def load_writer(cfg, judge):
    """The served model that writes, or None for the scripted editor of the tiny world."""
    tiny = cfg.checkpoint == "tiny" and not (cfg.judge_url or cfg.writer_url)
    if cfg.writer == "scripted" or (cfg.writer == "auto" and tiny):
        print("a scripted editor proposes the changes; it takes the place of a model that writes")
        return None
    if cfg.writer_url:
        return ServedJudge([cfg.writer_url], cfg.writer_model)
    if isinstance(judge, ServedJudge):
        return judge  # the model that judges also thinks about the question
    usage_error("a judge in this process answers yes or no, it does not write: give --writer-url")


def check_numbers(cfg):
    for name in ("rounds", "beam", "minibatch", "gradients", "errors", "max_expansion"):
        if getattr(cfg, name) < 1:
            flag = name.replace("_", "-")
            usage_error(f"--{flag} {getattr(cfg, name)}: must be 1 or more")
    if cfg.rubric < 0:
        usage_error(f"--rubric {cfg.rubric}: how many questions at most; 0 for none")
    if not 0 < cfg.budget <= 1:
        usage_error(f"--budget {cfg.budget}: a share of the calls of full, above 0, at most 1")
    for values in (cfg.seeds, cfg.select):
        if not values or len(set(values)) < len(values):
            usage_error("--seeds and --select: give at least one of each, and each once")


def main(cfg):
    check_numbers(cfg)
    first = " ".join(read_question(cfg.question).split())  # one line, as a rubric needs it
    if refusal(first):
        usage_error(f"--question {first[:60]!r}: {refusal(first)}; ask for yes or no")
    data, out = load_examples(cfg.data), Path(cfg.output_dir)
    rubric.check(data, cfg.rubric)
    judge, name = load_judge(cfg)
    served, results = load_writer(cfg, judge), []
    for seed in cfg.seeds:
        for how in cfg.select:
            print(f"{how}, seed {seed}")
            cached = CachedJudge(out / "answers.sqlite", judge, name)
            writer = Writer(served, cached) if served else ScriptedEditor()
            best, tree, rounds, refused = optimize(first, data, cached, writer, how, seed, cfg)
            print(f"  unusable proposals: {refused or 'none'}")
            calls = {"calls": len(cached.used), "asked": cached.calls}
            before, after = cached(first, data["test"]), cached(best, data["test"])  # only here
            result = {"select": how, "seed": seed, **calls, "refused": refused, "question": best}
            result |= compare(before, after, data["test"])
            folder = out / f"{how}_seed{seed}"
            (folder / "rubric.txt").unlink(missing_ok=True)  # of an earlier search
            if cfg.rubric:
                texts = [node["question"] for node in tree]
                result |= rubric.learn(texts, cached, data, cfg.rubric, folder / "rubric.txt")
            save(folder, result, tree, rounds, after, data["test"], first)
            results.append(result)
    guards.say_failures({name: judge})
    hidden = ("refused", "question", "asked")
    print(markdown([{k: shown(v) for k, v in r.items() if k not in hidden} for r in results]))
    for how in cfg.select:
        runs = [result for result in results if result["select"] == how]
        calls = sum(run["calls"] for run in runs) / len(runs)
        for measure in ("accuracy", "pairs"):
            gains = [run[f"{measure} after"][0] - run[f"{measure} before"][0] for run in runs]
            gain, width = interval(gains)
            over = f" ± {width:.3f} over {len(runs)} seeds" if len(runs) > 1 else ""
            print(f"{how}: {measure} {gain:+.3f}{over}, {calls:.0f} judge answers a search")
    print(f"questions, histories and pages are in {out}/*/; train with one of them:")
    last = out / f"{cfg.select[-1]}_seed{cfg.seeds[0]}"
    name = "rubric" if (last / "rubric.txt").is_file() else "question"
    print(f'    torchrun grpo.py --question "{last}/{name}.txt"')


# --- what a search leaves behind ----------------------------------------------------------------


def shown(value):
    return "{:.3f} [{:.3f}, {:.3f}]".format(*value) if isinstance(value, tuple) else value


def save(folder, result, tree, rounds, p_broken, examples, first):
    """question.txt, tree.jsonl (all that was tried), result.json and report.html of one search."""
    with atomic(folder / "question.txt") as file:
        file.write(result["question"] + "\n")
    write_jsonl(folder / "tree.jsonl", tree)
    write_json(folder / "result.json", result | {"rounds": rounds})
    history = []
    for before, line in zip([first, *(line["question"] for line in rounds)], rounds):
        row = {name: line[name] for name in ("round", "candidates")}
        row["best question"] = pages.word_diff(before, line["question"])
        history.append(row | {k: shown(v) for k, v in line.items() if isinstance(v, tuple)})
    measured = [(name, shown(value)) for name, value in result.items() if isinstance(value, tuple)]
    tables = {
        "Test split, opened once": [{"measure": k, "value [95 %]": v} for k, v in measured],
        "The best question of each round, on the validation split": history,
        **mistakes(p_broken, examples),
        "All questions that were tried": sorted(
            tree, key=lambda node: -node.get("log-likelihood", -math.inf)
        ),
    }
    title = f"{result['select']}, seed {result['seed']}: {result['question']}"
    with atomic(folder / "report.html") as file:
        file.write(pages.page(title, pages.sections(tables)))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
