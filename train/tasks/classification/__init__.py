"""Image classification with soft targets (mixup, cutmix, label smoothing)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from train.config_sections import TaskConfig as Settings  # it has no settings of its own

if TYPE_CHECKING:
    from data_pipeline.manifest import Manifest

__all__ = ["Settings", "check_dataset", "load", "report_sections"]


def load() -> type:
    from train.tasks.classification.task import Classification

    return Classification


def check_dataset(manifest: "Manifest") -> None:
    """Raise ValueError if the dataset's images have classes for their pixels or boxes, not for themselves, or one."""
    from data_pipeline.split import LABEL_MAP, OBJECTS

    if any(LABEL_MAP in split.annotations for split in manifest.splits.values()):
        raise ValueError("its images have label maps in place of classes: give task.name=segmentation")
    if any(OBJECTS in split.annotations for split in manifest.splits.values()):
        raise ValueError("its images have boxes in place of classes: give task.name=detection")
    if len(manifest.classes) < 2:
        raise ValueError("it has one class, so there is nothing to tell apart: prepare it with two classes or more")


def report_sections(runs: Sequence) -> list:
    """See train/tasks/report.py."""
    from train.tasks.classification.report import sections

    return sections(runs)
