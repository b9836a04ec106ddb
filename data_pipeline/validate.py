"""Check an image completely before it is packed, and return a JPEG that every decoder of training reads.

A sound RGB or gray JPEG keeps its bytes. Other images are repaired, transcoded, or refused with a reason; docs/data.md
has the table. EXIF orientation, TIFF's too, and colour profiles are ignored, as is usual for ImageNet, because no
decoder of training applies them, and label maps and boxes belong to the pixels as they are stored.
"""

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from data_pipeline import native
from data_pipeline.jpeg import MOST_SCANS, UnusualSampling, has_too_many_scans, is_complete, read_header

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 89_478_485  # Pillow's limit against decompression bombs
MAX_BYTES = 1 << 30  # limit of the file
MAX_SIDE = 65_500  # libjpeg's JPEG_MAX_DIMENSION; the index has 16 bits for a side
QUALITY = 90
LONGEST_REASON = 300  # characters

# The formats that Pillow may open. It knows more, but some of them run other programs on the file (EPS).
FORMATS = ("PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG", "JPEG2000", "AVIF")

ORIENTATION = 0x0112  # EXIF's tag

# Frame markers (ITU T.81, table B.1) that every decoder reads: baseline, extended sequential, progressive. The others
# are lossless, hierarchical, or arithmetic-coded.
COMMON_FRAMES = (0xC0, 0xC1, 0xC2)


class BadImage(Exception):
    """An image cannot be used; the message gives the reason."""


def shortened(text: str) -> str:
    """`text` on one line, with at most LONGEST_REASON characters."""
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]} …"


@contextlib.contextmanager
def errors_as_bad_image(what: str = "") -> Iterator[None]:
    """Raise any exception of this block as BadImage, because decoders and parsers raise nearly every type.

    Faults of the machine are raised unchanged: out of memory, system errors (with an errno), missing libraries. what:
    the beginning of the message.
    """
    try:
        yield
    except (BadImage, MemoryError, ImportError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        plain = isinstance(error, ValueError | OSError | SyntaxError) and str(error)
        raise BadImage(what + shortened(str(error) if plain else f"{type(error).__name__} {error}")) from error


def check_size(size: int) -> None:
    """Raise BadImage for a file that is too large to be read into memory."""
    if size > MAX_BYTES:
        raise BadImage(f"{size} bytes, more than {MAX_BYTES}")


@dataclass(frozen=True)
class Encoding:
    """How images are stored.

    By default they are unchanged. Otherwise all are encoded again, unless that saves no bytes.
    """

    resize_short: int | None = None  # pixels: the short side is shrunk to this, never enlarged
    max_side: int | None = None  # pixels: the long side is shrunk to this
    quality: int | None = None  # of JPEG; None means QUALITY if one of the others is set

    def size(self, width: int, height: int) -> tuple[int, int]:
        """The (width, height) of the stored image; its aspect ratio is kept up to rounding to whole pixels."""
        scale = 1.0
        if self.resize_short:
            scale = min(scale, self.resize_short / min(width, height))
        if self.max_side:
            scale = min(scale, self.max_side / max(width, height))
        return max(1, round(width * scale)), max(1, round(height * scale))


AS_IT_IS = Encoding()


@dataclass(frozen=True)
class StoredImage:
    """A JPEG to store.

    full_size: (width, height) before a resize. outcome: "kept", "repaired", "transcoded" or "reencoded". why: the
    reason for the report, or "".
    """

    data: bytes
    width: int
    height: int
    full_size: tuple[int, int]
    outcome: str
    why: str = ""


def check_image(data: bytes, encoding: Encoding = AS_IT_IS) -> StoredImage:
    """Decode an image completely and strictly, and return the JPEG to store.

    Raises BadImage if it is damaged or unusable. Strictly: warnings of libjpeg are errors, as in training. Pillow reads
    other formats; of several frames the first.
    """
    with errors_as_bad_image():
        return _check(data, encoding)


def _check(data: bytes, encoding: Encoding) -> StoredImage:
    if not data:
        raise BadImage("an empty file")
    if data.startswith(b"\xff\xd8"):
        sound, pixels, reason = _decode_jpeg(data)
    else:
        sound, pixels, reason = b"", *_decode_with_pillow(data)
    height, width = pixels.shape[:2]
    full_size, size = (width, height), encoding.size(width, height)
    if max(size) > MAX_SIDE:
        raise BadImage(f"{width}x{height} pixels: a side has more than {MAX_SIDE}")
    if encoding != AS_IT_IS:
        stored = encode_jpeg(_resize(pixels, size), encoding.quality or QUALITY, "4:2:0")
        if size != full_size or reason or len(stored) < len(sound):
            return StoredImage(stored, *size, full_size, "transcoded" if reason else "reencoded", reason)
    if reason:
        return StoredImage(encode_jpeg(pixels), *size, full_size, "transcoded", reason)
    if sound != data:
        return StoredImage(sound, *size, full_size, "repaired", "its header had faults that libjpeg warns about")
    return StoredImage(data, *size, full_size, "kept")


def encode_jpeg(pixels: np.ndarray, quality: int = 95, subsampling: str = "4:4:4") -> bytes:
    """Encode uint8 [height, width, 3] RGB or [height, width] gray as JPEG. The defaults are those for transcoding."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    return buffer.getvalue()


def to_pixels(image: "Image.Image") -> np.ndarray:
    """A Pillow image as uint8 [height, width, 3] RGB, or [height, width] if it is gray. Transparency is dropped."""
    if image.mode.startswith("I;16"):  # Pillow's own conversion would clip 16-bit gray to white
        return (np.asarray(image) >> 8).astype(np.uint8)
    if image.mode in ("I", "F"):
        raise BadImage("32-bit pixels, whose value for white is unknown")
    return np.array(image.convert("L" if image.mode in ("1", "L", "LA", "La") else "RGB"))


def _resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize with antialiased bicubic interpolation."""
    from PIL import Image

    if size == pixels.shape[1::-1]:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width}x{height} pixels, more than {MAX_PIXELS}")


