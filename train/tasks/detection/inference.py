"""From images to boxes in pixels of the stored images, as the config's `task` section says."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from catmodel.detection import detect
from data_pipeline.object_targets import shown_part
from train.tasks.base import Model
from train.tasks.detection.coco import BOX, FOUND

if TYPE_CHECKING:
    from train.tasks.detection.task import Detection


class Inference:
    """Boxes in images. Needs no gradients.

    score_threshold: scores below it are dropped; None: task.score_threshold.
    """

    def __init__(self, task: "Detection", score_threshold: float | None = None):
        self._task = task
        self._threshold = task.config.task.score_threshold if score_threshold is None else score_threshold

    def __call__(self, model: Model, images: Tensor, targets: dict[str, Tensor], ids: list[int]) -> list[np.ndarray]:
        """The objects in each of the images uint8 [m, 3, H, W], FOUND, best first.

        targets: on the CPU, of an evaluation (data_pipeline.object_targets.ObjectTargets). ids: the samples'.
        """
        task, settings = self._task, self._task.config.task
        inside = targets["inside"].to(images.device, non_blocking=True)
        sides = targets["sizes"] * targets["factors"]  # of the images in the inputs, to fractions of a pixel
        edges = torch.cat([torch.zeros_like(sides), sides], dim=1).to(images.device, non_blocking=True)
        detections = detect(
            task.detector,
            model(task.pixels(images, inside)),
            task.grid(images),
            edges,
            self._threshold,
            settings.before_nms,
            settings.nms,
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


def evaluation_targets(windows: np.ndarray, sizes: np.ndarray, shape: tuple[int, int]) -> dict[str, Tensor]:
    """What ObjectTargets gives for evaluation, of images that are in no dataset.

    windows: int32 [m, 5], of views.evaluation. sizes: int64 [m, 2], (width, height). shape: (height, width) of the
    input.
    """
    arrays = {
        "factors": np.array(shape[::-1]) / windows[:, 2:4],
        "sizes": sizes.astype(np.int32),
        "inside": shown_part(windows, sizes, shape),
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
