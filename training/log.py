"""What a run writes down: every number on the screen is in a file of the run folder.

Read next: run_folder.py
"""

import math
import sys
import time

import torch
from tqdm import tqdm

from training import pictures
from training.processes import gather, rank
from training.records import append_jsonl, mean, read_jsonl, test_means, write_jsonl
from training.run_folder import begin_log
from training.sharding import DTensor
from training.trackers import Nowhere, start_tracker


def make_records(rows, rollouts, scores):
    """One dict for each rollout: its prompt (one of `rows`), its thought, its scores."""
    records = []
    for n, (_, _, i, sample) in enumerate(rollouts.keys):
        record = {"id": rows[i]["id"], "prompt": rows[i]["prompt"], "sample": sample}
        record["thought"] = rollouts.thoughts[n]
        records.append(record | {name: values[n].item() for name, values in scores.items()})
    return records


def token_scores(k3_NS, surprise_NS, mask_NS):
    """Two scores of each test picture: its KL, in nats, and the mean over its tokens of -log pi -
    entropy. The latter is 0 on average, if the tokens were sampled from what is scored."""
    kl, surprise = (torch.where(mask_NS, values, 0.0).sum(1) for values in (k3_NS, surprise_NS))
    return {"kl": kl, "check/surprise": surprise / mask_NS.sum(1)}


def summarize(records, trained, heldout, group_size):
    """One step's records -> numbers to log. A NaN score counts as failed and enters no mean; a
    group with one is left out of group_std."""
    failed = mean(any(math.isnan(record[name]) for name in trained) for record in records)
    words = mean(len(record["thought"].split()) for record in records)
    metrics = {"failed": failed, "thought_words": words}
    advantages = torch.tensor([record["advantage"] for record in records]).view(-1, group_size)
    kinds = dict.fromkeys(trained, "reward") | dict.fromkeys(heldout, "held-out")
    for name, kind in (kinds | {"total": "reward"}).items():
        values = torch.tensor([record[name] for record in records]).view(-1, group_size)
        metrics[f"{kind}/{name}"] = values.nanmean().item()
        # The spread within a group is what GRPO learns from.
        metrics[f"{kind}/{name}/group_std"] = values.std(1).nanmean().item()
        if name in trained:
            metrics[f"reward/{name}/ceiling"] = at_the_top(values)
            metrics[f"reward/{name}/advantage_corr"] = correlation(values, advantages)
    metrics["unanimous_groups"] = (advantages == 0).all(1).float().mean().item()
    return metrics


def at_the_top(values):
    """Share of rollouts whose score is the highest of their group. Where no two are equal it is 1 /
    G; near 1 the reward has reached its ceiling, and teaches nothing."""
    highest = values.nan_to_num(-math.inf).amax(1, keepdim=True)
    return (values == highest).float().mean().item()


def correlation(values, advantages):
    """Of a reward, relative to its group, with the advantage: how far it decides what is learned.
    NaN if one of the two does not vary."""
    centered = values - values.nanmean(1, keepdim=True)
    known = centered.isfinite()
    pair = torch.stack([centered[known], advantages[known]])
    return torch.corrcoef(pair)[0, 1].item() if (pair.std(1) > 0).all() else math.nan


def check_weights(policy):
    """Are the trained weights finite, and do all processes hold the same ones? By their sum. Shards
    are not compared: they are parts of one set of weights."""
    trained = [p.detach() for p in policy.model.parameters() if p.requires_grad]
    shards = [p.to_local() for p in trained if isinstance(p, DTensor)]
    total = sum(p.double().sum().item() for p in trained if not isinstance(p, DTensor))
    totals = gather([total])
    finite = all(gather([all(p.isfinite().all() for p in shards)])) and all(
        map(math.isfinite, totals)
    )
    return {
        "weights_finite": int(finite),
        "processes_agree": int(len(set(totals)) == 1 or not finite),
    }


def with_errors(means):
    """
    >>> with_errors({"hps": 0.56, "hps/se": 0.011, "kl": 0.0, "kl/se": math.nan, "image/dark": 0.1})
    'hps 0.560±0.011  kl 0.000'"""
    errors = {name: means.get(f"{name}/se", math.nan) for name in means if "/" not in name}
    parts = [
        f"{name} {means[name]:.3f}" + (f"±{error:.3f}" if math.isfinite(error) else "")
        for name, error in errors.items()
    ]
    return "  ".join(parts)


def peak_memory():
    """GB that torch has used of the fullest GPU so far; nothing on a CPU."""
    if not torch.cuda.is_available():
        return {}
    return {"gpu_gb": max(gather([torch.cuda.max_memory_allocated() / 1e9]))}


