"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

import math

from train.config import Config


def learning_rate(config: Config, step: int, steps_per_epoch: int) -> float:
    """Learning rate of step `step` (counted from 0): linear warm-up from `warmup_lr`, then one cosine to `min_lr` over `train.epochs`.

    The cosine spans the whole run, warm-up included, as timm's default and CAT's released recipe have it: the first step
    after the warm-up is already a little below the peak.
    """
    schedule, peak = config.schedule, config.optimizer.lr
    warmup = schedule.warmup_epochs * steps_per_epoch
    if step < warmup:
        return schedule.warmup_lr + (peak - schedule.warmup_lr) * step / warmup
    progress = step / (config.train.epochs * steps_per_epoch)
    return schedule.min_lr + (peak - schedule.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
