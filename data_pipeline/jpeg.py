"""What the markers of a JPEG say (ITU T.81, annex B), without decoding it; and what of it is not for every decoder."""

import re
from dataclasses import dataclass

# In preparation and in training. A scan can take a few bytes of the file and a pass over the whole image; photographs have about ten.
MOST_SCANS = 500

PROGRESSIVE = 0xC2
_ALL = range(64)  # the coefficients of a block
# Not 0xFF 0x00, which is a byte of image data, nor a marker between blocks, nor a 0xFF that stands before another one.
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")


class UnusualSampling(ValueError):
    """Chroma sampling that libjpeg reads, but not everything around it."""


@dataclass(frozen=True)
class Scan:
    """One scan: the ids of its components, the coefficients that it brings, and how many of their lowest bits are still to come."""

    components: bytes
    coefficients: range
    low: int


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


def read_scans(data: bytes) -> tuple[bytes, list[Scan]]:
    """The ids of the image's components, and its scans, in their order. What is no JPEG has none."""
    frame, progressive, scans, position = b"", False, [], 2
    while match := _MARKER.search(data, position):
        marker, position = data[match.start() + 1], match.end()
        if marker == 0xD9:  # the end; what lies behind it is not of this image
            break
        if marker in (0x01, 0xD8):  # these stand alone
            continue
        length = int.from_bytes(data[position : position + 2], "big")
        segment = data[position : position + length]
        position += length
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            frame, progressive = segment[8::3], marker == PROGRESSIVE
        elif marker == 0xDA and len(segment) > 5:
            first, last, bits = segment[-3:]
            coefficients = range(first, last + 1) if progressive else _ALL
            scans.append(Scan(segment[3:-3:2], coefficients, bits & 15 if progressive else 0))
    return frame, scans


def has_too_many_scans(data: bytes) -> bool:
    """Whether there are more than MOST_SCANS."""
    return data.count(b"\xff\xda") > MOST_SCANS and len(read_scans(data)[1]) > MOST_SCANS


def is_complete(data: bytes) -> bool:
    """Whether each coefficient comes with all its bits. What is missing libjpeg guesses from the neighbours, each version differently."""
    frame, scans = read_scans(data)
    missing = {(component, coefficient) for component in frame for coefficient in _ALL}
    for scan in scans:
        brought = {(component, coefficient) for component in scan.components for coefficient in scan.coefficients}
        missing = missing | brought if scan.low else missing - brought
    return not missing
