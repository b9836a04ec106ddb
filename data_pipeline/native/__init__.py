"""The compiled reader and decoder: C on libjpeg-turbo (read.c, decode.c), loaded with ctypes, which releases the GIL.

`LIBRARY` is None if it was not built (no compiler or no headers at installation) or has another INTERFACE.
"""

import ctypes
import importlib.util
from collections.abc import Sequence

import numpy as np

from ..jpeg import MOST_SCANS

# The same values as in decode.h and resample.h.
INTERFACE = 4
MESSAGE_LENGTH = 200
AVX2, OWN_HUFFMAN = 1, 2
UNSOUND = -1
ENCODINGS = {"jpeg": 0, "raw": 1}
INTERPOLATIONS = {"bilinear": 0, "bicubic": 1}


def _load() -> ctypes.CDLL | None:
    # find_spec locates the file in an editable install too. It is not a Python module, so it is not imported.
    found = importlib.util.find_spec(".library", __name__)
    if found is None or found.origin is None:
        return None
    try:
        library = ctypes.CDLL(found.origin)
    except OSError:  # the libjpeg that it was linked with is missing
        return None
    if library.decoder_interface() != INTERFACE:
        return None
    pointer = ctypes.c_void_p
    library.decoder_decode.argtypes = [
        *(ctypes.c_int, ctypes.c_int, pointer, pointer, pointer),  # count, encoding, data, lengths, dimensions
        *(ctypes.c_int, pointer),  # most_scans, windows
        *[ctypes.c_int] * 4,  # height, width, filter, features
        *(pointer, pointer),  # out, messages
    ]
    library.decoder_read.argtypes = [ctypes.c_int, *[pointer] * 7]
    library.decoder_will_need.argtypes = [ctypes.c_int, *[pointer] * 3]
    library.decoder_will_need.restype = None
    return library


LIBRARY = _load()
FEATURES = 0 if LIBRARY is None else LIBRARY.decoder_features()


class Chunk(Sequence):
    """The bytes of n samples, in one buffer (uint8): sample i has the `lengths[i]` bytes from `starts[i]` on (int64 [n]
    each). As a sequence it has `bytes`.
    """

    def __init__(self, lengths: np.ndarray):
        ends = np.cumsum(lengths, dtype=np.int64)
        self.lengths = lengths.astype(np.int64)
        self.starts = ends - self.lengths
        self.buffer = np.empty(int(ends[-1]) if len(ends) else 0, np.uint8)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> bytes:
        start = self.starts[row]
        return self.buffer[start : start + self.lengths[row]].tobytes()


def read_samples(chunk: Chunk, rows: np.ndarray, files: np.ndarray, offsets: np.ndarray, checksums: np.ndarray) -> dict:
    """Read some `rows` of `chunk`: row rows[i] from the open file files[i], at offsets[i]; checksums: CRC-32.

    Returns {row: outcome} of those that failed: UNSOUND (too short, or another checksum) or an errno.
    """
    count = len(rows)
    files, offsets = np.ascontiguousarray(files, np.int32), np.ascontiguousarray(offsets, np.int64)
    checksums = np.ascontiguousarray(checksums, np.uint32)
    lengths, starts = chunk.lengths[rows], chunk.starts[rows]
    outcomes = np.empty(count, np.int32)
    pointers = (array.ctypes.data for array in (files, offsets, lengths, checksums, starts, chunk.buffer, outcomes))
    if not LIBRARY.decoder_read(count, *pointers):
        return {}
    failed = np.flatnonzero(outcomes)
    return dict(zip(rows[failed].tolist(), outcomes[failed].tolist(), strict=True))


def will_need(files: np.ndarray, offsets: np.ndarray, lengths: np.ndarray) -> None:
    """Ask the system to read parts of open files ahead: `lengths` bytes at `offsets`, [n] each."""
    files = np.ascontiguousarray(files, np.int32)
    offsets, lengths = (np.ascontiguousarray(values, np.int64) for values in (offsets, lengths))
    LIBRARY.decoder_will_need(len(files), files.ctypes.data, offsets.ctypes.data, lengths.ctypes.data)


def decode_batch(
    encoded: Sequence[bytes],
    dimensions: np.ndarray,
    windows: np.ndarray,
    shape: tuple[int, int],
    interpolation: str,
    out: np.ndarray,
    *,
    encoding: str = "jpeg",
    features: int = FEATURES,
) -> dict[int, str]:
    """See data_pipeline.decode.decode_batch. encoding: "jpeg", or "raw" for stored pixels, uint8 [height, width, 3].

    features: the CPU features to use, a subset of FEATURES; the result is bit-identical for all.
    """
    count = len(encoded)
    dimensions = np.ascontiguousarray(dimensions, np.int32)
    windows = np.ascontiguousarray(windows, np.int32)
    if dimensions.shape != (count, 2) or windows.shape != (count, 5):
        raise ValueError(f"{count} images, dimensions {dimensions.shape}, windows {windows.shape}")
    height, width = shape
    usable = out.dtype == np.uint8 and out.flags.c_contiguous and out.flags.writeable
    if out.shape != (count, height, width, 3) or not usable or min(shape) < 1:
        raise ValueError(f"out must be a contiguous uint8 array [{count}, {height}, {width}, 3]")
    if isinstance(encoded, Chunk):
        addresses = (encoded.starts + encoded.buffer.ctypes.data).astype(np.uintp)
        data, lengths = addresses.ctypes.data, encoded.lengths.astype(np.uintp)
    else:
        data = (ctypes.c_char_p * count)(*encoded)  # raises TypeError for anything but bytes
        lengths = np.fromiter(map(len, encoded), np.uintp, count)
    messages = np.empty((count, MESSAGE_LENGTH), np.uint8)
    failures = LIBRARY.decoder_decode(
        *(
            count,
            ENCODINGS[encoding],
            data,
            lengths.ctypes.data,
            dimensions.ctypes.data,
            MOST_SCANS,
            windows.ctypes.data,
        ),
        *(height, width, INTERPOLATIONS[interpolation], features, out.ctypes.data, messages.ctypes.data),
    )
    if not failures:
        return {}
    return {
        int(row): messages[row].tobytes().split(b"\0")[0].decode("utf-8", "replace")
        for row in np.flatnonzero(messages[:, 0])
    }
