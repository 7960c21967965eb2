"""One step of GRPO as a story: one prompt, one group, every number on the way from a text to a gradient.

And one picture of it: the same group, with the same noise, painted by the policy before and after training, ranked, with
rewards and advantages under each picture.

Run:   python grpo.py --explain                 or with any other flags of grpo.py: --rewards, --model, --advantage ...
       python explain.py runs/tiny_hps_seed1 runs/tiny_hps+artifact_seed1 --prompt "a red star and a blue circle"

You should see:  the story on the screen, shapes included, and runs/explain.html with the pictures; or docs/group.png.

Read next: grpo.py, where the same happens without talking.
"""

import html
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import torch
import tyro
from PIL import Image

import generate
import grpo
import rewards as reward_models
from evaluation import pages as report
from training import harness
from training.files import atomic, checkpoints, usage_error


def one_step(cfg, group=0):
    """The first step of a run, for one of its groups, and all that is computed on the way."""
    weights, held_out, rows, _ = harness.check(cfg, 1)
    device, dtype = generate.pick_device(cfg.device, cfg.dtype)
    policy, reference = harness.load_policies(cfg, None, device, dtype)
    train_on, watch = (
        harness.load_rewards(weights, cfg, device),
        harness.load_rewards(held_out, cfg, device),
    )
    place, G = grpo.prompts_of_step(rows, 0, cfg)[group], cfg.num_generations
    rollouts = grpo.rollout(policy, rows, [(place, k) for k in range(G)], 0, cfg)
    scores = reward_models.score(
        train_on | watch, rollouts.prompts, rollouts.images, [rows[place]] * G
    )
    total = reward_models.combine(
        scores, weights, G, cfg.combine, {name: 1.0 for name in list(weights)[1:]}
    )
    advantages = grpo.group_advantages(total, G, cfg.advantage)
    old = grpo.all_logprobs(policy, rollouts, cfg)
    before = grpo.reference_logprobs(policy, reference, rollouts, cfg)
    loss = grpo.grpo_loss(
        old,
        old,
        before,
        advantages.to(policy.device),
        rollouts.mask,
        cfg.beta,
        cfg.epsilon,
        cfg.epsilon_high,
    )
    optimizer = torch.optim.AdamW(
        grpo.trainable(policy), lr=cfg.learning_rate, betas=(0.9, 0.99), weight_decay=0
    )
    metrics = grpo.update(policy, before, optimizer, rollouts, advantages, cfg)
    change = ((grpo.all_logprobs(policy, rollouts, cfg) - old) * rollouts.mask).sum(1).cpu()
    return SimpleNamespace(**locals())


def table_of(s):
    """A line a picture, the best first."""
    return [
        {
            "picture": s.rollouts.images[i],
            "thought": s.rollouts.thoughts[i],
            **{name: s.scores[name][i].item() for name in (*s.weights, *s.held_out)},
            "total": s.total[i].item(),
            "advantage": s.advantages[i].item(),
            "log p before": (s.old[i] * s.rollouts.mask[i]).sum().item(),
            "change of log p": s.change[i].item(),
        }
        for i in s.advantages.argsort(descending=True).tolist()
    ]


def story(s, table):
    """What happened in that step, paragraph by paragraph."""
    cfg, r, mask, (G, C) = s.cfg, s.rollouts, s.rollouts.mask, s.rollouts.thought_ids.shape
    yield f'1. The prompt:  "{r.prompts[0]}"'
    yield f"2. The policy answers it {G} times: a group. Each time it thinks, then paints."
    yield (
        f"   thought tokens {(G, C)}, of which {r.thought_mask.sum(1).tolist()} are words it chose; the rest is padding"
    )
    yield (
        f"   picture tokens {tuple(r.image_ids.shape)}: {s.policy.grid} x {s.policy.grid} numbers below "
        f"{s.policy.model.config.vq_config.num_embeddings}; the first picture begins {r.image_ids[0, :8].tolist()}"
    )
    yield (
        f"3. Rewards that train: {', '.join(f'{w:g} x {n}' for n, w in s.weights.items())}, combined by {cfg.combine!r}. "
        f"Only watched: {', '.join(s.held_out) or 'nothing'}."
    )
    formula = {"group": " / (deviation + 1e-4)", "global": " / (deviation of all + 1e-4)"}.get(
        cfg.advantage, ""
    )
    yield (
        f"   mean of the group {s.total.nanmean():.3f}, deviation {s.total[s.total.isfinite()].std():.3f}; advantage = "
        + (
            "1 for the best, 0 for the others"
            if cfg.advantage == "best"
            else f"(reward - mean){formula}"
        )
    )
    yield f"4. Log-probabilities of exactly these tokens: {tuple(s.old.shape)}, thought and picture in one row."
    thought, picture = (
        (s.old * mask)[:, part].sum(1).mean() for part in (slice(C), slice(C, None))
    )
    yield (
        f"   a thought of the group has {thought:.1f} nats on average, a picture {picture:.1f}; the reference says the same, "
        f"for nothing has been learned yet: KL {grpo.kl_k3(s.old, s.before)[mask].sum() / G:.6f}"
    )
    yield (
        f"5. Ratio pi / pi_old = 1 everywhere; loss = mean over {int(mask.sum())} tokens of -advantage + beta KL = "
        f"{s.loss.sum() / mask.sum():.4f}. About 0, as advantages are, and yet:"
    )
    yield (
        f"6. its gradient is not 0 (norm {s.metrics['grad_norm']:.3f}). One step of AdamW at {cfg.learning_rate:g} later, "
        f"the log-probability of each rollout has changed as in the last column:"
    )
    yield (
        "\n"
        + "\n".join(
            report.markdown([{k: v for k, v in line.items() if k != "picture"} for line in table])
        )
        + "\n"
    )
    agree = torch.corrcoef(torch.stack([s.advantages, s.change]))[0, 1]
    yield (
        f"7. Better pictures became likelier, worse ones less likely: the correlation of the two columns is {agree:+.2f}. "
        "Do that a hundred times, with other prompts, and the policy is what the reward wanted."
    )


