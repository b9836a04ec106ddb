"""The window of an image that is used, and whether it is mirrored: pure functions of keys and sizes, for all backends.

A window is (x, y, width, height, flip), in pixels of the stored image: x to the right and y down from its top left
corner; flip is 1 if the result is mirrored left to right, else 0. A padded window may extend beyond the image; pixels
outside the image are black.

These are the crops of classification; views.py has all views. Targets that depend on positions are cut by the same
windows (annotations.Targets).
"""

import math

import numpy as np

from .config import AugmentConfig
from .randomness import Stream, fold, integers, uniform

ATTEMPTS = 10


def training_windows(
    keys: np.ndarray, widths: np.ndarray, heights: np.ndarray, config: AugmentConfig, eval_crop: float = 1.0
) -> np.ndarray:
    """Random windows, int32 [n, 5], for the int64 [n] keys of (seed, epoch, sample id) and the images' sizes [n].

    config.crop: "resized" (Inception's crop, as RandomResizedCrop of torchvision and timm), "padded" (the full image,
    shifted, as usual for CIFAR), or "none" (the windows of evaluation, with `eval_crop`).
    """
    widths, heights = np.asarray(widths, np.int64), np.asarray(heights, np.int64)
    if config.crop == "resized":
        windows = _resized(keys, widths, heights, config)
    elif config.crop == "padded":
        shifts = 2 * config.crop_padding + 1
        x = integers(keys, shifts, 0) - config.crop_padding
        y = integers(keys, shifts, 1) - config.crop_padding
        windows = _windows(x, y, widths, heights)
    else:
        windows = evaluation_windows(widths, heights, eval_crop)
    windows[:, 4] = uniform(fold(keys, Stream.FLIP), 1)[:, 0] < config.flip
    return windows


def evaluation_windows(widths: np.ndarray, heights: np.ndarray, eval_crop: float) -> np.ndarray:
    """Centred squares of side eval_crop × the short side, never mirrored, int32 [n, 5].

    Resizing such a square to S equals the usual "resize the short side to S / eval_crop, then crop the centre S × S",
    up to the rounding of sizes and offsets to whole pixels, and does not compute the border that is cropped away.
    """
    widths, heights = np.asarray(widths, np.int64), np.asarray(heights, np.int64)
    side = np.maximum(1, np.rint(eval_crop * np.minimum(widths, heights)).astype(np.int64))
    return _windows((widths - side) // 2, (heights - side) // 2, side, side)


def _resized(keys: np.ndarray, widths: np.ndarray, heights: np.ndarray, config: AugmentConfig) -> np.ndarray:
    """The first of ATTEMPTS random windows that fits; if none does, the largest centred one in the ratio range."""
    number = uniform(keys, 4 * ATTEMPTS).reshape(-1, 4, ATTEMPTS)
    smallest, largest = config.crop_scale
    low, high = config.crop_ratio
    area = (widths * heights)[:, None] * (smallest + (largest - smallest) * number[:, 0])
    ratio = np.exp(math.log(low) + (math.log(high) - math.log(low)) * number[:, 1])
    width, height = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (width > 0) & (width <= widths[:, None]) & (height > 0) & (height <= heights[:, None])

    row = np.arange(len(keys))
    first = fits.argmax(axis=1)
    found = fits[row, first]
    width, height = width[row, first], height[row, first]

    shape = widths / heights
    fallback_width = np.where(shape > high, np.rint(heights * high), widths)
    fallback_height = np.where(shape < low, np.rint(widths / low), heights)
    width = np.where(found, width, np.clip(fallback_width, 1, widths))
    height = np.where(found, height, np.clip(fallback_height, 1, heights))

    # Uniform over all positions inside the image; the fallback is centred.
    x = np.where(found, number[row, 2, first] * (widths - width + 1), (widths - width) // 2).astype(np.int64)
    y = np.where(found, number[row, 3, first] * (heights - height + 1), (heights - height) // 2).astype(np.int64)
    return _windows(x, y, width, height)


def _windows(x: np.ndarray, y: np.ndarray, width: np.ndarray, height: np.ndarray) -> np.ndarray:
    return np.stack([x, y, width, height, np.zeros_like(width)], axis=1).astype(np.int32)
