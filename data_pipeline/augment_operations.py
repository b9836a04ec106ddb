"""RandAugment's operations on pixel values of a group of images, in plain PyTorch; bit-identical to timm's (Pillow's).

Every operation takes, on one device, `images` (uint8 [g, 3, H, W]) and `argument` (float64 [g], in the units of
augment_choices.argument), and returns uint8 [g, 3, H, W]. Inputs are not modified, and nothing waits for a GPU.
"""

import torch
from torch import Tensor

# Pillow's ITU-R 601-2 luma weights, in units of 2^-16.
LUMA = (19595.0, 38470.0, 7471.0)


def auto_contrast(images: Tensor, argument: Tensor) -> Tensor:
    """Stretch each channel so that its darkest value becomes 0 and its brightest 255."""
    low, high = (values.double()[..., None] for values in (images.amin((2, 3)), images.amax((2, 3))))  # [g, 3, 1]
    levels = torch.arange(256, dtype=torch.float64, device=images.device)
    # In float64 and in Pillow's order of operations; otherwise some levels are truncated to another integer. (torch
    # computes number / tensor as number · reciprocal, which gives other bits.)
    scale = torch.full_like(high, 255.0) / (high - low)
    table = (levels * scale - low * scale).trunc_().clamp_(0, 255)
    return _look_up(torch.where(high > low, table, levels), images.flatten(2).long()).view_as(images)


def equalize(images: Tensor, argument: Tensor) -> Tensor:
    """Equalise the histogram of each channel by a table of 256 levels."""
    pixels = images.flatten(2).long()
    one = torch.ones((), dtype=torch.int32, device=images.device)
    counts = torch.zeros(*pixels.shape[:2], 256, dtype=torch.int32, device=images.device).scatter_add_(
        2, pixels, one.expand_as(pixels)
    )
    brightest = counts.gather(2, images.amax((2, 3)).long()[..., None])
    step = (pixels.shape[2] - brightest) // 255  # [g, 3, 1]
    divisor = step.clamp(min=1)
    table = ((counts.cumsum(2) - counts + divisor // 2) // divisor).clamp_(max=255)
    levels = torch.arange(256, device=images.device)
    return _look_up(torch.where(step > 0, table, levels), pixels).view_as(images)


def invert(images: Tensor, argument: Tensor) -> Tensor:
    return 255 - images


def posterize(images: Tensor, argument: Tensor) -> Tensor:
    """Keep the `argument` highest bits of every value."""
    mask = 256 - torch.exp2(8 - argument)
    return images & _per_image(mask.to(torch.uint8))


def solarize(images: Tensor, argument: Tensor) -> Tensor:
    """Invert the values that are at least `argument` (0 … 256)."""
    # Arithmetic, because comparison and torch.where take ten times as long on a CPU. The arithmetic shift spreads the
    # sign bit: 255 for values that stay, else 0.
    stays = ((images.to(torch.int16) - _per_image(argument.to(torch.int16))) >> 15).to(torch.uint8)
    return images ^ ~stays


def solarize_add(images: Tensor, argument: Tensor) -> Tensor:
    """Add `argument` (0 … 127) to the values below 128."""
    return images + ((images >> 7) ^ 1) * _per_image(argument.to(torch.uint8))


def brightness(images: Tensor, argument: Tensor) -> Tensor:
    """Blend with black."""
    return to_uint8(images.float().mul_(_per_image(argument.float())))


def contrast(images: Tensor, argument: Tensor) -> Tensor:
    """Blend with the image's mean luma, rounded."""
    pixels = images.float()
    luma = _luma(pixels)
    mean = luma.sum((1, 2, 3), dtype=torch.float64).div_(luma[0].numel()).add_(0.5).floor_()
    return _blend(_per_image(mean.float()), pixels, argument)


def color(images: Tensor, argument: Tensor) -> Tensor:
    """Blend with the image's luma, as torchvision's adjust_saturation does."""
    pixels = images.float()
    return _blend(_luma(pixels), pixels, argument)


def sharpness(images: Tensor, argument: Tensor) -> Tensor:
    """Blend with the image smoothed by (1 1 1, 1 5 1, 1 1 1) / 13. Border pixels do not change."""
    pixels = images.to(torch.int16)
    inner = pixels[:, :, 1:-1, 1:-1]
    smooth = (pixels[:, :, :-2] + pixels[:, :, 1:-1]).add_(pixels[:, :, 2:])
    smooth = (smooth[..., :-2] + smooth[..., 1:-1]).add_(smooth[..., 2:]).add_(inner, alpha=4)
    # No sum / 13 + 1/2 is so close to an integer that the rounding of 1 / 13 could change the floor.
    smooth = smooth.float().mul_(1 / 13).add_(0.5).floor_()
    found = images.clone()
    found[:, :, 1:-1, 1:-1] = _blend(smooth, inner.float(), argument)
    return found


def _blend(degenerate: Tensor, pixels: Tensor, factor: Tensor) -> Tensor:
    """Pillow's Image.blend: degenerate + factor · (pixels - degenerate) in float32, to uint8. Modifies `pixels`."""
    return to_uint8(pixels.sub_(degenerate).mul_(_per_image(factor.float())).add_(degenerate))


def _luma(pixels: Tensor) -> Tensor:
    """Pillow's conversion of RGB to "L", float32 [g, 1, H, W].

    All terms are integers below 2^24, so float32 is exact.
    """
    red, green, blue = (pixels[:, channel : channel + 1] for channel in range(3))
    luma = (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])
    return luma.add_(32768).mul_(2.0**-16).floor_()


def _look_up(table: Tensor, pixels: Tensor) -> Tensor:
    """Look up int64 pixels [g, 3, n] in table [g, 3, 256]; returns uint8 [g, 3, n]."""
    return table.to(torch.uint8).gather(2, pixels)


def _per_image(values: Tensor) -> Tensor:
    """Reshape [g] to [g, 1, 1, 1]."""
    return values[:, None, None, None]


def to_uint8(values: Tensor) -> Tensor:
    """Clip to 0 … 255 and truncate. Modifies `values`. Converting through int16 is twice as fast on a CPU."""
    return values.clamp_(0, 255).to(torch.int16).to(torch.uint8)
