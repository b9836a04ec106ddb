"""One JPEG and a window of it → a square of pixels. Plain: simplejpeg (libjpeg-turbo) decodes, torch resizes.

Both release the GIL, so threads scale. Prepared shards hold only RGB and gray JPEGs that decode without a warning; anything else
raises ValueError, to which the backend adds the shard and the sample.
"""

import numpy as np
import simplejpeg
import torch
from torch.nn.functional import interpolate


def decode(data: bytes, window: tuple[int, int, int, int], size: int, interpolation: str, out: np.ndarray) -> None:
    """Decode `data`, cut `window` (x, y, width, height in pixels) and resize it to size × size into `out`, uint8 [size, size, 3]."""
    crop_and_resize(decode_rgb(data), window, size, interpolation, out)


def decode_rgb(data: bytes) -> np.ndarray:
    """The whole image as RGB, uint8 [height, width, 3]. ValueError for damage of any kind, even where libjpeg would go on."""
    return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)


def crop_and_resize(image: np.ndarray, window: tuple[int, int, int, int], size: int, interpolation: str, out: np.ndarray) -> None:
    """Resize the window of `image` (uint8 [height, width, 3]) with antialiasing into `out`, uint8 [size, size, 3]."""
    _, _, width, height = window
    if width == height == size:
        _copy_window(image, window, out)
        return
    # Contiguous, because torch would make it so itself, with all the threads of the process.
    cut = np.empty((height, width, 3), np.uint8)
    _copy_window(image, window, cut)
    # Viewed as [1, 3, height, width] in channels-last memory, which torch resizes in uint8 with the vector unit, as Pillow-SIMD does.
    resized = interpolate(torch.from_numpy(cut).permute(2, 0, 1)[None], size=(size, size), mode=interpolation, antialias=True)
    out[...] = resized[0].permute(1, 2, 0).numpy()


def _copy_window(image: np.ndarray, window: tuple[int, int, int, int], out: np.ndarray) -> None:
    """Copy the window into `out`, uint8 [window height, window width, 3]; black where it sticks out of the image."""
    x, y, width, height = window
    image_height, image_width = image.shape[:2]
    left, right = max(x, 0), min(x + width, image_width)
    top, bottom = max(y, 0), min(y + height, image_height)
    if right - left == width and bottom - top == height:
        out[...] = image[top:bottom, left:right]
        return
    out[...] = 0
    if left < right and top < bottom:
        out[top - y : bottom - y, left - x : right - x] = image[top:bottom, left:right]