class Stopwatch:
    """Seconds of each part of a step, as metrics "seconds/<part>"."""

    def __init__(self):
        self.seconds, self.last = {}, time.perf_counter()

    def start(self):
        self.last = time.perf_counter()

    def __call__(self, part):
        """The part that began at the last call, or at start, ends here."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # a GPU works while Python goes on
        now = time.perf_counter()
        self.seconds[f"seconds/{part}"] = round(now - self.last, 3)
        self.last = now


class Log:
    """The run folder and the screen. Rank 0 writes; the other processes only send their part."""

    def __init__(self, cfg, folder, start, rewards):
        self.cfg, self.folder, self.writes = cfg, folder, rank() == 0
        self.trained, self.heldout = list(rewards.train), list(rewards.heldout)
        self.clock = Stopwatch()
        if self.writes:
            begin_log(folder, start, cfg, rewards.all)
            self.tracker = start_tracker(cfg, folder, start)
            print(
                f"{folder}/: trained on {' + '.join(self.trained)}; held out: "
                f"{', '.join(self.heldout) or 'nothing'}; {cfg.prompts_per_step} prompts x "
                f"{cfg.num_generations} pictures a step",
                flush=True,
            )
        steps, total = range(start, cfg.max_steps), cfg.max_steps
        self.bar = tqdm(steps, "grpo", total, initial=start, disable=not self.writes)

    def steps(self):
        for step in self.bar:
            self.clock.start()
            yield step

    def step(self, step, metrics, policy, rows, rollouts, scores):
        """Write one training step; returns (all metrics, the records of all processes)."""
        records = gather(make_records(rows, rollouts, scores))
        G = self.cfg.num_generations
        metrics = metrics | summarize(records, self.trained, self.heldout, G)
        metrics |= check_weights(policy) | peak_memory()
        metrics["diversity"] = mean(gather(pictures.diversity(rollouts.images, G)))
        if self.writes:
            line = {"step": step, **metrics, **self.clock.seconds}
            append_jsonl(self.folder / "metrics.jsonl", line)
            self.send(step, metrics | self.clock.seconds, {})
            numbered = [{"step": step} | record for record in records]
            write_jsonl(self.folder / "rollouts" / f"step_{step:06d}.jsonl", numbered)
            shown = {name: f"{metrics[f'reward/{name}']:.3f}" for name in self.trained}
            shown |= {name: f"{metrics[f'held-out/{name}']:.3f}" for name in self.heldout}
            self.bar.set_postfix(shown | {"kl": f"{metrics['kl']:.2f}"})
        return metrics, records

    def rollout_pictures(self, step, images):
        """The pictures of one training step, of all processes, in place of the last ones."""
        images = gather(images)
        if self.writes:
            for old in (self.folder / "rollouts").glob("*.png"):
                old.unlink()
            pictures.save_sheet(images, self.folder / "rollouts" / f"step_{step:06d}.png")

    def test(self, step, records, images):
        """Write the records and pictures of one test."""
        if not self.writes:
            return
        means = test_means(records)
        write_jsonl(self.folder / "tests" / f"step_{step:06d}.jsonl", records)
        append_jsonl(self.folder / "test.jsonl", {"step": step, **means})
        strip = self.folder / "samples" / f"step_{step:06d}.png"
        pictures.save_strip(images[: pictures.STRIP], strip)
        numbers = {f"test/{name}": value for name, value in means.items()}
        self.send(step, numbers, {"fixed prompts": strip})
        pictures.save_sheet(images, self.folder / "tests" / f"{'last' if step else 'first'}.png")
        tqdm.write(f"test at step {step}:  {with_errors(means)}")

    def pool(self, records):
        """Write the records for best-of-n."""
        if self.writes:
            write_jsonl(self.folder / "best_of_n.jsonl", records)

    def send(self, step, numbers, pictures):
        """To the tracker. One that fails costs a line and not the run. step None: the run ends."""
        try:
            if step is None:
                self.tracker.finish()
            else:
                self.tracker.send(step, numbers, pictures)
        except Exception as problem:  # whatever its library raises
            name, self.tracker = self.cfg.report_to, Nowhere()
            tqdm.write(f"--report-to {name}: {problem!r}; going on without it", file=sys.stderr)

    def end(self, page):
        """Name the page; send the changes from the first test to the last, and the two figures."""
        tests = read_jsonl(self.folder / "test.jsonl")
        first, last = tests[0], tests[-1]
        changes = {f"change/{n}": last[n] - first[n] for n in first if "/" not in n and n != "step"}
        files = {name: self.folder / f"{name}.png" for name in ("hacking", "training")}
        self.send(last["step"], changes, files)
        self.send(None, None, None)
        print(f"look at {page}")
