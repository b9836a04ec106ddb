"""The four weights of cross-patch attention as two matrices A and M (see `cross_patch`), and their gradients."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from catmodel.kernels.launch import launch


@triton.jit
def dot(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _load_linear(weight_ptr, bias_ptr, BIAS: tl.constexpr, P: tl.constexpr, FEATURES: tl.constexpr):
    """A linear layer [P outputs, P inputs] with its bias in column BIAS: [FEATURES, FEATURES], zero elsewhere."""
    row, column = tl.arange(0, FEATURES)[:, None], tl.arange(0, FEATURES)[None, :]
    weight = tl.load(weight_ptr + row * P + column, mask=(row < P) & (column < P), other=0.0)
    return tl.where(column == BIAS, tl.load(bias_ptr + row, mask=row < P, other=0.0), weight)


@triton.jit
def fold(qkv_weight_ptr, qkv_bias_ptr, proj_weight_ptr, proj_bias_ptr, P: tl.constexpr, FEATURES: tl.constexpr):
    """A / sqrt(P), and M with the projection's bias in column P + 1, both [FEATURES, FEATURES]."""
    w_q = _load_linear(qkv_weight_ptr, qkv_bias_ptr, P, P, FEATURES)
    w_k = _load_linear(qkv_weight_ptr + P * P, qkv_bias_ptr + P, P, P, FEATURES)
    w_v = _load_linear(qkv_weight_ptr + 2 * P * P, qkv_bias_ptr + 2 * P, P, P, FEATURES)
    w_proj = _load_linear(proj_weight_ptr, proj_bias_ptr, P + 1, P, FEATURES)
    m = dot(w_proj, w_v).to(w_v.dtype)
    a = (dot(tl.trans(w_q), w_k) * P**-0.5).to(w_q.dtype)
    return a, tl.where((tl.arange(0, FEATURES) == P + 1)[None, :], w_proj, m)


@triton.jit
def _cross_patch_unfold(
    sums_ptr,  # float32 [2, FEATURES, FEATURES]: gradients of A / sqrt(P) and M
    qkv_weight_ptr,
    qkv_bias_ptr,
    proj_weight_ptr,
    d_qkv_weight_ptr,
    d_qkv_bias_ptr,
    d_proj_weight_ptr,
    d_proj_bias_ptr,
    P: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Gradients of the parameters by the product rule. Grid (4): of W_q, W_k, W_v, W_proj, and their biases."""
    part = tl.program_id(0)
    i = tl.arange(0, FEATURES)
    row, column = i[:, None], i[None, :]
    square = (row < P) & (column < P)
    d_a = tl.load(sums_ptr + row * FEATURES + column, (row <= P) & (column <= P), 0.0) * P**-0.5
    d_m = tl.load(sums_ptr + FEATURES * FEATURES + row * FEATURES + column, (row < P) & (column <= P), 0.0)
    # For W_q and W_k the other one of them, for W_proj W_v, for W_v none of them.
    other = tl.where(part < 2, 1 - part, 2)
    w = _load_linear(qkv_weight_ptr + other * P * P, qkv_bias_ptr + other * P, P, P, FEATURES).to(tl.float32)
    if part == 0:
        result = dot(w, tl.trans(d_a))
    elif part == 1:
        result = dot(w, d_a)
    elif part == 2:
        w_proj = tl.load(proj_weight_ptr + row * P + column, square, 0.0).to(tl.float32)
        result = dot(tl.trans(w_proj), d_m)
    else:
        result = dot(d_m, tl.trans(w))
    if part < 3:
        weight_ptr, bias_ptr = d_qkv_weight_ptr + part * P * P, d_qkv_bias_ptr + part * P
        bias = tl.sum(tl.where(column == P, result, 0.0), 1)
    else:
        weight_ptr, bias_ptr = d_proj_weight_ptr, d_proj_bias_ptr
        bias = tl.load(sums_ptr + FEATURES * FEATURES + i * FEATURES + P + 1, i < P, 0.0)
    tl.store(weight_ptr + row * P + column, result.to(weight_ptr.dtype.element_ty), square)
    tl.store(bias_ptr + i, bias.to(bias_ptr.dtype.element_ty), i < P)


# Eight warps hold three matrices of 64 x 64 in float32.
UNFOLD_OPTIONS = dict(num_warps=8, num_stages=1)


def unfold(
    sums: Tensor, qkv_weight: Tensor, qkv_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the parameters from those of A / sqrt(P) and M, float32 [2, FEATURES, FEATURES]."""
    gradients = tuple(torch.empty_like(parameter) for parameter in (qkv_weight, qkv_bias, proj_weight, proj_bias))
    sizes = dict(P=len(proj_bias), FEATURES=sums.shape[-1])
    launch(_cross_patch_unfold, (4,), sums, qkv_weight, qkv_bias, proj_weight, *gradients, **sizes, **UNFOLD_OPTIONS)
    return gradients


def cases() -> list[dict]:
    """Cases for `benchmarks.kernel_resources`: patches of CAT-B, in bfloat16."""
    constants = dict(P=49, FEATURES=64)
    read = "qkv_weight_ptr", "qkv_bias_ptr", "proj_weight_ptr"
    written = "d_qkv_weight_ptr", "d_qkv_bias_ptr", "d_proj_weight_ptr", "d_proj_bias_ptr"
    signature = (
        dict(sums_ptr="*fp32") | dict.fromkeys((*read, *written), "*bf16") | dict.fromkeys(constants, "constexpr")
    )
    case = dict(fn=_cross_patch_unfold, signature=signature, constexprs=constants, **UNFOLD_OPTIONS)
    return [dict(name="cross-patch parameters", **case)]
