"""One step of GRPO, printed number by number: from a prompt to a change of probability.

It takes the first step of a run as grpo.py does, with all prompts of the step, and tells what
happens to the first group. Only a page is saved. The text is in explain.txt.

Run:   python -m studies.explain --rewards hps        with any flags of grpo.py
       python -m studies.explain --rewards hps,artifact --advantage global

You should see:  seven numbered paragraphs with the shapes of the tensors, the last with a
correlation near 1, and a table of the group. runs/explain.html shows its pictures, too.

Read next: grpo.py, `train_step`
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from markupsafe import Markup

import grpo
import rewards as reward_lib
from adversarial_reward import References
from artifact_reward import read_question
from evaluation import pages
from evaluation.tables import markdown
from generate import Rollouts
from training import checks
from training.cures import Cure
from training.files import atomic, usage_error
from training.flags import Cures
from training.log import Stopwatch
from training.policy import Policy
from training.prompts import jobs_of_step

RULES = {  # --advantage -> how the advantage is computed
    "group": "(reward - mean) / (deviation + 1e-4)",
    "global": "(reward - mean) / (deviation + 1e-4)",
    "none": "reward - mean",
    "best": "1 for the best of the group, 0 for the others",
}


@dataclass
class Step:
    """A step of training: N rollouts, S tokens of each, group after group."""

    policy: Policy  # after the update
    rewards: reward_lib.Rewards
    rollouts: Rollouts
    scores: dict  # name -> (N,), "total" and "advantage" among them
    metrics: dict
    old_NS: torch.Tensor  # log-probabilities before the update
    reference_NS: torch.Tensor  # those of the reference policy
    new_NS: torch.Tensor  # those after the update


def first_step(cfg):
    """Take the first step of a run with these flags, as grpo.main does."""
    if cfg.combine == "pareto" or cfg.cures != Cures():
        usage_error("explained is the plain method: not with --combine pareto or --cures")
    checks.fill_presets(cfg)
    cfg.question = read_question(cfg.question)
    weights, heldout = reward_lib.check_roles(cfg.rewards, cfg.eval_rewards, cfg.combine)
    rows, _ = checks.check_flags(cfg, len(weights), 1)
    policy, reference = grpo.load_policies(cfg)
    rewards = reward_lib.load_all(cfg, weights, heldout, rows)
    optimizer = grpo.make_optimizer(policy, cfg)
    cure = Cure(cfg.cures, policy, References(cfg.references), cfg.seed, rows)
    rollouts = grpo.rollout(policy, rows, jobs_of_step(rows, 0, cfg), 0, cfg)
    old_NS = grpo.all_logprobs(policy, rollouts, cfg)
    reference_NS = grpo.reference_logprobs(policy, reference, rollouts, cfg)
    scores, metrics = grpo.train_step(
        policy, reference, rewards, optimizer, rollouts, rows, 0, cfg, Stopwatch(), cure
    )
    new_NS = grpo.all_logprobs(policy, rollouts, cfg)
    return Step(policy, rewards, rollouts, scores, metrics, old_NS, reference_NS, new_NS)


def group_rows(step, cfg):
    """Rows of a table: the pictures of the first group, the highest advantage first."""
    mask, scores = step.rollouts.mask, step.scores
    before = torch.where(mask, step.old_NS, 0.0).sum(1).tolist()
    change = torch.where(mask, step.new_NS - step.old_NS, 0.0).sum(1).tolist()
    rows = []
    for i in scores["advantage"][: cfg.num_generations].argsort(descending=True).tolist():
        row = {"picture": step.rollouts.images[i], "thought": step.rollouts.thoughts[i]}
        row |= {name: values[i].item() for name, values in scores.items()}
        rows.append(row | {"log p before": before[i], "change of log p": change[i]})
    return rows


def numbers(step, rows, cfg):
    """What explain.txt names: name -> value."""
    G, total = cfg.num_generations, step.scores["total"]
    group, old, reference = step.rollouts[:G], step.old_NS[:G], step.reference_NS[:G]
    C, sampled = group.thought_ids.shape[1], torch.where(group.mask, old, 0.0)
    weights = (cfg.beta, cfg.epsilon, cfg.epsilon_high)
    advantages = step.scores["advantage"][:G].to(old.device)
    loss = grpo.grpo_loss(old, old, reference, advantages, group.mask, *weights)
    whole_step = cfg.advantage == "global"
    known = total[total.isfinite()] if whole_step else total[:G][total[:G].isfinite()]
    columns = [[row[name] for row in rows] for name in ("advantage", "change of log p")]
    trained = [f"{weight:g} x {name}" for name, weight in step.rewards.weights.items()]
    return {
        "thought_shape": tuple(group.thought_ids.shape),
        "sampled": group.thought_mask.sum(1).tolist(),
        "picture_shape": tuple(group.image_ids.shape),
        "grid": step.policy.grid,
        "codebook": step.policy.model.config.vq_config.num_embeddings,
        "first_tokens": group.image_ids[0, :8].tolist(),
        "trained": ", ".join(trained),
        "heldout": ", ".join(step.rewards.heldout) or "nothing",
        "mean": total[:G].nanmean(),
        "over": "the whole step" if whole_step else "the group",
        "known": len(known),
        "deviation": known.std(),
        "rule": RULES[cfg.advantage],
        "logprobs_shape": tuple(old.shape),
        "thought_nats": sampled[:, :C].sum(1).mean(),
        "picture_nats": sampled[:, C:].sum(1).mean(),
        "kl": grpo.kl_k3(old, reference)[group.mask].sum() / G,
        "tokens": group.mask.sum(),
        "loss": loss.sum() / group.mask.sum(),
        "agreement": torch.corrcoef(torch.tensor(columns))[0, 1],
    }


def main(cfg):
    step = first_step(cfg)
    rows = group_rows(step, cfg)
    named = {"cfg": cfg, "group": step.rollouts, "metrics": step.metrics}
    template = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8")
    text = template.format(**named, **numbers(step, rows, cfg))
    print(text)
    print(markdown([{k: v for k, v in row.items() if k != "picture"} for row in rows]))
    body = Markup().join(Markup("<p>{}</p>\n").format(part) for part in text.split("\n\n"))
    page = Path(cfg.output_dir) / "explain.html"
    with atomic(page) as file:
        file.write(pages.page("One step of GRPO", body + pages.table(rows)))
    print(f"\nlook at {page}")


if __name__ == "__main__":
    main(tyro.cli(grpo.Config, description=__doc__))
