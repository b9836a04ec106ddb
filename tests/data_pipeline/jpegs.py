"""JPEGs of every kind for the tests of the decoder."""

import io
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from tests.data_pipeline.shards import picture

# A tiny file of every kind; 16 bytes behind each are for the fuzzer.
CORPUS = Path(__file__).parents[2] / "data_pipeline/native/fuzz/corpus"


def noisy(number: int, width: int, height: int) -> np.ndarray:
    """Half picture, half noise: every coefficient counts. uint8 [height, width, 3]."""
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8) // 2 + picture(number, width, height) // 2


def with_pillow(image: np.ndarray, mode: str | None = None, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def every_kind(width: int, height: int) -> dict[str, bytes]:
    """What libjpeg can write: subsamplings, gray, progressive, restarts, optimized Huffman tables."""
    image = noisy(1, width, height)
    kinds = {f"{name} baseline": simplejpeg.encode_jpeg(image, quality=90, colorsubsampling=name) for name in SUBSAMPLINGS}
    kinds |= {f"{name} progressive": with_pillow(image, progressive=True, subsampling=name) for name in ("4:4:4", "4:2:2", "4:2:0")}
    kinds["gray"] = with_pillow(image[..., 0])
    kinds["gray progressive"] = with_pillow(image[..., 0], progressive=True)
    kinds["restarts"] = with_pillow(image, restart_marker_blocks=3, subsampling="4:2:0")
    kinds["optimized"] = with_pillow(image, optimize=True, quality=100)
    kinds["coarse"] = with_pillow(image, quality=3)
    return kinds


SUBSAMPLINGS = ("444", "422", "420", "440", "411")
