"""The learning rate, step by step."""

from __future__ import annotations

import math

from qwenlet.config import TrainingConfig


def warmup_steps(config: TrainingConfig, steps: int) -> int:
    """A share of the steps below 1, else a number of them."""
    return math.ceil(config.warmup * steps) if config.warmup < 1 else min(int(config.warmup), steps)


def factor(config: TrainingConfig, step: int, steps: int) -> float:
    """What the highest learning rate is multiplied by at a step (from 0 on) of `steps`."""
    warm = warmup_steps(config, steps)
    if step < warm:
        return (step + 1) / warm
    if config.schedule == "constant":
        return 1.0
    along = (step - warm) / max(steps - warm, 1)
    left = 0.5 * (1.0 + math.cos(math.pi * along)) if config.schedule == "cosine" else 1.0 - along
    return config.min_lr + (1.0 - config.min_lr) * left
