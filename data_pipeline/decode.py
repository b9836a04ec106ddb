"""JPEGs and a window of each → squares of pixels. Plain: simplejpeg (libjpeg-turbo) decodes, torch resizes.

Both release the GIL, so threads scale. Prepared shards hold only RGB and gray JPEGs that decode without a warning; whatever else turns up
is a failure of that sample alone.
"""

from collections.abc import Sequence

import numpy as np
import simplejpeg
import torch
from torch.nn.functional import interpolate


def decode_batch(
    encoded: Sequence[bytes], dimensions: np.ndarray, windows: np.ndarray, size: int, interpolation: str, out: np.ndarray
) -> dict[int, str]:
    """Decode n images, cut their windows (crop.py), resize with antialiasing and mirror them into `out`, uint8 [n, size, size, 3], RGB.

    dimensions: int [n, 2], the (width, height) that each image must have. windows: int32 [n, 5].
    interpolation: "bicubic" or "bilinear". Returns {row: why} of the images that could not be decoded; their rows of `out` mean nothing.
    """
    failures = {}
    for row, data in enumerate(encoded):
        try:
            image = simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
        except ValueError as error:
            failures[row] = str(error)
            continue
        height, width = image.shape[:2]
        if (width, height) != tuple(dimensions[row]):
            failures[row] = f"it is {width}x{height} pixels where the index says {dimensions[row][0]}x{dimensions[row][1]}"
            continue
        crop_and_resize(image, windows[row].tolist(), size, interpolation, out[row])
    return failures


def crop_and_resize(image: np.ndarray, window: Sequence[int], size: int, interpolation: str, out: np.ndarray) -> None:
    """Cut the window (x, y, width, height, flip) of `image`, uint8 [height, width, 3], and resize it into `out`, uint8 [size, size, 3]."""
    x, y, width, height, flip = window
    if width == height == size:
        _copy_window(image, x, y, out)
    else:
        # Contiguous, because torch would make it so itself, with all the threads of the process.
        cut = np.empty((height, width, 3), np.uint8)
        _copy_window(image, x, y, cut)
        # Viewed as [1, 3, height, width] in channels-last memory, which torch resizes in uint8 with the vector unit, as Pillow-SIMD does.
        resized = interpolate(torch.from_numpy(cut).permute(2, 0, 1)[None], size=(size, size), mode=interpolation, antialias=True)
        out[...] = resized[0].permute(1, 2, 0).numpy()
    if flip:
        out[...] = out[:, ::-1].copy()


def _copy_window(image: np.ndarray, x: int, y: int, out: np.ndarray) -> None:
    """Copy the window at (x, y) into `out`, uint8 [window height, window width, 3]; black where it sticks out of the image."""
    height, width = out.shape[:2]
    image_height, image_width = image.shape[:2]
    left, right = max(x, 0), min(x + width, image_width)
    top, bottom = max(y, 0), min(y + height, image_height)
    if right - left == width and bottom - top == height:
        out[...] = image[top:bottom, left:right]
        return
    out[...] = 0
    if left < right and top < bottom:
        out[top - y : bottom - y, left - x : right - x] = image[top:bottom, left:right]
