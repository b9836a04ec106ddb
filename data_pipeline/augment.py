"""The recipe on the device: batched, per-sample random, without a host synchronisation and without a loop over samples.

Every number is a function of a sample's key, so an image's augmentation does not depend on its neighbours, its place in the
batch, or the device. Make the keys of a micro-batch with `sample_keys`.
"""

import functools
import math

import numpy as np
import torch

from .config import AugmentConfig
from .randomness import Stream, fold, make_key, normal, uniform

# timm's RandomErasing: area of the box relative to the image, height / width, and tries to place it.
ERASING_AREA = (0.02, 1 / 3)
ERASING_ASPECT = (0.3, 1 / 0.3)
ERASING_ATTEMPTS = 10


def sample_keys(seed: int, epoch: int, draws: np.ndarray) -> np.ndarray:
    """The augmentation keys of `draws` (MicroBatch.draws, int64 [m]) in an epoch, int64 [m]. On the host, as all that is chosen by them."""
    return fold(make_key(seed, Stream.AUGMENT, epoch), draws)


def augment(images: torch.Tensor, keys: np.ndarray, config: AugmentConfig) -> torch.Tensor:
    """uint8 [m, 3, S, S] on any device and int64 keys [m] on the host → float32 [m, 3, S, S] on the device: normalise, erase. What has probability 0 costs nothing."""
    images = normalise(images, config)
    if config.erasing > 0:
        images = _erase(images, torch.from_numpy(keys).to(images.device, non_blocking=True), config.erasing)
    return images


def normalise(images: torch.Tensor, config: AugmentConfig) -> torch.Tensor:
    """uint8 [m, 3, S, S] in 0 … 255 → float32: (image / 255 - mean) / std, per channel."""
    scale, shift = _normalisation(config.mean, config.std, images.device)
    return images.to(torch.float32).mul_(scale).add_(shift)


@functools.lru_cache(8)
def _normalisation(mean: tuple, std: tuple, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Factor and summand, [3, 1, 1] each. Kept, because copying them to the device anew would wait for the device every time."""
    mean, std = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    return tuple(values.to(torch.float32).view(3, 1, 1).to(device) for values in (1 / (255 * std), -mean / std))


def _erase(images: torch.Tensor, keys: torch.Tensor, probability: float) -> torch.Tensor:
    """Random erasing (Zhong et al., arXiv 1708.04896) as timm's 'pixel' mode: one box of standard normal noise. Changes `images`."""
    chosen, top, left, height, width = _boxes(keys, probability, *images.shape[-2:])
    if images.device.type == "cpu":
        # Here indexing does not wait for anything, and noise is drawn only where it is used. The numbers are the same.
        rows = chosen.nonzero()[:, 0]
        images[rows] = _fill_boxes(images[rows], keys[rows], top[rows], left[rows], height[rows], width[rows])
        return images
    zero = torch.zeros_like(height)
    return _fill_boxes(images, keys, top, left, torch.where(chosen, height, zero), width)


def _boxes(keys: torch.Tensor, probability: float, image_height: int, image_width: int) -> tuple[torch.Tensor, ...]:
    """Whether each image is erased (bool [m]) and the box: top, left, height, width in pixels (int64 [m] each).

    Of 10 candidates the first that is smaller than the image in both directions; where there is none, nothing is erased.
    """
    # In float64, so that a box hardly ever hits a rounding boundary, where CPU and GPU could differ.
    number = uniform(fold(keys, Stream.ERASE), 2 * ERASING_ATTEMPTS + 3).double()
    area, aspect = number[:, :ERASING_ATTEMPTS], number[:, ERASING_ATTEMPTS : 2 * ERASING_ATTEMPTS]
    low, high = ERASING_AREA
    area = (low + (high - low) * area) * (image_height * image_width)
    low, high = math.log(ERASING_ASPECT[0]), math.log(ERASING_ASPECT[1])
    aspect = torch.exp(low + (high - low) * aspect)
    heights = torch.sqrt(area * aspect).round().long()
    widths = torch.sqrt(area / aspect).round().long()
    fits = (heights < image_height) & (widths < image_width)

    attempt = torch.arange(ERASING_ATTEMPTS, device=keys.device)
    first = torch.where(fits, attempt, ERASING_ATTEMPTS - 1).amin(1, keepdim=True)
    height, width = heights.gather(1, first)[:, 0], widths.gather(1, first)[:, 0]
    chosen = fits.any(1) & (number[:, -1] < probability)
    top = (number[:, -3] * (image_height - height + 1)).long()
    left = (number[:, -2] * (image_width - width + 1)).long()
    return chosen, top, left, height, width


def _fill_boxes(
    images: torch.Tensor, keys: torch.Tensor, top: torch.Tensor, left: torch.Tensor, height: torch.Tensor, width: torch.Tensor
) -> torch.Tensor:
    """Replace the boxes of float images [m, 3, H, W] by noise, in place. The noise of a pixel depends on its key and its place."""
    _, channels, image_height, image_width = images.shape
    keys = fold(keys, Stream.ERASE_NOISE)[:, None, None]
    row = torch.arange(image_height, device=images.device)[:, None]
    column = torch.arange(image_width, device=images.device)
    top, left, height, width = (values[:, None, None] for values in (top, left, height, width))
    inside = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)  # [m, H, W]
    for channel in range(channels):  # one at a time: the 64-bit hashes are the largest tensors here
        noise = normal(keys, (channel * image_height + row) * image_width + column)
        images[:, channel] = torch.where(inside, noise, images[:, channel])
    return images
