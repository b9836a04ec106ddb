"""Dropout whose mask is a function of a seed and a place, so that a Triton kernel can draw it again and plain PyTorch can draw the same.

A matrix's element (row, column) is kept where a hash of (seed, row, column), taken as a number in [0, 1), is at least the rate.
The hash is the 32-bit finaliser "lowbias32" (Wellons, 2018, "Prospecting for hash functions"): two multiplications and three shifts.
The seed enters twice: its hash before the row's is taken, itself after that. With the first alone, two seeds whose
hashes differ by the bits of a row's number give the same rows in another order, and a long run draws many such pairs.
"""

import torch
from torch import Tensor

# The constants of lowbias32 and, for columns, 2^32 / golden ratio; as the signed integers that have these bits.
MULTIPLIERS = (0x7FEB352D, 0x846CA68B - 2**32)
GOLDEN = 0x9E3779B9 - 2**32


def draw_seed(device: torch.device) -> Tensor:
    """An int32 seed from torch's default generator of the device: a scalar there, so nobody waits for it."""
    return torch.randint(2**31 - 1, (), dtype=torch.int32, device=device)


def threshold(rate: float) -> int:
    """The smallest hash, as a signed 32-bit integer, that keeps its element."""
    return round(rate * 2**32) - 2**31


def keep_mask(seed: Tensor, shape: tuple[int, ...], rate: float) -> Tensor:
    """bool, True where an element stays. shape [..., rows, columns]: the leading dimensions number the rows on, in order."""
    *rows, columns = shape
    total = torch.Size(rows).numel()
    row_key = _hash(torch.arange(total, dtype=torch.int32, device=seed.device) ^ _hash(seed)) ^ seed
    column_key = torch.arange(columns, dtype=torch.int32, device=seed.device) * GOLDEN
    return (_hash(row_key[:, None] ^ column_key) >= threshold(rate)).view(shape)


def dropout(x: Tensor, rate: float, seed: Tensor) -> Tensor:
    """x [..., rows, columns] with elements dropped at `rate`, the others scaled by 1 / (1 - rate)."""
    return x * keep_mask(seed, tuple(x.shape), rate) * (1 / (1 - rate))


def _hash(x: Tensor) -> Tensor:
    """int32 → int32; products wrap around."""
    x = (x ^ _shifted(x, 16)).mul_(MULTIPLIERS[0])
    x = x.bitwise_xor_(_shifted(x, 15)).mul_(MULTIPLIERS[1])
    return x.bitwise_xor_(_shifted(x, 16))


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits with zeros coming in, as for unsigned integers."""
    return (x >> bits).bitwise_and_((1 << (32 - bits)) - 1)
