"""Views for detection: images resized with their aspect kept, at one of several scales, and padded to the shape of
their micro-batch; as in mmdetection 2.x (Resize, RandomCrop, RandomFlip, Pad).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from .randomness import Stream, fold, uniform
from .views import CANDIDATES, factors

# The keyed numbers of a sample: which path, which scale of `scales` and of `crop_scales`, height and width of the crop.
NUMBERS = 5

Scale = tuple[int, int]


@dataclass(frozen=True)
class ScaledBoxes:
    """scales: (long, short) sides into which an image is resized, its aspect kept. mode: "value" takes one of them;
    "range" a short side between the smallest and the largest, with the largest long side.

    crop_scales: with probability 1/2 an image is first resized to one of these, of which a crop is taken; its height
    and width are uniform in crop_range, but at most the image's. The crop is then resized to `scales`. Its window shows
    as much of the image beside the crop as the micro-batch's shape has room for, where mmdetection would pad.

    A micro-batch has the largest height and the largest width of its resized images, or crops, rounded up to multiples
    of `divisor`. Padding is at the right and at the bottom, also of images that are mirrored (with probability `flip`).
    grouped: whether a micro-batch has either landscape or portrait images (GroupedOrder).

    In evaluation the image is resized to test_scale (long, short) and padded to multiples of `divisor`.
    """

    scales: tuple[Scale, ...]
    test_scale: Scale
    divisor: int = 32
    mode: Literal["value", "range"] = "value"
    crop_scales: tuple[Scale, ...] = ()
    crop_range: tuple[int, int] = (384, 600)
    flip: float = 0.5
    grouped: bool = True

    @property
    def shape(self) -> tuple[int, int]:
        """Of images without limits: a micro-batch may have crops of both orientations."""
        long = self._padded(max(map(max, self.scales)))
        short = self._padded(max(map(min, self.scales)))
        return (short if self.grouped and not self.crop_scales else long), long

    @property
    def most_shapes(self) -> int:
        """Every image has the short side of a scale or more, or its long side, along its longer side."""
        height, width = self.shape
        least = self._padded(min(map(min, self.scales)))
        sides = range(self.divisor, width + 1, self.divisor)
        landscape = {(h, w) for h in sides for w in sides if h <= height and w >= least}
        return len(landscape | {(h, w) for w, h in landscape})

    def shapes(self, keys: np.ndarray, widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
        widths, heights = (np.asarray(sides, np.int64).ravel() for sides in (widths, heights))
        _, _, sides = self._resize(keys.ravel(), widths, heights)
        return self._padded(sides.reshape(*keys.shape, 2).max(axis=1))

    def training(self, keys: np.ndarray, widths: np.ndarray, heights: np.ndarray, shapes: np.ndarray) -> np.ndarray:
        """Resize, crop and padding are one window, in whole pixels of the stored image: its sides are those of the
        shape, divided by the factor of the resize, and rounded. An image that is not cropped is shown as a whole.
        """
        widths, heights = np.asarray(widths, np.int64), np.asarray(heights, np.int64)
        factor, cropped, _ = self._resize(keys, widths, heights)
        fitting = (shapes / np.stack([heights, widths], axis=1)).min(axis=1)
        factor = np.where(cropped, factor, np.minimum(factor, fitting))
        height, width = np.maximum(1, np.rint(shapes / factor[:, None])).astype(np.int64).T[..., None]
        count = CANDIDATES if self.crop_scales else 1
        places = uniform(keys, NUMBERS + 2 * count)[:, NUMBERS:]
        flip = (uniform(fold(keys, Stream.FLIP), 1) < self.flip).astype(np.int64)
        # A place inside the image; where the window is larger, the image's beginning, or if it is mirrored its end.
        right, bottom = widths[:, None] - width, heights[:, None] - height
        x = (places[:, :count] * (np.maximum(right, 0) + 1)).astype(np.int64) + flip * np.minimum(right, 0)
        y = (places[:, count:] * (np.maximum(bottom, 0) + 1)).astype(np.int64)
        return np.stack(np.broadcast_arrays(x, y, width, height, flip), axis=2).astype(np.int32)

    def evaluation(self, widths: np.ndarray, heights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The windows are the whole images and as many pixels beside them as the padding takes, rounded."""
        sides = np.stack([np.asarray(heights, np.int64), np.asarray(widths, np.int64)], axis=1)
        resized = _rounded(sides * factors(widths, heights, self.test_scale)[:, None])
        shapes = self._padded(resized)
        extents = np.rint(shapes * (sides / resized)).astype(np.int64)
        zeros = np.zeros(len(sides), np.int64)
        return np.stack([zeros, zeros, extents[:, 1], extents[:, 0], zeros], axis=1).astype(np.int32), shapes

    def groups(self, widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
        """Images of equal shapes: the network's outputs depend on the padding."""
        height, width = self.evaluation(widths, heights)[1].T
        return height << 32 | width

    def _resize(
        self, keys: np.ndarray, widths: np.ndarray, heights: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The factor [n] by which each image is resized, whether it is cropped [n], and the (height, width) of the
        resized image, or crop, [n, 2].
        """
        number = uniform(keys, NUMBERS).T
        factor = np.ones(len(keys))
        sides = np.stack([heights, widths], axis=1)
        cropped = np.zeros(len(keys), bool)
        if self.crop_scales:
            cropped = number[0] < 0.5
            before = factors(widths, heights, np.array(self.crop_scales)[_choice(number[2], len(self.crop_scales))])
            most = np.minimum(_rounded(sides * before[:, None]), self.crop_range[1])
            least = np.minimum(most, self.crop_range[0])
            crops = least + (number[3:5].T * (most - least + 1)).astype(np.int64)
            factor = np.where(cropped, before, factor)
            sides = np.where(cropped[:, None], crops, sides)
        after = factors(sides[:, 1], sides[:, 0], self._scales(number[1]))
        return factor * after, cropped, _rounded(sides * after[:, None])

    def _scales(self, number: np.ndarray) -> np.ndarray:
        """A (long, short) for each uniform number, int64 [n, 2]."""
        scales = np.array(self.scales)
        if self.mode == "value":
            return scales[_choice(number, len(scales))]
        (_, least), (long, most) = scales.min(axis=0), scales.max(axis=0)
        short = least + _choice(number, most - least + 1)
        return np.stack([np.full_like(short, long), short], axis=1)

    def _padded(self, sides):
        """Sides, rounded up to multiples of `divisor`."""
        return -(-sides // self.divisor) * self.divisor


def _choice(number: np.ndarray, count: int) -> np.ndarray:
    """Integers in [0, count) of uniform numbers in [0, 1)."""
    return (number * count).astype(np.int64)


def _rounded(sides: np.ndarray) -> np.ndarray:
    return np.maximum(1, np.floor(sides + 0.5).astype(np.int64))
