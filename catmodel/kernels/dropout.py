"""The mask of `catmodel.dropout`, inside a Triton kernel."""

import triton
import triton.language as tl

from catmodel.dropout import GOLDEN, MULTIPLIERS

_FIRST, _SECOND, _GOLDEN = (tl.constexpr(bits % 2**32) for bits in (*MULTIPLIERS, GOLDEN))


@triton.jit
def keep_mask(seed, rows, columns, THRESHOLD: tl.constexpr):
    """bool [R, C], True for elements that are kept.

    seed: int32 scalar. rows [R], columns [C]: integers. THRESHOLD: `catmodel.dropout.threshold` of the rate.
    """
    key = seed.to(tl.uint32)
    row_key = _hash(rows.to(tl.uint32) ^ _hash(key)) ^ key
    column_key = columns.to(tl.uint32) * _GOLDEN
    return _hash(row_key[:, None] ^ column_key[None, :]).to(tl.int32, bitcast=True) >= THRESHOLD


@triton.jit
def _hash(x):
    x = (x ^ (x >> 16)) * _FIRST
    x = (x ^ (x >> 15)) * _SECOND
    return x ^ (x >> 16)
