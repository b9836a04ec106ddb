"""JPEGs of every kind for the tests of the decoder."""

import io
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from data_pipeline import native
from tests.data_pipeline.shards import picture

DECODERS = ["native"] * (native.LIBRARY is not None) + ["simplejpeg", "pillow"]  # those that are available here

# A tiny file of every kind, each followed by 16 bytes of parameters for the fuzzer.
CORPUS = Path(__file__).parents[2] / "data_pipeline/native/fuzz/corpus"


def noisy(number: int, width: int, height: int) -> np.ndarray:
    """Half picture, half noise, so that no coefficient is 0: uint8 [height, width, 3]."""
    noise = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return noise // 2 + picture(number, width, height) // 2


def with_pillow(image: np.ndarray, mode: str | None = None, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def every_kind(width: int, height: int) -> dict[str, bytes]:
    """The kinds of JPEG that libjpeg writes: subsamplings, gray, progressive, restarts, optimized Huffman tables."""
    image = noisy(1, width, height)
    kinds = {
        f"{name} baseline": simplejpeg.encode_jpeg(image, quality=90, colorsubsampling=name) for name in SUBSAMPLINGS
    }
    kinds |= {
        f"{name} progressive": with_pillow(image, progressive=True, subsampling=name)
        for name in ("4:4:4", "4:2:2", "4:2:0")
    }
    kinds["gray"] = with_pillow(image[..., 0])
    kinds["gray progressive"] = with_pillow(image[..., 0], progressive=True)
    kinds["restarts"] = with_pillow(image, restart_marker_blocks=3, subsampling="4:2:0")
    kinds["optimized"] = with_pillow(image, optimize=True, quality=100)
    kinds["coarse"] = with_pillow(image, quality=3)
    return kinds


SUBSAMPLINGS = ("444", "422", "420", "440", "411")


def with_sampling(factors: list[tuple[int, int]], width: int, height: int) -> bytes:
    """A baseline YCbCr JPEG with these (horizontal, vertical) sampling factors, 1 to 4 each, and blocks of one colour.

    Pillow and simplejpeg write the usual factors only.
    """
    random = np.random.default_rng(0)
    widest, highest = (max(column) for column in zip(*factors, strict=True))
    units = -(-width // (8 * widest)) * -(-height // (8 * highest))
    bits, last = [], [0, 0, 0]
    for _ in range(units):
        for component, (horizontal, vertical) in enumerate(factors):
            for _ in range(horizontal * vertical):
                value = int(random.integers(-60, 61))  # the block's mean, in quantization steps of 16 / 8 = 2 of 255
                difference, last[component] = value - last[component], value
                length = abs(difference).bit_length()
                bits.append(f"{length:04b}")  # the Huffman code of a length is its number in 4 bits
                number = difference if difference > 0 else difference + (1 << length) - 1
                bits.append(f"{number:0{length}b}" if length else "")
                bits.append("0")  # no other coefficient
    text = "".join(bits)
    text += "1" * (-len(text) % 8)
    data = int(text, 2).to_bytes(len(text) // 8, "big").replace(b"\xff", b"\xff\0")
    frame = bytes([8, *height.to_bytes(2, "big"), *width.to_bytes(2, "big"), 3])
    frame += bytes(byte for number, (x, y) in enumerate(factors) for byte in (number + 1, x << 4 | y, 0))
    segments = {
        0xDB: b"\0" + bytes([16] * 64),
        0xC0: frame,
        0xC4: bytes([0, 0, 0, 0, 12, *bytes(12), *range(12)]) + bytes([0x10, 1, *bytes(15), 0]),
        0xDA: bytes([3, 1, 0, 2, 0, 3, 0, 0, 63, 0]),
    }
    parts = [bytes([0xFF, marker]) + (2 + len(body)).to_bytes(2, "big") + body for marker, body in segments.items()]
    return b"".join([b"\xff\xd8", *parts, data, b"\xff\xd9"])


def corpus(name: str) -> bytes:
    """A seed of the fuzzer without its last 16 bytes, which are parameters of the fuzzer."""
    return (CORPUS / f"{name}.jpg").read_bytes()[:-16]
