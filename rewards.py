"""Every reward and every metric, in one dictionary, behind one calling convention.

    reward = rewards.load("hps", checkpoint="tiny")
    scores = reward(prompts, images, metadata)    # (N,) float32, higher is better, NaN = no score

A reward model measures what it was trained on, and little else. HPS was fitted to choices between
two pictures (Bradley-Terry: P(a over b) = sigmoid(s_a - s_b)). Where faults did not influence these
choices, it has no reason to score broken pictures lower. ArtifactReward is asked about faults only.
`combine` turns several rewards into one number.

Run:   python rewards.py --list
       python rewards.py --list --verbose         also: the command that downloads or starts each
       python rewards.py score hps,stats outputs/00000/samples/*.png --prompt "a red star"
       python rewards.py serve hps --model real      then: --rewards hps@http://127.0.0.1:8100

You should see:  a line for each reward, with its range and what it needs; then a score for each
picture. `evaluate.py --images` scores a whole folder.

A reward of your own: a class with the attributes and the call of `Jpeg`
(reward_models/image_statistics.py), and a line in REWARDS. README.md has an example.

Left out: the models; they are in reward_models/, a file for each family.
Read next: artifact_reward.py
"""

import functools
import math
import re
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import tyro

from adversarial_reward import Adversarial, AdversarialPickScore
from artifact_reward import ArtifactReward
from evaluation.tables import markdown
from reward_models import guards
from reward_models.clip import HPS, Aesthetic, PickScore
from reward_models.git import GIT
from reward_models.grounding_dino import GDino
from reward_models.hpsv3 import HPSv3
from reward_models.image_statistics import STATISTICS, Jpeg, Noise
from reward_models.imagereward import ImageReward
from reward_models.llava import ORM, Unified
from reward_models.maniqa import MANIQAReward
from reward_models.serving import DeQA, RemoteReward, serve_forever
from reward_models.vqascore import VQAScore
from tiny_world.gold import Gold, GoldAligned, GoldClean
from training import waiting
from training.cures import win_rates
from training.decode import open_picture
from training.files import ROOT, usage_error
from training.flags import reward_parts
from training.processes import pick_device

# Shapes:  N pictures or rollouts   K rewards

REWARDS = {
    "hps": HPS,
    "hpsv3": HPSv3,
    "pickscore": PickScore,
    "imagereward": ImageReward,
    "aesthetic": Aesthetic,
    "maniqa": MANIQAReward,
    "deqa": DeQA,
    "gdino": GDino,
    "git": GIT,
    "orm": ORM,
    "vqascore": VQAScore,
    "unified": Unified,
    "artifact": ArtifactReward,
    "adversarial": Adversarial,
    "adversarial-pickscore": AdversarialPickScore,
    "jpeg": Jpeg,
    "noise": Noise,
    **STATISTICS,  # brightness, saturation, edges, entropy: held-out only; "stats" names all four
    "gold": Gold,
    "gold-aligned": GoldAligned,
    "gold-clean": GoldClean,
}


def load(name, device="cpu", checkpoint=None, url=None, **options):
    """The reward of that name.

    checkpoint: None = the published one, "tiny" = ours, or a folder. url: the reward is served
    there (`rewards.py serve`), with its options. options: the class'. Wrong input: exit code 2."""
    if name not in REWARDS:
        usage_error(f"unknown reward {name!r}; known are {', '.join(REWARDS)}")
    if url:
        reward = RemoteReward(name, url)
        if reward.tiny and checkpoint != "tiny":
            usage_error(
                f"{name}@{url} serves the checkpoint of the tiny world, which knows no other; "
                f"start it with `python rewards.py serve {name} --model real`"
            )
        return reward
    kind = REWARDS[name]
    if checkpoint == "tiny":
        checkpoint = ROOT / "tiny_world/checkpoints" / getattr(kind, "tiny_folder", name)
        if kind.checkpoint and not checkpoint.is_dir():
            usage_error(f"{name} has no tiny checkpoint; it works with a --model other than tiny")
    reward = kind(device=device, checkpoint=checkpoint, **options)
    if getattr(reward, "remote", False):  # a judge on a server does not use it
        checkpoint = None
    reward.identity = guards.identity(reward, name, checkpoint)
    reward.tiny = bool(kind.checkpoint) and guards.is_tiny(checkpoint)
    return reward


