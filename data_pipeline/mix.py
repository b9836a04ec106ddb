"""Mixup, CutMix and label smoothing on a micro-batch of classification, as timm's batch mode.

One draw serves the whole micro-batch, and image i is mixed with image m-1-i. Mixup: Zhang et al., arXiv 1710.09412.
CutMix: Yun et al., arXiv 1905.04899. The random numbers are drawn on the host from the key alone, so nothing waits for
the device. They come from numpy's Philox; numpy may change its Beta distribution between versions.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from .config import AugmentConfig


@dataclass(frozen=True)
class Mixing:
    """How a micro-batch is mixed. share: the weight of the image itself, lambda, for targets and for mixup's images.

    box: with CutMix, the pixels that the other image replaces (top, bottom, left, right); None with mixup.
    """

    share: float
    box: tuple[int, int, int, int] | None


def draw_mixing(key: int, height: int, width: int, config: AugmentConfig) -> Mixing | None:
    """The draw of the micro-batch with this key, for images of height x width pixels; None: it is not mixed."""
    if not (config.mixup > 0 or config.cutmix > 0):
        return None
    generator = np.random.Generator(np.random.Philox(key=key & 0xFFFFFFFFFFFFFFFF))
    # All four are always drawn, in this order, so that one setting does not shift the draws of another.
    apply, switch, row, column = generator.random(4)
    if apply >= config.mix_probability:
        return None
    use_cutmix = config.cutmix > 0 and (config.mixup == 0 or switch < config.switch_probability)
    alpha = config.cutmix if use_cutmix else config.mixup
    share = float(generator.beta(alpha, alpha))
    if not use_cutmix:
        return Mixing(share, None)
    *box, share = cutmix_box(height, width, share, row, column)
    return Mixing(share, tuple(box))


def mix(
    images: torch.Tensor, labels: torch.Tensor, key: int, num_classes: int, config: AugmentConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix float images [m, 3, S, S] with int64 labels [m].

    key: derived from (seed, step, micro-batch index). Returns mixed images and float32 targets [m, num_classes], whose
    rows sum to 1. `images` are not modified.
    """
    targets = smoothed(labels, num_classes, config.label_smoothing)
    mixing = draw_mixing(key, *images.shape[-2:], config)
    if mixing is None:
        return images, targets
    if mixing.box is None:
        images = torch.lerp(images.flip(0), images, mixing.share)
    else:
        top, bottom, left, right = mixing.box
        other = images[..., top:bottom, left:right].flip(0)
        images = images.clone()
        images[..., top:bottom, left:right] = other
    return images, torch.lerp(targets.flip(0), targets, mixing.share)


def smoothed(labels: torch.Tensor, num_classes: int, smoothing: float) -> torch.Tensor:
    """int64 [m] → float32 [m, num_classes]: smoothing / num_classes everywhere, plus 1 - smoothing at the label."""
    on, off = target_values(num_classes, smoothing)
    return torch.full((len(labels), num_classes), off, device=labels.device).scatter_(1, labels[:, None], on)


def target_values(num_classes: int, smoothing: float) -> tuple[float, float]:
    """A smoothed target at the label, and at each other class."""
    off = smoothing / num_classes
    return 1 - smoothing + off, off


def cutmix_box(height: int, width: int, share: float, row: float, column: float) -> tuple[int, int, int, int, float]:
    """The box to replace (top, bottom, left, right in pixels), and the share of the image that remains after clipping.

    The box has the area 1 - share around a centre at (row, column), in [0, 1) each, and is clipped to the image.
    """
    ratio = math.sqrt(1 - share)
    box_height, box_width = int(height * ratio), int(width * ratio)
    centre_y, centre_x = int(row * height), int(column * width)
    top, bottom = max(centre_y - box_height // 2, 0), min(centre_y + (box_height + 1) // 2, height)
    left, right = max(centre_x - box_width // 2, 0), min(centre_x + (box_width + 1) // 2, width)
    return top, bottom, left, right, 1 - (bottom - top) * (right - left) / (height * width)
