"""Cross-patch attention (`catmodel.attention.CrossPatchAttention`) of few patches: one kernel forward, one backward.

With a single head, all maps from a channel's patches to the softmax and from the softmax to the output are linear maps
of P to P features, so two matrices replace the four weights. Let x be the patches followed by a column of ones, and W
the weights with their bias as an additional column:

    q k^T = x A x^T, A = W_q^T W_k              proj(weights v) = (weights x) M^T + bias, M = W_proj W_v

This needs 4 products per tile instead of 6, backward 11 instead of 17, and two sums of gradients instead of four, few
enough to stay in registers. Every program computes A and M, with fp32 sums, and rounds them to the dtype of the input,
as q, k and v are rounded elsewhere. Only the input is saved for the backward pass.

A tile has ROWS rows of P features: TOKENS (n, padded to a power of two) of each of ROWS / TOKENS channels, which attend
to each other under a mask. Features are padded to FEATURES >= P + 2: after the column of ones there is one for the bias
of the projection.

Tiles are read from a map's tokens as they are stored, or, if it is divided into so many patches that a tile's channels
would fill only a part of the memory's sectors of 32 bytes, after they were packed (`catmodel.kernels.pack`).

Programs loop over the tiles with a fixed stride. Backward, they sum the gradients of A and M in fp32. PyTorch then adds
the programs' sums in a fixed order, and a third kernel obtains the gradients of the parameters by the product rule.
"""