# --- names, weights and roles -------------------------------------------------------------------


def parse(text):
    """ "hps:1,artifact:0.5" -> {"hps": 1.0, "artifact": 0.5}. Wrong input: exit code 2."""
    return {name: weight for name, weight, _ in parse_parts(text)}


def unweighted(text):
    """The names alone, where a weight has no meaning. Wrong input: exit code 2."""
    for name, weight in parse(text).items():
        if weight != 1:
            usage_error(f"{name}:{weight:g}: only --rewards of grpo.py has weights; drop it here")
    return list(parse(text))


def addresses(text):
    """ "hps@http://127.0.0.1:8100:0.5,artifact" -> {"hps": "http://127.0.0.1:8100"}."""
    return {name: url for name, _, url in parse_parts(text) if url}


def parse_parts(text):
    """(name, weight, address or None) of each part of "name", "name:weight" or
    "name@http://host:port[:weight]", separated by commas."""
    found = []
    for part in reward_parts(text):
        match = re.fullmatch(r"([^:@]*)(?:@(https?://[^/:]+:\d+))?(?::(.*))?", part)
        if match is None:
            form = "name, name:weight or name@http://host:port:weight"
            usage_error(f"rewards {text}: {part!r} does not have the form {form}")
        name, url, weight = match.groups()
        try:
            value = float(weight or 1)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            usage_error(f"rewards {text}: {weight!r} is no number above 0, as in artifact:0.5")
        if name not in REWARDS:
            known = ", ".join(REWARDS)
            usage_error(f"rewards {text}: unknown reward {name!r}; known are {known}")
        if name in (known for known, *_ in found):
            usage_error(f"rewards {text}: {name!r} is named twice; give it one weight")
        found.append((name, value, url))
    return found


def gigabytes(cfg):
    """GPU memory of the published models that these flags of grpo.py load into its process. A class
    without the attribute needs none."""
    if cfg.model == "tiny":
        return 0.0
    parts = parse_parts(cfg.rewards) + parse_parts(cfg.eval_rewards)
    return sum(getattr(REWARDS[name], "gigabytes", 0.0) for name, _, url in parts if not url)


def learns(reward):
    """Is this reward (or class) trained along with the policy?"""
    return hasattr(reward, "learn")


def check_roles(training, heldout, how):
    """The flags --rewards, --eval-rewards and --combine of grpo.py -> (name -> weight, held-out
    names). A reward has one role: what is trained on is no evidence. Wrong input: exit code 2."""
    weights, heldout = parse(training), unweighted(heldout)
    if not weights:
        usage_error("--rewards: name at least one, such as hps,artifact")
    both = ", ".join(weights.keys() & set(heldout))
    if both:
        usage_error(
            f"{both} is in --rewards and in --eval-rewards (tiny: gold and its parts, unless you "
            "name others): what is trained on cannot be held out; remove it from one"
        )
    statistics = ", ".join(name for name in weights if name in STATISTICS)
    if statistics:
        usage_error(f"--rewards {statistics}: an image statistic can only be in --eval-rewards")
    untrained = ", ".join(name for name in heldout if learns(REWARDS[name]))
    if untrained:
        why = "it is meaningless unless it learns beside the policy; name it in --rewards"
        usage_error(f"--eval-rewards {untrained}: {why}")
    remote = ", ".join(name for name in addresses(training) if learns(REWARDS[name]))
    if remote:
        why = "it learns from the policy's pictures, in this process only; leave the address out"
        usage_error(f"--rewards {remote}@...: {why}")
    weighted = [f"{name}:{weight:g}" for name, weight in weights.items() if weight != 1]
    if weighted and how in ("mean", "min", "uwo", "constrained"):
        usage_error(
            f"--combine {how} uses no weights, and --rewards has {', '.join(weighted)}; drop the "
            "weights, or use --combine sum, normalized, pareto, winrate or quantized"
        )
    return weights, heldout


