"""CoT's local aggregation (`catmodel.aggregation`), forward and backward: a 3 x 3 kernel of its own for each pixel.

Channels a * G + g, a = 0 .. C/G - 1, use kernel g of a pixel. A program processes a block of an image's G * H * W
kernels: it loads the nine weights of each once and loops over a. In the backward pass it gathers a value's gradient
from the nine pixels that used the value, and sums a weight's gradient over a, so that no two programs write the same
element. Sums are in fp32.

Elements moved per pixel: forward 2C + 9G, backward 3C + 18G. Each is read from memory once; the other eight reads hit
the caches. Each of PyTorch's nine products goes through memory. These figures are counted, not measured.

For the shape letters see `catmodel.aggregation`. Values may be contiguous or channels-last. Other tensors are copied to
the values' layout if they have another.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from catmodel.kernels.launch import blocks, launch, operator


@triton.jit
def _steps(pixels, G: tl.constexpr, SHARE: tl.constexpr, LAST: tl.constexpr):
    """Strides in memory: of values by pixel and by a, of weights by pixel and by k."""
    if LAST:
        return G * SHARE, G, G * 9, 1
    else:
        return 1, G * pixels, 1, pixels


@triton.jit
def _kernels(pixels, G: tl.constexpr, SHARE: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr):
    """The program's image, and positions of each of its kernels, in memory order.

    They are: its pixel, the offsets in the image of the value for a = 0 and of the weight for k = 0, and whether it is
    inside the image.
    """
    blocks = tl.cdiv(pixels * G, BLOCK)
    image = (tl.program_id(0) // blocks).to(tl.int64)  # only its start can exceed 2^31 elements
    kernel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    if LAST:
        pixel, g = kernel // G, kernel % G
        value, weight = pixel * (G * SHARE) + g, kernel * 9
    else:
        pixel, g = kernel % pixels, kernel // pixels
        value, weight = kernel, g * (9 * pixels) + pixel
    return image, pixel, value, weight, kernel < pixels * G


@triton.jit
def _neighbours(pixel, pixels, width, mask):
    """Offset in pixels of each neighbour, and whether it exists. In the opposite direction: -steps[k], has[8 - k]."""
    steps, has = (), ()
    for k in tl.static_range(9):
        step = (k // 3 - 1) * width
        column = pixel % width + (k % 3 - 1)
        has += (mask & (pixel + step >= 0) & (pixel + step < pixels) & (column >= 0) & (column < width),)
        steps += (step + (k % 3 - 1),)
    return steps, has


@triton.jit
def _aggregate_forward(
    values_ptr,
    weights_ptr,
    y_ptr,
    pixels,
    width,
    G: tl.constexpr,
    SHARE: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image, pixel, value, weight, mask = _kernels(pixels, G, SHARE, LAST, BLOCK)
    pixel_step, channel_step, _, weight_step = _steps(pixels, G, SHARE, LAST)
    steps, has = _neighbours(pixel, pixels, width, mask)
    values_ptr += image * G * SHARE * pixels + value
    y_ptr += image * G * SHARE * pixels + value
    weights_ptr += image * G * 9 * pixels + weight

    weights = ()
    for k in tl.static_range(9):
        weights += (tl.load(weights_ptr + k * weight_step, mask=mask, other=0.0).to(tl.float32),)
    for _ in range(SHARE):
        y = tl.zeros((BLOCK,), tl.float32)
        for k in tl.static_range(9):
            y += weights[k] * tl.load(values_ptr + steps[k] * pixel_step, mask=has[k], other=0.0).to(tl.float32)
        tl.store(y_ptr, y.to(y_ptr.dtype.element_ty), mask=mask)
        values_ptr += channel_step
        y_ptr += channel_step


@triton.jit
def _aggregate_backward(
    dy_ptr,
    values_ptr,
    weights_ptr,
    dvalues_ptr,
    dweights_ptr,
    pixels,
    width,
    G: tl.constexpr,
    SHARE: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image, pixel, value, weight, mask = _kernels(pixels, G, SHARE, LAST, BLOCK)
    pixel_step, channel_step, kernel_step, weight_step = _steps(pixels, G, SHARE, LAST)
    steps, has = _neighbours(pixel, pixels, width, mask)
    dy_ptr += image * G * SHARE * pixels + value
    values_ptr += image * G * SHARE * pixels + value
    dvalues_ptr += image * G * SHARE * pixels + value
    weights_ptr += image * G * 9 * pixels + weight
    dweights_ptr += image * G * 9 * pixels + weight

    weights, dweights = (), ()  # weights[k] belongs to the pixel whose neighbour k is this pixel
    for k in tl.static_range(9):
        place = k * weight_step - steps[k] * kernel_step
        weights += (tl.load(weights_ptr + place, mask=has[8 - k], other=0.0).to(tl.float32),)
        dweights += (tl.zeros((BLOCK,), tl.float32),)
    for _ in range(SHARE):
        dy = tl.load(dy_ptr, mask=mask, other=0.0).to(tl.float32)
        dvalue = tl.zeros((BLOCK,), tl.float32)
        sums = ()
        for k in tl.static_range(9):
            step = steps[k] * pixel_step
            dvalue += weights[k] * tl.load(dy_ptr - step, mask=has[8 - k], other=0.0).to(tl.float32)
            sums += (dweights[k] + dy * tl.load(values_ptr + step, mask=has[k], other=0.0).to(tl.float32),)
        dweights = sums
        tl.store(dvalues_ptr, dvalue.to(dvalues_ptr.dtype.element_ty), mask=mask)
        dy_ptr += channel_step
        values_ptr += channel_step
        dvalues_ptr += channel_step
    for k in tl.static_range(9):
        tl.store(dweights_ptr + k * weight_step, dweights[k].to(dweights_ptr.dtype.element_ty), mask=mask)


def _channels_last(values_BCHW: Tensor) -> bool:
    return not values_BCHW.is_contiguous() and values_BCHW.is_contiguous(memory_format=torch.channels_last)


def _lay(x_BCHW: Tensor, last: bool) -> Tensor:
    return x_BCHW.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _lay_weights(weights_BGKHW: Tensor, last: bool) -> Tensor:
    return _lay(weights_BGKHW.flatten(1, 2), last).unflatten(1, (-1, 9))


@functools.cache
def _plan(C: int, G: int, last: bool) -> tuple[dict, dict]:
    """Constants and launch options. Each thread has two of the kernels, so that a warp loads neighbours together."""
    return dict(G=G, SHARE=C // G, LAST=last, BLOCK=512), dict(num_warps=8, num_stages=1)


def _grid(weights_BGKHW: Tensor, constants: dict) -> tuple[int]:
    B, G, _, H, W = weights_BGKHW.shape
    return (B * blocks(G * H * W, constants["BLOCK"]),)


@operator("aggregate", visible=True)
def aggregate(values_BCHW: Tensor, weights_BGKHW: Tensor) -> Tensor:
    """Values [B, C, H, W], weights [B, G, 9, H, W], G dividing C -> [B, C, H, W] in the dtype and layout of the values.

    The two may have different dtypes, as under autocast.
    """
    last = _channels_last(values_BCHW)
    values_BCHW, weights_BGKHW = _lay(values_BCHW, last), _lay_weights(weights_BGKHW, last)
    _, C, H, W = values_BCHW.shape
    y_BCHW = torch.empty_like(values_BCHW)
    constants, options = _plan(C, weights_BGKHW.shape[1], last)
    grid = _grid(weights_BGKHW, constants)
    launch(_aggregate_forward, grid, values_BCHW, weights_BGKHW, y_BCHW, H * W, W, **constants, **options)
    return y_BCHW


@aggregate.register_fake
def _(values_BCHW, weights_BGKHW):
    return torch.empty_like(_lay(values_BCHW, _channels_last(values_BCHW)))


@operator("aggregate_backward", visible=True)
def aggregate_backward(dy_BCHW: Tensor, values_BCHW: Tensor, weights_BGKHW: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the values and of the weights, each in its dtype."""
    last = _channels_last(values_BCHW)
    values_BCHW, dy_BCHW = _lay(values_BCHW, last), _lay(dy_BCHW, last)
    weights_BGKHW = _lay_weights(weights_BGKHW, last)
    _, C, H, W = values_BCHW.shape
    dvalues_BCHW, dweights_BGKHW = torch.empty_like(values_BCHW), torch.empty_like(weights_BGKHW)
    constants, options = _plan(C, weights_BGKHW.shape[1], last)
    tensors = dy_BCHW, values_BCHW, weights_BGKHW, dvalues_BCHW, dweights_BGKHW
    launch(_aggregate_backward, _grid(weights_BGKHW, constants), *tensors, H * W, W, **constants, **options)
    return dvalues_BCHW, dweights_BGKHW


