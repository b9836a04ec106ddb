"""Object detection: boxes with classes, by RetinaNet, FCOS or ATSS on any backbone of catmodel."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from train.tasks.detection.settings import Settings, check_config

if TYPE_CHECKING:
    from data_pipeline.manifest import Manifest
    from data_pipeline.order import Order
    from data_pipeline.split import Split
    from train.config import Config

__all__ = ["Settings", "check_config", "check_dataset", "load", "order", "report_sections"]


def load() -> type:
    from train.tasks.detection.task import Detection

    return Detection


def check_dataset(manifest: "Manifest") -> None:
    """Raise ValueError if the dataset has no boxes, or a split with nothing to find."""
    from data_pipeline.split import OBJECTS

    if not all(OBJECTS in split.annotations for split in manifest.splits.values()):
        raise ValueError(
            "it has no boxes, from which task.name=detection learns: prepare the images together with their "
            "annotations, or leave out task.name to learn the images' classes"
        )
    for name, split in manifest.splits.items():
        if split.annotation(OBJECTS)["crowd"].all():
            raise ValueError(f"its {name} split has no object but crowds: prepare it with objects to find")


def order(config: "Config", split: "Split", seed: int, global_batch: int, micro_batch: int) -> "Order":
    """With task.aspect_groups micro-batches have images of one orientation."""
    from data_pipeline.grouped_order import GroupedOrder
    from data_pipeline.order import Order

    if config.task.aspect_groups:
        return GroupedOrder.of(split, seed, global_batch, micro_batch)
    return Order(seed, split.samples, global_batch, micro_batch, config.data.shuffle, config.data.repeats)


def report_sections(runs: Sequence) -> list:
    """See train/tasks/report.py."""
    from train.tasks.detection.report import sections

    return sections(runs)
