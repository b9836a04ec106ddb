"""From images to the class of every pixel: whole images or sliding windows, at several sizes, mirrored too.

As in mmsegmentation 0.x: the logits of overlapping windows are averaged; of several passes over an image, the
probabilities, at the size of the result.

Shape letters: m images, C classes, H W the size of the network's input, h w the size of the result.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.augment import normalise
from data_pipeline.config import AugmentConfig
from data_pipeline.views import ScaledCrops
from train.config import Config
from train.tasks.base import Model
from train.tasks.segmentation.settings import Settings

CHUNK = 32  # classes whose logits are enlarged at once


def views_of(settings: Settings, augment: AugmentConfig, test_ratio: float) -> ScaledCrops:
    """Which part of each image is used, and at what size; in evaluation at one ratio of `test_ratios`."""
    return ScaledCrops(
        shape=settings.crop,
        scale=settings.scale,
        scale_range=settings.scale_range,
        cat_max_ratio=settings.cat_max_ratio,
        flip=augment.flip,
        test_scale=settings.test_scale or settings.scale,
        test_ratio=test_ratio,
        divisor=settings.divisor,
    )


class Inference:
    """The classes of images' pixels, as the config's `task` section says. Needs no gradients."""

    def __init__(self, config: Config):
        self._settings, self._augment = config.task, config.augment

    def __call__(self, model: Model, images: Tensor, size: tuple[int, int]) -> Tensor:
        """images: uint8 [m, 3, H, W], of the size that the largest of `test_ratios` gives to photographs of `size`.

        Smaller ones are made from it. Returns int64 [m, *size]; size: (h, w).
        """
        passes = [
            (self._logits(model, image.flip(3) if mirrored else image), mirrored)
            for image in self._at_all_ratios(images, size)
            for mirrored in ((False, True) if self._settings.test_flip else (False,))
        ]
        # One image at a time: the logits of all classes at full size take much memory.
        rows = [[(logits[row : row + 1], mirrored) for logits, mirrored in passes] for row in range(len(passes[0][0]))]
        return torch.cat([_best(row[0][0], size) if len(row) == 1 else _best_of_mean(row, size) for row in rows])

    def _at_all_ratios(self, images: Tensor, size: tuple[int, int]) -> list[Tensor]:
        """The images at each of `test_ratios`, normalised, float [m, 3, *, *]."""
        resized = []
        for ratio in self._settings.test_ratios:
            views = views_of(self._settings, self._augment, ratio)
            _, shapes = views.evaluation(np.array([size[1]]), np.array([size[0]]))
            shape = tuple(shapes[0].tolist())
            image = images
            if shape != tuple(images.shape[2:]):
                image = F.interpolate(images.float(), size=shape, mode="bilinear", antialias=True)
            resized.append(normalise(image, self._augment))
        return resized

    def _logits(self, model: Model, images: Tensor) -> Tensor:
        """float32 [m, C, *, *], of the network's size, or of the images' with sliding windows."""
        if self._settings.test == "whole":
            return model(images).float()
        height, width = images.shape[2:]
        total, count = None, torch.zeros(height, width, device=images.device)
        for y, x in _windows((height, width), self._settings.window_sides, self._settings.strides):
            part = images[:, :, y, x].contiguous()
            logits = F.interpolate(model(part).float(), size=part.shape[2:], mode="bilinear")
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], height, width)
            total[:, :, y, x] += logits
            count[y, x] += 1
        return total / count


def _windows(size: tuple[int, int], sides: tuple[int, int], strides: tuple[int, int]) -> list[tuple[slice, slice]]:
    """Rows and columns of each window: the last ones of a side end at the border, and windows are never larger than the
    image.
    """
    places = []
    for length, side, stride in zip(size, sides, strides, strict=True):
        count = max(length - side + stride - 1, 0) // stride + 1
        ends = [min(number * stride + side, length) for number in range(count)]
        places.append([slice(max(end - side, 0), end) for end in ends])
    return [(y, x) for y in places[0] for x in places[1]]


def _best(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """[1, C, *, *] → the class of the largest logit at `size`, int64 [1, *size]; of equal ones the first."""
    highest, found = None, None
    for start in range(0, logits.shape[1], CHUNK):
        part = F.interpolate(logits[:, start : start + CHUNK], size=size, mode="bilinear")
        values, classes = part.max(dim=1)
        if highest is None:
            highest, found = values, classes
        else:
            better = values > highest
            highest, found = torch.where(better, values, highest), torch.where(better, classes + start, found)
    return found


def _best_of_mean(passes: Sequence[tuple[Tensor, bool]], size: tuple[int, int]) -> Tensor:
    """The class of the largest sum of probabilities at `size`, int64 [1, *size]. passes: (logits, mirrored)."""
    total = 0.0
    for logits, mirrored in passes:
        probabilities = F.interpolate(logits, size=size, mode="bilinear").softmax(dim=1)
        total = total + (probabilities.flip(3) if mirrored else probabilities)
    return total.argmax(dim=1)
