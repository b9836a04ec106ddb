"""Sums over the rows of a matrix (gradients of biases), alone or while the matrix is multiplied by the GELU's slope."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from catmodel.kernels.gelu import gelu_slope
from catmodel.kernels.launch import programs


@triton.jit
def _columns(
    x_ptr,  # [M, N]
    h_ptr,  # [M, N]; None: sum x alone
    out_ptr,  # [M, N]: x * GELU'(h)
    sums_ptr,  # [programs, N] float32
    M,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(M, ROWS), tl.num_programs(0)):
        first = tl.full((), ROWS, tl.int64) * tile
        inside = (row < M - first)[:, None] & (column < N)[None, :]
        place = first * N + row[:, None] * N + column[None, :]
        x = tl.load(x_ptr + place, inside, 0.0).to(tl.float32)
        if h_ptr is not None:
            h = tl.load(h_ptr + place, inside, 0.0).to(tl.float32)
            x *= gelu_slope(h, h_ptr.dtype.element_ty == tl.float32)
            tl.store(out_ptr + place, x.to(out_ptr.dtype.element_ty), inside)
        total += x
    tl.store(sums_ptr + tl.program_id(0) * N + column, tl.sum(total, 0), column < N)


def _grid(x: Tensor, rows: int, columns: int, each: int) -> tuple[int, int]:
    across = triton.cdiv(x.shape[1], columns)
    return min(triton.cdiv(each * programs(x.device), across), triton.cdiv(len(x), rows)), across


def column_sums(x: Tensor, rows: int = 32, columns: int = 128, each: int = 8) -> Tensor:
    """x [M, N] -> [N] float32."""
    grid = _grid(x, rows, columns, each)
    sums = torch.empty(grid[0], x.shape[1], dtype=torch.float32, device=x.device)
    _columns[grid](x, None, None, sums, *x.shape, ROWS=rows, COLUMNS=columns, num_warps=4)
    return sums.sum(0)


def gelu_backward(da: Tensor, h: Tensor, rows: int = 16, columns: int = 128, each: int = 8) -> tuple[Tensor, Tensor]:
    """da, h [M, N] -> da * GELU'(h), and its sum over rows [N] float32."""
    grid = _grid(da, rows, columns, each)
    sums, out = torch.empty(grid[0], da.shape[1], dtype=torch.float32, device=da.device), torch.empty_like(da)
    _columns[grid](da, h, out, sums, *da.shape, ROWS=rows, COLUMNS=columns, num_warps=4)
    return out, sums.sum(0)
