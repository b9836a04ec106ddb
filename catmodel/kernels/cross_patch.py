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
from catmodel.kernels import cross_patch_weights
from catmodel.kernels.cross_patch_weights import dot, fold, unfold
from catmodel.kernels.dropout import keep_mask
from catmodel.kernels.launch import blocks, launch, operator, padded, programs

# -------------------------------------------------------------------------------------------------------------- kernels


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
    height,
    width,
    n: tl.constexpr,
    SIZE: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    PACKED: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Of a tile's elements the first, offsets from it and a mask [ROWS, FEATURES].

    Also the tile's image, and each row's channel, counted through all images.
    """
    P: tl.constexpr = SIZE * SIZE
    CHANNELS: tl.constexpr = ROWS // TOKENS
    BLOCKS: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    feature = tl.arange(0, FEATURES)
    image, first = tile // BLOCKS, tile % BLOCKS * CHANNELS
    there = ((patch < n) & (channel < C - first))[:, None] & (feature < P)[None, :]
    if PACKED:
        start = (image * C + first) * tl.full((), P * n, tl.int64)
        offsets = (channel * (P * n) + patch)[:, None] + feature[None, :] * n
    else:
        columns = tl.cdiv(width, SIZE)
        top, left, y, x = patch // columns * SIZE, patch % columns * SIZE, feature // SIZE, feature % SIZE
        if RAGGED:
            there &= (top[:, None] + y[None, :] < height) & (left[:, None] + x[None, :] < width)
        start = tl.full((), C, tl.int64) * image * height * width + first
        offsets = ((top * width + left) * C + channel)[:, None] + ((y * width + x) * C)[None, :]
    return start, offsets, there, image, image * C + first + channel


@triton.jit
def _weights(logits, channel, patch, n: tl.constexpr):
    """The softmax within each channel, fp32 [ROWS, ROWS]. Every row, including padding, has a finite logit."""
    allowed = (channel[:, None] == channel[None, :]) & (patch < n)[None, :]
    logits = tl.where(allowed, logits, float("-inf"))
    weights = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    return weights / tl.sum(weights, axis=1)[:, None]


@triton.jit
def _cross_patch_forward(
    x_ptr,  # [B, C, P, n] if PACKED, else [B, height * width, C]
    qkv_weight_ptr,
    qkv_bias_ptr,
    proj_weight_ptr,
    proj_bias_ptr,
    seed_ptr,
    scale_ptr,  # [B]: of each image's output, or None
    y_ptr,  # as x
    tiles,
    height,
    width,
    n: tl.constexpr,
    SIZE: tl.constexpr,
    C: tl.constexpr,
    PACKED: tl.constexpr,
    RAGGED: tl.constexpr,  # the map is not divided into whole patches; only if not PACKED
    RATE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    P: tl.constexpr = SIZE * SIZE
    channel, patch = _rows(ROWS, TOKENS, PACKED)
    a, m = fold(qkv_weight_ptr, qkv_bias_ptr, proj_weight_ptr, proj_bias_ptr, P, FEATURES)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        first, offsets, there, image, sequence = _places(
            tile, channel, patch, height, width, n, SIZE, C, ROWS, TOKENS, FEATURES, PACKED, RAGGED
        )
        x = tl.load(x_ptr + first + offsets, mask=there, other=_one(P, a.dtype, FEATURES))
        xa = dot(x, a).to(x.dtype)
        weights = _weights(dot(xa, tl.trans(x)), channel, patch, n)
        if RATE > 0:
            keep = keep_mask(tl.load(seed_ptr), sequence * n + patch, patch, THRESHOLD)
            weights = tl.where(keep, weights * (1 / (1 - RATE)), 0.0)
        mixed = (dot(weights.to(x.dtype), x) + _one(P + 1, tl.float32, FEATURES)).to(x.dtype)
        y = dot(mixed, tl.trans(m))
        if scale_ptr is not None:
            y *= tl.load(scale_ptr + image).to(tl.float32)
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
    scale_ptr,
    dx_ptr,
    sums_ptr,  # float32 [programs, 2, FEATURES, FEATURES]: gradients of A / sqrt(P) and M
    tiles,
    height,
    width,
    n: tl.constexpr,
    SIZE: tl.constexpr,
    C: tl.constexpr,
    PACKED: tl.constexpr,
    RAGGED: tl.constexpr,  # the map is not divided into whole patches; only if not PACKED
    RATE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    P: tl.constexpr = SIZE * SIZE
    channel, patch = _rows(ROWS, TOKENS, PACKED)
    a, m = fold(qkv_weight_ptr, qkv_bias_ptr, proj_weight_ptr, proj_bias_ptr, P, FEATURES)
    d_a = tl.zeros((FEATURES, FEATURES), tl.float32)
    d_m = tl.zeros((FEATURES, FEATURES), tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        first, offsets, there, image, sequence = _places(
            tile, channel, patch, height, width, n, SIZE, C, ROWS, TOKENS, FEATURES, PACKED, RAGGED
        )
        x = tl.load(x_ptr + first + offsets, mask=there, other=_one(P, a.dtype, FEATURES))
        dy = tl.load(dy_ptr + first + offsets, mask=there, other=0.0)  # rows of padding are zero and add nothing
        if scale_ptr is not None:
            dy = (dy.to(tl.float32) * tl.load(scale_ptr + image).to(tl.float32)).to(x.dtype)
        xa = dot(x, a).to(x.dtype)
        weights = _weights(dot(xa, tl.trans(x)), channel, patch, n)
        dmixed = dot(dy, m).to(x.dtype)
        dweights = dot(dmixed, tl.trans(x))
        dropped = weights
        if RATE > 0:
            keep = keep_mask(tl.load(seed_ptr), sequence * n + patch, patch, THRESHOLD)
            dropped = tl.where(keep, weights * (1 / (1 - RATE)), 0.0)
            dweights = tl.where(keep, dweights * (1 / (1 - RATE)), 0.0)
        dlogits = (weights * (dweights - tl.sum(weights * dweights, axis=1)[:, None])).to(x.dtype)
        dropped = dropped.to(x.dtype)
        mixed = (dot(dropped, x) + _one(P + 1, tl.float32, FEATURES)).to(x.dtype)
        d_m = tl.dot(tl.trans(dy), mixed, d_m, input_precision="ieee")
        dxa = dot(dlogits, x).to(x.dtype)
        d_a = tl.dot(tl.trans(x), dxa, d_a, input_precision="ieee")
        dx = dot(tl.trans(dropped), dmixed)
        dx = tl.dot(tl.trans(dlogits), xa, dx, input_precision="ieee")
        dx = tl.dot(dxa, tl.trans(a), dx, input_precision="ieee")
        tl.store(dx_ptr + first + offsets, dx.to(x.dtype), mask=there)

    place = tl.arange(0, FEATURES)[:, None] * FEATURES + tl.arange(0, FEATURES)[None, :]
    sums_ptr += tl.program_id(0) * (2 * FEATURES * FEATURES)
    tl.store(sums_ptr + place, d_a)
    tl.store(sums_ptr + FEATURES * FEATURES + place, d_m)


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
    scale: Tensor | None,
) -> Tensor:
    """`CrossPatchAttention` with one head, for n <= 64 patches of P <= 49 tokens.

    x: the tokens of a map of height x width, [B, N, C], or packed, [B, C, P, n]. So is the result.
    rate, seed: dropout of the attention weights, whose rows are numbered by image, channel and query
    (`catmodel.dropout`).
    scale: factors of the images' results [B]; None: all are 1.

    It is designed for bfloat16 and float16. In float32 it is correct but slow (see `kernels.cross_patch_attention`).
    """
    x = x.contiguous()
    y = torch.empty_like(x)
    tiles, constants = _plan(x.shape, len(proj_bias), height, width, rate)
    grid = (min(FORWARD_PROGRAMS * programs(x.device), tiles),)
    parameters = (parameter.contiguous() for parameter in (qkv_weight, qkv_bias, proj_weight, proj_bias))
    arguments = x, *parameters, seed, scale, y, tiles, height, width
    launch(_cross_patch_forward, grid, *arguments, **constants, **OPTIONS)
    return y


@cross_patch_attention.register_fake
def _(x, qkv_weight, qkv_bias, proj_weight, proj_bias, height, width, rate, seed, scale):
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
    scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and of the four parameters, each in its dtype."""
    dy, x = dy.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    tiles, constants = _plan(x.shape, len(proj_bias), height, width, rate)
    grid = (min(BACKWARD_PROGRAMS * programs(x.device), tiles),)
    features = constants["FEATURES"]
    sums = x.new_empty(*grid, 2, features, features, dtype=torch.float32)
    parameters = tuple(parameter.contiguous() for parameter in (qkv_weight, qkv_bias, proj_weight, proj_bias))
    arguments = dy, x, *parameters, seed, scale, dx, sums, tiles, height, width
    launch(_cross_patch_backward, grid, *arguments, **constants, **OPTIONS)
    return dx, *unfold(sums.sum(0), *parameters)