class Rewards:
    """The loaded rewards of a run, by name, in their two roles."""

    def __init__(self, weights, heldout, loaded):
        self.weights, self.all = weights, loaded  # weights: training reward -> weight
        self.train = {name: loaded[name] for name in weights}
        self.heldout = {name: loaded[name] for name in heldout}
        self.adversaries = {n: reward for n, reward in self.train.items() if learns(reward)}
        # combine=constrained: the weight of each training reward but the first
        self.multipliers = {name: 1.0 for name in list(weights)[1:]}

    def update_multipliers(self, records, how, floor, rate=0.1):
        """combine=constrained: lambda_k, the weight of reward k, rises if its mean over a step is
        below the floor, and falls if it is above (dual ascent on a Lagrange multiplier):
        lambda_k <- [lambda_k + rate (floor - mean r_k)]_+."""
        for name, value in self.multipliers.items() if how == "constrained" else ():
            mean = float(torch.tensor([record[name] for record in records]).nanmean())
            if math.isfinite(mean):  # else all scores of this step failed
                self.multipliers[name] = max(0.0, value + rate * (floor - mean))


def refuse_learners(names):
    """A reward that learns cannot score pictures alone."""
    names = ", ".join(name for name in names if learns(REWARDS[name]))
    if names:
        usage_error(f"{names}: it must learn beside a policy before it can score; use grpo.py")


def load_all(cfg, weights, heldout, rows):
    """The rewards of a run, from the flags of grpo.py, as a Rewards. rows: its training prompts.
    Exit code 2 if the judge or the reference pictures are unusable."""
    adversary = {"references": cfg.references, "steps": cfg.adversary_steps}
    adversary |= {"when": cfg.adversary_update, "seed": cfg.seed}
    judge = {"judge_urls": cfg.judge_url, "judge_model": cfg.judge_model, "question": cfg.question}
    options = {"artifact": judge, "adversarial": adversary, "adversarial-pickscore": adversary}
    urls = addresses(cfg.rewards) | addresses(cfg.eval_rewards)
    asked = "artifact" in [*weights, *heldout] and "artifact" not in urls
    if not asked and (cfg.question or cfg.judge_url or cfg.judge_model):
        usage_error("--question, --judge-url, --judge-model: no reward `artifact` here uses them")
    device, loaded = pick_device(cfg.device)[0], {}
    checkpoint, prompts = "tiny" if cfg.model == "tiny" else None, [row["prompt"] for row in rows]
    for name in [*weights, *heldout]:
        flags = options.get(name, {})
        loaded[name] = load(name, device, checkpoint, urls.get(name), **flags)
        if hasattr(loaded[name], "check"):
            loaded[name].check(prompts)
    guards.say_cut(loaded, prompts)
    return Rewards(weights, heldout, loaded)


# --- scoring ------------------------------------------------------------------------------------


def start_scoring(rewards, prompts, images, metadata=None):
    """Begin to score pictures with all rewards of a dict; call the result to get the scores.

    Remote rewards are asked at once, in threads, while the policy does its own work. Those of this
    process run when the scores are wanted: running two at once on one machine is slower. One of
    this process that raises, or returns another number of scores, ends the run: only a *picture*
    may fail, and is NaN then."""
    remote = {n: reward for n, reward in rewards.items() if getattr(reward, "remote", False)}
    calls = [functools.partial(r, prompts, images, metadata) for r in remote.values()]
    pending = dict(zip(remote, waiting.start(calls, len(calls))))

    def finish():
        scores = {}
        for name, reward in rewards.items():
            future = pending.get(name)  # a remote reward bounds its own time
            values = future.result() if future else reward(prompts, images, metadata)
            scores[name] = guards.check_scores(name, reward, values, len(images))
        return scores

    return finish


