"""Targets of detection: the boxes of a sample's objects, where its window and shape put them in the network's input."""

import numpy as np
import torch

from .annotations import Cut
from .objects import ObjectTable
from .split import Split

# The smallest number of boxes that a micro-batch has room for.
LEAST_BOXES = 8


class ObjectTargets:
    """In training a micro-batch has "boxes": float32 [m, G, 4], (left, top, right, bottom) in pixels of the input;
    "labels": int64 [m, G], -1 where a sample has fewer objects; "inside": int32 [m, 4], (left, top, right, bottom) of
    the part that shows the image, as LabelMaps has it. G is a power of two.

    Crowds and objects without area are left out. Boxes are clipped to what the window shows of the image, and those of
    which it shows less than one stored pixel in width or height are left out (mmdetection's rules). Among several
    candidates the first is chosen that shows the centre of a box; if there is none, the last.

    In evaluation it has "factors": float64 [m, 2], pixels of the input for one of the stored image, in x and y;
    "sizes": int32 [m, 2], the stored (width, height); and "inside".
    """

    stored = None

    def __init__(self, split: Split, training: bool):
        self._table, self._images, self._training = ObjectTable(split), split.records, training

    def read(self, ids: np.ndarray, candidates: np.ndarray, shape: tuple[int, int]) -> Cut:
        images = self._images[ids]
        sizes = np.stack([images["width"], images["height"]], axis=1).astype(np.int64)
        if not self._training:
            windows = candidates[:, 0]
            factors = np.array(shape[::-1]) / windows[:, 2:4]
            shown = shown_part(windows, sizes, shape)
            return Cut(windows, list(zip(factors, sizes.astype(np.int32), shown, strict=True)))
        objects = [self._usable(sample, size) for sample, size in zip(ids.tolist(), sizes, strict=True)]
        windows = np.stack([choose(*pair) for pair in zip((boxes for boxes, _ in objects), candidates, strict=True)])
        shown = shown_part(windows, sizes, shape)
        targets = []
        for (boxes, labels), window, size, part in zip(objects, windows, sizes, shown, strict=True):
            moved, kept = move_boxes(boxes, window, size, shape)
            targets.append((moved[kept], labels[kept], part))
        return Cut(windows, targets)

    def collate(self, targets: list) -> dict[str, torch.Tensor]:
        *columns, inside = zip(*targets, strict=True)
        found = {"inside": torch.from_numpy(np.stack(inside))}
        if not self._training:
            factors, sizes = (torch.from_numpy(np.stack(column)) for column in columns)
            return {"factors": factors, "sizes": sizes, **found}
        most = max(LEAST_BOXES, *(len(labels) for labels in columns[1]))
        room = 1 << (most - 1).bit_length()
        boxes = np.zeros((len(targets), room, 4), np.float32)
        labels = np.full((len(targets), room), -1, np.int64)
        for row, (some_boxes, some_labels) in enumerate(zip(*columns, strict=True)):
            boxes[row, : len(some_labels)] = some_boxes
            labels[row, : len(some_labels)] = some_labels
        return {"boxes": torch.from_numpy(boxes), "labels": torch.from_numpy(labels), **found}

    def _usable(self, sample: int, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The boxes that can be learnt from, float64 [n, 4] (left, top, right, bottom) clipped to the image of (width,
        height) `size`, and their labels, int64 [n].
        """
        objects = self._table.of(sample)
        left, top = objects["x"], objects["y"]
        boxes = np.stack([left, top, left + objects["width"], top + objects["height"]], axis=1)
        boxes = boxes.clip(0, np.tile(size, 2))
        kept = (boxes[:, 2:] - boxes[:, :2] >= 1).all(axis=1) & (objects["area"] > 0) & (objects["crowd"] == 0)
        return boxes[kept], objects["label"][kept].astype(np.int64)


def choose(boxes: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """The first of the candidates (int32 [K, 5]) that shows the centre of one of the boxes [n, 4], else the last."""
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    starts, extents = candidates[:, None, :2], candidates[:, None, 2:4]
    found = ((centres >= starts) & (centres < starts + extents)).all(axis=2).any(axis=1)
    return candidates[found.argmax() if found.any() else -1]


def move_boxes(
    boxes: np.ndarray, window: np.ndarray, size: np.ndarray, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Where boxes [n, 4] of an image of (width, height) `size` are in its window (crop.py) resized to `shape`.

    Returns them clipped to what is shown of the image, float32 [n, 4], and whether one stored pixel or more of both
    their sides is shown, bool [n]. The map is the decoder's: the window's edges become those of the input.
    """
    x, y, width, height, flip = window.tolist()
    start, extent = np.array([x, y]), np.array([width, height])
    low, high = np.maximum(start, 0), np.minimum(start + extent, size)
    boxes = np.concatenate([boxes[:, :2].clip(low, high), boxes[:, 2:].clip(low, high)], axis=1)
    kept = (boxes[:, 2:] - boxes[:, :2] >= 1).all(axis=1)
    moved = (boxes - np.tile(start, 2)) * np.tile(np.array(shape[::-1]) / extent, 2)
    if flip:
        moved[:, [0, 2]] = shape[1] - moved[:, [2, 0]]
    return moved.astype(np.float32), kept


def shown_part(windows: np.ndarray, sizes: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(left, top, right, bottom) of the outputs of each window whose centres lie in the image, int32 [n, 4].

    windows: int32 [n, 5]. sizes: int64 [n, 2], (width, height). Output i of a side of n is at start + (i + 0.5) ·
    extent / n of the image.
    """
    starts, extents = windows[:, :2].astype(np.int64), windows[:, 2:4].astype(np.int64)
    sides = np.array(shape[::-1])
    # The smallest i with start + (2 i + 1) · extent / (2 n) ≥ edge, for the image's two edges.
    low, high = (
        (-((extents - 2 * sides * (edge - starts)) // (2 * extents))).clip(0, sides) for edge in (0 * sizes, sizes)
    )
    mirrored = windows[:, 4] == 1
    left = np.where(mirrored, sides[0] - high[:, 0], low[:, 0])
    right = np.where(mirrored, sides[0] - low[:, 0], high[:, 0])
    return np.stack([left, low[:, 1], right, high[:, 1]], axis=1).astype(np.int32)
