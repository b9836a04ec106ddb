"""The end of the recipe as Triton kernels: images are normalised, erased and mixed in one pass; targets are mixed.

The program (program.py) has each sample's box to erase, and the micro-batch's mixing in its first values. Results are
those of augment.normalise and augment.erase, and of mix.mix, up to the last bits of the noise. Launch with
enable_fp_fusion=False: the plain path rounds each product, except where `tl.fma` stands here.
"""

import math

import triton
import triton.language as tl

from data_pipeline import randomness

from .operations import store
from .program import CUTMIX as _CUTMIX
from .program import MIXUP as _MIXUP

MIXUP, CUTMIX = tl.constexpr(_MIXUP), tl.constexpr(_CUTMIX)
GOLDEN, FIRST, SECOND = (
    tl.constexpr(value % 2**64) for value in (randomness.GOLDEN, randomness._MULTIPLIER_1, randomness._MULTIPLIER_2)
)
RADIUS, ANGLE = tl.constexpr(2.0**-16), tl.constexpr(2 * math.pi * 2.0**-16)


@triton.jit
def _bits(key, counter):
    """`randomness.bits`: SplitMix64's output number `counter` for the state `key`, uint64."""
    z = key.to(tl.uint64) + (counter + 1).to(tl.uint64) * GOLDEN
    z = (z ^ (z >> 30)) * FIRST
    z = (z ^ (z >> 27)) * SECOND
    return z ^ (z >> 31)


@triton.jit
def _quarter(hashed, NUMBER: tl.constexpr):
    return ((hashed >> (16 * NUMBER)) & 0xFFFF).to(tl.int32).to(tl.float32)


@triton.jit
def _noise(key, counter):
    """The first three of `randomness.normals`, for red, green and blue."""
    hashed = _bits(key, counter)
    radius = tl.sqrt_rn(tl.log((_quarter(hashed, 0) + 1) * RADIUS) * -2)
    other = tl.sqrt_rn(tl.log((_quarter(hashed, 1) + 1) * RADIUS) * -2)
    angle = _quarter(hashed, 2) * ANGLE
    return radius * tl.cos(angle), other * tl.cos(_quarter(hashed, 3) * ANGLE), radius * tl.sin(angle)


@triton.jit
def _lerp(start, end, weight):
    """torch.lerp."""
    near = weight < 0.5
    return tl.fma(tl.where(near, weight, weight - 1), end - start, tl.where(near, start, end))


@triton.jit
def _finished(
    at, row_ptr, place, y, x, inside, size, stride_channel, scales, shifts, ERASE: tl.constexpr, NOISE: tl.constexpr
):
    """A sample's pixels, normalised and erased: red, green, blue, float32.

    row_ptr: the erasing columns of the sample in the program.
    """
    red = tl.load(at, mask=inside, other=0).to(tl.float32) * scales[0] + shifts[0]
    green = tl.load(at + stride_channel, mask=inside, other=0).to(tl.float32) * scales[1] + shifts[1]
    blue = tl.load(at + 2 * stride_channel, mask=inside, other=0).to(tl.float32) * scales[2] + shifts[2]
    if ERASE:
        top, left = tl.load(row_ptr + 1).to(tl.int32), tl.load(row_ptr + 2).to(tl.int32)
        bottom, right = tl.load(row_ptr + 3).to(tl.int32), tl.load(row_ptr + 4).to(tl.int32)
        erased = (y >= top) & (y < bottom) & (x >= left) & (x < right)
        if tl.max(erased.to(tl.int32)) > 0:
            if NOISE:
                noise_red, noise_green, noise_blue = _noise(tl.load(row_ptr), place)
                red = tl.where(erased, noise_red, red)
                green = tl.where(erased, noise_green, green)
                blue = tl.where(erased, noise_blue, blue)
            else:
                red, green, blue = tl.where(erased, 0.0, red), tl.where(erased, 0.0, green), tl.where(erased, 0.0, blue)
    return red, green, blue


@triton.jit(do_not_specialize=["columns", "column"])
def finish_images(
    images_ptr,  # uint8 [m, 3, size, size]
    program_ptr,
    found_ptr,  # float32 [m, 3, size, size], contiguous
    columns,
    column,
    size,
    stride_image,
    stride_channel,
    stride_y,
    stride_x,
    scale_red,
    scale_green,
    scale_blue,
    shift_red,
    shift_green,
    shift_blue,
    ERASE: tl.constexpr,
    NOISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (m, blocks of BLOCK pixels). `column` is where the first sample's erasing columns begin."""
    sample = tl.program_id(0)
    other = tl.num_programs(0) - 1 - sample
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pixels = size * size
    inside = place < pixels
    y, x = place // size, place % size
    offset = y * stride_y + x * stride_x
    scales, shifts = (scale_red, scale_green, scale_blue), (shift_red, shift_green, shift_blue)
    kind, share = (
        tl.load(program_ptr).to(tl.int32),
        tl.load(program_ptr + 1).to(tl.float64, bitcast=True).to(tl.float32),
    )

    at = images_ptr + sample.to(tl.int64) * stride_image + offset
    row_ptr = program_ptr + sample * columns + column
    red, green, blue = _finished(at, row_ptr, place, y, x, inside, size, stride_channel, scales, shifts, ERASE, NOISE)
    if (kind == MIXUP) | (kind == CUTMIX):
        at = images_ptr + other.to(tl.int64) * stride_image + offset
        row_ptr = program_ptr + other * columns + column
        other_red, other_green, other_blue = _finished(
            at, row_ptr, place, y, x, inside, size, stride_channel, scales, shifts, ERASE, NOISE
        )
        if kind == MIXUP:
            red, green, blue = (
                _lerp(other_red, red, share),
                _lerp(other_green, green, share),
                _lerp(other_blue, blue, share),
            )
        else:
            top, bottom = tl.load(program_ptr + 2).to(tl.int32), tl.load(program_ptr + 3).to(tl.int32)
            left, right = tl.load(program_ptr + 4).to(tl.int32), tl.load(program_ptr + 5).to(tl.int32)
            replaced = (y >= top) & (y < bottom) & (x >= left) & (x < right)
            red = tl.where(replaced, other_red, red)
            green = tl.where(replaced, other_green, green)
            blue = tl.where(replaced, other_blue, blue)
    found_ptr += sample.to(tl.int64) * 3 * pixels + place
    store(found_ptr, pixels, inside, red, green, blue)


@triton.jit
def finish_targets(
    labels_ptr,  # int64 [m]
    program_ptr,
    found_ptr,  # float32 [m, classes]
    classes,
    on,
    off,
    BLOCK: tl.constexpr,
):
    """Grid (m, blocks of BLOCK classes). on: a target at the label; off: at the other classes."""
    sample = tl.program_id(0)
    other = tl.num_programs(0) - 1 - sample
    number = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    kind, share = (
        tl.load(program_ptr).to(tl.int32),
        tl.load(program_ptr + 1).to(tl.float64, bitcast=True).to(tl.float32),
    )
    target = tl.where(number == tl.load(labels_ptr + sample), on, off)
    if (kind == MIXUP) | (kind == CUTMIX):
        target = _lerp(tl.where(number == tl.load(labels_ptr + other), on, off), target, share)
    tl.store(found_ptr + sample.to(tl.int64) * classes + number, target, mask=number < classes)
