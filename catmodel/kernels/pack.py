"""Transposition between tokens stored row by row and the rows of cross-patch attention: [B, N, C] <-> [B, C, n, P].

PyTorch needs up to four passes over memory for it (pad, cut, transpose; paste, crop), these kernels one. The gradient
of either direction is the other one, because padding with zeros and cropping are adjoint.

For the shape letters see `catmodel.attention`.
"""

import functools

import triton
import triton.language as tl
from torch import Tensor

from catmodel.kernels.launch import blocks, launch, operator, padded

TILE = 4096  # elements of a tile: 32 per thread


@triton.jit
def _transpose(
    x_ptr,  # [B, height * width, C]
    y_ptr,  # [B, C, n, P]
    height,
    width,
    C,
    SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    TO_X: tl.constexpr,
):
    """One program per image, block of channels and (fastest) patch.

    Neighbouring programs write short rows of P values next to each other, which the cache combines.
    """
    P: tl.constexpr = SIZE * SIZE
    columns = tl.cdiv(width, SIZE)
    n = tl.cdiv(height, SIZE) * columns
    blocks = tl.cdiv(C, CHANNELS)
    patch = tl.program_id(0) % n
    block = tl.program_id(0) // n % blocks
    image = (tl.program_id(0) // n // blocks).to(tl.int64)
    p = tl.arange(0, TOKENS)
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    row = patch // columns * SIZE + p // SIZE
    column = patch % columns * SIZE + p % SIZE
    inside = (p < P) & (row < height) & (column < width)

    at_x = x_ptr + image * height * width * C + (row * width + column)[:, None] * C + channel[None, :]
    at_y = y_ptr + (image * C + channel[:, None]) * n * P + patch * P + p[None, :]
    if TO_X:
        y = tl.load(at_y, mask=(channel < C)[:, None] & inside[None, :], other=0.0)
        tl.store(at_x, tl.trans(y), mask=inside[:, None] & (channel < C)[None, :])
    else:
        x = tl.load(at_x, mask=inside[:, None] & (channel < C)[None, :], other=0.0)
        tl.store(at_y, tl.trans(x), mask=(channel < C)[:, None] & (p < P)[None, :])


def _launch(x_BNC: Tensor, y_BCnP: Tensor, height: int, width: int, size: int, to_x: bool) -> None:
    B, C, n, _ = y_BCnP.shape
    constants, options = _plan(size, to_x)
    grid = (B * blocks(C, constants["CHANNELS"]) * n,)
    launch(_transpose, grid, x_BNC, y_BCnP, height, width, C, **constants, **options)


@functools.cache
def _plan(size: int, to_x: bool) -> tuple[dict, dict]:
    """The constants and the launch options of `_transpose`."""
    tokens = padded(size**2)
    return dict(SIZE=size, TOKENS=tokens, CHANNELS=min(TILE // tokens, 64), TO_X=to_x), dict(num_warps=4, num_stages=1)


@operator("pack", visible=True)
def pack(x_BNC: Tensor, height: int, width: int, size: int) -> Tensor:
    """Tokens [B, height * width, C], row by row -> for each channel the values of each patch, [B, C, n, size * size].

    Patches that extend beyond the map on the right or at the bottom are padded with zeros.
    """
    x_BNC = x_BNC.contiguous()
    y_BCnP = _new_packed(x_BNC, height, width, size)
    _launch(x_BNC, y_BCnP, height, width, size, to_x=False)
    return y_BCnP


@operator("unpack", visible=True)
def unpack(y_BCnP: Tensor, height: int, width: int, size: int) -> Tensor:
    """The inverse of `pack`: [B, C, n, P] -> [B, height * width, C]. Values outside the map are dropped."""
    y_BCnP = y_BCnP.contiguous()
    x_BNC = y_BCnP.new_empty(y_BCnP.shape[0], height * width, y_BCnP.shape[1])
    _launch(x_BNC, y_BCnP, height, width, size, to_x=True)
    return x_BNC


@pack.register_fake
def _new_packed(x_BNC, height, width, size):
    n = -(-height // size) * -(-width // size)
    return x_BNC.new_empty(x_BNC.shape[0], x_BNC.shape[2], n, size**2)


@unpack.register_fake
def _(y_BCnP, height, width, size):
    return y_BCnP.new_empty(y_BCnP.shape[0], height * width, y_BCnP.shape[1])


def _save(ctx, inputs, output):
    _, *ctx.map = inputs


pack.register_autograd(lambda ctx, dy: (unpack(dy, *ctx.map), None, None, None), setup_context=_save)
unpack.register_autograd(lambda ctx, dx: (pack(dx, *ctx.map), None, None, None), setup_context=_save)


def cases() -> list[dict]:
    """Cases for `benchmarks.kernel_resources`: patches of CAT-B, in bfloat16."""
    found = []
    for name, to_x in (("pack", False), ("unpack", True)):
        constants, options = _plan(7, to_x)
        signature = dict(x_ptr="*bf16", y_ptr="*bf16", height="i32", width="i32", C="i32") | dict.fromkeys(
            constants, "constexpr"
        )
        found.append(dict(name=name, fn=_transpose, signature=signature, constexprs=constants, **options))
    return found