def _decode_with_pillow(data: bytes) -> tuple[np.ndarray, str]:
    """Pixels, and the reason why the image must be converted."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # _check_pixels checks it
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_pixels(*image.size)
            image.verify()  # the checksums of a PNG, which decoding does not check; it cannot be decoded afterwards
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            kind = f"{image.format} to JPEG"
            if image.format == "TIFF":
                image.getexif()[ORIENTATION] = 1  # else Pillow turns the pixels when it loads them
                image = image.copy()  # its size is that of the pixels, where Pillow has swapped the first one's
            return to_pixels(image), kind
    except Image.UnidentifiedImageError as error:
        raise BadImage("not an image of a known format") from error


# --- JPEG ------------------------------------------------------------------------------------------------------------


def _decode_jpeg(data: bytes) -> tuple[bytes, np.ndarray, str]:
    """The JPEG's bytes, repaired if necessary; its pixels; and the reason why it must be converted ("" if none)."""
    if has_too_many_scans(data):
        raise BadImage(f"more than {MOST_SCANS} scans")
    repaired, frame = _repair_header(data)
    try:
        pixels, reason = _decode_strictly(data)
    except ValueError:
        if repaired == data:
            raise
        # libjpeg reports only its first warning. Decoding the repaired file shows whether there are others.
        data, (pixels, reason) = repaired, _decode_strictly(repaired)
    if not reason and frame not in COMMON_FRAMES:
        reason = "lossless or arithmetic-coded JPEG"
    if not reason and not is_complete(data):
        reason = "JPEG that lacks scans, which each decoder replaces differently"
    return data, pixels, reason


def _decode_strictly(data: bytes) -> tuple[np.ndarray, str]:
    """Pixels, and the reason why the image must be converted. Raises ValueError at the first warning."""
    import simplejpeg

    try:
        width, height, colorspace = read_header(data)
    except UnusualSampling:  # Pillow's libjpeg reads these, and so does ours, which also stops at warnings
        pixels = _decode_with_pillow(data)[0]
        _refuse_warnings(data, *pixels.shape[1::-1])
        return pixels, "JPEG with unusual chroma sampling"
    _check_pixels(width, height)
    if colorspace in ("CMYK", "YCCK"):
        simplejpeg.decode_jpeg(data, "CMYK")
        return _decode_with_pillow(data)[0], "CMYK JPEG"  # Pillow handles Adobe's inverted CMYK
    if colorspace == "Gray":
        return simplejpeg.decode_jpeg(data, "GRAY")[..., 0], ""
    return simplejpeg.decode_jpeg(data, "RGB"), ""


def _refuse_warnings(data: bytes, width: int, height: int) -> None:
    """Raise ValueError if the end marker is missing, or if the compiled decoder, where there is one, does not decode
    the whole image. It stops at the last row, so image data that is left over is not found.
    """
    if data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):
        raise ValueError("Premature end of JPEG file")
    if native.LIBRARY is not None:
        window, out = np.array([[0, 0, width, height, 0]]), np.empty((1, 1, 1, 3), np.uint8)
        if failures := native.decode_batch([data], np.array([[width, height]]), window, (1, 1), "bilinear", out):
            raise ValueError(failures[0])


def _repair_header(data: bytes) -> tuple[bytes, int]:
    """The JPEG with a header that libjpeg does not warn about, and its frame marker.

    No repair changes a pixel: bytes between two segments are removed, an unknown version of JFIF is replaced, and so
    are the parameters of a progressive scan in a sequential one. Data after the first scan's header is not repaired,
    because left-over or missing image data there is damage.
    """
    parts, position, frame = [data[:2]], 2, 0
    while True:
        position = data.find(b"\xff", position)
        if position < 0 or position + 4 > len(data):
            raise BadImage("a JPEG header without an end")
        marker = data[position + 1]
        if not (0xC0 <= marker <= 0xFE) or 0xD0 <= marker <= 0xD9:  # not the marker of a segment
            position += 1
            continue
        length = 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        segment = bytearray(data[position : position + length])
        position += length
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            frame = marker
        elif marker == 0xE0 and segment[4:9] == b"JFIF\0" and len(segment) > 9:
            segment[9] = 1
        elif marker == 0xDA:
            if frame in (0xC0, 0xC1):
                segment[-3:] = b"\0\x3f\0"
            return b"".join([*parts, segment, data[position:]]), frame
        parts.append(segment)
