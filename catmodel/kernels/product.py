"""Matrix products with the GELU, or a product with its derivative, in their epilogues.

Forward x w^T + b is not stored, but GELU of it and GELU' of it: the backward pass only multiplies by the latter. Both
are read and written once, as by a product that stores the hidden layer itself.
"""

import triton
import triton.language as tl

from catmodel.kernels.gelu import gelu, gelu_and_slope


@triton.jit
def product(
    x,  # [M, K]: a pointer, or a descriptor of tiles [BLOCK_M, BLOCK_K]
    w,  # forward [N, K], backward [K, N]
    bias_ptr,  # [N]; forward only
    slope,  # [M, N]: GELU'; written forward if KEEP, read backward
    out,  # [M, N]: GELU forward, the gradient of the hidden layer backward
    sums_ptr,  # [tiles of M, N] float32: `out` summed over each tile's rows; written backward
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    BACKWARD: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One tile of GELU(x w^T + bias) or, backward, (x w) * GELU'. Consecutive tiles share rows: x stays in the L2."""
    tile = tl.program_id(0)
    tile_m = tile // tl.cdiv(N, BLOCK_N)
    start_n = tile % tl.cdiv(N, BLOCK_N) * BLOCK_N
    start_m = tile_m * BLOCK_M
    # Only a tile's start can exceed 2^31 elements; int32 offsets within the tile take half the registers.
    first = tile_m.to(tl.int64) * BLOCK_M
    row = tl.arange(0, BLOCK_M)
    column = start_n + tl.arange(0, BLOCK_N)
    row_mask, column_mask = (row < M - first)[:, None], (column < N)[None, :]
    exact: tl.constexpr = out.dtype.element_ty == tl.float32 if not TMA else out.dtype == tl.float32

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        if TMA:
            x_tile = x.load([start_m, start])
            w_tile = w.load([start, start_n]) if BACKWARD else w.load([start_n, start]).T
        else:
            k = start + tl.arange(0, BLOCK_K)
            x_tile = tl.load(x + first * K + row[:, None] * K + k[None, :], row_mask & (k < K)[None, :], 0.0)
            if BACKWARD:
                w_tile = tl.load(w + k[:, None] * N + column[None, :], (k < K)[:, None] & column_mask, 0.0)
            else:
                w_tile = tl.load(w + column[None, :] * K + k[:, None], (k < K)[:, None] & column_mask, 0.0)
        total = tl.dot(x_tile, w_tile, total, input_precision="ieee")

    mask = row_mask & column_mask
    place = row[:, None] * N + column[None, :]
    if BACKWARD:
        if TMA:
            result = total * slope.load([start_m, start_n]).to(tl.float32)
        else:
            result = total * tl.load(slope + first * N + place, mask, 0.0).to(tl.float32)
        tl.store(sums_ptr + tile_m * N + column, tl.sum(result, 0), column < N)
    else:
        h = total + tl.load(bias_ptr + column, column < N, 0.0).to(tl.float32)[None, :]
        if KEEP:
            result, gradient = gelu_and_slope(h, exact)
            if TMA:
                slope.store([start_m, start_n], gradient.to(slope.dtype))
            else:
                tl.store(slope + first * N + place, gradient.to(slope.dtype.element_ty), mask)
        else:
            result = gelu(h, exact)
    if TMA:
        out.store([start_m, start_n], result.to(out.dtype))
    else:
        tl.store(out + first * N + place, result.to(out.dtype.element_ty), mask)
