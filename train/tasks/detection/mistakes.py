"""A detector's most confident mistake in an image, and its kind. Without torch."""

from dataclasses import dataclass

import numpy as np
from hotcoco.primitives import bbox_iou

from train.tasks.detection.coco import BOX, columns

# As TIDE has them (coco.KINDS) and hotcoco counts them.
FOUND_AT, NEAR = 0.5, 0.1


@dataclass(frozen=True)
class Mistake:
    """row: of the detection. kind: see coco.KINDS. other: the row of the object that it overlaps most, and their IoU;
    None if nothing is there.
    """

    row: int
    kind: str
    other: int | None
    iou: float


def first_mistake(objects: np.ndarray, found: np.ndarray) -> Mistake | None:
    """The first of the detections FOUND [d], best first, that is no object, or one that was found before.

    objects: OBJECT [n] of the same image. As in COCO's evaluation at IoU 0.5, a detection takes the object of its class
    that it overlaps most and that no better one has taken; one that lies in a crowd of its class does not count.
    """
    if not len(objects):
        return Mistake(0, "background", None, 0.0) if len(found) else None
    crowd = objects["crowd"].astype(bool)
    every_iou = bbox_iou(columns(found, BOX), columns(objects, BOX), crowd)
    taken = np.zeros(len(objects), bool)
    for row, (iou, label) in enumerate(zip(every_iou, found["label"], strict=True)):
        same = (objects["label"] == label) & (iou >= FOUND_AT)
        if (free := same & ~taken & ~crowd).any():
            taken[np.where(free, iou, -1.0).argmax()] = True
        elif not (same & crowd).any():
            return _kind(row, np.where(crowd, 0.0, iou), objects["label"] == label)
    return None


def _kind(row: int, iou: np.ndarray, same: np.ndarray) -> Mistake:
    """iou: with each object, [n]. same: whether the object has the detection's class, [n]."""
    here, there = (np.where(those, iou, 0.0) for those in (same, ~same))
    best = int(iou.argmax())
    if NEAR <= here.max() < FOUND_AT:
        return Mistake(row, "place", int(here.argmax()), float(here.max()))
    if there.max() >= FOUND_AT:
        return Mistake(row, "class", int(there.argmax()), float(there.max()))
    if here.max() >= FOUND_AT:
        return Mistake(row, "duplicate", int(here.argmax()), float(here.max()))
    if iou[best] <= NEAR:
        return Mistake(row, "background", None, float(iou[best]))
    return Mistake(row, "both", best, float(iou[best]))
