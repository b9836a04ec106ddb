"""What the markers of a JPEG say (ITU T.81, annex B), without decoding it; and what of it is not for every decoder."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

# In preparation and in training. A scan can take a few bytes of the file and a pass over the whole image; photographs have about ten.
MOST_SCANS = 500

PROGRESSIVE = 0xC2
_ALL = (1 << 64) - 1  # the coefficients of a block, a bit each
# Not 0xFF 0x00, which is a byte of image data, nor a marker between blocks, nor a 0xFF that stands before another one.
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")


class UnusualSampling(ValueError):
    """Chroma sampling that libjpeg reads, but not everything around it."""


@dataclass(frozen=True)
class Scan:
    """One scan: the ids of its components, its coefficients (a bit each), and how many of their lowest bits are still to come."""

    components: bytes
    coefficients: int
    low: int
    frame: bytes  # the ids of all components of the image


def read_header(data: bytes) -> tuple[int, int, str]:
    """(width, height, colour space: "RGB", "YCbCr", "Gray", "CMYK" or "YCCK"). Raises ValueError; UnusualSampling is one."""
    import simplejpeg

    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except KeyError as error:  # 4:4:1, which libjpeg-turbo 3 has a number for, and simplejpeg no name
        raise UnusualSampling("its chroma sampling is unusual") from error
    except ValueError as error:
        if "subsampling" in str(error):  # also said of what is no JPEG at all
            raise UnusualSampling(str(error)) from error
        raise
    return width, height, colorspace


def read_scans(data: bytes) -> Iterator[Scan]:
    """The scans of an image, in their order. What is no JPEG has none."""
    frame, progressive, position = b"", False, 2
    while match := _MARKER.search(data, position):
        marker, position = data[match.start() + 1], match.end()
        if marker == 0xD9:  # the end; what lies behind it is not of this image
            return
        if marker in (0x01, 0xD8):  # these stand alone
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
    """Whether there are more than MOST_SCANS."""
    for number, scan in enumerate(read_scans(data), start=1):
        if number > MOST_SCANS:
            return True
        if scan.coefficients == _ALL and set(scan.components) >= set(scan.frame):  # the usual JPEG, of one scan: no decoder looks further
            return False
    return False


def is_complete(data: bytes) -> bool:
    """Whether each coefficient comes with all its bits. What is missing libjpeg guesses from the neighbours, each version differently."""
    complete = {}
    for scan in read_scans(data):
        for component in scan.components:
            before = complete.get(component, 0)
            complete[component] = before & ~scan.coefficients if scan.low else before | scan.coefficients
        if all(complete.get(component) == _ALL for component in scan.frame):
            return True
    return False
