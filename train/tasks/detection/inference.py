"""From images to boxes in pixels of the stored images, as the config's `task` section says."""

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from catmodel.detection import Detector, detect
from data_pipeline.augment import normalise
from train.tasks.base import Model
from train.tasks.detection.coco import BOX, FOUND
from train.tasks.segmentation.task import clear_outside

if TYPE_CHECKING:
    from data_pipeline.config import AugmentConfig
    from train.config import Config
    from train.tasks.detection.settings import Settings


def network_input(images: Tensor, inside: Tensor, settings: "Settings", augment: "AugmentConfig") -> Tensor:
    """Images uint8 [m, 3, H, W] as the network takes them: normalised, of mean colour outside of `inside` (int32
    [m, 4]), with the order of channels that task.bgr says.
    """
    images = clear_outside(normalise(images, augment), inside)
    return images.flip(1) if settings.bgr else images


class Inference:
    """Boxes in images. Needs no gradients. detector: for its places and boxes; its weights are not used."""

    def __init__(self, config: "Config", detector: Detector):
        self._settings, self._augment, self._detector = config.task, config.augment, detector

    def __call__(self, model: Model, images: Tensor, targets: dict[str, Tensor], ids: list[int]) -> list[np.ndarray]:
        """The objects in each of the images uint8 [m, 3, H, W], FOUND, best first.

        targets: on the CPU, of an evaluation (data_pipeline.object_targets.ObjectTargets). ids: the samples'.
        """
        settings = self._settings
        inside = targets["inside"].to(images.device, non_blocking=True)
        outputs = model(network_input(images, inside, settings, self._augment))
        detections = detect(
            self._detector,
            outputs,
            self._detector.grid(*images.shape[2:], images.device),
            inside,
            settings.score_threshold,
            settings.before_nms,
            settings.nms_threshold,
            settings.detections,
        )
        factors, sizes = targets["factors"].numpy(), targets["sizes"].numpy()
        return [
            as_found(number, *(part.cpu().numpy() for part in parts), factor, size)
            for number, parts, factor, size in zip(ids, detections, factors, sizes, strict=True)
        ]


def as_found(
    image: int, boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, factors: np.ndarray, size: np.ndarray
) -> np.ndarray:
    """FOUND [n] in pixels of the stored image of `size` (width, height).

    boxes: float32 [n, 4], x1, y1, x2, y2 in pixels of the input. factors: float64 [2], input pixels per stored pixel in
    x and y.
    """
    edges = np.minimum(boxes.astype(np.float64) / np.tile(factors, 2), np.tile(size, 2))
    rows = np.zeros(len(boxes), FOUND)
    for name, column in zip(BOX, [*edges[:, :2].T, *(edges[:, 2:] - edges[:, :2]).T], strict=True):
        rows[name] = column
    rows["image"], rows["score"], rows["label"] = image, scores, labels
    return rows
