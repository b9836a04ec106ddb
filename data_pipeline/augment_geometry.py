"""RandAugment's geometric operations on a group of images, in plain PyTorch, as timm with interpolation="bicubic".

They reproduce Pillow's affine transform with bicubic interpolation. Every operation takes, on one device, `images`
(uint8 [g, 3, S, S]), `argument` (float64 [g]) and `fill` (float32 [3], the colour outside the source), and returns
uint8 [g, 3, S, S]. Inputs are not modified, and nothing waits for a GPU.

A pixel of the result lies at first + fraction in the source, in units of pixels whose centres are integers. Pillow's
cubic (Keys, a = -1) weights the pixels first - 1 … first + 2; pixels beyond the edge repeat the edge. A result is
inside if its nearest source pixel is. Pillow sums in float64 and truncates, this module sums in float32: about one
value in 1000 differs, by 1 of 255 (more values if a shift is close to whole pixels).
"""

import functools

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from .augment_operations import to_uint8

# Added before truncating. It exceeds the rounding errors of float32, which would otherwise turn a flat 255 into 254.
ROUNDING = 2.0**-12
BORDER = 2  # pixels by which the cubic's support reaches beyond the image

# The weights of the four pixels as polynomials of the fraction: rows are its powers 0 … 3.
CUBIC = ((0, 1, 0, 0), (-1, 0, 1, 0), (2, -2, 1, -1), (-1, 1, -1, 1))


def shear_x(images: Tensor, argument: Tensor, fill: Tensor) -> Tensor:
    """Shift each row to the left by its distance from the upper edge, times `argument`."""
    return _shift_rows(images, argument[:, None] * _centres(images), fill)


def shear_y(images: Tensor, argument: Tensor, fill: Tensor) -> Tensor:
    """Shift each column upwards by its distance from the left edge, times `argument`."""
    return shear_x(images.transpose(2, 3), argument, fill).transpose(2, 3)


def translate_x(images: Tensor, argument: Tensor, fill: Tensor) -> Tensor:
    """Shift to the left by `argument`, relative to the width."""
    return _shift_rows(images, (argument * images.shape[3])[:, None], fill)


def translate_y(images: Tensor, argument: Tensor, fill: Tensor) -> Tensor:
    """Shift upwards by `argument`, relative to the height."""
    return translate_x(images.transpose(2, 3), argument, fill).transpose(2, 3)


def _shift_rows(images: Tensor, shift: Tensor, fill: Tensor) -> Tensor:
    """Pixel x of row y is read at x + shift[:, y] in the source. shift: float64 [g, S], or [g, 1] for all rows."""
    size = images.shape[3]
    first = shift.floor()
    fraction = (shift - first).float()
    # The source pixels that get a weight, [g, 1, S or 1, S + 3].
    position = first.to(torch.int32)[:, None, :, None] + torch.arange(
        -1, size + 2, dtype=torch.int32, device=images.device
    )
    index = position.clamp(0, size - 1).long().expand(-1, 3, size, -1)
    pixels = images.contiguous().gather(3, index).float()
    weights = (_powers(fraction) @ _cubic(images.device))[:, None, :, None]
    found = pixels[..., :size] * weights[..., 0]
    for tap in (1, 2, 3):
        found.addcmul_(pixels[..., tap : tap + size], weights[..., tap])
    return _fill(found, _inside(position[..., 1 : size + 1], fraction[:, None, :, None], size), fill)


