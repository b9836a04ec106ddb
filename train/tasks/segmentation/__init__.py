"""Semantic segmentation: a class for every pixel, by Semantic FPN on any backbone of catmodel."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from train.tasks.segmentation.settings import Settings, check_config

if TYPE_CHECKING:
    from data_pipeline.manifest import Manifest

__all__ = ["Settings", "check_config", "check_dataset", "load", "report_sections"]


def load() -> type:
    from train.tasks.segmentation.task import Segmentation

    return Segmentation


def check_dataset(manifest: "Manifest") -> None:
    """Raise ValueError if the dataset has no label maps, or one class."""
    from data_pipeline.split import LABEL_MAP

    if not all(LABEL_MAP in split.annotations for split in manifest.splits.values()):
        raise ValueError(
            "it has no label maps, from which task.name=segmentation learns: prepare the images together with their "
            "annotations, or leave out task.name to learn the images' classes"
        )
    if len(manifest.classes) < 2:
        raise ValueError("it has one class, so there is nothing to tell apart: prepare it with two classes or more")


def report_sections(runs: Sequence) -> list:
    """See train/tasks/report.py."""
    from train.tasks.segmentation.report import sections

    return sections(runs)
