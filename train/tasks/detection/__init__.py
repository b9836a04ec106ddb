"""Object detection: boxes with classes, by RetinaNet, FCOS or ATSS on any backbone of catmodel."""

from typing import TYPE_CHECKING

from train.tasks.detection.settings import Settings, check_config

if TYPE_CHECKING:
    from data_pipeline.manifest import Manifest

__all__ = ["Settings", "check_config", "check_dataset", "load"]


def load() -> type:
    from train.tasks.detection.task import Detection

    return Detection


def check_dataset(manifest: "Manifest") -> None:
    """Raise ValueError if the dataset has no boxes."""
    if not all("objects" in split.annotations for split in manifest.splits.values()):
        raise ValueError(
            "it has no boxes, from which task.name=detection learns: prepare the images together with their "
            "annotations, or leave out task.name to learn the images' classes"
        )
