"""Which part of each image a task uses, and the size of the result: pure functions of keys and the images' sizes.

A view is a window of the stored image (crop.py), which the decoder resizes to a shape (height, width). In training
there may be several candidates, among which the targets choose (annotations.Targets).
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from .config import AugmentConfig, DataConfig
from .crop import evaluation_windows, training_windows
from .randomness import Stream, fold, uniform

# Places that are drawn for a crop whose classes must be mixed (ScaledCrops), as many as mmsegmentation tries.
CANDIDATES = 10


class Views(Protocol):
    """The views of a task.

    shape: the largest height and the largest width of training inputs. most_shapes: how many shapes these may have.
    """

    shape: tuple[int, int]
    most_shapes: int

    def shapes(self, keys: np.ndarray, widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
        """The (height, width) of the inputs of r micro-batches, int64 [r, 2], for the int64 [r, m] keys of (seed,
        epoch, draw) and the images' sizes [r, m].
        """

    def training(self, keys: np.ndarray, widths: np.ndarray, heights: np.ndarray, shapes: np.ndarray) -> np.ndarray:
        """Candidate windows, int32 [n, K, 5], for the int64 [n] keys of (seed, epoch, draw), the images' sizes [n] and
        the shapes of their micro-batches, int64 [n, 2]. K ≥ 1 is the same for all samples.

        Of an image that replaces an unreadable one, the shape is that of the micro-batch into which it must fit.
        """

    def evaluation(self, widths: np.ndarray, heights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The windows of images of these sizes, int32 [n, 5], and the (height, width) of the results, int64 [n, 2]."""

    def groups(self, widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
        """A number for each size, int64 [n]: only images with the same one may be evaluated in one batch."""


@dataclass(frozen=True)
class Crops:
    """Squares of data.image_size pixels, as for classification."""

    data: DataConfig
    augment: AugmentConfig
    most_shapes: ClassVar[int] = 1

    @property
    def shape(self) -> tuple[int, int]:
        return self.data.image_size, self.data.image_size

    def shapes(self, keys: np.ndarray, widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
        return np.tile(self.shape, (len(keys), 1))

    def training(self, keys: np.ndarray, widths: np.ndarray, heights: np.ndarray, shapes: np.ndarray) -> np.ndarray:
        return training_windows(keys, widths, heights, self.augment, self.data.eval_crop)[:, None]

    def evaluation(self, widths: np.ndarray, heights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return evaluation_windows(widths, heights, self.data.eval_crop), np.tile(self.shape, (len(widths), 1))

    def groups(self, widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
        return np.zeros(len(widths), np.int64)


@dataclass(frozen=True)
class ScaledCrops:
    """Images resized with their aspect kept, then cropped, as for segmentation (mmsegmentation 0.x: Resize, RandomCrop,
    RandomFlip, Pad).

    shape: of the crop. scale: (long, short), the largest size of the resized image's long and short side, times a
    number that is uniform in scale_range. A crop that is larger than the resized image has padding at the right and at
    the bottom, also if it is mirrored. cat_max_ratio: below 1, CANDIDATES places of the same crop are drawn. flip: its
    probability.

    In evaluation the whole image is resized to test_scale (long, short) × test_ratio, then each side up to a multiple
    of `divisor`.
    """

    shape: tuple[int, int]
    scale: tuple[int, int]
    scale_range: tuple[float, float]
    cat_max_ratio: float
    flip: float
    test_scale: tuple[int, int]
    test_ratio: float = 1.0
    divisor: int = 1
    most_shapes: ClassVar[int] = 1

    def shapes(self, keys: np.ndarray, widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
        return np.tile(self.shape, (len(keys), 1))

    def training(self, keys: np.ndarray, widths: np.ndarray, heights: np.ndarray, shapes: np.ndarray) -> np.ndarray:
        """Resizing, cropping and padding are one window, in whole pixels of the stored image: its sides are those of
        the crop divided by the factor of the resize, rounded.
        """
        widths, heights = np.asarray(widths, np.int64)[:, None], np.asarray(heights, np.int64)[:, None]
        count = CANDIDATES if self.cat_max_ratio < 1 else 1
        number = uniform(keys, 1 + 2 * count)
        low, high = self.scale_range
        factor = (low + (high - low) * number[:, :1]) * factors(widths, heights, self.scale)
        height, width = (np.maximum(1, np.rint(side / factor)).astype(np.int64) for side in self.shape)
        # A place inside the image; along a side where the window is larger, at the image's beginning. Of a mirrored
        # window that is too wide it is the end, because mirroring moves the padding from the left to the right.
        flip = (uniform(fold(keys, Stream.FLIP), 1) < self.flip).astype(np.int64)
        x = (number[:, 1 : 1 + count] * (np.maximum(widths - width, 0) + 1)).astype(np.int64)
        y = (number[:, 1 + count :] * (np.maximum(heights - height, 0) + 1)).astype(np.int64)
        x = x + flip * np.minimum(widths - width, 0)
        columns = np.broadcast_arrays(x, y, width, height, flip)
        return np.stack(columns, axis=2).astype(np.int32)

    def evaluation(self, widths: np.ndarray, heights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        widths, heights = np.asarray(widths, np.int64), np.asarray(heights, np.int64)
        zeros = np.zeros_like(widths)
        windows = np.stack([zeros, zeros, widths, heights, zeros], axis=1).astype(np.int32)
        factor = self.test_ratio * factors(widths, heights, self.test_scale)
        sides = np.stack([heights, widths], axis=1)
        resized = np.maximum(1, np.floor(sides * factor[:, None] + 0.5).astype(np.int64))
        return windows, -(-resized // self.divisor) * self.divisor

    def groups(self, widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
        """Images of equal size: the labels of a batch are compared at their own size."""
        return np.asarray(widths, np.int64) << 32 | np.asarray(heights, np.int64)


def factors(widths: np.ndarray, heights: np.ndarray, scale: tuple[int, int] | np.ndarray) -> np.ndarray:
    """The largest factors by which images fit into (long, short), one side by side with the other, float64 [n].

    scale: two numbers, or two for each image, [n, 2].
    """
    scale = np.asarray(scale)
    long, short = scale.max(axis=-1), scale.min(axis=-1)
    return np.minimum(long / np.maximum(widths, heights), short / np.minimum(widths, heights))


def evaluation_slices(views: Views, widths: np.ndarray, heights: np.ndarray, batch_size: int) -> list[range]:
    """The ids of each batch of an evaluation: runs of consecutive ids of one group, of at most `batch_size` each."""
    groups = views.groups(widths, heights)
    starts = [0, *(np.flatnonzero(np.diff(groups)) + 1).tolist()]
    ends = [*starts[1:], len(groups)]
    runs = zip(starts, ends, strict=True)
    return [range(at, min(at + batch_size, end)) for start, end in runs for at in range(start, end, batch_size)]