def rotate(images: Tensor, argument: Tensor, fill: Tensor) -> Tensor:
    """Rotate by `argument` degrees, counter-clockwise, around the centre."""
    count, _, size, _ = images.shape
    width = size + 2 * BORDER
    angle = -torch.deg2rad(argument)[:, None]
    cos, sin = torch.cos(angle), torch.sin(angle)
    centred = _centres(images) - size / 2
    # x and y in the source are sums of a term of the column and a term of the row. In the shapes below, 2 is (x, y).
    of_column = torch.stack([cos, -sin]) * centred  # [2, g, S]
    of_row = torch.stack([sin, cos]) * centred + (size / 2 - 0.5)
    first, fraction = _add(of_column, of_row)  # [2, g, S, S]
    inside = _inside(first, fraction, size)
    inside = inside[0].mul_(inside[1])[:, None]

    # The first of the 4 x 4 weighted pixels, as a row number in a table of all pixels.
    x, y = first.clamp_(-1, size - 1).add_(BORDER - 1)
    corner = y.mul_(width).add_(x).to(torch.int32)
    corner += torch.arange(count, dtype=torch.int32, device=images.device)[:, None, None] * width**2
    table = pad(images.float(), (BORDER,) * 4, mode="replicate").permute(0, 2, 3, 1).contiguous().view(-1, 3)
    found = _weigh(table, corner.view(-1), fraction.view(2, -1), width)
    return _fill(found.view(count, size, size, 3).permute(0, 3, 1, 2).contiguous(), inside, fill)


def _weigh(table: Tensor, corner: Tensor, fraction: Tensor, width: int) -> Tensor:
    """Weighted sums of 4 x 4 pixels: [n, 3], for n corners and fractions [2, n].

    table: all pixels of images `width` wide. An embedding bag computes this: for each result it reads 16 rows,
    multiplies them by their weights and adds them.
    """
    part = 16384 if table.device.type == "cpu" else len(corner)  # 16 weights per result then fit in a CPU's cache
    offsets, x_cubic, y_cubic = _taps(width, table.device)
    parts = zip(*(values.split(part) for values in (corner[:, None], *_powers(fraction))), strict=True)
    found = [
        embedding_bag(first + offsets, table, mode="sum", per_sample_weights=(x @ x_cubic).mul_(y @ y_cubic))
        for first, x, y in parts
    ]
    return torch.cat(found)


def _add(of_column: Tensor, of_row: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of two float64 […, S] as integer part and fraction, float32 […, S, S] each; only this needs float64."""
    column, row = of_column.floor(), of_row.floor()
    fraction = (of_column - column).float()[..., None, :] + (of_row - row).float()[..., None]
    carry = fraction.floor()
    return carry.add(column.float()[..., None, :]).add_(row.float()[..., None]), fraction.sub_(carry)


def _inside(first: Tensor, fraction: Tensor, size: int) -> Tensor:
    """1 if the pixel nearest to first + fraction is one of 0 … size - 1, else 0; float32.

    Arithmetic, because comparisons take ten times as long on a CPU.
    """
    nearest = first + (fraction + 0.5).floor_()
    return (nearest + 1).clamp_(0, 1).sub_((nearest - (size - 1)).clamp_(0, 1))


def _fill(values: Tensor, inside: Tensor, fill: Tensor) -> Tensor:
    """float32 [g, 3, S, S] → uint8, with the colour `fill` where `inside` is 0. Modifies `values`."""
    fill = fill[:, None, None]
    return to_uint8(values.sub_(fill).mul_(inside).add_(fill + ROUNDING))


def _powers(fraction: Tensor) -> Tensor:
    """float32 […] → its powers 0 … 3, […, 4] (a transposed view)."""
    power = fraction.new_ones(4, *fraction.shape)
    power[1] = fraction
    torch.mul(fraction, fraction, out=power[2])
    torch.mul(power[2], fraction, out=power[3])
    return power.movedim(0, -1)


@functools.lru_cache(8)
def _cubic(device: torch.device) -> Tensor:
    return torch.tensor(CUBIC, dtype=torch.float32).to(device)


@functools.lru_cache(8)
def _taps(width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For 4 x 4 pixels, row by row: offsets from the first, int32 [16], and CUBIC in x and in y, [4, 16] each."""
    cubic, four = _cubic(device), torch.arange(4, dtype=torch.int32)
    return (four[:, None] * width + four).view(-1).to(device), cubic.repeat(1, 4), cubic.repeat_interleave(4, 1)


def _centres(images: Tensor) -> Tensor:
    """Positions of the pixels' centres along a side, float64 [S]."""
    return torch.arange(images.shape[3], dtype=torch.float64, device=images.device) + 0.5
