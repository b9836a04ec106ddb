"""Mixup, CutMix and label smoothing on a micro-batch, as timm's batch mode: one draw per micro-batch, each image with its mirror.

Mixup: Zhang et al., arXiv 1710.09412. CutMix: Yun et al., arXiv 1905.04899. The draws are made on the host, from the key alone:
nothing waits for the device. They come from numpy's Philox, whose Beta numbers numpy may change between its versions.
"""

import math

import numpy as np
import torch

from .config import AugmentConfig


def mix(images: torch.Tensor, labels: torch.Tensor, key: int, num_classes: int, config: AugmentConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Float images [m, 3, S, S], int64 labels [m] → mixed images and float32 targets [m, num_classes], whose rows sum to 1.

    Image i is mixed with image m-1-i. `key` is of (seed, step, micro-batch index). The images given are left as they are.
    """
    targets = smoothed(labels, num_classes, config.label_smoothing)
    if not (config.mixup > 0 or config.cutmix > 0):
        return images, targets
    generator = np.random.Generator(np.random.Philox(key=key & 0xFFFFFFFFFFFFFFFF))
    # Always drawn, and in this order, so that one setting does not shift the draws of another.
    apply, switch, row, column = generator.random(4)
    if apply >= config.mix_probability:
        return images, targets
    use_cutmix = config.cutmix > 0 and (config.mixup == 0 or switch < config.switch_probability)
    alpha = config.cutmix if use_cutmix else config.mixup
    share = float(generator.beta(alpha, alpha))  # lambda: how much of the image itself remains
    if use_cutmix:
        top, bottom, left, right, share = cutmix_box(images.shape[-2], images.shape[-1], share, row, column)
        other = images[..., top:bottom, left:right].flip(0)
        images = images.clone()
        images[..., top:bottom, left:right] = other
    else:
        images = torch.lerp(images.flip(0), images, share)
    return images, torch.lerp(targets.flip(0), targets, share)


def smoothed(labels: torch.Tensor, num_classes: int, smoothing: float) -> torch.Tensor:
    """int64 [m] → float32 [m, num_classes]: smoothing / num_classes everywhere, and 1 - smoothing more at the label."""
    off = smoothing / num_classes
    targets = torch.full((len(labels), num_classes), off, device=labels.device)
    return targets.scatter_(1, labels[:, None], 1 - smoothing + off)


def cutmix_box(height: int, width: int, share: float, row: float, column: float) -> tuple[int, int, int, int, float]:
    """The box that is replaced (top, bottom, left, right in pixels), and the share of the image that really remains.

    A box of area 1 - share around a centre at (row, column) in [0, 1), clipped to the image.
    """
    ratio = math.sqrt(1 - share)
    box_height, box_width = int(height * ratio), int(width * ratio)
    centre_y, centre_x = int(row * height), int(column * width)
    top, bottom = max(centre_y - box_height // 2, 0), min(centre_y + (box_height + 1) // 2, height)
    left, right = max(centre_x - box_width // 2, 0), min(centre_x + (box_width + 1) // 2, width)
    return top, bottom, left, right, 1 - (bottom - top) * (right - left) / (height * width)
