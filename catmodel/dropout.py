"""Dropout whose mask is a function of a seed and a position.

A Triton kernel can therefore draw the mask again in the backward pass, and PyTorch can draw the same mask.

Element (row, column) of a matrix is kept if a hash of (seed, row, column), read as a number in [0, 1), is at least the
rate. The hash is the 32-bit finaliser "lowbias32" (Wellons, 2018, "Prospecting for hash functions"): two
multiplications and three shifts. The seed enters twice: its hash before the row is hashed, and the seed itself
afterwards. With the hash alone, two seeds whose hashes differ in the bits of a row number would give the same rows in
another order, and a long run draws many such pairs.
"""

import torch
from torch import Tensor

# The constants of lowbias32, and 2^32 / golden ratio for columns; as the signed integers with these bits.
MULTIPLIERS = (0x7FEB352D, 0x846CA68B - 2**32)
GOLDEN = 0x9E3779B9 - 2**32


def draw_seed(device: torch.device) -> Tensor:
    """An int32 scalar from torch's default generator of the device, where it stays: the host does not wait."""
    return torch.randint(2**31 - 1, (), dtype=torch.int32, device=device)


def threshold(rate: float) -> int:
    """The smallest hash, as a signed 32-bit integer, for which an element is kept."""
    return round(rate * 2**32) - 2**31


def keep_mask(seed: Tensor, shape: tuple[int, ...], rate: float) -> Tensor:
    """bool [..., rows, columns], True for elements that are kept. Rows are numbered through the leading dimensions."""
    *rows, columns = shape
    total = torch.Size(rows).numel()
    row_key = _hash(torch.arange(total, dtype=torch.int32, device=seed.device) ^ _hash(seed)) ^ seed
    column_key = torch.arange(columns, dtype=torch.int32, device=seed.device) * GOLDEN
    return (_hash(row_key[:, None] ^ column_key) >= threshold(rate)).view(shape)


def dropout(x: Tensor, rate: float, seed: Tensor) -> Tensor:
    """Drop elements of x [..., rows, columns] at `rate` and scale the others by 1 / (1 - rate)."""
    return x * keep_mask(seed, tuple(x.shape), rate) * (1 / (1 - rate))


def _hash(x: Tensor) -> Tensor:
    """int32 -> int32, with products that wrap around."""
    x = (x ^ _shifted(x, 16)).mul_(MULTIPLIERS[0])
    x = x.bitwise_xor_(_shifted(x, 15)).mul_(MULTIPLIERS[1])
    return x.bitwise_xor_(_shifted(x, 16))


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits, shifting in zeros, as for unsigned integers."""
    return (x >> bits).bitwise_and_((1 << (32 - bits)) - 1)
