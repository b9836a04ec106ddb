"""Counter-based random numbers: pure functions of a key and a counter, with no generator state.

The hash is SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014), whose n-th
output for the state `key` is `mix64(key + n * GOLDEN)`. It is computed in wrap-around int64 arithmetic, so the same
code works for numpy arrays and torch tensors, and gives the same bits on CPU and GPU.

    key = make_key(seed, Stream.CROP, epoch)      # one number per purpose and position
    keys = fold(key, ids)                         # one per sample
    uniform(keys, 4)                              # four numbers per sample
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:  # the order of samples is computed and checked before torch is imported
    import torch

# Both of dtype int64.
Integers = TypeVar("Integers", np.ndarray, "torch.Tensor")


class Stream(IntEnum):
    """The purposes of random numbers. The results of a seed depend on the values: never renumber them."""

    ORDER = 1
    CROP = 2
    AUGMENT = 3
    FLIP = 4
    ERASE = 5
    ERASE_NOISE = 6
    MIX = 7
    MODEL = 8
    INIT = 9
    REPLACEMENT = 10
    RAND_AUGMENT = 11
    COLOR_JITTER = 12
    DISTORTION = 13


def make_key(seed: int, stream: Stream, *position: int) -> int:
    """The key of (seed, purpose, position…), a Python int in signed 64-bit range.

    Any ints are accepted, modulo 2^64.
    """
    key = 0
    for part in (seed, stream, *position):
        key = _scalar(fold(key, np.array([_signed(part)], np.int64)))
    return key


def fold(key: int | Integers, values: int | Integers) -> Integers:
    """Derive keys from `key` by `values`, with broadcasting; at least one of the two must be an int64 array or tensor.

    Both maps, key → result and value → result, are bijections, so different values never give the same key.
    """
    if isinstance(values, int):
        hashed = _scalar(mix64(np.array([_signed(values + GOLDEN)], np.int64)))
    else:
        hashed = mix64(values + GOLDEN)
    return mix64(hashed + (_signed(key) if isinstance(key, int) else key))


def bits(keys: Integers, counter: int | Integers) -> Integers:
    """64 random bits per key, as int64: SplitMix64's output number `counter` (from 0) for the state `keys`.

    Broadcasts.
    """
    if isinstance(counter, int):
        return mix64(keys + _signed((counter + 1) * GOLDEN))
    return mix64(keys + (counter + 1) * GOLDEN)


def uniform(keys: Integers, count: int) -> Integers:
    """Uniform numbers in [0, 1), [n, count], for [n] keys.

    numpy: float64 from the hash's top 53 bits. torch: float32 from its top 24 bits. Both conversions are exact, so
    torch's numbers are numpy's truncated to 24 bits, and 1 is never reached.
    """
    if isinstance(keys, np.ndarray):
        return _shift(bits(keys[:, None], np.arange(count)), 11).astype(np.float64) * 2.0**-53
    import torch

    counter = torch.arange(count, device=keys.device)
    return _shift(bits(keys[:, None], counter), 40).to(torch.float32) * 2.0**-24


def integers(keys: Integers, bound: int | Integers, counter: int = 0) -> Integers:
    """One integer in [0, bound) per key, for 1 ≤ bound ≤ 2^31 (an int or one per key).

    The top 32 bits times `bound`, divided by 2^32 (Lemire 2019, without rejection); the bias is below bound / 2^32.
    """
    return (_shift(bits(keys, counter), 32) * bound) >> 32


def normals(keys: torch.Tensor, counter: int | torch.Tensor = 0) -> torch.Tensor:
    """Four standard normal float32 numbers per (key, counter) after broadcasting, [4, …].

    Box–Muller (1958) on the quarters of one hash. The radius has 16 bits, which bounds the numbers by 4.71; that
    suffices for noise. The hash is the same on all devices; log, cos and sin may differ in the last bit between CPU and
    GPU.
    """
    import torch

    hashed = bits(keys, counter)
    quarters = torch.stack([hashed, hashed >> 16, hashed >> 32, hashed >> 48]).bitwise_and_(0xFFFF).to(torch.float32)
    radius = quarters[:2].add_(1).mul_(2.0**-16).log_().mul_(-2).sqrt_()  # + 1: the logarithm of 0 is infinite
    angle = quarters[2:].mul_(2 * math.pi * 2.0**-16)
    return torch.cat([radius * angle.cos(), radius * angle.sin_()])


def mix64(z: Integers) -> Integers:
    """SplitMix64's finaliser (Stafford's variant 13), a bijection of int64."""
    z = (z ^ _shift(z, 30)) * _MULTIPLIER_1
    z = (z ^ _shift(z, 27)) * _MULTIPLIER_2
    return z ^ _shift(z, 31)


def _shift(z: Integers, count: int) -> Integers:
    """Logical right shift. int64's own shift is arithmetic, so the copies of the sign bit are masked out."""
    return (z >> count) & ((1 << (64 - count)) - 1)


def _signed(value: int) -> int:
    """Any int modulo 2^64, in signed 64-bit range."""
    value = int(value) & 0xFFFFFFFFFFFFFFFF
    return value - (1 << 64) if value >> 63 else value


def _scalar(array: np.ndarray) -> int:
    # Arrays of one element instead of numpy scalars, because scalars warn on overflow.
    return int(array[0])


GOLDEN = _signed(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = _signed(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = _signed(0x94D049BB133111EB)
