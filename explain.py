"""One step of GRPO as a story: one prompt, one group, every number on the way from a text to a gradient.

Run:   python grpo.py --explain                 or with any other flags of grpo.py: --rewards, --model, --advantage ...

You should see:  the story on the screen, shapes included, and runs/explain.html with the pictures.

Read next: grpo.py, where the same happens without talking.
"""

import html
from pathlib import Path

import torch

import generate
import grpo
import harness
import report
import rewards as reward_models
from files import atomic


def explain(cfg, group=0):
    """Tell the first step's first group. Nothing is saved but the page."""
    weights, held_out, rows, _ = harness.check(cfg, 1)
    device, dtype = generate.pick_device(cfg.device, cfg.dtype)
    policy, reference = harness.load_policies(cfg, None, device, dtype)
    train_on, watch = harness.load_rewards(weights, cfg, device), harness.load_rewards(held_out, cfg, device)
    row, G = rows[grpo.prompts_of_step(rows, 0, cfg)[group]], cfg.num_generations
    said = []

    def say(text):
        said.append(text)
        print(text)

    say(f'1. The prompt:  "{row["prompt"]}"')
    rollouts = grpo.rollout(policy, [row], [(0, k) for k in range(G)], 0, cfg)
    N, T, C = *rollouts.image_ids.shape, rollouts.thought_ids.shape[1]
    say(f"2. The policy answers it {N} times: a group. Each time it thinks, then paints.")
    say(f"   thought tokens {tuple(rollouts.thought_ids.shape)}, of which {rollouts.thought_mask.sum(1).tolist()} are words "
        f"it chose; the rest is padding")
    say(f"   picture tokens {tuple(rollouts.image_ids.shape)}: {policy.grid} x {policy.grid} numbers below "
        f"{policy.model.config.vq_config.num_embeddings}; the first picture begins {rollouts.image_ids[0, :8].tolist()}")
    scores = reward_models.score(train_on | watch, rollouts.prompts, rollouts.images, [row] * N)
    total = reward_models.combine(scores, weights, G, cfg.combine, {name: 1.0 for name in list(weights)[1:]})
    advantages = grpo.group_advantages(total, G, cfg.advantage)
    say(f"3. Rewards that train: {', '.join(f'{w:g} x {n}' for n, w in weights.items())}, combined by {cfg.combine!r}. "
        f"Only watched: {', '.join(held_out) or 'nothing'}.")
    say(f"   mean of the group {total.nanmean():.3f}, deviation {total[total.isfinite()].std():.3f}; "
        f"advantage = (reward - mean) / (deviation + 1e-4)" if cfg.advantage == "group" else "")
    old = grpo.all_logprobs(policy, rollouts, cfg)
    before = grpo.reference_logprobs(policy, reference, rollouts, cfg)
    mask, picture = rollouts.mask, torch.arange(C + T) >= C
    say(f"4. Log-probabilities of exactly these tokens: {tuple(old.shape)}, thought and picture in one row.")
    say(f"   a thought of the group has {(old * (mask & ~picture)).sum(1).mean():.1f} nats on average, a picture "
        f"{(old * (mask & picture)).sum(1).mean():.1f}; the reference says the same, for nothing has been learned yet: "
        f"KL {grpo.kl_k3(old, before)[mask].sum() / N:.6f}")
    loss = grpo.grpo_loss(old, old, before, advantages, mask, cfg.beta, cfg.epsilon, cfg.epsilon_high)
    say(f"5. Ratio pi / pi_old = 1 everywhere; loss = mean over {int(mask.sum())} tokens of -advantage + beta KL = "
        f"{loss.sum() / mask.sum():.4f}. About 0, as advantages are, and yet:")
    optimizer = torch.optim.AdamW(grpo.trainable(policy), lr=cfg.learning_rate, betas=(0.9, 0.99), weight_decay=0)
    metrics = grpo.update(policy, before, optimizer, rollouts, advantages, cfg)
    after = grpo.all_logprobs(policy, rollouts, cfg)
    change = ((after - old) * mask).sum(1)
    say(f"6. its gradient is not 0 (norm {metrics['grad_norm']:.3f}). One step of AdamW at {cfg.learning_rate:g} later, "
        f"the log-probability of each rollout has changed as in the last column:")
    names = [*weights, *held_out]
    ranked = sorted(range(N), key=lambda i: -advantages[i].item())
    table = [{"picture": rollouts.images[i], "thought": rollouts.thoughts[i], **{n: scores[n][i].item() for n in names},
              "total": total[i].item(), "advantage": advantages[i].item(), "log p before": (old[i] * mask[i]).sum().item(),
              "change of log p": change[i].item()} for i in ranked]
    say("\n" + "\n".join(report.markdown([{k: v for k, v in line.items() if k != "picture"} for line in table])) + "\n")
    agree = torch.corrcoef(torch.stack([advantages, change]))[0, 1]
    say(f"7. Better pictures became likelier, worse ones less likely: the correlation of the two columns is {agree:+.2f}. "
        "Do that a hundred times, with other prompts, and the policy is what the reward wanted.")
    page = Path(cfg.output_dir) / "explain.html"
    with atomic(page) as file:
        told = "".join(f"<p>{html.escape(text.strip())}</p>" for text in said if "|" not in text)
        file.write(report.page("One step of GRPO", told + report.table(table)))
    print(f"\nlook at {page}")
