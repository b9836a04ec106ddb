"""Cross-patch attention (`catmodel.attention.CrossPatchAttention`) of few patches: one kernel forward, one backward.

With a single head, all maps from a channel's patches to the softmax and from the softmax to the output are linear maps
of P to P features, so two matrices replace the four weights. Let x be the patches followed by a column of ones, and W
the weights with their bias as an additional column:

    q k^T = x A x^T, A = W_q^T W_k              proj(weights v) = (weights x) M^T + bias, M = W_proj W_v

This needs 4 products per tile instead of 6, backward 11 instead of 17, and two sums of gradients instead of four, few
enough to stay in registers. Every program computes A and M, with fp32 sums, and rounds them to the dtype of the input,
as q, k and v are rounded elsewhere. Only the input is saved for the backward pass.

A tile has ROWS rows of the matrix [B * C * n, P]: TOKENS (n, padded to a power of two) of each of ROWS / TOKENS
channels, which attend to each other under a block-diagonal mask. Features are padded to FEATURES >= P + 2: after the
column of ones there is one for the bias of the projection.

Programs loop over the tiles with a fixed stride. Backward, they sum the gradients of A and M in fp32. PyTorch then adds
the programs' sums in a fixed order, and a third kernel obtains the gradients of the parameters by the product rule.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from catmodel.dropout import threshold
from catmodel.kernels.dropout import keep_mask
from catmodel.kernels.launch import blocks, launch, operator, padded, programs

# -------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _dot(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _load_linear(weight_ptr, bias_ptr, BIAS: tl.constexpr, P: tl.constexpr, FEATURES: tl.constexpr):
    """A linear layer [P outputs, P inputs] with its bias in column BIAS: [FEATURES, FEATURES], zero elsewhere."""
    row, column = tl.arange(0, FEATURES)[:, None], tl.arange(0, FEATURES)[None, :]
    weight = tl.load(weight_ptr + row * P + column, mask=(row < P) & (column < P), other=0.0)
    return tl.where(column == BIAS, tl.load(bias_ptr + row, mask=row < P, other=0.0), weight)


@triton.jit
def _fold(qkv_weight_ptr, qkv_bias_ptr, proj_weight_ptr, proj_bias_ptr, P: tl.constexpr, FEATURES: tl.constexpr):
    """A / sqrt(P), and M with the projection's bias in column P + 1, both [FEATURES, FEATURES]."""
    w_q = _load_linear(qkv_weight_ptr, qkv_bias_ptr, P, P, FEATURES)
    w_k = _load_linear(qkv_weight_ptr + P * P, qkv_bias_ptr + P, P, P, FEATURES)
    w_v = _load_linear(qkv_weight_ptr + 2 * P * P, qkv_bias_ptr + 2 * P, P, P, FEATURES)
    w_proj = _load_linear(proj_weight_ptr, proj_bias_ptr, P + 1, P, FEATURES)
    m = _dot(w_proj, w_v).to(w_v.dtype)
    a = (_dot(tl.trans(w_q), w_k) * P**-0.5).to(w_q.dtype)
    return a, tl.where((tl.arange(0, FEATURES) == P + 1)[None, :], w_proj, m)


@triton.jit
def _one(at: tl.constexpr, dtype: tl.constexpr, FEATURES: tl.constexpr):
    """[1, FEATURES]: one in column `at`, zero elsewhere."""
    return (tl.arange(0, FEATURES) == at)[None, :].to(tl.float32).to(dtype)


