"""Types of flags, and their parsing. This loads no torch, so that `grpo.py --help` is quick.

Read next: checks.py
"""

import os
import re
import time
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import tyro

# Of every --judge-url: one address each time it is given. A flag that takes any number would take
# the files behind it, too.
JudgeUrls = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
# Rewards that learn along with the policy: their scores of two steps cannot be compared.
LEARNING = ("adversarial", "adversarial-pickscore")
STATISTICS = ("brightness", "saturation", "edges", "entropy")  # the reward name "stats": all four
Combine = Literal[  # see rewards.combine
    "sum", "normalized", "mean", "min", "uwo", "pareto", "winrate", "quantized", "constrained"
]


@dataclass
class Cures:
    """--cures.NAME; the defaults are off. What they do: cures.py."""

    gradient_penalty: float = 0.0  # gamma: prefer flat optima; twice the time of an update
    # GARDO: names from --eval-rewards. The KL counts only for pictures that the training reward
    # ranks higher than these rewards do. They then guide the training, and are not fully held out.
    doubted_by: str = ""
    doubtful_share: float = 0.1  # GARDO: share of each group whose KL counts
    # GARDO: every so many steps the policy becomes the reference; the logged kl begins again at 0
    reference_steps: int = 0
    spread: bool = False  # GARDO: positive advantages times the distance to the nearest picture
    data_weight: float = 0.0  # likelihood of reference pictures (--references) in the loss
    # STAGE: added to the reward: this, times 1 / (1 + (entropy of the reference - entropy)^2)
    entropy_bonus: float = 0.0
    average: float = 0.0  # decay of an average of the weights, such as .95; the tests measure it

    def copies(self):
        """How many copies of the trained weights are in memory."""
        return bool(self.reference_steps) + bool(self.average) + 2 * bool(self.gradient_penalty)


def reward_parts(text):
    """The parts of --rewards or --eval-rewards, such as "hps:0.5"; "stats" stands for four."""
    parts = [part.strip() for part in (text or "").split(",") if part.strip()]
    return [p for part in parts for p in (STATISTICS if part == "stats" else [part])]


def reward_names(text):
    """The names in --rewards or --eval-rewards.

    >>> reward_names("hps:0.5, artifact@http://127.0.0.1:8000")
    ['hps', 'artifact']"""
    return [re.split("[:@]", part)[0] for part in reward_parts(text)]


def cure_flags(cures=None):
    """The flags of cures by name, as in config.json. Without an argument: their defaults, which a
    run from before a cure existed had."""
    return {f"cures.{name}": value for name, value in asdict(cures or Cures()).items()}


def parse_flags(config, description):
    """The command line as a config. Of several processes the first one prints; should it fail, the
    others wait a moment, because torchrun ends all as soon as one has ended."""
    first = os.environ.get("RANK", "0") == "0"
    try:
        return tyro.cli(config, description=description, console_outputs=first)
    except SystemExit:
        time.sleep(0 if first else 2)
        raise