import functools
import math

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
def _rows(ROWS: tl.constexpr, TOKENS: tl.constexpr, PACKED: tl.constexpr):
    """The channel of each row of a tile, counted from the tile's first, and its patch."""
    i = tl.arange(0, ROWS)
    if PACKED:
        return i // TOKENS, i % TOKENS
    return i % (ROWS // TOKENS), i // (ROWS // TOKENS)  # neighbouring channels are neighbours in memory


@triton.jit
def _places(
    tile,
    channel,
    patch,
    n: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Of a tile's elements the first, offsets from it and a mask [ROWS, FEATURES]; each row's channel of all images."""
    P: tl.constexpr = SIZE * SIZE
    CHANNELS: tl.constexpr = ROWS // TOKENS
    BLOCKS: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    COLUMNS: tl.constexpr = (WIDTH + SIZE - 1) // SIZE
    feature = tl.arange(0, FEATURES)
    image, first = tile // BLOCKS, tile % BLOCKS * CHANNELS
    there = ((patch < n) & (channel < C - first))[:, None] & (feature < P)[None, :]
    if PACKED:
        row = channel * n + patch
        if n == TOKENS:  # rows are consecutive, so the compiler computes one address instead of one per element
            row = tl.arange(0, ROWS)
        start = (image * C + first) * tl.full((), n * P, tl.int64)
        offsets = row[:, None] * P + feature[None, :]
    else:
        top, left, y, x = patch // COLUMNS * SIZE, patch % COLUMNS * SIZE, feature // SIZE, feature % SIZE
        if HEIGHT % SIZE > 0:
            there &= top[:, None] + y[None, :] < HEIGHT
        if WIDTH % SIZE > 0:
            there &= left[:, None] + x[None, :] < WIDTH
        start = image * tl.full((), HEIGHT * WIDTH * C, tl.int64) + first
        offsets = ((top * WIDTH + left) * C + channel)[:, None] + ((y * WIDTH + x) * C)[None, :]
    return start, offsets, there, image * C + first + channel


@triton.jit
def _weights(logits, channel, patch, n: tl.constexpr):
    """The softmax within each channel, fp32 [ROWS, ROWS]. Every row, including padding, has a finite logit."""
    allowed = (channel[:, None] == channel[None, :]) & (patch < n)[None, :]
    logits = tl.where(allowed, logits, float("-inf"))
    weights = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    return weights / tl.sum(weights, axis=1)[:, None]


@triton.jit
def _cross_patch_forward(
    x_ptr,  # [B, C, n, P] if PACKED, else [B, HEIGHT * WIDTH, C]
    qkv_weight_ptr,
    qkv_bias_ptr,
    proj_weight_ptr,
    proj_bias_ptr,
    seed_ptr,
    y_ptr,  # as x
    tiles,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    C: tl.constexpr,
    PACKED: tl.constexpr,
    RATE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    P: tl.constexpr = SIZE * SIZE
    n: tl.constexpr = ((HEIGHT + SIZE - 1) // SIZE) * ((WIDTH + SIZE - 1) // SIZE)
    channel, patch = _rows(ROWS, TOKENS, PACKED)
    a, m = _fold(qkv_weight_ptr, qkv_bias_ptr, proj_weight_ptr, proj_bias_ptr, P, FEATURES)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        first, offsets, there, sequence = _places(
            tile, channel, patch, n, HEIGHT, WIDTH, SIZE, C, ROWS, TOKENS, FEATURES, PACKED
        )
        x = tl.load(x_ptr + first + offsets, mask=there, other=_one(P, a.dtype, FEATURES))
        xa = _dot(x, a).to(x.dtype)
        weights = _weights(_dot(xa, tl.trans(x)), channel, patch, n)
        if RATE > 0:
            keep = keep_mask(tl.load(seed_ptr), sequence * n + patch, patch, THRESHOLD)
            weights = tl.where(keep, weights * (1 / (1 - RATE)), 0.0)
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
    tiles,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    C: tl.constexpr,
    PACKED: tl.constexpr,
    RATE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    P: tl.constexpr = SIZE * SIZE
    n: tl.constexpr = ((HEIGHT + SIZE - 1) // SIZE) * ((WIDTH + SIZE - 1) // SIZE)
    channel, patch = _rows(ROWS, TOKENS, PACKED)
    a, m = _fold(qkv_weight_ptr, qkv_bias_ptr, proj_weight_ptr, proj_bias_ptr, P, FEATURES)
    d_a = tl.zeros((FEATURES, FEATURES), tl.float32)
    d_m = tl.zeros((FEATURES, FEATURES), tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        first, offsets, there, sequence = _places(
            tile, channel, patch, n, HEIGHT, WIDTH, SIZE, C, ROWS, TOKENS, FEATURES, PACKED
        )
        x = tl.load(x_ptr + first + offsets, mask=there, other=_one(P, a.dtype, FEATURES))
        dy = tl.load(dy_ptr + first + offsets, mask=there, other=0.0)  # rows of padding are zero and add nothing
        xa = _dot(x, a).to(x.dtype)
        weights = _weights(_dot(xa, tl.trans(x)), channel, patch, n)
        dmixed = _dot(dy, m).to(x.dtype)
        dweights = _dot(dmixed, tl.trans(x))
        dropped = weights
        if RATE > 0:
            keep = keep_mask(tl.load(seed_ptr), sequence * n + patch, patch, THRESHOLD)
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
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    height: int,
    width: int,
    rate: float,
    seed: Tensor | None,
) -> Tensor:
    """`CrossPatchAttention` with one head, for n <= 64 patches of P <= 49 tokens.

    x: the tokens of a map of height x width, [B, N, C], or packed, [B, C, n, P]. So is the result.
    rate, seed: dropout of the attention weights, whose rows are numbered by image, channel and query
    (`catmodel.dropout`).

    It is designed for bfloat16 and float16. In float32 it is correct but slow (see `kernels.cross_patch_attention`).
    """
    x = x.contiguous()
    y = torch.empty_like(x)
    tiles, constants = _plan(x.shape, len(proj_bias), height, width, rate)
    grid = (min(FORWARD_PROGRAMS * programs(x.device), tiles),)
    parameters = (parameter.contiguous() for parameter in (qkv_weight, qkv_bias, proj_weight, proj_bias))
    launch(_cross_patch_forward, grid, x, *parameters, seed, y, tiles, **constants, **FORWARD_OPTIONS)
    return y


@cross_patch_attention.register_fake
def _(x, qkv_weight, qkv_bias, proj_weight, proj_bias, height, width, rate, seed):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@operator("cross_patch_attention_backward", visible=True)
def cross_patch_attention_backward(
    dy: Tensor,
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    height: int,
    width: int,
    rate: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and of the four parameters, each in its dtype."""
    dy, x = dy.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    tiles, constants = _plan(x.shape, len(proj_bias), height, width, rate)
    grid = (min(BACKWARD_PROGRAMS * programs(x.device), tiles),)
    features = constants["FEATURES"]
    sums = x.new_empty(*grid, 2, features, features, dtype=torch.float32)
    parameters = tuple(parameter.contiguous() for parameter in (qkv_weight, qkv_bias, proj_weight, proj_bias))
    arguments = dy, x, *parameters, seed, dx, sums, tiles
    launch(_cross_patch_backward, grid, *arguments, **constants, **BACKWARD_OPTIONS)
    gradients = tuple(torch.empty_like(parameter) for parameter in parameters)
    sizes = dict(P=len(proj_bias), FEATURES=features)
    launch(_cross_patch_unfold, (4,), sums.sum(0), *parameters[:3], *gradients, **sizes, **UNFOLD_OPTIONS)
    return dx, *gradients


@cross_patch_attention_backward.register_fake
def _(dy, x, qkv_weight, qkv_bias, proj_weight, proj_bias, height, width, rate, seed):
    inputs = x, qkv_weight, qkv_bias, proj_weight, proj_bias
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in inputs)


def _save(ctx, inputs, output):
    *tensors, ctx.height, ctx.width, ctx.rate, seed = inputs
    ctx.save_for_backward(*tensors, seed)


def _differentiate(ctx, dy):
    *tensors, seed = ctx.saved_tensors
    gradients = cross_patch_attention_backward(dy, *tensors, ctx.height, ctx.width, ctx.rate, seed)
    return *gradients, None, None, None, None


cross_patch_attention.register_autograd(_differentiate, setup_context=_save)


# ---------------------------------------------------------------------------------------------------- launch parameters

ROWS = 64  # of a tile
# Four warps, because on Hopper eight warps would compute each product of 64 rows twice. Of packed maps, the backward
# kernel then uses all registers and spills up to 56 bytes per thread (sm_90, P = 49, bfloat16). Separate kernels for
# the two sums would not spill, but would read x and dy again and repeat 6 of the 11 products; a spilled register costs
# two instructions per tile.
FORWARD_OPTIONS = BACKWARD_OPTIONS = dict(num_warps=4, num_stages=1)
UNFOLD_OPTIONS = dict(num_warps=8, num_stages=1)
# Programs per multiprocessor: about as many as are resident at once. Depends on the device only, as do the sums.
FORWARD_PROGRAMS, BACKWARD_PROGRAMS = 3, 2


@functools.cache
def _plan(shape: torch.Size, P: int, height: int, width: int, rate: float) -> tuple[int, dict]:
    """The number of tiles, and the constants of both kernels, for x of this shape."""
    packed, size = len(shape) == 4, math.isqrt(P)
    B, C = shape[0], shape[1 if packed else 2]
    tokens = triton.next_power_of_2(blocks(height, size) * blocks(width, size))
    place = dict(HEIGHT=height, WIDTH=width, SIZE=size, C=C, PACKED=packed)
    sizes = dict(ROWS=ROWS, TOKENS=tokens, FEATURES=padded(P + 2))
    return B * blocks(C, ROWS // tokens), dict(place, RATE=rate, THRESHOLD=threshold(rate), **sizes)


def cases() -> list[dict]:
    """Cases for `benchmarks.kernel_resources`: the four stages of CAT-B at 224 pixels, in bfloat16."""
    parameters = "x_ptr", "qkv_weight_ptr", "qkv_bias_ptr", "proj_weight_ptr", "proj_bias_ptr"
    found = []
    for side, shape in ((56, (1, 96, 64, 49)), (28, (1, 192, 16, 49)), (14, (1, 196, 384)), (7, (1, 49, 768))):
        _, constants = _plan(shape, 49, side, side, 0.2)
        for name, kernel, tensors, sums, options in (
            ("forward", _cross_patch_forward, (*parameters, "y_ptr"), (), FORWARD_OPTIONS),
            ("backward", _cross_patch_backward, ("dy_ptr", *parameters, "dx_ptr"), ("sums_ptr",), BACKWARD_OPTIONS),
        ):
            signature = dict.fromkeys(tensors, "*bf16") | dict.fromkeys(sums, "*fp32")
            signature |= dict(seed_ptr="*i32", tiles="i32") | dict.fromkeys(constants, "constexpr")
            name = f"cross-patch {name}, {(side // 7) ** 2} patches"
            found.append(dict(name=name, fn=kernel, signature=signature, constexprs=constants, **options))
    constants = dict(P=49, FEATURES=64)
    written = "d_qkv_weight_ptr", "d_qkv_bias_ptr", "d_proj_weight_ptr", "d_proj_bias_ptr"
    signature = dict(sums_ptr="*fp32") | dict.fromkeys((*parameters[1:4], *written), "*bf16")
    signature |= dict.fromkeys(constants, "constexpr")
    case = dict(fn=_cross_patch_unfold, signature=signature, constexprs=constants, **UNFOLD_OPTIONS)
    return [*found, dict(name="cross-patch parameters", **case)]
