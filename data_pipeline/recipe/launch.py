"""The recipe in a few launches of Triton kernels: three per round of operations and two at the end."""

import torch
import triton
from torch import Tensor

from data_pipeline.augment import fill_colour, normalisation
from data_pipeline.config import AugmentConfig
from data_pipeline.mix import target_values

from .finish import finish_images, finish_targets
from .operations import MOST_CHUNKS, apply_round, count_levels, make_tables
from .program import OF_MIXING, OF_ROUND, Program

COUNT_BLOCK = 1024  # pixels that a program counts at a time
BLOCK = 128  # pixels of a program: with one per thread, the registers of all operations let an SM hold 48 warps or more
CLASSES = 1024  # targets of a program
OPTIONS = dict(num_warps=4, num_stages=1, enable_fp_fusion=False)


def run_program(
    images: Tensor, labels: Tensor, program: Program, num_classes: int, config: AugmentConfig
) -> tuple[Tensor, Tensor]:
    """What `mix(augment(...))` computes, for uint8 images [m, 3, S, S] in any memory layout and int64 labels [m]."""
    values = to_device(program, images.device)
    images = apply_rounds(images, values, program, config)
    return finish(images, labels, values, program, num_classes, config)


def to_device(program: Program, device: torch.device) -> Tensor:
    """The program's values on the device: one copy, which nothing waits for. To a GPU, it is from pinned memory."""
    values = torch.from_numpy(program.values)
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


def apply_rounds(images: Tensor, values: Tensor, program: Program, config: AugmentConfig) -> Tensor:
    """The program's rounds of operations: uint8 [m, 3, S, S] → the same, contiguous; `images` are not modified."""
    if program.rounds == 0:
        return images
    count, _, _, size = images.shape
    chunks = min(triton.cdiv(size**2, COUNT_BLOCK), MOST_CHUNKS)
    counts = torch.empty(count, chunks, 3, 256, dtype=torch.int32, device=images.device)
    tables = torch.empty(count, 3, 256, dtype=torch.uint8, device=images.device)
    # Rounds write to two buffers in turn.
    buffers = [
        torch.empty(images.shape, dtype=torch.uint8, device=images.device) for _ in range(min(program.rounds, 2))
    ]
    fill, columns = fill_colour(config.mean), program.columns
    for number in range(program.rounds):
        column, found, strides = OF_MIXING + OF_ROUND * number, buffers[number % 2], images.stride()
        count_levels[count, chunks, 3](
            images, values, counts, columns, column, size, *strides, BLOCK=COUNT_BLOCK, **OPTIONS
        )
        make_tables[count, 3](counts, values, tables, columns, column, size, chunks, **OPTIONS)
        apply_round[count, triton.cdiv(size**2, BLOCK)](
            images, values, tables, found, columns, column, size, *strides, *fill, BLOCK=BLOCK, **OPTIONS
        )
        images = found
    return images


def finish(
    images: Tensor, labels: Tensor, values: Tensor, program: Program, num_classes: int, config: AugmentConfig
) -> tuple[Tensor, Tensor]:
    """Normalise, erase and mix: float32 [m, 3, S, S], contiguous, and targets, float32 [m, num_classes]."""
    count, _, _, size = images.shape
    found = torch.empty(images.shape, device=images.device)
    targets = torch.empty(count, num_classes, device=images.device)
    scale, shift = normalisation(config.mean, config.std)
    finish_images[count, triton.cdiv(size**2, BLOCK)](
        images,
        values,
        found,
        program.columns,
        OF_MIXING + OF_ROUND * program.rounds,
        size,
        *images.stride(),
        *scale,
        *shift,
        ERASE=config.erasing > 0,
        NOISE=config.erasing_mode == "pixel",
        BLOCK=BLOCK,
        **OPTIONS,
    )
    on, off = target_values(num_classes, config.label_smoothing)
    finish_targets[count, triton.cdiv(num_classes, CLASSES)](
        labels, values, targets, num_classes, on, off, BLOCK=CLASSES, **OPTIONS
    )
    return found, targets
