"""The MLP's matrix products with the exact GELU, or its derivative, in their epilogues.

They are meant for networks so narrow that the products are bound by memory (`kernels.mlp_pays`), where each pass over
the hidden layer counts. Elements moved per token, for C channels and 4C hidden channels:

                 PyTorch                                               these kernels
    inference    fc1 5C, GELU 8C, fc2 5C                       = 18C   5C + 5C                           = 10C
    forward      the same                                      = 18C   fc1 with GELU 9C, fc2 5C          = 14C
    backward     dA 5C, GELU' 12C, dW1 5C, dW2 5C, dx 5C,              dA with GELU' 9C, the others 16C  = 25C
                 db1 4C, db2 C                                 = 37C

Training moves 39C instead of 55C. In stage 1 of CAT-B at batch 128 in bf16 (401,408 tokens, C = 96) this saves 1.23 of
4.24 GB per block. These figures are counted, not measured.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from catmodel.kernels.launch import operator


@triton.jit
def _product(
    x_ptr,  # [M, K]
    w_ptr,  # [K, N], with any strides
    stride_k,
    stride_n,
    bias_ptr,  # [N]; forward only
    h_ptr,  # [M, N], the hidden layer before the GELU; written forward if KEEP_H, read backward
    out_ptr,  # [M, N]: GELU(h) forward, the gradient of h backward
    sums_ptr,  # [tiles of M, N] float32: the gradient of h summed over each tile's rows; written backward
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    BACKWARD: tl.constexpr,
    KEEP_H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of GELU(x w + bias) or, backward, (x w) * GELU'(h). Consecutive tiles share rows: x stays in the L2."""
    tile = tl.program_id(0)
    tile_m = tile // tl.cdiv(N, BLOCK_N)
    # Only a tile's start can exceed 2^31 elements; int32 offsets within the tile take half the registers.
    first = tile_m.to(tl.int64) * BLOCK_M
    row = tl.arange(0, BLOCK_M)
    column = tile % tl.cdiv(N, BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, column_mask = (row < M - first)[:, None], (column < N)[None, :]

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + first * K + row[:, None] * K + k[None, :], row_mask & (k < K)[None, :], 0.0)
        w = tl.load(w_ptr + k[:, None] * stride_k + column[None, :] * stride_n, (k < K)[:, None] & column_mask, 0.0)
        total = tl.dot(x, w, total, input_precision="ieee")

    mask = row_mask & column_mask
    place = row[:, None] * N + column[None, :]
    if BACKWARD:
        h = tl.load(h_ptr + first * N + place, mask, 0.0).to(tl.float32)
        density = 0.3989422804014327 * tl.exp(-0.5 * h * h)
        out = total * (_normal_cdf(h) + h * density)
        tl.store(sums_ptr + tile_m * N + column, tl.sum(out, 0), column < N)
    else:
        h = total + tl.load(bias_ptr + column, column < N, 0.0).to(tl.float32)[None, :]
        if KEEP_H:
            tl.store(h_ptr + first * N + place, h.to(h_ptr.dtype.element_ty), mask)
        out = h * _normal_cdf(h)
    tl.store(out_ptr + first * N + place, out.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def _normal_cdf(x):
    return 0.5 + 0.5 * tl.math.erf(x * 0.7071067811865476)


ROWS = 128  # rows of a tile


def _plan(channels: int) -> tuple[dict[str, int], dict[str, int]]:
    """Sizes of tiles, and launch options. With tiles of 128 x 128 a multiprocessor would hold a single block."""
    return dict(BLOCK_M=ROWS, BLOCK_N=64, BLOCK_K=32 if channels % 64 else 64), dict(num_warps=8, num_stages=3)


def _launch(
    x_MK: Tensor, w_KN: Tensor, bias_N: Tensor | None, h_MN: Tensor | None, out_MN: Tensor, sums: Tensor | None
) -> None:
    (M, K), N = x_MK.shape, w_KN.shape[1]
    sizes, options = _plan(K)
    grid = (triton.cdiv(M, sizes["BLOCK_M"]) * triton.cdiv(N, sizes["BLOCK_N"]),)
    modes = dict(BACKWARD=sums is not None, KEEP_H=h_MN is not None)
    _product[grid](x_MK, w_KN, *w_KN.stride(), bias_N, h_MN, out_MN, sums, M, N, K, **modes, **sizes, **options)


@operator("mlp")
def mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, train: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """GELU(x w1^T + b1) w2^T + b2: x [..., C], w1 [hidden, C], b1 [hidden], w2 [C, hidden], b2 [C], all of one dtype.

    Returns y [..., C] and, for the backward pass, the hidden layer before and after the GELU, both [..., hidden]. Only
    y is differentiable. Without `train` the other two are empty, and the hidden layer before the GELU is never written.
    """
    x_MC = x.reshape(-1, x.shape[-1]).contiguous()
    a_MN = x_MC.new_empty(len(x_MC), len(w1))
    h_MN = torch.empty_like(a_MN) if train else None
    _launch(x_MC, w1.T, b1, h_MN, a_MN, None)
    y = F.linear(a_MN, w2, b2).view(x.shape)
    if not train:
        return y, x.new_empty(0), x.new_empty(0)
    return y, h_MN.view(*x.shape[:-1], -1), a_MN.view(*x.shape[:-1], -1)


@mlp.register_fake
def _(x, w1, b1, w2, b2, train=True):
    hidden = (*x.shape[:-1], len(w1)) if train else (0,)
    return x.new_empty(x.shape), x.new_empty(hidden), x.new_empty(hidden)


@operator("mlp_backward")
def mlp_backward(
    dy: Tensor, x: Tensor, w1: Tensor, w2: Tensor, h: Tensor, a: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w1, b1, w2 and b2."""
    x_MC, dy_MC = (z.reshape(-1, x.shape[-1]).contiguous() for z in (x, dy))
    h_MN, a_MN = h.view(-1, len(w1)), a.view(-1, len(w1))
    dh_MN = torch.empty_like(h_MN)
    sums = torch.empty(triton.cdiv(len(x_MC), ROWS), len(w1), device=x.device)
    _launch(dy_MC, w2, None, h_MN, dh_MN, sums)
    db1, db2 = sums.sum(0).to(x.dtype), dy_MC.sum(0)
    return (dh_MN @ w1).view(x.shape), dh_MN.T @ x_MC, db1, dy_MC.T @ a_MN, db2


@mlp_backward.register_fake
def _(dy, x, w1, w2, h, a):
    return (
        x.new_empty(x.shape),
        torch.empty_like(w1),
        w1.new_empty(len(w1)),
        torch.empty_like(w2),
        w2.new_empty(len(w2)),
    )


def _keep(ctx, inputs, output) -> None:
    x, w1, _, w2, _, train = inputs
    _, h, a = output
    ctx.mark_non_differentiable(h, a)
    ctx.set_materialize_grads(False)  # otherwise autograd allocates zeros for h and a
    ctx.save_for_backward(x, w1, w2, h, a)


def _backward(ctx, dy, dh, da):
    x, w1, w2, h, a = ctx.saved_tensors
    return *torch.ops.catmodel.mlp_backward(dy, x, w1, w2, h, a), None


mlp.register_autograd(_backward, setup_context=_keep)


def cases() -> list[dict]:
    """Cases for `catmodel.kernels.report`: the first two stages of CAT-B, in bfloat16."""
    found = []
    for channels in (96, 192):
        sizes, options = _plan(channels)
        for what in ("inference", "forward", "backward"):
            constants = dict(
                N=4 * channels, K=channels, BACKWARD=what == "backward", KEEP_H=what != "inference", **sizes
            )
            # As in a launch by Triton, arguments that are None or 1 are constants.
            constants |= dict(stride_n=1, bias_ptr=None) if what == "backward" else dict(stride_k=1, sums_ptr=None)
            constants |= dict(h_ptr=None) if what == "inference" else {}
            signature = dict.fromkeys(("x_ptr", "w_ptr", "bias_ptr", "h_ptr", "out_ptr"), "*bf16")
            signature |= dict(sums_ptr="*fp32", stride_k="i32:16", stride_n="i32:16", M="i32:16") | dict.fromkeys(
                constants, "constexpr"
            )
            found.append(
                dict(
                    name=f"mlp {what}, {channels} channels",
                    fn=_product,
                    signature=signature,
                    constexprs=constants,
                    **options,
                )
            )
    return found
