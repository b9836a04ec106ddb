"""Image classification with soft targets (mixup, cutmix, label smoothing)."""

from train.config_sections import TaskConfig as Settings  # it has no settings of its own

__all__ = ["Settings", "load"]


def load() -> type:
    from train.tasks.classification.task import Classification

    return Classification
