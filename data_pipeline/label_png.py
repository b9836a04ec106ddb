"""Label maps of segmentation as PNGs: read one strictly, map its values to classes, and encode it as it is stored.

A stored label map is a gray PNG without alpha, whose pixels are the classes 0 … n-1 and `ignored_value(n)`: 8 bits with
255 for ignored pixels if there are at most 255 classes, otherwise 16 bits with 65535.
"""

import functools
import io
from dataclasses import dataclass

import numpy as np

from data_pipeline.validate import BadImage, errors_as_bad_image

MAX_CLASSES = 65_535
SIGNATURE = b"\x89PNG\r\n\x1a\n"
BITS = 24  # the place of the number of bits in a PNG
# Modes of Pillow.
GRAY, PALETTE = ("1", "L", "I;16"), "P"
OTHERS = {"RGB": "RGB", "RGBA": "RGB with transparency", "LA": "gray with transparency"}


def ignored_value(classes: int) -> int:
    """The value of ignored pixels in stored label maps."""
    return 255 if classes <= 255 else 65_535


@dataclass(frozen=True)
class LabelCoding:
    """What the pixels of a source's label maps mean: `values[c]` is class c, those in `ignored` count for nothing.

    Every other value is a fault.
    """

    values: tuple[int, ...]
    ignored: tuple[int, ...]

    @property
    def classes(self) -> int:
        return len(self.values)


def stored_coding(classes: int) -> LabelCoding:
    """The coding of stored label maps."""
    return LabelCoding(tuple(range(classes)), (ignored_value(classes),))


@dataclass(frozen=True)
class StoredLabel:
    """A label map to store. why: the reason why it has other bytes than its source, or "".

    pixels: the number of each class that it has.
    """

    data: bytes
    width: int
    height: int
    why: str
    pixels: dict[int, int]


def check_label(data: bytes, coding: LabelCoding, of_image: tuple[int, int], size: tuple[int, int]) -> StoredLabel:
    """Decode a label map completely, and return the PNG to store.

    of_image: (width, height) of the image to which it belongs, which it must have. size: (width, height) of the result;
    if it is another one, the map is resized by nearest neighbour. A PNG that is as it would be stored keeps its bytes.
    Raises BadImage if it is damaged, has another size, has colours in place of classes, or has a value of no class.
    """
    with errors_as_bad_image():
        pixels, stored_form = _read(data, of_image)
    labels = _table(coding)[pixels]
    if (wrong := labels < 0).any():
        y, x = np.unravel_index(np.argmax(wrong), wrong.shape)
        raise BadImage(f"the pixel at x {x}, y {y} has the value {pixels[y, x]}; {_expected(coding)}")
    kind = np.uint8 if coding.classes <= 255 else np.uint16
    labels = labels.astype(kind)
    why = "" if stored_form == kind else f"a PNG of another form than {np.dtype(kind).itemsize * 8} bits gray"
    if not np.array_equal(labels, pixels):
        why = "other values"
    if size != of_image:
        labels, why = _resize(labels, size), "resized"
    pixels = np.bincount(labels.ravel(), minlength=coding.classes)[: coding.classes]
    pixels = {label: int(pixels[label]) for label in np.flatnonzero(pixels).tolist()}
    return StoredLabel(_encode(labels) if why else data, *size, why, pixels)


def _read(data: bytes, size: tuple[int, int]) -> tuple[np.ndarray, type | None]:
    """The values of a PNG's pixels, [height, width]: gray, or indices of a palette; and uint8 or uint16 if it is gray
    with as many bits.
    """
    from PIL import Image

    if not data.startswith(SIGNATURE):
        raise BadImage("not a PNG")
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        image.verify()  # the checksums of all chunks, which decoding does not check
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        mode, found = image.mode, image.size
        if found != size:
            raise BadImage("it has {}x{} pixels, and its image {}x{}: they must be equal".format(*found, *size))
        if mode not in (*GRAY, PALETTE):
            raise BadImage(
                f"it is {OTHERS.get(mode, mode)}: a label map has the number of a class in each pixel, "
                "as gray or as indices of a palette"
            )
        pixels = np.asarray(image)
    bits = data[BITS]
    if mode == "L" and bits in (2, 4):
        pixels = pixels // (255 // (2**bits - 1))  # Pillow spreads these over 0 … 255
    stored_form = {8: np.uint8, 16: np.uint16}.get(bits) if mode in GRAY else None
    return pixels.astype(np.uint16 if mode == "I;16" else np.uint8), stored_form


@functools.lru_cache(maxsize=4)
def _table(coding: LabelCoding) -> np.ndarray:
    """int32 [65536]: the stored value for each value of the source, or -1."""
    table = np.full(65_536, -1, np.int32)
    table[list(coding.values)] = np.arange(coding.classes)
    table[list(coding.ignored)] = ignored_value(coding.classes)
    return table


def _expected(coding: LabelCoding) -> str:
    first, last = min(coding.values), max(coding.values)
    return f"the {coding.classes} classes are {first} to {last}, ignored is {' or '.join(map(str, coding.ignored))}"


def _resize(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """By nearest neighbour: the pixel i of n takes the one of m that holds its centre, (i + 0.5) · m / n."""
    rows, columns = ((2 * np.arange(n) + 1) * m // (2 * n) for n, m in zip(size[::-1], labels.shape, strict=True))
    return labels[rows[:, None], columns]


def _encode(labels: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(labels).save(buffer, "PNG")
    return buffer.getvalue()
