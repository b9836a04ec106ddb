"""Transposition between tokens stored row by row, [B, N, C], and the layouts of cross-patch attention.

- [B, C, n, P], a row for each patch, of whose values linear layers are computed (flash attention);
- with `places`, [B, C, P, n], a row for each place in a patch, for the single kernel. Rows of n = 64 or 16 patches are
  read 16 bytes at a time, rows of P = 49 values 2 bytes at a time.

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


@triton.jit
def _transpose_places(
    x_ptr,  # [B, height * width, C]
    y_ptr,  # [B, C, P, n]
    height,
    width,
    C,
    n: tl.constexpr,
    SIZE: tl.constexpr,
    PATCHES: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    TO_X: tl.constexpr,
):
    """One program per image, row of the patches and (fastest) block of channels: that row of all patches.

    Its tile has a row for each of the COLUMNS (SIZE, padded) and channels, in which channels are neighbours.
    """
    across = tl.cdiv(width, SIZE)
    blocks = tl.cdiv(C, CHANNELS)
    image = (tl.program_id(0) // blocks // SIZE).to(tl.int64)
    line = tl.program_id(0) // blocks % SIZE
    i = tl.arange(0, COLUMNS * CHANNELS)
    place = (i // CHANNELS)[:, None]
    channel = (tl.program_id(0) % blocks * CHANNELS + i % CHANNELS)[:, None]
    patch = tl.arange(0, PATCHES)[None, :]
    row, column = patch // across * SIZE + line, patch % across * SIZE + place
    there = (place < SIZE) & (channel < C) & (patch < n)
    inside = there & (row < height) & (column < width)

    at_x = x_ptr + image * height * width * C + (row * width + column) * C + channel
    at_y = y_ptr + (image * C + channel) * (SIZE * SIZE * n) + (line * SIZE + place) * n + patch
    if TO_X:
        tl.store(at_x, tl.load(at_y, mask=there, other=0.0), mask=inside)
    else:
        tl.store(at_y, tl.load(at_x, mask=inside, other=0.0), mask=there)


def _launch(x_BNC: Tensor, y: Tensor, height: int, width: int, size: int, places: bool, to_x: bool) -> None:
    B, C, n = *y.shape[:2], y.shape[3 if places else 2]
    kernel = _transpose_places if places else _transpose
    constants, options = _plan_places(n, size) if places else _plan(size)
    grid = (B * blocks(C, constants["CHANNELS"]) * (size if places else n),)
    launch(kernel, grid, x_BNC, y, height, width, C, TO_X=to_x, **constants, **options)


@functools.cache
def _plan(size: int) -> tuple[dict, dict]:
    """The constants of `_transpose` and its launch options."""
    tokens = padded(size**2)
    return dict(SIZE=size, TOKENS=tokens, CHANNELS=min(TILE // tokens, 64)), dict(num_warps=4, num_stages=1)


@functools.cache
def _plan_places(n: int, size: int) -> tuple[dict, dict]:
    """The constants of `_transpose_places` and its launch options: tiles of 8192 elements, 64 per thread."""
    patches, columns = triton.next_power_of_2(n), triton.next_power_of_2(size)
    channels = max(16, min(8192 // (patches * columns), 64))  # 16 channels fill a sector of 32 bytes
    constants = dict(n=n, SIZE=size, PATCHES=patches, COLUMNS=columns, CHANNELS=channels)
    return constants, dict(num_warps=4, num_stages=1)


@operator("pack", visible=True)
def pack(x_BNC: Tensor, height: int, width: int, size: int, places: bool) -> Tensor:
    """Tokens [B, height * width, C], row by row -> for each channel the values of each patch, [B, C, n, size * size].

    Patches that extend beyond the map on the right or at the bottom are padded with zeros.
    places: the values of all patches at each place instead, [B, C, size * size, n], for n <= 64.
    """
    x_BNC = x_BNC.contiguous()
    y = _new_packed(x_BNC, height, width, size, places)
    _launch(x_BNC, y, height, width, size, places, to_x=False)
    return y


@operator("unpack", visible=True)
def unpack(y: Tensor, height: int, width: int, size: int, places: bool) -> Tensor:
    """The inverse of `pack`: [B, C, n, P] or [B, C, P, n] -> [B, N, C]. Values outside the map are dropped."""
    y = y.contiguous()
    x_BNC = y.new_empty(y.shape[0], height * width, y.shape[1])
    _launch(x_BNC, y, height, width, size, places, to_x=True)
    return x_BNC


@pack.register_fake
def _new_packed(x_BNC, height, width, size, places):
    n, P = -(-height // size) * -(-width // size), size**2
    return x_BNC.new_empty(x_BNC.shape[0], x_BNC.shape[2], *((P, n) if places else (n, P)))


@unpack.register_fake
def _(y, height, width, size, places):
    return y.new_empty(y.shape[0], height * width, y.shape[1])


def _save(ctx, inputs, output):
    _, *ctx.map = inputs


pack.register_autograd(lambda ctx, dy: (unpack(dy, *ctx.map), None, None, None, None), setup_context=_save)
unpack.register_autograd(lambda ctx, dx: (pack(dx, *ctx.map), None, None, None, None), setup_context=_save)


def cases() -> list[dict]:
    """Cases for `benchmarks.kernel_resources`: patches of CAT-B, and its first two stages, in bfloat16."""
    found, tensors = [], dict(x_ptr="*bf16", y_ptr="*bf16")
    for name, to_x in (("pack", False), ("unpack", True)):
        constants, options = _plan(7)
        constants = dict(TO_X=to_x, **constants)
        signature = tensors | dict(height="i32", width="i32", C="i32") | dict.fromkeys(constants, "constexpr")
        found.append(dict(name=name, fn=_transpose, signature=signature, constexprs=constants, **options))
        for side in (56, 28):
            constants, options = _plan_places((side // 7) ** 2, 7)
            constants = dict(TO_X=to_x, **constants)
            numbers = dict(height="i32", width="i32", C="i32:16")
            signature = tensors | numbers | dict.fromkeys(constants, "constexpr")
            title = f"{name} places, {(side // 7) ** 2} patches"
            found.append(dict(name=title, fn=_transpose_places, signature=signature, constexprs=constants, **options))
    return found
