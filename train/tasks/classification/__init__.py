"""Image classification with soft targets (mixup, cutmix, label smoothing)."""

from collections.abc import Sequence

from train.config_sections import TaskConfig as Settings  # it has no settings of its own

__all__ = ["Settings", "load", "report_sections"]


def load() -> type:
    from train.tasks.classification.task import Classification

    return Classification


def report_sections(runs: Sequence) -> list:
    """See train/tasks/report.py."""
    from train.tasks.classification.report import sections

    return sections(runs)
