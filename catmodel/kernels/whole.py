"""The whole MLP in one kernel for networks of 96 or 192 channels, whose hidden layer then never reaches memory.

Forward reads x and writes y. Backward computes the hidden layer again, and writes it after the GELU, and its gradient,
for the two products that give the weights' gradients; and dx.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from catmodel.kernels.gelu import gelu, gelu_and_slope


@triton.jit
def _forward(
    x,  # descriptors: [M, C] in tiles [ROWS, C1] and [ROWS, C2] (C = C1 + C2, both powers of two)
    x2,
    w1,  # [H, C] in tiles [HIDDEN, C1], [HIDDEN, C2]
    w12,
    b1_ptr,
    w2,  # [C, H] in tiles [C1, HIDDEN], [C2, HIDDEN]
    w22,
    b2_ptr,
    y,
    y2,
    H: tl.constexpr,
    C1: tl.constexpr,
    C2: tl.constexpr,
    ROWS: tl.constexpr,
    HIDDEN: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0) * ROWS
    left, right = x.load([row, 0]), x2.load([row, C1])
    total = tl.zeros((ROWS, C1), tl.float32)
    total2 = tl.zeros((ROWS, C2), tl.float32)
    for start in tl.range(0, H, HIDDEN, num_stages=STAGES):
        h = tl.dot(left, w1.load([start, 0]).T)
        h = tl.dot(right, w12.load([start, C1]).T, h)
        h += tl.load(b1_ptr + start + tl.arange(0, HIDDEN)).to(tl.float32)[None, :]
        a = gelu(h, False).to(x.dtype)
        total = tl.dot(a, w2.load([0, start]).T, total)
        total2 = tl.dot(a, w22.load([C1, start]).T, total2)
    total += tl.load(b2_ptr + tl.arange(0, C1)).to(tl.float32)[None, :]
    total2 += tl.load(b2_ptr + C1 + tl.arange(0, C2)).to(tl.float32)[None, :]
    y.store([row, 0], total.to(x.dtype))
    y2.store([row, C1], total2.to(x.dtype))


@triton.jit
def _backward(
    x,
    x2,
    dy,
    dy2,
    w1,
    w12,
    b1_ptr,
    w2,
    w22,
    a_out,  # [M, H] in tiles [ROWS, HIDDEN]
    dh_out,
    dx,
    dx2,
    sums_ptr,  # [tiles of M, H] float32
    H: tl.constexpr,
    C1: tl.constexpr,
    C2: tl.constexpr,
    ROWS: tl.constexpr,
    HIDDEN: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0) * ROWS
    left, right = x.load([row, 0]), x2.load([row, C1])
    dleft, dright = dy.load([row, 0]), dy2.load([row, C1])
    total = tl.zeros((ROWS, C1), tl.float32)
    total2 = tl.zeros((ROWS, C2), tl.float32)
    for start in tl.range(0, H, HIDDEN, num_stages=STAGES):
        column = start + tl.arange(0, HIDDEN)
        w1_tile, w12_tile = w1.load([start, 0]), w12.load([start, C1])
        h = tl.dot(left, w1_tile.T)
        h = tl.dot(right, w12_tile.T, h)
        h += tl.load(b1_ptr + column).to(tl.float32)[None, :]
        da = tl.dot(dleft, w2.load([0, start]))
        da = tl.dot(dright, w22.load([C1, start]), da)
        a, slope = gelu_and_slope(h, False)
        dh = da * slope
        tl.store(sums_ptr + tl.program_id(0) * H + column, tl.sum(dh, 0))
        dh = dh.to(x.dtype)
        a_out.store([row, start], a.to(x.dtype))
        dh_out.store([row, start], dh)
        total = tl.dot(dh, w1_tile, total)
        total2 = tl.dot(dh, w12_tile, total2)
    dx.store([row, 0], total.to(x.dtype))
    dx2.store([row, C1], total2.to(x.dtype))


def _halves(C: int) -> tuple[int, int]:
    first = 1 << (C.bit_length() - 1)
    return first, C - first


def forward(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, rows: int, hidden: int, stages: int, warps: int
) -> Tensor:
    """x [M, C] -> [M, C]."""
    from triton.tools.tensor_descriptor import TensorDescriptor as D

    (M, C), H = x.shape, len(w1)
    halves, y = _halves(C), torch.empty_like(x)
    xs, w1s, ys = ([D.from_tensor(t, [n, c]) for c in halves] for t, n in ((x, rows), (w1, hidden), (y, rows)))
    w2s = [D.from_tensor(w2, [c, hidden]) for c in halves]
    _forward[(triton.cdiv(M, rows),)](*xs, *w1s, b1, *w2s, b2, *ys, H, *halves, rows, hidden, stages, num_warps=warps)
    return y


def backward(
    dy: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, rows: int, hidden: int, stages: int, warps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden layer after the GELU, its gradient before it, dx, and the latter's sums over rows."""
    from triton.tools.tensor_descriptor import TensorDescriptor as D

    (M, C), H = x.shape, len(w1)
    halves, dx = _halves(C), torch.empty_like(x)
    a, dh = x.new_empty(M, H), x.new_empty(M, H)
    sums = torch.empty(triton.cdiv(M, rows), H, dtype=torch.float32, device=x.device)
    xs, dys, w1s, dxs = (
        [D.from_tensor(t, [n, c]) for c in halves] for t, n in ((x, rows), (dy, rows), (w1, hidden), (dx, rows))
    )
    w2s = [D.from_tensor(w2, [c, hidden]) for c in halves]
    hidden_layers = [D.from_tensor(t, [rows, hidden]) for t in (a, dh)]
    sizes = H, *halves, rows, hidden, stages
    _backward[(len(sums),)](*xs, *dys, *w1s, b1, *w2s, *hidden_layers, *dxs, sums, *sizes, num_warps=warps)
    return a, dh, dx, sums.sum(0)


