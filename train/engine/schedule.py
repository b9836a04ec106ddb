"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

import math

from train.config import Config, TrainConfig


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


def evaluation_due(config: TrainConfig, done: int, steps_per_epoch: int) -> bool:
    """Whether to evaluate after `done` steps: every `train.evaluate_every` epochs, and at the end."""
    epoch, rest = divmod(done, steps_per_epoch)
    return bool(config.evaluate_every) and done > 0 and rest == 0 and (epoch % config.evaluate_every == 0 or epoch == config.epochs)
