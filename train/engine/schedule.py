"""The learning rate and the evaluation schedule as pure functions of the step, without state to save or restore."""

import math

from train.config import Config


def learning_rate(config: Config, step: int, steps_per_epoch: int) -> float:
    """Learning rate of step `step` (counted from 0): linear warm-up from `warmup_lr`, then by `schedule.kind`.

    Cosine and poly span the whole run, warm-up included, as in timm's default and CAT's released recipe: the first step
    after the warm-up is already slightly below the peak.
    """
    schedule, peak = config.schedule, config.optimizer.lr
    warmup = config.warmup_steps(steps_per_epoch)
    if step < warmup:
        return schedule.warmup_lr + (peak - schedule.warmup_lr) * step / warmup
    progress = step / config.total_steps(steps_per_epoch)
    if schedule.kind == "cosine":
        return schedule.min_lr + (peak - schedule.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule.kind == "poly":
        return schedule.min_lr + (peak - schedule.min_lr) * (1 - progress) ** schedule.power
    decays = schedule.decay_steps or [epoch * steps_per_epoch for epoch in schedule.decay_epochs]
    return peak * schedule.decay_rate ** sum(step >= decay for decay in decays)


def evaluation_due(config: Config, done: int, steps_per_epoch: int) -> bool:
    """Whether to evaluate after `done` steps: at every interval, and at the end of the whole run."""
    interval = config.evaluation_interval(steps_per_epoch)
    return interval > 0 and done > 0 and (done % interval == 0 or done == config.total_steps(steps_per_epoch))