@triton.jit
def _stationary(
    x,  # descriptors of [M, C], in tiles [ROWS, C1] and [ROWS, C2]
    x2,
    w,  # forward [H, C] in tiles [HIDDEN, C1], [HIDDEN, C2]; backward [C, H] in tiles [C1, HIDDEN], [C2, HIDDEN]
    w2,
    bias_ptr,
    slope,  # [M, H] in tiles [ROWS, HIDDEN]
    out,
    sums_ptr,  # [programs / tiles of H, H] float32
    M,
    H: tl.constexpr,
    C1: tl.constexpr,
    BACKWARD: tl.constexpr,
    ROWS: tl.constexpr,
    HIDDEN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """As `product.product`, but a program keeps its tile of the weights and goes through many tiles of rows."""
    tiles: tl.constexpr = H // HIDDEN
    start_n = tl.program_id(0) % tiles * HIDDEN
    column = start_n + tl.arange(0, HIDDEN)
    if BACKWARD:
        w_tile, w2_tile = w.load([0, start_n]), w2.load([C1, start_n])
        sums = tl.zeros((ROWS, HIDDEN), tl.float32)
    else:
        w_tile, w2_tile = w.load([start_n, 0]).T, w2.load([start_n, C1]).T
        bias = tl.load(bias_ptr + column).to(tl.float32)[None, :]
    for tile in tl.range(tl.program_id(0) // tiles, tl.cdiv(M, ROWS), tl.num_programs(0) // tiles, num_stages=STAGES):
        row = tile * ROWS
        total = tl.dot(x.load([row, 0]), w_tile)
        total = tl.dot(x2.load([row, C1]), w2_tile, total)
        if BACKWARD:
            total *= slope.load([row, start_n]).to(tl.float32)
            sums += total
            out.store([row, start_n], total.to(out.dtype))
        else:
            result, gradient = gelu_and_slope(total + bias, False)
            slope.store([row, start_n], gradient.to(out.dtype))
            out.store([row, start_n], result.to(out.dtype))
    if BACKWARD:
        tl.store(sums_ptr + tl.program_id(0) // tiles * H + column, tl.sum(sums, 0))


def stationary(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    slope: Tensor | None,
    rows: int,
    hidden: int,
    stages: int,
    warps: int,
    each: int,
) -> tuple[Tensor, Tensor]:
    """Forward (a bias is given): x [M, C], w [H, C] -> GELU, GELU'. Backward: x [M, C], w [C, H], slope -> dh, sums."""
    from triton.tools.tensor_descriptor import TensorDescriptor as D

    from catmodel.kernels.launch import programs

    (M, C), H = x.shape, w.shape[0 if slope is None else 1]
    halves, out = _halves(C), x.new_empty(M, H)
    xs = [D.from_tensor(x, [rows, c]) for c in halves]
    ws = [D.from_tensor(w, [hidden, c] if slope is None else [c, hidden]) for c in halves]
    across = H // hidden
    grid = min(programs(x.device) * each // across, triton.cdiv(M, rows)) * across
    sums = None if slope is None else torch.empty(grid // across, H, dtype=torch.float32, device=x.device)
    second = x.new_empty(M, H) if slope is None else slope
    tiles = D.from_tensor(second, [rows, hidden]), D.from_tensor(out, [rows, hidden])
    sizes = M, H, halves[0], slope is not None, rows, hidden, stages
    _stationary[(grid,)](*xs, *ws, bias, *tiles, sums, *sizes, num_warps=warps)
    return (out, second) if slope is None else (out, sums.sum(0))