@aggregate_backward.register_fake
def _(dy_BCHW, values_BCHW, weights_BGKHW):
    last = _channels_last(values_BCHW)
    return torch.empty_like(_lay(values_BCHW, last)), torch.empty_like(_lay_weights(weights_BGKHW, last))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dy_BCHW):
    return aggregate_backward(dy_BCHW, *ctx.saved_tensors)


aggregate.register_autograd(_differentiate, setup_context=_save)


def cases() -> list[dict]:
    """Cases for `benchmarks.kernel_resources`: stage 1 of CoTNet-50, in both layouts, and its last; in bfloat16."""
    found = []
    for channels, side, last in ((64, 56, False), (64, 56, True), (512, 7, False)):
        constants, options = _plan(channels, channels // 8, last)
        size = f"{channels} channels, {side} x {side}{', channels-last' if last else ''}"
        for name, kernel, tensors in (
            ("forward", _aggregate_forward, ("values_ptr", "weights_ptr", "y_ptr")),
            ("backward", _aggregate_backward, ("dy_ptr", "values_ptr", "weights_ptr", "dvalues_ptr", "dweights_ptr")),
        ):
            signature = dict.fromkeys(tensors, "*bf16") | dict.fromkeys(constants, "constexpr")
            signature |= dict(pixels="i32:16" if side**2 % 16 == 0 else "i32", width="i32")
            found.append(
                dict(name=f"aggregate {name}, {size}", fn=kernel, signature=signature, constexprs=constants, **options)
            )
    return found
