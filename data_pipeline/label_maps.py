"""A class for every pixel: label maps, cut like their images.

A sample's label map is a PNG of its image's size (label_png.py). It lies in the shards, at the place that annotation
`label_map` gives.
"""

import io

import numpy as np
import torch

from .annotations import Cut
from .backends.stored import StoredSamples
from .label_png import ignored_value
from .split import LABEL_MAP, DataError, Split


class LabelMaps:
    """Targets: label maps of `classes` classes.

    In training a micro-batch has {"labels": [m, H, W], "inside": int32 [m, 4]}: the labels by nearest neighbour, and
    (left, top, right, bottom) of the part that shows the image; the rest is padding, and ignored. In evaluation it has
    {"labels": [m, h, w]}, uncut, of the images' own size. Labels are uint8, or int32 with
    more than 255 classes (`ignored_value`).

    max_ratio: the first candidate is chosen that has more than one class, the most frequent one with a smaller share
    than this of the pixels that are not ignored; if there is none, the last (mmsegmentation's cat_max_ratio).
    """

    def __init__(self, split: Split, classes: int, training: bool, max_ratio: float = 1.0):
        if not split.shards:
            raise DataError(f"{split.folder} has no shards of split {split.name!r}, and its label maps lie in them.")
        self.stored = StoredSamples(split, annotation=LABEL_MAP)
        self._images, self._classes, self._training, self._max_ratio = split.records, classes, training, max_ratio
        self._ignored = ignored_value(classes)

    def read(self, ids: np.ndarray, candidates: np.ndarray, shape: tuple[int, int]) -> Cut:
        encoded, failures = self.stored.read(ids)
        images = self._images[ids]
        sizes = zip(images["width"].tolist(), images["height"].tolist(), strict=True)
        windows, targets = candidates[:, 0].copy(), []
        for row, (data, size) in enumerate(zip(encoded, sizes, strict=True)):
            target = None
            if row not in failures:
                try:
                    labels = decode_labels(data, size, self._classes)
                    windows[row], target = self._choose(labels, candidates[row], shape)
                except ValueError as error:
                    failures[row] = str(error)
            if target is None and not self._training:
                target = np.full(size[::-1], self._ignored, np.uint8 if self._ignored == 255 else np.int32)
            targets.append(target)
        return Cut(windows, targets, self.stored.sentences(ids, failures))

    def collate(self, targets: list) -> dict[str, torch.Tensor]:
        if not self._training:
            return {"labels": torch.from_numpy(np.stack(targets))}
        labels, inside = zip(*targets, strict=True)
        return {"labels": torch.from_numpy(np.stack(labels)), "inside": torch.tensor(inside, dtype=torch.int32)}

    def _choose(self, labels: np.ndarray, candidates: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, object]:
        """The chosen window, and the target."""
        if not self._training:
            return candidates[0], labels
        for window in candidates:
            cut, inside = cut_labels(labels, window, shape, self._ignored)
            if len(candidates) == 1 or self._is_mixed(cut):
                break
        return window, (cut, inside)

    def _is_mixed(self, labels: np.ndarray) -> bool:
        counts = torch.bincount(torch.from_numpy(labels).view(-1), minlength=self._ignored + 1)[: self._classes]
        largest, total = int(counts.max()), int(counts.sum())
        return largest < total and largest / total < self._max_ratio


def decode_labels(data: bytes, size: tuple[int, int], classes: int) -> np.ndarray:
    """The labels of a PNG, uint8 [height, width], or int32 with more than 255 classes.

    size: the (width, height) that it must have. Raises ValueError, with the reason, for a PNG that cannot be decoded
    or is none of a label map.
    """
    from PIL import Image

    ignored = ignored_value(classes)
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if image.size != size:
                raise ValueError("it is {}x{} pixels where its image has {}x{}".format(*image.size, *size))
            mode, bits = ("L", 8) if ignored == 255 else ("I;16", 16)
            if image.mode != mode:
                raise ValueError(f"it is not gray of {bits} bits, as label maps of {classes} classes are")
            labels = np.asarray(image)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(str(error)) from error
    labels = labels if ignored == 255 else labels.astype(np.int32)
    if (wrong := (labels >= classes) & (labels != ignored)).any():
        value = labels[wrong][0]
        raise ValueError(f"it has the value {value}, and the classes are 0 to {classes - 1} ({ignored}: ignored)")
    return labels


def cut_labels(
    labels: np.ndarray, window: np.ndarray, shape: tuple[int, int], ignored: int
) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """Cut a window (crop.py) out of a label map and resize it to `shape` by nearest neighbour; pixels outside the map
    are ignored.

    Returns the labels, and (left, top, right, bottom) of the part inside the map. Output pixel i of a side of n shows
    the source pixel that contains start + (i + 0.5) · extent / n, as the image's resampling is centred there.
    """
    x, y, width, height, flip = window.tolist()
    left, right, columns = _sources(x, width, shape[1], labels.shape[1], bool(flip))
    top, bottom, rows = _sources(y, height, shape[0], labels.shape[0], False)
    cut = np.full(shape, ignored, labels.dtype)
    cut[top:bottom, left:right] = labels.take(rows, axis=0).take(columns, axis=1)
    return cut, (left, top, right, bottom)


def _sources(start: int, extent: int, count: int, length: int, mirrored: bool) -> tuple[int, int, np.ndarray]:
    """The range of those of `count` outputs whose source is one of `length` pixels, and their sources."""
    sources = start + (2 * np.arange(count) + 1) * extent // (2 * count)
    sources = sources[::-1] if mirrored else sources
    inside = np.flatnonzero((sources >= 0) & (sources < length))
    first, last = (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (0, 0)
    return first, last, sources[first:last]
