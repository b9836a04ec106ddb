"""Scores of a segmentation: mean intersection over union, mean and overall accuracy of pixels, from counts of pixels.

The counts are one matrix of int64. Integers add up to the same in any order: the scores are equal, to the last bit, on
any number of ranks.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.loader import MicroBatch
from data_pipeline.randomness import fold
from data_pipeline.split import DataError
from train.tasks.base import Model, on_device
from train.tasks.drawing import as_base64
from train.tasks.segmentation.colours import paint, reduced
from train.tasks.segmentation.inference import Inference
from train.telemetry.metrics import Scores

if TYPE_CHECKING:
    from train.config import Config

KEPT = 8  # pictures of an evaluation
LONGEST = 384  # pixels of a picture's longer side


@dataclass(frozen=True)
class Shown:
    """A sample of the `val` split in small: the photograph (JPEG), its labels and the prediction (PNG, painted with
    colours.palette), in base64.
    """

    id: int
    image: str
    labels: str
    prediction: str


def confusion(labels: Tensor, found: Tensor, classes: int) -> Tensor:
    """Count pixels by (label, found class), int64 [classes, classes]. Labels that are no class are left out."""
    nowhere = classes * classes
    places = torch.where(labels < classes, labels * classes + found, nowhere)
    return torch.bincount(places.flatten(), minlength=nowhere)[:nowhere].view(classes, classes)


def scores_of(matrix: np.ndarray) -> dict[str, float]:
    """miou, macc and aacc of a confusion matrix int64 [classes, classes], in percent.

    The means leave out classes that occur neither in labels nor in predictions (miou), or not in labels (macc).
    """
    correct, labelled, predicted = counts_of(matrix)
    union = labelled + predicted - correct
    occurs, has_labels = union > 0, labelled > 0
    return {
        "miou": 100 * float(np.mean(correct[occurs] / union[occurs])),
        "macc": 100 * float(np.mean(correct[has_labels] / labelled[has_labels])),
        "aacc": 100 * float(correct.sum() / labelled.sum()),
    }


def counts_of(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels by class: found correctly, labelled as it, found as it."""
    return matrix.diagonal(), matrix.sum(axis=1), matrix.sum(axis=0)


class SegmentationTally:
    """Counts pixels by label and prediction, at the labels' own size. The sum of a batch is its number of images.

    Kept beside it for TensorBoard and launch/report.py: by class the numbers of pixels, and `KEPT` images with labels
    and prediction, those whose ids a hash puts first: the same ones in every evaluation of the split.
    """

    width = 1

    def __init__(self, config: "Config", classes: Sequence[str], device: torch.device):
        self._inference, self._classes, self._device = Inference(config), tuple(classes), device
        self._confusion = torch.zeros(len(classes), len(classes), dtype=torch.int64, device=device)
        self._shown: list[tuple[int, Shown]] = []  # with the id's hash, the smallest first

    def add(self, model: Model, batch: MicroBatch) -> Tensor:
        labels = batch.targets["labels"].to(self._device, non_blocking=True).long()
        counted = batch.counted.to(self._device, non_blocking=True)
        images = on_device(batch, self._device)
        found = self._inference(model, images, tuple(labels.shape[1:]))
        labels = labels.where(counted[:, None, None], len(self._classes))
        self._confusion += confusion(labels, found, len(self._classes))
        for row, number in enumerate(batch.ids.tolist()):
            if batch.counted[row]:
                self._show(number, images[row], labels[row], found[row])
        return counted.sum().double()[None]

    def finish(self, sums: Sequence[float]) -> tuple[Scores, dict]:
        if dist.is_initialized():
            dist.all_reduce(self._confusion)
        matrix = self._confusion.cpu().numpy()
        if not matrix.any():
            raise DataError(
                "not one pixel of the val split that can be read has a class. Check the dataset with: python "
                "launch/prepare.py verify DATASET; if it is whole, prepare it with label maps that are not all ignored"
            )
        correct, labelled, predicted = (counts.tolist() for counts in counts_of(matrix))
        details = {
            "classes": list(self._classes),
            "correct": correct,
            "labelled": labelled,
            "predicted": predicted,
            "pictures": [asdict(shown) for shown in self._gather()],
        }
        return Scores(scores_of(matrix), int(sums[0])), details

    def _show(self, number: int, image: Tensor, labels: Tensor, found: Tensor) -> None:
        order = int(fold(0, np.array([number]))[0])
        if len(self._shown) == KEPT and self._shown[-1][0] < order:
            return
        size = _small(tuple(labels.shape))
        photograph = F.interpolate(image[None].float(), size=size, mode="bilinear", antialias=True)[0]
        pixels = photograph.round().byte().permute(1, 2, 0).cpu().numpy()
        maps = (reduced(one.cpu().numpy(), size) for one in (labels, found))
        painted = (as_base64(paint(one, len(self._classes)), "PNG") for one in maps)
        self._shown.append((order, Shown(number, as_base64(pixels, "JPEG"), *painted)))
        self._shown = sorted(self._shown, key=lambda pair: pair[0])[:KEPT]

    def _gather(self) -> list[Shown]:
        """The pictures of all ranks, on all ranks, by their ids."""
        together = [self._shown]
        if dist.is_initialized():
            together = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(together, self._shown)
        first = sorted((pair for shown in together for pair in shown), key=lambda pair: pair[0])[:KEPT]
        return sorted((shown for _, shown in first), key=lambda shown: shown.id)


def _small(size: tuple[int, int]) -> tuple[int, int]:
    """A size whose longer side is at most LONGEST."""
    factor = min(1.0, LONGEST / max(size))
    return tuple(max(1, round(side * factor)) for side in size)
