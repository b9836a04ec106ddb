"""Parse the markers of a JPEG (ITU T.81, annex B) without decoding it, and detect JPEGs that some decoders refuse."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

# The limit in preparation and in training. A scan of a few bytes can cost a pass over the whole image. Progressive
# photographs have about ten scans.
MOST_SCANS = 500

PROGRESSIVE = 0xC2
_ALL = (1 << 64) - 1  # the coefficients of a block, a bit each
# Excludes 0xFF 0x00, which is a byte of image data, restart markers, and a 0xFF that is followed by another one.
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")


class UnusualSampling(ValueError):
    """Chroma sampling that libjpeg reads but other libraries do not."""


@dataclass(frozen=True)
class Scan:
    """One scan: the ids of its components, its coefficients (a bit each), and the number of low bits that it omits."""

    components: bytes
    coefficients: int
    low: int
    frame: bytes  # the ids of all components of the image


def read_header(data: bytes) -> tuple[int, int, str]:
    """Width, height, and colour space ("RGB", "YCbCr", "Gray", "CMYK" or "YCCK").

    Raises ValueError or UnusualSampling.
    """
    import simplejpeg

    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except KeyError as error:  # 4:4:1, which libjpeg-turbo 3 knows and simplejpeg does not
        raise UnusualSampling("its chroma sampling is unusual") from error
    except ValueError as error:
        if "subsampling" in str(error):  # simplejpeg also reports this for data that is not a JPEG
            raise UnusualSampling(str(error)) from error
        raise
    return width, height, colorspace


def read_scans(data: bytes) -> Iterator[Scan]:
    """The scans of an image in the order of the file. Data that is not a JPEG has none."""
    frame, progressive, position = b"", False, 2
    while match := _MARKER.search(data, position):
        marker, position = data[match.start() + 1], match.end()
        if marker == 0xD9:  # the end of the image; bytes after it do not belong to it
            return
        if marker in (0x01, 0xD8):  # markers without a segment
            continue
        length = int.from_bytes(data[position : position + 2], "big")
        segment = data[position : position + length]
        position += length
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            frame, progressive = segment[8::3], marker == PROGRESSIVE
        elif marker == 0xDA and len(segment) > 5:
            first, last, bits = segment[-3:]
            if progressive:
                yield Scan(segment[3:-3:2], (2 << last) - (1 << first) & _ALL, bits & 15, frame)
            else:
                yield Scan(segment[3:-3:2], _ALL, 0, frame)


def has_too_many_scans(data: bytes) -> bool:
    """Whether an image has more than MOST_SCANS scans."""
    for number, scan in enumerate(read_scans(data), start=1):
        if number > MOST_SCANS:
            return True
        # The usual JPEG has one scan that completes the image; decoders stop after it.
        if scan.coefficients == _ALL and set(scan.components) >= set(scan.frame):
            return False
    return False


def is_complete(data: bytes) -> bool:
    """Whether the scans contain all bits of all coefficients.

    libjpeg guesses missing bits from neighbouring blocks, and its versions do so differently.
    """
    complete = {}
    for scan in read_scans(data):
        for component in scan.components:
            before = complete.get(component, 0)
            complete[component] = before & ~scan.coefficients if scan.low else before | scan.coefficients
        if all(complete.get(component) == _ALL for component in scan.frame):
            return True
    return False
