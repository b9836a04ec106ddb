"""The compiled decoder: C on libjpeg-turbo (decode.c first), loaded with ctypes, which releases the GIL.

`LIBRARY` is None where it was not built (no compiler or no headers when the project was installed) or was built from other sources.
"""

import ctypes
import importlib.util
from collections.abc import Sequence

import numpy as np

from ..jpeg import MOST_SCANS

# As in decode.h and resample.h.
INTERFACE = 2
MESSAGE_LENGTH = 200
AVX2, OWN_HUFFMAN = 1, 2
ENCODINGS = {"jpeg": 0, "raw": 1}
INTERPOLATIONS = {"bilinear": 0, "bicubic": 1}


def _load() -> ctypes.CDLL | None:
    found = importlib.util.find_spec(".library", __name__)  # in an editable install too; it is no Python module, so it is only looked up
    if found is None or found.origin is None:
        return None
    try:
        library = ctypes.CDLL(found.origin)
    except OSError:  # the libjpeg that it was linked to is gone
        return None
    if library.decoder_interface() != INTERFACE:
        return None
    pointer = ctypes.c_void_p
    library.decoder_decode.argtypes = [
        *(ctypes.c_int, ctypes.c_int, pointer, pointer, pointer),  # count, encoding, data, lengths, dimensions
        *(ctypes.c_int, pointer),  # most_scans, windows
        *(ctypes.c_int, ctypes.c_int, ctypes.c_int, pointer, pointer),  # size, filter, features, out, messages
    ]
    return library


LIBRARY = _load()
FEATURES = 0 if LIBRARY is None else LIBRARY.decoder_features()


def decode_batch(
    encoded: Sequence[bytes],
    dimensions: np.ndarray,
    windows: np.ndarray,
    size: int,
    interpolation: str,
    out: np.ndarray,
    *,
    encoding: str = "jpeg",
    features: int = FEATURES,
) -> dict[int, str]:
    """See data_pipeline.decode.decode_batch. encoding: "jpeg", or "raw" for stored pixels, uint8 [height, width, 3].

    features: of the machine, which of them to use; the result is the same, to the last bit.
    """
    count = len(encoded)
    dimensions = np.ascontiguousarray(dimensions, np.int32)
    windows = np.ascontiguousarray(windows, np.int32)
    if dimensions.shape != (count, 2) or windows.shape != (count, 5):
        raise ValueError(f"{count} images, dimensions {dimensions.shape}, windows {windows.shape}")
    if out.shape != (count, size, size, 3) or out.dtype != np.uint8 or not out.flags.c_contiguous or not out.flags.writeable or size < 1:
        raise ValueError(f"out must be a contiguous uint8 array [{count}, {size}, {size}, 3]")
    data = (ctypes.c_char_p * count)(*encoded)  # refuses anything but bytes
    lengths = np.fromiter(map(len, encoded), np.uintp, count)
    messages = np.empty((count, MESSAGE_LENGTH), np.uint8)
    failures = LIBRARY.decoder_decode(
        *(count, ENCODINGS[encoding], data, lengths.ctypes.data, dimensions.ctypes.data, MOST_SCANS, windows.ctypes.data),
        *(size, INTERPOLATIONS[interpolation], features, out.ctypes.data, messages.ctypes.data),
    )
    if not failures:
        return {}
    return {int(row): messages[row].tobytes().split(b"\0")[0].decode("utf-8", "replace") for row in np.flatnonzero(messages[:, 0])}