def explain(cfg):
    """Tell the first step's first group. Nothing is saved but the page."""
    step = one_step(cfg)
    table, told = table_of(step), []
    for text in story(step, table):
        print(text)
        told += (
            [] if "|" in text else [f"<p>{html.escape(text.strip())}</p>"]
        )  # the page has a table with pictures
    page = Path(cfg.output_dir) / "explain.html"
    with atomic(page) as file:
        file.write(report.page("One step of GRPO", "".join(told) + report.table(table)))
    print(f"\nlook at {page}")


# --- one group, before and after -------------------------------------------------------------------


@dataclass
class Config:
    runs: Annotated[
        tuple[str, ...], tyro.conf.Positional
    ]  # run folders, a row each below the policy before RL
    prompt: str = "a red star and a blue circle"
    pictures: int = 8  # the group
    seed: int = 1
    figure: str = "docs/group.png"


def group_row(name, folder, weights, how, cfg):
    """The group of one policy: (title, [(picture, {reward: score}, advantage)], best first). weights, how: as it was
    trained, which is how its advantages are made."""
    policy = generate.load_policy(folder)
    row = {"id": "0", "prompt": cfg.prompt}
    keys = [(cfg.seed, 0, 0, k) for k in range(cfg.pictures)]
    rollouts = generate.sample(policy, [cfg.prompt] * cfg.pictures, keys)
    names = dict.fromkeys([*weights, "hps", "artifact", "gold-clean"])
    scores = reward_models.score(
        {n: reward_models.load(n, checkpoint="tiny") for n in names},
        rollouts.prompts,
        rollouts.images,
        [row] * cfg.pictures,
    )
    total = reward_models.combine(scores, weights, cfg.pictures, how, dict.fromkeys(weights, 1.0))
    advantages = grpo.group_advantages(total, cfg.pictures)
    order = advantages.argsort(descending=True).tolist()
    return name, [
        (rollouts.images[i], {n: scores[n][i].item() for n in names}, advantages[i].item())
        for i in order
    ]


def group_figure(rows, cfg):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(rows), cfg.pictures, figsize=(1.45 * cfg.pictures, 2.45 * len(rows)), squeeze=False
    )
    figure.suptitle(
        f'"{cfg.prompt}", the same noise; a row is a group, the best first', fontsize=11
    )
    for line, (title, group) in zip(axes, rows):
        for axis, (picture, scores, advantage) in zip(line, group):
            axis.imshow(picture.resize((128, 128), Image.NEAREST))
            told = "\n".join(
                f"{name.replace('gold-clean', 'whole')} {value:.2f}"
                for name, value in scores.items()
            )
            axis.set_xlabel(f"{told}\nA {advantage:+.2f}", fontsize=8)
            axis.set(xticks=[], yticks=[])
        line[0].set_title(title, fontsize=10, loc="left")
    figure.tight_layout()
    with atomic(cfg.figure, "wb") as file:
        figure.savefig(file, format="png", dpi=80)
    plt.close(figure)


def main(cfg):
    rows = [group_row("before training; advantages by hps", "tiny", {"hps": 1.0}, "sum", cfg)]
    for run in map(Path, cfg.runs):
        if not checkpoints(run):
            usage_error(
                f"{run}: no checkpoints/step-* in it; give run folders that grpo.py has made"
            )
        flags = json.loads((run / "config.json").read_text())["flags"]
        weights = reward_models.parse(flags["rewards"])
        rows.append(
            group_row(
                f"after GRPO on {flags['rewards']}",
                str(checkpoints(run)[-1]),
                weights,
                flags["combine"],
                cfg,
            )
        )
    group_figure(rows, cfg)
    print(f"look at {cfg.figure}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
