"""AdamW, and its learning rate.

Adam gives each weight a step of about the learning rate, whatever the size of its gradient. With a
gradient that is mostly noise this is a random walk: docs/results.md, "Learning rate and drift".

Read next: stopping.py
"""

import torch

from training.policy import trainable


def make_optimizer(policy, cfg):
    """AdamW without weight decay: the KL penalty already pulls towards the reference policy."""
    return torch.optim.AdamW(trainable(policy), betas=(0.9, cfg.adam_beta2), weight_decay=0)


def learning_rate(step, cfg):
    """Linear warm-up: Adam's first steps are of full size, however little it knows. Then linear
    decay to 0, as T2I-R1: at a constant rate noise keeps moving the policy, which only costs KL."""
    warmup = int(cfg.warmup_ratio * cfg.max_steps)
    rising, falling = (step + 1) / (warmup + 1), (cfg.max_steps - step) / (cfg.max_steps - warmup)
    return cfg.learning_rate * min(rising, falling)