def score(rewards, prompts, images, metadata=None):
    """All rewards of a dict on the same pictures: name -> (N,) float32, NaN where one failed."""
    return start_scoring(rewards, prompts, images, metadata)()


def score_opened(rewards, prompts, images, metadata=None):
    """As `score`, but an image may be None, a damaged file: NaN from all rewards."""
    good, scores = [i for i, image in enumerate(images) if image is not None], {}
    guards.refuse_photographs(rewards, [images[i] for i in good])
    parts = [values and [values[i] for i in good] for values in (prompts, images, metadata)]
    known = score(rewards, *parts) if good else {}
    for name in rewards:
        scores[name] = torch.full((len(images),), math.nan)
        if good:
            scores[name][good] = known[name]
    return scores


# --- several rewards, one number ----------------------------------------------------------------


def standardize(values_NK, group_size):
    """z-scores within each group of rows, (N, K). NaN stays NaN, and counts neither in the mean nor
    in the standard deviation, which has n - 1 and 1e-4 added, as for advantages in T2I-R1."""
    groups = values_NK.view(-1, group_size, values_NK.shape[-1])
    known = groups.isfinite()
    count = known.sum(1, keepdim=True)
    mean = groups.nan_to_num().sum(1, keepdim=True) / count.clamp(min=1)
    squares = torch.where(known, groups - mean, 0.0).square().sum(1, keepdim=True)
    std = (squares / (count - 1).clamp(min=1)).sqrt()
    return ((groups - mean) / (std + 1e-4)).view_as(values_NK)


def combine(scores, weights, group_size, how="sum", multipliers=None):
    """Many rewards -> one number for each rollout, (N,). NaN marks a rollout that gets no
    advantage, because one of its scores failed. z: z-score in the group.

    sum          sum_k w_k r_k: the paper, and T2I-R1. The reward with the largest scale dominates.
    normalized   sum_k w_k z_k: all rewards count alike (with --advantage global: GDPO,
                 arXiv:2601.05242).
    mean, min    of the z_k: ensembles (arXiv:2312.09244, arXiv:2310.02743).
    uwo          mean - 0.5 variance of the z_k (there of r, in PPO with weight 0.1).
    pareto       sum; only the Pareto front of a group teaches: training/cures.py, pareto_front.
    winrate      sum_k w_k (share of the group's others that r_k puts lower): only the order counts,
                 so a tiny difference counts as much as a large one (Pref-GRPO, arXiv:2508.20751).
    quantized    sum_k of w_k r_k rounded to tenths: tiny differences teach nothing (AR-GRPO,
                 arXiv:2508.06924, adds a reward of three levels to the plain one).
    constrained  r_1 + sum_{k>1} lambda_k r_k; Rewards.update_multipliers sets lambda so that each
                 further reward stays above its floor (after arXiv:2310.04373, where every reward is
                 a constraint)."""
    names = list(weights)
    values = torch.stack([scores[name] for name in names], 1)  # (N, K)
    weight = torch.tensor([weights[name] for name in names])
    if how in ("sum", "pareto"):
        return (values * weight).sum(1)
    if how == "winrate":
        columns = [win_rates(column, group_size) for column in values.T]
        return (torch.stack(columns, 1) * weight).sum(1)
    if how == "quantized":
        return (values * weight * 10).round().sum(1) / 10
    if how == "constrained":
        multiplier = torch.tensor([multipliers[name] for name in names[1:]])
        return values[:, 0] + (values[:, 1:] * multiplier).sum(1)
    z = standardize(values, group_size)
    if how == "normalized":
        return (z * weight).sum(1)
    if how == "min":
        return z.min(1).values
    return z.mean(1) - 0.5 * z.var(1, correction=0) * (how == "uwo")  # mean, or uwo


