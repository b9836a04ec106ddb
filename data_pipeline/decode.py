"""Decode windows of JPEGs, or of stored pixels, to one shape, with the first available of three decoders:

    native      C on libjpeg-turbo (native/), which decodes only the part that the window needs
    simplejpeg  libjpeg-turbo decodes the whole image, torch resizes; the pixels are bit-identical to native's
    pillow      a fallback; pixels differ by rounding, and some damaged images are not detected

All release the GIL, so they run in parallel in threads. Prepared datasets hold only RGB and gray JPEGs that decode
without a warning; anything else is a failure of that sample alone. EXIF orientation is ignored. `native` does not
detect damage below the window; the checksum in the index does.
"""

import importlib.util
import io
import warnings
from collections.abc import Callable, Sequence

import numpy as np

from . import native
from .jpeg import MOST_SCANS, has_too_many_scans, read_header


def _first_available() -> str:
    if native.LIBRARY is not None:
        return "native"
    return "simplejpeg" if importlib.util.find_spec("simplejpeg") else "pillow"


DECODER = _first_available()

if DECODER != "native":
    warnings.warn(
        f"The compiled decoder is not built, so {DECODER} decodes the images, at about half the speed. "
        "Install a C compiler and the headers of libjpeg-turbo "
        "(Debian, Ubuntu: apt-get install gcc libc6-dev libjpeg-dev), "
        "then install this project again: pip install --editable .",
        stacklevel=2,
    )


def decode_batch(
    encoded: Sequence[bytes],
    dimensions: np.ndarray,
    windows: np.ndarray,
    shape: tuple[int, int],
    interpolation: str,
    out: np.ndarray,
    decoder: str = DECODER,
) -> dict[int, str]:
    """Decode n JPEGs, cut out their windows (crop.py), resize these with antialiasing and mirror them.

    dimensions: int [n, 2], the (width, height) that each image must have. windows: int32 [n, 5]. interpolation:
    "bicubic" or "bilinear". out: receives the pixels, RGB, uint8 [n, *shape, 3]; shape: (height, width). Returns
    {row: reason} of the images that could not be decoded; their rows of `out` are undefined.
    """
    if decoder == "native":
        return native.decode_batch(encoded, dimensions, windows, shape, interpolation, out)
    decode, resize = _FALLBACKS[decoder]
    return _one_by_one(decode, resize, encoded, dimensions, windows, shape, interpolation, out)


def crop_and_resize_batch(
    stored: Sequence[bytes],
    dimensions: np.ndarray,
    windows: np.ndarray,
    shape: tuple[int, int],
    interpolation: str,
    out: np.ndarray,
    decoder: str = DECODER,
) -> dict[int, str]:
    """As decode_batch, for images stored as pixels, uint8 [height, width, 3]."""
    if decoder == "native":
        return native.decode_batch(stored, dimensions, windows, shape, interpolation, out, encoding="raw")
    return _one_by_one(_as_pixels, _FALLBACKS[decoder][1], stored, dimensions, windows, shape, interpolation, out)


# --- without the compiled decoder ------------------------------------------------------------------------------------


def _one_by_one(
    decode: Callable[[bytes, int, int], np.ndarray],
    resize: Callable[[np.ndarray, tuple[int, int], str], np.ndarray],
    encoded: Sequence[bytes],
    dimensions: np.ndarray,
    windows: np.ndarray,
    shape: tuple[int, int],
    interpolation: str,
    out: np.ndarray,
) -> dict[int, str]:
    failures = {}
    for row, data in enumerate(encoded):
        width, height = dimensions[row].tolist()
        x, y, window_width, window_height, flip = windows[row].tolist()
        try:
            image = decode(data, width, height)
            if image.shape[1::-1] != (width, height):
                raise ValueError(
                    f"it is {image.shape[1]}x{image.shape[0]} pixels where the index says {width}x{height}"
                )
        except ValueError as error:
            failures[row] = str(error)
            continue
        cut = _cut(image, x, y, window_width, window_height)
        resized = cut if cut.shape[:2] == tuple(shape) else resize(cut, shape, interpolation)
        out[row] = resized[:, ::-1] if flip else resized
    return failures


def _cut(image: np.ndarray, x: int, y: int, width: int, height: int) -> np.ndarray:
    """The window as a contiguous uint8 [height, width, 3].

    torch would make it contiguous with all threads of the process.
    """
    cut = np.zeros((height, width, 3), np.uint8)
    left, right = max(x, 0), min(x + width, image.shape[1])
    top, bottom = max(y, 0), min(y + height, image.shape[0])
    if left < right and top < bottom:
        cut[top - y : bottom - y, left - x : right - x] = image[top:bottom, left:right]
    return cut


def _as_pixels(data: bytes, width: int, height: int) -> np.ndarray:
    if len(data) != width * height * 3:
        raise ValueError(f"it has {len(data)} bytes where {width}x{height} pixels take {width * height * 3}")
    return np.frombuffer(data, np.uint8).reshape(height, width, 3)


def _refuse_too_many_scans(data: bytes) -> None:
    if has_too_many_scans(data):
        raise ValueError(f"it has more than {MOST_SCANS} scans")


def _decode_with_simplejpeg(data: bytes, width: int, height: int) -> np.ndarray:
    import simplejpeg

    _refuse_too_many_scans(data)
    if read_header(data)[2] in ("CMYK", "YCCK"):
        raise ValueError("it is CMYK")
    return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)


def _resize_with_torch(image: np.ndarray, shape: tuple[int, int], interpolation: str) -> np.ndarray:
    import torch
    from torch.nn.functional import interpolate

    # A channels-last view [1, 3, height, width], which torch resizes in uint8 with vector instructions, like
    # Pillow-SIMD.
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    return interpolate(pixels, size=tuple(shape), mode=interpolation, antialias=True)[0].permute(1, 2, 0).numpy()


def _decode_with_pillow(data: bytes, width: int, height: int) -> np.ndarray:
    from PIL import Image

    _refuse_too_many_scans(data)
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            if image.mode not in ("RGB", "L"):
                raise ValueError(f"it is {image.mode}")
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(str(error)) from error


def _resize_with_pillow(image: np.ndarray, shape: tuple[int, int], interpolation: str) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize(shape[::-1], Image.Resampling[interpolation.upper()]))


_FALLBACKS = {
    "simplejpeg": (_decode_with_simplejpeg, _resize_with_torch),
    "pillow": (_decode_with_pillow, _resize_with_pillow),
}
