"""Photometric distortion, as usual in semantic segmentation and detection: brightness, contrast, saturation, hue.

After SSD (Liu et al., arXiv 1512.02325) and OpenMMLab's PhotoMetricDistortion. Each operation has a chance of one half;
the contrast changes before or after saturation and hue, with equal chances. Here values stay floating-point between the
operations and are clipped to 0 … 255 after each; there they are also rounded.

All random choices are functions of a sample's key, so an image's distortion depends neither on its neighbours nor on
the device. Pixels do not move: labels stay as they are.
"""

import numpy as np
import torch
from torch import Tensor

from .augment import to_device
from .randomness import Stream, fold, uniform

BRIGHTNESS = 32.0  # largest summand, of values in 0 … 255
CONTRAST = SATURATION = 0.5  # a factor is 1 ± at most this
HUE = 36.0  # degrees: largest turn of the hue

# The columns of `choose_distortions`, in the order in which they are applied.
SHIFT, CONTRAST_BEFORE, SATURATE, TURN, CONTRAST_AFTER = range(5)
NEUTRAL = (0.0, 1.0, 1.0, 0.0, 1.0)


def choose_distortions(keys: np.ndarray) -> np.ndarray:
    """The distortions of samples with these keys (int64 [m]), float32 [m, 5].

    Columns: a summand, a factor of the contrast, a factor of the saturation, degrees of hue, a factor of the contrast.
    """
    number = uniform(fold(keys, Stream.DISTORTION), 9)
    size = 2 * number[:, :4] - 1  # of brightness, contrast, saturation, hue: -1 … 1
    used, early = number[:, 4:8] < 0.5, number[:, 8] < 0.5
    contrast = 1 + CONTRAST * size[:, 1]
    columns = np.stack(
        [BRIGHTNESS * size[:, 0], contrast, 1 + SATURATION * size[:, 2], HUE * size[:, 3], contrast], axis=1
    )
    on = np.stack([used[:, 0], used[:, 1] & early, used[:, 2], used[:, 3], used[:, 1] & ~early], axis=1)
    return np.where(on, columns, NEUTRAL).astype(np.float32)


def distort(images: Tensor, keys: np.ndarray) -> Tensor:
    """Distort images, uint8 [m, 3, H, W] RGB on any device, by keys int64 [m] on the host.

    Returns float32 [m, 3, H, W] in 0 … 255, contiguous. The input is not modified.
    """
    chosen = to_device(choose_distortions(keys), images.device)
    # On a CPU one image at a time, because a single image fits in the cache.
    count = 1 if images.device.type == "cpu" else max(1, len(images))
    found = torch.empty(images.shape, device=images.device)
    for source, target, rows in zip(images.split(count), found.split(count), chosen.split(count), strict=True):
        target.copy_(_distort(source.float(), rows))
    return found


def _distort(image: Tensor, chosen: Tensor) -> Tensor:
    columns = chosen.T[:, :, None, None, None]
    image = (image + columns[SHIFT]).clamp_(0, 255)
    image = image.mul_(columns[CONTRAST_BEFORE]).clamp_(0, 255)
    image = _turn(_saturate(image, columns[SATURATE]), columns[TURN])
    return image.mul_(columns[CONTRAST_AFTER]).clamp_(0, 255)


def _saturate(image: Tensor, factor: Tensor) -> Tensor:
    """Multiply HSV's saturation by `factor`, up to 1; value and hue stay.

    The value V is the largest channel, the saturation 1 - smallest / V: the distances from V are multiplied.
    """
    high, low = image.amax(1, keepdim=True), image.amin(1, keepdim=True)
    most = torch.where(high > low, high / (high - low), torch.inf)  # the factor that makes the saturation 1
    return high - (high - image) * torch.minimum(factor, most)


def _turn(image: Tensor, degrees: Tensor) -> Tensor:
    """Add `degrees` to HSV's hue; value and saturation stay."""
    high, low = image.amax(1, keepdim=True), image.amin(1, keepdim=True)
    chroma = high - low
    red, green, blue = image.split(1, dim=1)
    scale = torch.where(chroma > 0, chroma, 1.0)
    # In units of 60 degrees: 0 red, 2 green, 4 blue. Gray pixels have no hue, and no chroma to colour them.
    hue = torch.where(
        high == red,
        (green - blue) / scale,
        torch.where(high == green, (blue - red) / scale + 2, (red - green) / scale + 4),
    )
    hue = hue + degrees / 60
    # A channel falls from V as its distance on the circle of hues grows beyond one unit, to V - chroma at two.
    centres = torch.tensor([0.0, 2.0, 4.0], device=image.device).view(1, 3, 1, 1)
    distance = (hue - centres + 3).remainder(6).sub_(3).abs_()
    turned = high - chroma * (distance - 1).clamp_(0, 1)
    return torch.where(degrees == 0, image, turned)