@triton.jit
def _places(
    tile,
    channels,
    n: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """A tile's first element, its elements' offsets from there [ROWS, FEATURES], and a mask of those that exist."""
    i = tl.arange(0, ROWS)
    feature = tl.arange(0, FEATURES)
    first = tile * tl.full((), (ROWS // TOKENS) * n * P, tl.int64)
    if n == TOKENS:  # rows are consecutive, so the compiler computes one address instead of one per element
        row = i
        there = i < (channels - tile * (ROWS // TOKENS)) * n
    else:
        row = i // TOKENS * n + i % TOKENS
        there = (i % TOKENS < n) & (tile * (ROWS // TOKENS) + i // TOKENS < channels)
    return first, row[:, None] * P + feature[None, :], there[:, None] & (feature < P)[None, :]


@triton.jit
def _weights(logits, n: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr):
    """The softmax within each channel, fp32 [ROWS, ROWS]. Every row, including padding, has a finite logit."""
    i = tl.arange(0, ROWS)
    allowed = ((i // TOKENS)[:, None] == (i // TOKENS)[None, :]) & (i % TOKENS < n)[None, :]
    logits = tl.where(allowed, logits, float("-inf"))
    weights = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    return weights / tl.sum(weights, axis=1)[:, None]


@triton.jit
def _keep(seed_ptr, tile, n: tl.constexpr, THRESHOLD: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr):
    i = tl.arange(0, ROWS)
    channel = tile * (ROWS // TOKENS) + i // TOKENS
    return keep_mask(tl.load(seed_ptr), channel * n + i % TOKENS, i % TOKENS, THRESHOLD)


@triton.jit
def _cross_patch_forward(
    x_ptr,  # [channels, n, P]
    qkv_weight_ptr,
    qkv_bias_ptr,
    proj_weight_ptr,
    proj_bias_ptr,
    seed_ptr,
    y_ptr,  # [channels, n, P]
    channels,
    n: tl.constexpr,
    P: tl.constexpr,
    RATE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    a, m = _fold(qkv_weight_ptr, qkv_bias_ptr, proj_weight_ptr, proj_bias_ptr, P, FEATURES)
    for tile in range(tl.program_id(0), tl.cdiv(channels, ROWS // TOKENS), tl.num_programs(0)):
        first, offsets, there = _places(tile, channels, n, P, ROWS, TOKENS, FEATURES)
        x = tl.load(x_ptr + first + offsets, mask=there, other=_one(P, a.dtype, FEATURES))
        xa = _dot(x, a).to(x.dtype)
        weights = _weights(_dot(xa, tl.trans(x)), n, ROWS, TOKENS)
        if RATE > 0:
            weights = tl.where(_keep(seed_ptr, tile, n, THRESHOLD, ROWS, TOKENS), weights * (1 / (1 - RATE)), 0.0)
        mixed = (_dot(weights.to(x.dtype), x) + _one(P + 1, tl.float32, FEATURES)).to(x.dtype)
        y = _dot(mixed, tl.trans(m))
        tl.store(y_ptr + first + offsets, y.to(x.dtype), mask=there)


@triton.jit
def _cross_patch_backward(
    dy_ptr,
    x_ptr,
    qkv_weight_ptr,
    qkv_bias_ptr,
    proj_weight_ptr,
    proj_bias_ptr,
    seed_ptr,
    dx_ptr,
    sums_ptr,  # float32 [programs, 2, FEATURES, FEATURES]: gradients of A / sqrt(P) and M
    channels,
    n: tl.constexpr,
    P: tl.constexpr,
    RATE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    a, m = _fold(qkv_weight_ptr, qkv_bias_ptr, proj_weight_ptr, proj_bias_ptr, P, FEATURES)
    d_a = tl.zeros((FEATURES, FEATURES), tl.float32)
    d_m = tl.zeros((FEATURES, FEATURES), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(channels, ROWS // TOKENS), tl.num_programs(0)):
        first, offsets, there = _places(tile, channels, n, P, ROWS, TOKENS, FEATURES)
        x = tl.load(x_ptr + first + offsets, mask=there, other=_one(P, a.dtype, FEATURES))
        dy = tl.load(dy_ptr + first + offsets, mask=there, other=0.0)  # rows of padding are zero and add nothing
        xa = _dot(x, a).to(x.dtype)
        weights = _weights(_dot(xa, tl.trans(x)), n, ROWS, TOKENS)
        dmixed = _dot(dy, m).to(x.dtype)
        dweights = _dot(dmixed, tl.trans(x))
        dropped = weights
        if RATE > 0:
            keep = _keep(seed_ptr, tile, n, THRESHOLD, ROWS, TOKENS)
            dropped = tl.where(keep, weights * (1 / (1 - RATE)), 0.0)
            dweights = tl.where(keep, dweights * (1 / (1 - RATE)), 0.0)
        dlogits = (weights * (dweights - tl.sum(weights * dweights, axis=1)[:, None])).to(x.dtype)
        dropped = dropped.to(x.dtype)
        mixed = (_dot(dropped, x) + _one(P + 1, tl.float32, FEATURES)).to(x.dtype)
        d_m = tl.dot(tl.trans(dy), mixed, d_m, input_precision="ieee")
        dxa = _dot(dlogits, x).to(x.dtype)
        d_a = tl.dot(tl.trans(x), dxa, d_a, input_precision="ieee")
        dx = _dot(tl.trans(dropped), dmixed)
        dx = tl.dot(tl.trans(dlogits), xa, dx, input_precision="ieee")
        dx = tl.dot(dxa, tl.trans(a), dx, input_precision="ieee")
        tl.store(dx_ptr + first + offsets, dx.to(x.dtype), mask=there)

    place = tl.arange(0, FEATURES)[:, None] * FEATURES + tl.arange(0, FEATURES)[None, :]
    sums_ptr += tl.program_id(0) * (2 * FEATURES * FEATURES)
    tl.store(sums_ptr + place, d_a)
    tl.store(sums_ptr + FEATURES * FEATURES + place, d_m)


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
        result = _dot(w, tl.trans(d_a))
    elif part == 1:
        result = _dot(w, d_a)
    elif part == 2:
        w_proj = tl.load(proj_weight_ptr + row * P + column, square, 0.0).to(tl.float32)
        result = _dot(tl.trans(w_proj), d_m)
    else:
        result = _dot(d_m, tl.trans(w))
    if part < 3:
        weight_ptr, bias_ptr = d_qkv_weight_ptr + part * P * P, d_qkv_bias_ptr + part * P
        bias = tl.sum(tl.where(column == P, result, 0.0), 1)
    else:
        weight_ptr, bias_ptr = d_proj_weight_ptr, d_proj_bias_ptr
        bias = tl.load(sums_ptr + FEATURES * FEATURES + i * FEATURES + P + 1, i < P, 0.0)
    tl.store(weight_ptr + row * P + column, result.to(weight_ptr.dtype.element_ty), square)
    tl.store(bias_ptr + i, bias.to(bias_ptr.dtype.element_ty), i < P)


# ------------------------------------------------------------------------------------------------------------ operators


@operator("cross_patch_attention", visible=True)
def cross_patch_attention(
    x_BCnP: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    rate: float,
    seed: Tensor | None,
) -> Tensor:
    """`CrossPatchAttention` with one head, between `pack` and `unpack`: [B, C, n, P] -> [B, C, n, P], n <= 64, P <= 49.

    It is designed for bfloat16 and float16. In float32 it is correct but slow (see `kernels.cross_patch_attention`).

    rate, seed: dropout of the attention weights, whose rows are numbered by image, channel and query
    (`catmodel.dropout`).
    """
    x_BCnP = x_BCnP.contiguous()
    B, C, n, P = x_BCnP.shape
    y_BCnP = torch.empty_like(x_BCnP)
    constants, options = _plan(n, P, rate, FORWARD_WARPS)
    grid = _grid(B * C, constants, FORWARD_PROGRAMS, x_BCnP.device)
    parameters = (parameter.contiguous() for parameter in (qkv_weight, qkv_bias, proj_weight, proj_bias))
    launch(_cross_patch_forward, grid, x_BCnP, *parameters, seed, y_BCnP, B * C, **constants, **options)
    return y_BCnP


@cross_patch_attention.register_fake
def _(x_BCnP, qkv_weight, qkv_bias, proj_weight, proj_bias, rate, seed):
    return torch.empty_like(x_BCnP, memory_format=torch.contiguous_format)


@operator("cross_patch_attention_backward", visible=True)
def cross_patch_attention_backward(
    dy_BCnP: Tensor,
    x_BCnP: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    rate: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and of the four parameters, each in its dtype."""
    dy_BCnP, x_BCnP = dy_BCnP.contiguous(), x_BCnP.contiguous()
    B, C, n, P = x_BCnP.shape
    dx_BCnP = torch.empty_like(x_BCnP)
    constants, options = _plan(n, P, rate, BACKWARD_WARPS)
    grid = _grid(B * C, constants, BACKWARD_PROGRAMS, x_BCnP.device)
    sums = x_BCnP.new_empty(*grid, 2, constants["FEATURES"], constants["FEATURES"], dtype=torch.float32)
    parameters = tuple(parameter.contiguous() for parameter in (qkv_weight, qkv_bias, proj_weight, proj_bias))
    launch(
        _cross_patch_backward, grid, dy_BCnP, x_BCnP, *parameters, seed, dx_BCnP, sums, B * C, **constants, **options
    )
    gradients = tuple(torch.empty_like(parameter) for parameter in parameters)
    sizes = dict(P=P, FEATURES=constants["FEATURES"])
    launch(_cross_patch_unfold, (4,), sums.sum(0), *parameters[:3], *gradients, **sizes, **UNFOLD_OPTIONS)
    return dx_BCnP, *gradients


@cross_patch_attention_backward.register_fake
def _(dy_BCnP, x_BCnP, qkv_weight, qkv_bias, proj_weight, proj_bias, rate, seed):
    inputs = x_BCnP, qkv_weight, qkv_bias, proj_weight, proj_bias
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in inputs)


def _save(ctx, inputs, output):
    *tensors, ctx.rate, seed = inputs
    ctx.save_for_backward(*tensors, seed)


def _differentiate(ctx, dy_BCnP):
    *tensors, seed = ctx.saved_tensors
    return *cross_patch_attention_backward(dy_BCnP, *tensors, ctx.rate, seed), None, None


cross_patch_attention.register_autograd(_differentiate, setup_context=_save)


# ---------------------------------------------------------------------------------------------------- launch parameters

ROWS = 64
FORWARD_WARPS, BACKWARD_WARPS = 4, 4
# Four warps, because on Hopper eight warps would compute each product of 64 rows twice. The backward kernel then uses
# all registers and spills up to 72 bytes per thread (sm_90, P = 49, bfloat16). Separate kernels for the two sums would
# not spill, but would read x and dy again and repeat 6 of the 11 products; a spilled register costs two instructions
# per tile.
UNFOLD_OPTIONS = dict(num_warps=8, num_stages=1)
FORWARD_PROGRAMS, BACKWARD_PROGRAMS = 3, 2  # per multiprocessor: about as many as are resident at once


@functools.cache
def _plan(n: int, P: int, rate: float, warps: int) -> tuple[dict, dict]:
    """Constants and launch options of a kernel."""
    tokens = triton.next_power_of_2(n)
    constants = dict(n=n, P=P, RATE=rate, THRESHOLD=threshold(rate), ROWS=ROWS, TOKENS=tokens, FEATURES=padded(P + 2))
    return constants, dict(num_warps=warps, num_stages=1)


def _grid(channels: int, constants: dict, per_multiprocessor: int, device: torch.device) -> tuple[int]:
    """As many programs as the device holds, at most one per tile. Depends on shapes and device only, as do the sums."""
    return (min(per_multiprocessor * programs(device), blocks(channels, ROWS // constants["TOKENS"])),)


def cases() -> list[dict]:
    """Cases for `benchmarks.kernel_resources`: the four stages of CAT-B at 224 pixels, in bfloat16."""
    parameters = "x_ptr", "qkv_weight_ptr", "qkv_bias_ptr", "proj_weight_ptr", "proj_bias_ptr"
    found = []
    for n in (64, 16, 4, 1):
        for name, kernel, tensors, sums, warps in (
            ("forward", _cross_patch_forward, (*parameters, "y_ptr"), (), FORWARD_WARPS),
            ("backward", _cross_patch_backward, ("dy_ptr", *parameters, "dx_ptr"), ("sums_ptr",), BACKWARD_WARPS),
        ):
            constants, options = _plan(n, 49, 0.2, warps)
            signature = dict.fromkeys(tensors, "*bf16") | dict.fromkeys(sums, "*fp32")
            signature |= dict(seed_ptr="*i32", channels="i32") | dict.fromkeys(constants, "constexpr")
            case = dict(name=f"cross-patch {name}, {n} patches", fn=kernel, signature=signature, constexprs=constants)
            found.append(case | options)
    constants = dict(P=49, FEATURES=64)
    parameters = "qkv_weight_ptr", "qkv_bias_ptr", "proj_weight_ptr"
    written = "d_qkv_weight_ptr", "d_qkv_bias_ptr", "d_proj_weight_ptr", "d_proj_bias_ptr"
    signature = dict(sums_ptr="*fp32") | dict.fromkeys((*parameters, *written), "*bf16")
    signature |= dict.fromkeys(constants, "constexpr")
    case = dict(name="cross-patch parameters", fn=_cross_patch_unfold, signature=signature, constexprs=constants)
    return [*found, case | UNFOLD_OPTIONS]