@cross_patch_attention_backward.register_fake
def _(dy, x, qkv_weight, qkv_bias, proj_weight, proj_bias, height, width, rate, seed, scale):
    inputs = x, qkv_weight, qkv_bias, proj_weight, proj_bias
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in inputs)


def _save(ctx, inputs, output):
    *tensors, ctx.height, ctx.width, ctx.rate, seed, scale = inputs
    ctx.save_for_backward(*tensors, seed, scale)


def _differentiate(ctx, dy):
    *tensors, seed, scale = ctx.saved_tensors
    gradients = cross_patch_attention_backward(dy, *tensors, ctx.height, ctx.width, ctx.rate, seed, scale)
    return *gradients, None, None, None, None, None


cross_patch_attention.register_autograd(_differentiate, setup_context=_save)


# ---------------------------------------------------------------------------------------------------- launch parameters

ROWS = 64  # of a tile
# Four warps, because on Hopper eight warps would compute each product of 64 rows twice.
OPTIONS = dict(num_warps=4, num_stages=1)
# Programs per multiprocessor: as many as its registers hold at once. The order of the sums depends on the device only.
FORWARD_PROGRAMS, BACKWARD_PROGRAMS = 4, 2


@functools.cache
def _plan(shape: torch.Size, P: int, height: int, width: int, rate: float) -> tuple[int, dict]:
    """The number of tiles, and the constants of both kernels, for x of this shape.

    The sides of the map are no constants: dense images have many sizes, and would each take seconds to compile.
    """
    packed, size = len(shape) == 4, math.isqrt(P)
    B, C = shape[0], shape[1 if packed else 2]
    n = blocks(height, size) * blocks(width, size)
    tokens = triton.next_power_of_2(n)
    ragged = not packed and (height % size > 0 or width % size > 0)
    place = dict(n=n, SIZE=size, C=C, PACKED=packed, RAGGED=ragged)
    sizes = dict(ROWS=ROWS, TOKENS=tokens, FEATURES=padded(P + 2))
    return B * blocks(C, ROWS // tokens), dict(place, RATE=rate, THRESHOLD=threshold(rate), **sizes)


def cases() -> list[dict]:
    """Cases for `benchmarks.kernel_resources`: the four stages of CAT-B at 224 pixels, in bfloat16."""
    parameters = "x_ptr", "qkv_weight_ptr", "qkv_bias_ptr", "proj_weight_ptr", "proj_bias_ptr"
    found = []
    for side, shape in ((56, (1, 96, 49, 64)), (28, (1, 192, 49, 16)), (14, (1, 196, 384)), (7, (1, 49, 768))):
        _, constants = _plan(shape, 49, side, side, 0.2)
        for name, kernel, tensors, sums in (
            ("forward", _cross_patch_forward, (*parameters, "y_ptr"), ()),
            ("backward", _cross_patch_backward, ("dy_ptr", *parameters, "dx_ptr"), ("sums_ptr",)),
        ):
            signature = dict.fromkeys(tensors, "*bf16") | dict.fromkeys(sums, "*fp32")
            signature |= dict(seed_ptr="*i32", scale_ptr="*bf16") | dict.fromkeys(("tiles", "height", "width"), "i32")
            signature |= dict.fromkeys(constants, "constexpr")
            name = f"cross-patch {name}, {(side // 7) ** 2} patches"
            found.append(dict(name=name, fn=kernel, signature=signature, constexprs=constants, **OPTIONS))
    return [*found, *cross_patch_weights.cases()]
