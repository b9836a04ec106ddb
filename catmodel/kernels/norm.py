"""Residual sum with drop-path, then LayerNorm, in one pass; and their gradients, with all sums over rows, in another.

Units of one activation [M, C] that are moved, as counted:

                 what Inductor makes                                          these kernels
    forward      x, branch -> x', y                                      4    the same                               4
    backward     dy, x', dx' -> dx, dbranch                              5    the same                               5
                 dy, x' -> dgamma, dbeta                                 2    kept in registers meanwhile
                 dbranch -> gradient of the branch's last bias           1    kept in registers meanwhile

Of a branch that is scaled already, dbranch is dx, and the backward pass moves 4.

Microseconds in the stages of CAT-B (batch 256, bf16, one H200, docs/results/h200-2026-11-27/kernel-lab.json), and those
of what Inductor makes of the same:

                 stage 1      2            3            4
    forward      151 / 224    78 / 76      40 / 39      21 / 21
    backward     201 / 401    113 / 212    69 / 117     39 / 63
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from catmodel.kernels.launch import blocks, launch, operator, padded, programs


@triton.jit
def _norm_forward(
    x_ptr,  # [M, C]
    branch_ptr,  # [M, C], without its last bias
    bias_ptr,  # [C], or None
    scale_ptr,  # [B]: drop-path's factor of each sample, or None
    gamma_ptr,  # [C]
    beta_ptr,  # [C]
    sum_ptr,  # [M, C]: x + scale * (branch + bias), or x + branch + scale * bias if the branch is SCALED
    y_ptr,  # [M, C]: its LayerNorm
    M,
    tokens,  # rows of a sample
    C: tl.constexpr,
    SCALED: tl.constexpr,
    EPS: tl.constexpr,  # a number given at run time would be fp64 where Inductor launches the kernel
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.arange(0, COLUMNS)
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    inside = (row < M - first)[:, None] & (column < C)[None, :]
    place = first * C + row[:, None] * C + column[None, :]
    x = tl.load(x_ptr + place, inside, 0.0).to(tl.float32)
    branch = tl.load(branch_ptr + place, inside, 0.0).to(tl.float32)
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + (first + row) // tokens, row < M - first, 0.0).to(tl.float32)[:, None]
        if not SCALED:
            branch *= scale
    if bias_ptr is not None:
        branch += tl.load(bias_ptr + column, column < C, 0.0).to(tl.float32)[None, :] * scale
    total = (x + branch).to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + place, total, inside)
    normed, _ = _normed(total.to(tl.float32), column, C, EPS)
    gamma = tl.load(gamma_ptr + column, column < C, 0.0).to(tl.float32)
    beta = tl.load(beta_ptr + column, column < C, 0.0).to(tl.float32)
    tl.store(y_ptr + place, (normed * gamma[None, :] + beta[None, :]).to(y_ptr.dtype.element_ty), inside)


@triton.jit
def _normed(x, column, C: tl.constexpr, EPS: tl.constexpr):
    """Rows of mean 0 and variance 1 (0 in columns beyond C), and the factor [rows, 1]."""
    centred = x - (tl.sum(x, 1) * (1 / C))[:, None]
    if C < column.shape[0]:
        centred = tl.where((column < C)[None, :], centred, 0.0)
    factor = tl.rsqrt(tl.sum(centred * centred, 1) * (1 / C) + EPS)[:, None]
    return centred * factor, factor


@triton.jit
def _norm_backward(
    dy_ptr,  # [M, C]
    dsum_ptr,  # [M, C]
    sum_ptr,  # [M, C]
    scale_ptr,  # [B] or None
    gamma_ptr,  # [C]
    dx_ptr,  # [M, C]
    dbranch_ptr,  # [M, C]; None if it is dx
    sums_ptr,  # [programs, 3, C] float32: gradients of gamma, beta and bias, summed over a program's rows
    M,
    tokens,
    C: tl.constexpr,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    column = tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    gamma = tl.load(gamma_ptr + column, column < C, 0.0).to(tl.float32)[None, :]
    dgamma = tl.zeros((ROWS, COLUMNS), tl.float32)
    dbeta = tl.zeros((ROWS, COLUMNS), tl.float32)
    dbias = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, ROWS), tl.num_programs(0), num_stages=STAGES):
        first = tl.full((), ROWS, tl.int64) * tile
        inside = (row < M - first)[:, None] & (column < C)[None, :]
        place = first * C + row[:, None] * C + column[None, :]
        dy = tl.load(dy_ptr + place, inside, 0.0).to(tl.float32)
        total = tl.load(sum_ptr + place, inside, 0.0).to(tl.float32)
        dsum = tl.load(dsum_ptr + place, inside, 0.0).to(tl.float32)
        normed, factor = _normed(total, column, C, EPS)
        dgamma += dy * normed
        dbeta += dy
        dy *= gamma
        mean = (tl.sum(dy, 1) * (1 / C))[:, None]
        slope = (tl.sum(dy * normed, 1) * (1 / C))[:, None]
        dx = dsum + factor * (dy - mean - normed * slope)
        tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), inside)
        if scale_ptr is not None:
            dx *= tl.load(scale_ptr + (first + row) // tokens, row < M - first, 0.0)[:, None]
        if dbranch_ptr is not None:
            tl.store(dbranch_ptr + place, dx.to(dbranch_ptr.dtype.element_ty), inside)
        dbias += dx  # 0 in rows beyond M
    sums_ptr += tl.program_id(0) * 3 * C
    tl.store(sums_ptr + column, tl.sum(dgamma, 0), column < C)
    tl.store(sums_ptr + C + column, tl.sum(dbeta, 0), column < C)
    tl.store(sums_ptr + 2 * C + column, tl.sum(dbias, 0), column < C)


def forward(
    x: Tensor,
    branch: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    eps: float = 1e-5,
    scaled: bool = False,
    elements: int = 2048,
) -> tuple[Tensor, Tensor]:
    """As `residual_norm`. Tiles have `elements` elements."""
    C = x.shape[-1]
    M, columns = x.numel() // C, padded(C)
    total, y = torch.empty_like(x), torch.empty_like(x)
    rows = max(elements // columns, 1)
    sizes = dict(C=C, SCALED=scaled, EPS=eps, ROWS=rows, COLUMNS=columns, num_warps=4)
    place = M, M // len(x)
    launch(_norm_forward, (blocks(M, rows),), x, branch, bias, scale, gamma, beta, total, y, *place, **sizes)
    return total, y


def backward(
    dy: Tensor,
    dsum: Tensor,
    total: Tensor,
    scale: Tensor | None,
    gamma: Tensor,
    eps: float = 1e-5,
    scaled: bool = False,
    elements: int = 2048,
    each: int = 3,
    warps: int = 4,
    stages: int = 3,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of x, of branch (None: the same), and of gamma, beta and bias as one [3, C] float32.

    each: programs per multiprocessor, of which each sums the gradients of its rows.
    """
    C = total.shape[-1]
    M, columns = total.numel() // C, padded(C)
    dx = torch.empty_like(total)
    dbranch = None if scale is None or scaled else torch.empty_like(total)
    rows = max(elements // columns, 1)
    grid = min(each * programs(total.device), blocks(M, rows))
    sums = torch.empty(grid, 3, C, dtype=torch.float32, device=total.device)
    sizes = dict(C=C, EPS=eps, ROWS=rows, COLUMNS=columns, STAGES=stages, num_warps=warps)
    place = M, M // len(total)
    launch(_norm_backward, (grid,), dy, dsum, total, scale, gamma, dx, dbranch, sums, *place, **sizes)
    return dx, dbranch, sums.sum(0)


@operator("residual_norm", visible=True)
def residual_norm(
    x: Tensor,
    branch: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    scaled: bool,
) -> tuple[Tensor, Tensor]:
    """x, branch [B, ..., C], bias, gamma, beta [C], scale [B] -> z = x + scale (branch + bias), LayerNorm(z).

    All have one dtype; scale may have another. scaled: the branch is scaled already, and z = x + branch + scale bias.
    """
    return forward(x.contiguous(), branch.contiguous(), bias, scale, gamma, beta, eps, scaled)


@residual_norm.register_fake
def _(x, branch, bias, scale, gamma, beta, eps, scaled):
    return x.new_empty(x.shape), x.new_empty(x.shape)


@operator("residual_norm_backward", visible=True)
def residual_norm_backward(
    dy: Tensor, dsum: Tensor, total: Tensor, scale: Tensor | None, gamma: Tensor, eps: float, scaled: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of branch (empty if it is the same), and of gamma, beta and bias as one [3, C]."""
    dx, dbranch, sums = backward(dy.contiguous(), dsum.contiguous(), total, scale, gamma, eps, scaled)
    return dx, dx.new_empty(0) if dbranch is None else dbranch, sums.to(gamma.dtype)


@residual_norm_backward.register_fake
def _(dy, dsum, total, scale, gamma, eps, scaled):
    dbranch = total.new_empty(0 if scale is None or scaled else total.shape)
    return total.new_empty(total.shape), dbranch, gamma.new_empty(3, len(gamma))


def _keep(ctx, inputs, output) -> None:
    _, _, bias, scale, gamma, _, ctx.eps, ctx.scaled = inputs
    ctx.save_for_backward(output[0], scale, gamma)
    ctx.biased = bias is not None


def _differentiate(ctx, dsum, dy):
    total, scale, gamma = ctx.saved_tensors
    dx, dbranch, sums = residual_norm_backward(dy, dsum, total, scale, gamma, ctx.eps, ctx.scaled)
    dgamma, dbeta, dbias = sums.unbind()
    same = scale is None or ctx.scaled
    return dx, dx if same else dbranch, dbias if ctx.biased else None, None, dgamma, dbeta, None, None


residual_norm.register_autograd(_differentiate, setup_context=_keep)


GRADIENTS = dict.fromkeys(("dy_ptr", "dsum_ptr", "sum_ptr", "gamma_ptr", "dx_ptr", "dbranch_ptr"), "*bf16")
GRADIENTS |= dict(sums_ptr="*fp32")


def cases() -> list[dict]:
    """Cases for `benchmarks.kernel_resources`: the stages of CAT-B, in bfloat16, with drop-path."""
    found, read = [], ("x_ptr", "branch_ptr", "bias_ptr", "gamma_ptr", "beta_ptr", "sum_ptr", "y_ptr")
    for channels in (96, 192, 384, 768):
        columns = padded(channels)
        sizes = dict(C=channels, EPS=1e-5, ROWS=max(2048 // columns, 1), COLUMNS=columns)
        numbers = dict(scale_ptr="*bf16", M="i32:16", tokens="i32")
        options = dict(num_warps=4, num_stages=3)
        for kernel, tensors, more, name in (
            (_norm_forward, dict.fromkeys(read, "*bf16"), dict(SCALED=False), "forward"),
            (_norm_backward, GRADIENTS, dict(STAGES=3), "backward"),
            (_norm_backward, GRADIENTS, dict(STAGES=3, dbranch_ptr=None), "backward, of a scaled branch"),
        ):
            constants = sizes | more
            signature = tensors | numbers | dict.fromkeys(constants, "constexpr")
            case = dict(name=f"residual and norm {name}, {channels} channels", fn=kernel, signature=signature)
            found.append(dict(case, constexprs=constants, **options))
    return found
