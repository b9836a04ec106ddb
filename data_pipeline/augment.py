"""The augmentation recipe on the device: batched, random per sample, without host synchronisation.

All random choices are functions of a sample's key (augment_choices.py), so the augmentation of an image does not
depend on its neighbours, its place in the batch, or the device. `sample_keys` makes the keys of a micro-batch.

Only images are transformed, so a task with targets that depend on positions must leave out geometric operations.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from . import augment_geometry as geometry
from . import augment_operations as operations
from .augment_choices import (
    NOTHING,
    OPERATIONS,
    Boxes,
    ChosenOperations,
    choose_color_jitter,
    choose_rand_augment,
    erasing_boxes,
    parse_rand_augment,
)
from .config import AugmentConfig
from .randomness import Stream, fold, make_key, normals

# The functions of augment_choices.OPERATIONS; the geometric ones also take the fill colour of uncovered pixels.
ON_VALUES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "AutoContrast": operations.auto_contrast,
    "Equalize": operations.equalize,
    "Invert": operations.invert,
    "Posterize": operations.posterize,
    "Solarize": operations.solarize,
    "SolarizeAdd": operations.solarize_add,
    "Color": operations.color,
    "Contrast": operations.contrast,
    "Brightness": operations.brightness,
    "Sharpness": operations.sharpness,
}
GEOMETRIC: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "Rotate": geometry.rotate,
    "ShearX": geometry.shear_x,
    "ShearY": geometry.shear_y,
    "TranslateX": geometry.translate_x,
    "TranslateY": geometry.translate_y,
}


def sample_keys(seed: int, epoch: int, draws: np.ndarray) -> np.ndarray:
    """The augmentation keys, int64 [m], of `draws` (MicroBatch.draws, int64 [m]) in an epoch. Computed on the host."""
    return fold(make_key(seed, Stream.AUGMENT, epoch), draws)


def augment(images: Tensor, keys: np.ndarray, config: AugmentConfig) -> Tensor:
    """Augment and normalise a micro-batch: RandAugment, colour jitter, normalisation, erasing, in this order.

    images: uint8 [m, 3, S, S] on any device; not modified. keys: int64 [m] on the host. Returns float32 [m, 3, S, S] on
    the same device, contiguous. Parts of the recipe that are turned off cost nothing.
    """
    rounds = choose_operations(keys, config)
    images = normalise(apply(images, rounds, config.mean) if rounds else images, config)
    if config.erasing > 0:
        erase(images, keys, erasing_boxes(keys, config.erasing, *images.shape[-2:]), config.erasing_mode)
    return images


def choose_operations(keys: np.ndarray, config: AugmentConfig) -> list[ChosenOperations]:
    """The operations of RandAugment and then of colour jitter, a round each, for the samples with these keys [m]."""
    rounds = []
    if config.rand_augment is not None:
        rounds += choose_rand_augment(keys, parse_rand_augment(config.rand_augment))
    if config.color_jitter > 0:
        rounds += choose_color_jitter(keys, config.color_jitter)
    return rounds


def normalise(images: Tensor, config: AugmentConfig) -> Tensor:
    """uint8 [m, 3, S, S] in 0 … 255 → float32, contiguous: (image / 255 - mean) / std, per channel."""
    scale, shift = _normalisation(config.mean, config.std, images.device)
    images = images.contiguous()
    found = torch.empty(images.shape, device=images.device)
    # On a CPU one image at a time, because a single image fits in the cache.
    for source, target in zip(
        *(part.split(1) if part.device.type == "cpu" else [part] for part in (images, found)), strict=True
    ):
        target.copy_(source).mul_(scale).add_(shift)
    return found


def clear_outside(images: Tensor, inside: Tensor) -> Tensor:
    """Set images [m, 3, H, W] to zero, which is the mean colour, outside of `inside` (int32 [m, 4]: left, top, right,
    bottom), in place.
    """
    left, top, right, bottom = inside.T[:, :, None]
    rows, columns = (torch.arange(side, device=images.device) for side in images.shape[2:])
    shown = ((rows >= top) & (rows < bottom))[:, :, None] & ((columns >= left) & (columns < right))[:, None, :]
    return images.masked_fill_(~shown[:, None], 0.0)


@functools.lru_cache(8)
def _normalisation(mean: tuple, std: tuple, device: torch.device) -> tuple[Tensor, Tensor]:
    """`normalisation` as tensors [3, 1, 1]. Cached, because every copy to the device would wait for it."""
    return tuple(torch.tensor(values).view(3, 1, 1).to(device) for values in normalisation(mean, std))


def normalisation(mean: Sequence[float], std: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """For values in 0 … 255: a factor and a summand per channel."""
    return tuple(1 / (255 * s) for s in std), tuple(-m / s for m, s in zip(mean, std, strict=True))


def apply(images: Tensor, rounds: Sequence[ChosenOperations], mean: tuple[float, float, float]) -> Tensor:
    """Apply `rounds` of operations to uint8 [m, 3, S, S] and return a modified copy.

    mean: in 0 … 1, the colour of pixels that a geometric operation uncovers. In each round, every operation runs once
    on all images that use it.
    """
    images, fill = images.clone(memory_format=torch.contiguous_format), _fill(mean, images.device)
    for chosen_operations in rounds:
        order = np.argsort(chosen_operations.operations, kind="stable")
        arguments = to_device(chosen_operations.arguments[order], images.device)
        present, starts = np.unique(chosen_operations.operations[order], return_index=True)
        for operation, start, stop in zip(present, starts, [*starts[1:], len(order)], strict=True):
            if operation != NOTHING:
                chosen = [images[row] for row in order[start:stop]]
                found = operate(OPERATIONS[operation], torch.stack(chosen), arguments[start:stop], fill)
                torch._foreach_copy_(chosen, list(found))
    return images


def operate(name: str, images: Tensor, argument: Tensor, fill: Tensor) -> Tensor:
    """Apply one operation to uint8 [g, 3, S, S]. argument: float64 [g]. fill: a colour, float32 [3] in 0 … 255."""
    return GEOMETRIC[name](images, argument, fill) if name in GEOMETRIC else ON_VALUES[name](images, argument)


@functools.lru_cache(8)
def _fill(mean: tuple, device: torch.device) -> Tensor:
    return torch.tensor(fill_colour(mean)).to(device)


def fill_colour(mean: Sequence[float]) -> tuple[float, ...]:
    """`mean` as whole numbers in 0 … 255, as timm passes it to Pillow."""
    return tuple(min(255.0, float(round(255 * value))) for value in mean)


def erase(images: Tensor, keys: np.ndarray, boxes: Boxes, mode: str) -> None:
    """Fill boxes of normalised images [m, 3, H, W] in place, as timm's RandomErasing does.

    mode: "pixel" fills with normal noise per value, a function of the sample's key and the pixel's place; "const" with
    0.
    """
    if len(boxes.rows) == 0:
        return
    keys = fold(keys[boxes.rows], Stream.ERASE_NOISE)
    (_erase_one_by_one if images.device.type == "cpu" else _erase_together)(images, keys, boxes, mode)


def _erase_one_by_one(images: Tensor, keys: np.ndarray, boxes: Boxes, mode: str) -> None:
    """Erase on a CPU, where it pays to compute noise inside the boxes only."""
    fields = (keys, boxes.rows, boxes.tops, boxes.lefts, boxes.heights, boxes.widths)
    for key, row, top, left, height, width in zip(*(field.tolist() for field in fields), strict=True):
        y, x = torch.arange(top, top + height)[:, None], torch.arange(left, left + width)
        noise = _noise(torch.tensor(key), y, x, images) if mode == "pixel" else torch.zeros(())
        images[row, :, top : top + height, left : left + width] = noise


def _erase_together(images: Tensor, keys: np.ndarray, boxes: Boxes, mode: str) -> None:
    """Erase on a GPU: all boxes in a few kernel launches, each box in a window of the size of the largest."""
    height, width = boxes.heights.max(), boxes.widths.max()
    y = np.minimum(boxes.tops, images.shape[2] - height)[:, None] + np.arange(height)
    x = np.minimum(boxes.lefts, images.shape[3] - width)[:, None] + np.arange(width)
    y_inside = (y >= boxes.tops[:, None]) & (y < (boxes.tops + boxes.heights)[:, None])
    x_inside = (x >= boxes.lefts[:, None]) & (x < (boxes.lefts + boxes.widths)[:, None])
    keys, rows, y, x, y_inside, x_inside = (
        to_device(array, images.device) for array in (keys, boxes.rows, y, x, y_inside, x_inside)
    )
    keys, rows, y, x = keys[:, None, None], rows[:, None, None], y[:, :, None], x[:, None, :]
    inside = y_inside[:, :, None] & x_inside[:, None, :]  # [k, height, width]
    noise = _noise(keys, y, x, images).permute(1, 2, 3, 0) if mode == "pixel" else images.new_zeros(())
    images[rows, :, y, x] = torch.where(inside[..., None], noise, images[rows, :, y, x])


def _noise(keys: Tensor, y: Tensor, x: Tensor, images: Tensor) -> Tensor:
    """Normal numbers for the three channels at pixel (y, x), [3, …] after broadcasting."""
    return normals(keys, y * images.shape[3] + x)[:3]


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy a host array to the device without waiting: to a GPU the copy is made from pinned memory."""
    values = torch.from_numpy(array)
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)
