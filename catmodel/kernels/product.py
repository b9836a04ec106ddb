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
    DOT: tl.constexpr,
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
        tl.store(sums_ptr + tile_m * N + column, _over_rows(result, x.dtype if TMA else tl.float32, DOT), column < N)
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


@triton.jit
def persistent(
    x,  # descriptors as of `product`, but of tiles [BLOCK_M, BLOCK_N // 2] for slope and out
    w,
    bias_ptr,
    slope,
    out,
    sums_ptr,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    DOT: tl.constexpr,
):
    """As `product`, with a program per multiprocessor that loads its next tile while it finishes the last one."""
    across: tl.constexpr = tl.cdiv(N, BLOCK_N)
    HALF: tl.constexpr = BLOCK_N // 2
    for tile in tl.range(
        tl.program_id(0), tl.cdiv(M, BLOCK_M) * across, tl.num_programs(0), flatten=True, num_stages=STAGES
    ):
        tile_m = tile // across
        start_m, start_n = tile_m * BLOCK_M, tile % across * BLOCK_N
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, K, BLOCK_K):
            x_tile = x.load([start_m, start])
            w_tile = w.load([start, start_n]) if BACKWARD else w.load([start_n, start]).T
            total = tl.dot(x_tile, w_tile, total)
        halves = tl.split(tl.permute(tl.reshape(total, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        for half in tl.static_range(2):
            column = start_n + half * HALF + tl.arange(0, HALF)
            part = halves[half]
            if BACKWARD:
                part *= slope.load([start_m, start_n + half * HALF]).to(tl.float32)
                tl.store(sums_ptr + tile_m * N + column, _over_rows(part, x.dtype, DOT), column < N)
                out.store([start_m, start_n + half * HALF], part.to(out.dtype))
            else:
                part += tl.load(bias_ptr + column, column < N, 0.0).to(tl.float32)[None, :]
                value, gradient = gelu_and_slope(part, False)
                slope.store([start_m, start_n + half * HALF], gradient.to(out.dtype))
                out.store([start_m, start_n + half * HALF], value.to(out.dtype))


@triton.jit
def _over_rows(tile, dtype: tl.constexpr, DOT: tl.constexpr):
    """[rows, columns] -> [columns]. DOT: as a product of rounded numbers with ones, which needs no shuffles."""
    if DOT:
        ones = tl.full((tile.shape[0], 16), 1.0, tl.float32).to(dtype)
        result = tl.sum(tl.dot(tl.trans(tile.to(dtype)), ones), 1) * 0.0625
    else:
        result = tl.sum(tile, 0)
    return result
