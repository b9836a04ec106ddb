"""COCO's scores of a detector, and what is kept of an evaluation.

Detections are gathered on every rank in the order of (sample id, score from the highest, place in the network's
output), so that the scores are equal, to the last bit, on any number of ranks.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.loader import MicroBatch
from data_pipeline.objects import ObjectTable
from data_pipeline.randomness import fold
from data_pipeline.split import DataError, Split
from train.tasks.base import Model, on_device
from train.tasks.detection.coco import BOX, FOUND, Truth, coco_scores, columns, truth_of, write_results
from train.tasks.detection.inference import Inference
from train.tasks.detection.mistakes import first_mistake
from train.tasks.drawing import as_base64
from train.telemetry.metrics import Scores

if TYPE_CHECKING:
    from train.tasks.detection.task import Detection

KEPT = 8  # pictures of an evaluation
KEPT_MISTAKES = 16
LONGEST = 480  # pixels of a picture's longer side
LEAST = 0.3  # score of a detection that pictures show
MOST = 40  # detections that a picture shows

# Areas in pixels that COCO calls small, medium, large; an object on a limit is of both sizes.
AREAS = {"s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e10)}
METRICS = ("ap", "ap50", "ap75", "aps", "apm", "apl", "ar100")


@dataclass(frozen=True)
class Shown:
    """A sample of the `val` split in small. image: the photograph (JPEG), in base64.

    Boxes are in its pixels, (left, top, width, height, label, then in `truth` 1 for a crowd, in `found` the score).
    """

    id: int
    image: str
    truth: list[tuple]
    found: list[tuple]


@dataclass(frozen=True)
class ShownMistake:
    """An image with its most confident mistake: `found` has one row. kind: see coco.KINDS. other: the label of the
    object that it overlaps, and their IoU; None if nothing is there.
    """

    shown: Shown
    kind: str
    other: int | None
    iou: float

    @property
    def rank(self) -> tuple[float, int]:
        """The most confident one has the lowest; equal ones are in the order of their ids."""
        return -self.shown.found[0][-1], self.shown.id


class DetectionTally:
    """Collects the detections of this rank's images. The sum of a batch is its number of images.

    Kept beside them for TensorBoard and launch/report.py: `KEPT` images with objects and detections, those whose ids a
    hash puts first, and the `KEPT_MISTAKES` images with the most confident mistakes: the same ones on any number of
    ranks.
    """

    width = 1

    def __init__(self, task: "Detection", split: Split, device: torch.device):
        self._inference, self._classes, self._device = Inference(task), task.classes, device
        self._table = ObjectTable(split)
        self._ids: list[int] = []
        self._found: list[np.ndarray] = []
        self._shown: list[tuple[int, Shown]] = []  # with the id's hash, the smallest first
        self._mistakes: list[ShownMistake] = []  # the most confident first

    def add(self, model: Model, batch: MicroBatch) -> Tensor:
        images, ids = on_device(batch, self._device), batch.ids.tolist()
        for row, found in enumerate(self._inference(model, images, batch.targets, ids)):
            if batch.counted[row]:
                self._ids.append(ids[row])
                self._found.append(found)
                left, top, right, bottom = batch.targets["inside"][row].tolist()
                size = tuple(batch.targets["sizes"][row].tolist())
                self._keep(ids[row], found, images[row, :, top:bottom, left:right], size)
        return batch.counted.sum().double()[None].to(self._device)

    def finish(self, sums: Sequence[float]) -> tuple[Scores, dict]:
        ranks = self._gathered()
        ids, found, shown, mistakes = ([one for part in parts for one in part] for parts in zip(*ranks, strict=True))
        detections = np.concatenate([*found, np.zeros(0, FOUND)])
        detections = detections[np.argsort(detections["image"], kind="stable")]
        truth = truth_of(self._table, np.array(sorted(ids), np.int64))
        if not (truth.objects["crowd"] == 0).any():
            raise DataError(
                "not one image of the val split that has objects can be read. Check the dataset with: python "
                "launch/prepare.py verify DATASET"
            )
        self._results = truth, detections
        scores = coco_scores(truth, detections, self._classes)
        first = sorted(shown, key=lambda pair: pair[0])[:KEPT]
        details = {
            "classes": list(self._classes),
            "ap": percentages(scores.by_class),
            "ap50": percentages(scores.by_class_50),
            **counts_of(truth, len(self._classes)),
            "scores": dict(zip(scores.values, percentages(scores.values.values()), strict=True)),
            "errors": {kind: (count, 100 * scores.gains[kind]) for kind, count in scores.counts.items()},
            "pictures": [asdict(one) for one in sorted((one for _, one in first), key=lambda one: one.id)],
            "mistakes": [asdict(one) for one in sorted(mistakes, key=lambda one: one.rank)[:KEPT_MISTAKES]],
        }
        return Scores({name: 100 * scores.values[name] for name in METRICS}, int(sums[0])), details

    def write_results(self, path: Path) -> None:
        """After `finish`: all detections as COCO's results file, by the source's ids of images and categories."""
        truth, detections = self._results
        write_results(path, truth, self._table.category_ids, detections)

    def _gathered(self) -> list[tuple[list, list, list, list]]:
        """(ids, detections, pictures, mistakes) of each rank, on all ranks."""
        own = (self._ids, [np.concatenate([*self._found, np.zeros(0, FOUND)])], self._shown, self._mistakes)
        if not dist.is_initialized():
            return [own]
        together: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(together, own)
        return together

    def _keep(self, number: int, found: np.ndarray, photograph: Tensor, size: tuple[int, int]) -> None:
        """Keep the image for a picture if it is among the first by its id's hash, or by its most confident mistake.

        photograph: uint8 [3, height, width], as the network got it. size: (width, height) of the stored image.
        """
        objects, order = self._table.of(number), int(fold(0, np.array([number]))[0])
        if len(self._shown) < KEPT or order < self._shown[-1][0]:
            chosen = found[found["score"] >= LEAST][:MOST]
            self._shown.append((order, small(number, photograph, size, objects, chosen)))
            self._shown = sorted(self._shown, key=lambda pair: pair[0])[:KEPT]
        if mistake := first_mistake(objects, found):
            one = found[mistake.row : mistake.row + 1]
            if len(self._mistakes) < KEPT_MISTAKES or (-one["score"][0], number) < self._mistakes[-1].rank:
                other = None if mistake.other is None else int(objects["label"][mistake.other])
                shown = small(number, photograph, size, objects, one)
                self._mistakes.append(ShownMistake(shown, mistake.kind, other, mistake.iou))
                self._mistakes = sorted(self._mistakes, key=lambda one: one.rank)[:KEPT_MISTAKES]


def small(number: int, photograph: Tensor, size: tuple[int, int], objects: np.ndarray, found: np.ndarray) -> Shown:
    """A sample for a picture whose longer side has at most LONGEST pixels. Arguments: see DetectionTally."""
    factor = min(1.0, LONGEST / max(size))
    width, height = (max(1, round(side * factor)) for side in size)
    pixels = F.interpolate(photograph[None].float(), size=(height, width), mode="bilinear", antialias=True)[0]
    image = as_base64(pixels.round().byte().permute(1, 2, 0).cpu().numpy(), "JPEG")
    scale = np.array([width / size[0], height / size[1]] * 2)
    boxes = [(columns(rows, BOX) * scale).round(1).tolist() for rows in (objects, found)]
    columns_of = ((objects, "crowd"), (found, "score"))
    truth, scored = (
        [(*box, *row) for box, row in zip(part, rows[["label", last]].tolist(), strict=True)]
        for part, (rows, last) in zip(boxes, columns_of, strict=True)
    )
    return Shown(number, image, truth, scored)


def counts_of(truth: Truth, classes: int) -> dict[str, Any]:
    """Objects that are no crowds: by class, and by size."""
    objects = truth.objects[truth.objects["crowd"] == 0]
    sizes = {name: (objects["area"] >= low) & (objects["area"] <= high) for name, (low, high) in AREAS.items()}
    return {
        "objects": np.bincount(objects["label"], minlength=classes).tolist(),
        "sizes": {name: int(those.sum()) for name, those in sizes.items()},
    }


def percentages(values: Iterable[float]) -> list[float | None]:
    """0..100; None for NaN, which JSON does not have."""
    return [None if value != value else 100 * value for value in map(float, values)]