# --- command line -------------------------------------------------------------------------------


@dataclass
class Config:
    command: Annotated[Literal["", "score", "serve"], tyro.conf.Positional] = ""  # what to do
    reward: Annotated[str, tyro.conf.Positional] = ""  # score: which rewards; serve: which one
    files: Annotated[tuple[str, ...], tyro.conf.Positional] = ()  # score: picture files
    list: bool = False  # list all rewards
    verbose: bool = False  # list: also how to download each checkpoint or start its server
    prompt: str = ""  # score: the prompt of the pictures
    # "tiny" for our checkpoints, "real" for the published ones [score: tiny; serve: say which]
    model: Literal["", "tiny", "real"] = ""
    checkpoint: str | None = None  # or a folder of your own
    port: int = 8100  # serve: where to listen
    host: str = "127.0.0.1"  # serve: 0.0.0.0 lets everybody in who can reach this machine
    token: str = ""  # serve: answer only those whose environment has it as REWARD_TOKEN


def overview(verbose):
    """A row for each reward, for tables."""
    rows = []
    for name, kind in REWARDS.items():
        row = {"name": name, "range": f"{kind.range[0]:g} to {kind.range[1]:g}"}
        row["usual"] = getattr(kind, "usual", "")
        row |= {"needs": ", ".join(kind.needs) or "-", "checkpoint": kind.checkpoint or "-"}
        row["reference"] = kind.reference
        if verbose:
            download = f"hf download {kind.checkpoint}" if kind.checkpoint else "-"
            row["how to get it"] = getattr(kind, "how", download)
        rows.append(row)
    return rows


def score_files(loaded, files, prompt):
    """One row for each file; NaN where it is no readable picture."""
    rows = []
    for path in files:
        scores = score_opened(loaded, [prompt], [open_picture(path)])
        rows.append({name: value.item() for name, value in scores.items()} | {"picture": path})
    return rows


def serve_reward(cfg, name, url, device, checkpoint):
    if REWARDS[name].checkpoint and not (cfg.model or cfg.checkpoint):
        usage_error(
            f"serve {cfg.reward}: which weights? --model real (the published ones), --model tiny "
            "(those of the tiny world) or --checkpoint FOLDER"
        )
    serve_forever(name, lambda: load(name, device, checkpoint, url), cfg.port, cfg.host, cfg.token)


def main(cfg):
    if cfg.list or not cfg.command:
        return print(markdown(overview(cfg.verbose)))
    parts = parse_parts(cfg.reward)
    if not parts or (len(parts) > 1 and cfg.command == "serve"):
        usage_error(f"{cfg.reward!r}: name a reward to score with or to serve; --list shows them")
    if cfg.command == "score" and not cfg.files:
        example = 'python rewards.py score hps picture.png --prompt "a red star"'
        usage_error(f"name pictures as well: {example}; for a folder: evaluate.py --images")
    refuse_learners([name for name, *_ in parts])
    reads = [name for name, *_ in parts if "text" in REWARDS[name].needs]
    if cfg.command == "score" and reads and not cfg.prompt:
        usage_error(f'{reads[0]} compares the picture with its prompt; give --prompt "a red star"')
    checkpoint = cfg.checkpoint or (None if cfg.model == "real" else "tiny")
    device = pick_device("auto")[0]
    if cfg.command == "serve":
        return serve_reward(cfg, parts[0][0], parts[0][2], device, checkpoint)
    unweighted(cfg.reward)
    loaded = {name: load(name, device, checkpoint, url) for name, _, url in parts}
    rows = score_files(loaded, cfg.files, cfg.prompt)
    print(markdown(rows))
    guards.say_failures(loaded)
    sys.exit(3 if any(math.isnan(row[name]) for row in rows for name in loaded) else 0)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
