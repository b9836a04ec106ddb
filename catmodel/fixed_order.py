"""Operators whose gradients are summed in a fixed order. PyTorch's own use atomic additions on a GPU.

Values are PyTorch's, to the bit. The gradients are written by hand: each element gathers what belongs to it. That of
the max-pooling has PyTorch's bits on a CPU, too.

Shape letters: B images, C channels, H W map.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MaxPool(nn.Module):
    """Maximum over windows of `size` x `size` pixels: [B, C, H, W] -> [B, C, ceil(H/stride), ceil(W/stride)].

    size: odd; a window's centre is a multiple of the stride.
    """

    def __init__(self, size: int, stride: int):
        super().__init__()
        self.size, self.stride = size, stride

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x_BCHW.requires_grad:
            return _MaxPool.apply(x_BCHW, self.size, self.stride)[0]
        return F.max_pool2d(x_BCHW, self.size, self.stride, self.size // 2)

    def extra_repr(self) -> str:
        return f"size={self.size}, stride={self.stride}"


class _MaxPool(torch.autograd.Function):
    """Also returns the place of each maximum in its map H * W, which is not differentiable."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x_BCHW: Tensor, size: int, stride: int) -> tuple[Tensor, Tensor]:
        return F.max_pool2d(x_BCHW, size, stride, size // 2, return_indices=True)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, int, int], output: tuple[Tensor, Tensor]) -> None:
        x_BCHW, ctx.size, ctx.stride = inputs
        ctx.sides = x_BCHW.shape[2:]
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx, dy_BChw: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        (place_BChw,) = ctx.saved_tensors
        (H, W), (h, w), size, stride = ctx.sides, dy_BChw.shape[2:], ctx.size, ctx.stride
        edge = size // 2
        row, column = (torch.arange(side, device=dy_BChw.device) * stride - edge for side in (h, w))
        place_BChw = place_BChw - (row[:, None] * W + column)  # from the window's first pixel
        dy = dy_BChw.to(torch.promote_types(dy_BChw.dtype, torch.float32))
        dx = dy.new_zeros(*dy.shape[:2], H + 2 * edge, W + 2 * edge)
        # A pixel lies at a later place of an earlier window. Windows thus add in the order in which a CPU takes them.
        for k in reversed(range(size**2)):
            y, x = divmod(k, size)
            pixels = dx[:, :, y : y + (h - 1) * stride + 1 : stride, x : x + (w - 1) * stride + 1 : stride]
            pixels += torch.where(place_BChw == y * W + x, dy, 0.0)
        return dx[:, :, edge : H + edge, edge : W + edge].to(dy_BChw.dtype), None, None


def resize(x_BCHW: Tensor, sides: tuple[int, int], mode: str) -> Tensor:
    """[B, C, H, W] -> [B, C, *sides], by `F.interpolate`. mode: "bilinear" or "bicubic"."""
    if torch.is_grad_enabled() and x_BCHW.requires_grad:
        return _Resize.apply(x_BCHW, *sides, mode)
    return F.interpolate(x_BCHW, size=sides, mode=mode)


class _Resize(torch.autograd.Function):
    """The map is multiplied by a matrix along each side, and so is its gradient, by their transposes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x_BCHW: Tensor, height: int, width: int, mode: str) -> Tensor:
        return F.interpolate(x_BCHW, size=(height, width), mode=mode)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, int, int, str], output: Tensor) -> None:
        ctx.before, ctx.after, ctx.mode = inputs[0].shape[2:], output.shape[2:], inputs[3]

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None, None]:
        dtype = torch.promote_types(dy.dtype, torch.float32)
        with torch.autocast(dy.device.type, enabled=False):
            rows, columns = (
                _matrix(*sides, ctx.mode, dtype, dy.device) for sides in zip(ctx.before, ctx.after, strict=True)
            )
            return (rows @ dy.to(dtype) @ columns.T).to(dy.dtype), None, None, None


def _matrix(side: int, other: int, mode: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[side, other]: row i is an impulse at place i, resized."""
    impulses = torch.eye(side, dtype=dtype, device=device)[None, :, :, None]
    return F.interpolate(impulses, size=(other, 1), mode=mode)[0, :, :, 0]


def upsample(x_BCHW: Tensor, factor: int) -> Tensor:
    """[B, C, H, W] -> [B, C, factor * H, factor * W], bilinear between pixels' centres, by `F.interpolate`.

    The gradient is gathered by weighted sums of slices, along H and then along W: compiled, it reads the large map's
    gradient once, and writes and reads a map of 1 / factor of its size in between. No matrices, as in `resize`.
    """
    if factor == 1:
        return x_BCHW
    if torch.is_grad_enabled() and x_BCHW.requires_grad:
        return _Upsample.apply(x_BCHW, factor)
    return _upsample(x_BCHW, factor)


def _upsample(x_BCHW: Tensor, factor: int) -> Tensor:
    height, width = x_BCHW.shape[2:]
    return F.interpolate(x_BCHW, size=(factor * height, factor * width), mode="bilinear")


class _Upsample(torch.autograd.Function):
    """A new pixel takes from the old pixel that it lies in, and from the one before or after."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x_BCHW: Tensor, factor: int) -> Tensor:
        return _upsample(x_BCHW, factor)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, int], output: Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        dx = dy.to(torch.promote_types(dy.dtype, torch.float32))
        return _gather(_gather(dx, 2, ctx.factor), 3, ctx.factor).to(dy.dtype), None


def _gather(dy: Tensor, dim: int, factor: int) -> Tensor:
    """The gradient of a linear interpolation along `dim`, whose length it divides by `factor`."""
    parts = dy.unflatten(dim, (-1, factor)).unbind(dim + 1)
    offsets = [(r + 0.5) / factor - 0.5 for r in range(factor)]  # of new pixels' centres from the old one's

    def total(weights: list[float]) -> Tensor:
        (first, weight), *others = [pair for pair in zip(parts, weights, strict=True) if pair[1]]
        result = first * weight
        for part, weight in others:
            result = torch.add(result, part, alpha=weight)
        return result

    here = total([1 - abs(offset) for offset in offsets])
    before = total([max(-offset, 0.0) for offset in offsets])
    after = total([max(offset, 0.0) for offset in offsets])
    # The rest of a new pixel comes from the old pixel before or after, and outside the map from the old pixel itself.
    last = dy.shape[dim] // factor - 1
    from_next = torch.cat([before.narrow(dim, 1, last), after.narrow(dim, last, 1)], dim)
    from_previous = torch.cat([before.narrow(dim, 0, 1), after.narrow(dim, 0, last)], dim)
    return here + from_next + from_previous


def repeat(x_BCHW: Tensor, factor: int) -> Tensor:
    """[B, C, H, W] -> [B, C, factor * H, factor * W]: each pixel becomes factor x factor, as in mode "nearest"."""
    wide = x_BCHW[:, :, :, None, :, None].expand(-1, -1, -1, factor, -1, factor)
    return wide.flatten(4, 5).flatten(2, 3)


def pad_border(x_BCHW: Tensor, reflect: bool) -> Tensor:
    """A border of one pixel around the map, as by `F.pad` in mode "reflect" or "replicate": [B, C, H + 2, W + 2]."""
    at = 1 if reflect else 0
    for dim in (2, 3):
        last = x_BCHW.shape[dim] - 1 - at
        x_BCHW = torch.cat([x_BCHW.narrow(dim, at, 1), x_BCHW, x_BCHW.narrow(dim, last, 1)], dim)
    return x_BCHW
