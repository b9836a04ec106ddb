"""Backend for FFCV files, with random access through their index, decoded by the project's decoder.

FFCV itself is not needed; see preparation/beton.py.
"""

import numpy as np

from ..decode import crop_and_resize_batch, decode_batch
from ..split import Split
from .stored import stored_in_beton


class FFCVBackend:
    """Decodes samples of `split` by id. Thread-safe. Raises DataError if the split has no FFCV file."""

    def __init__(self, split: Split):
        self.stored = stored_in_beton(split)
        self._decode_batch = decode_batch if split.beton.mode == "jpeg" else crop_and_resize_batch

    def decode_batch(
        self, ids: np.ndarray, windows: np.ndarray, shape: tuple[int, int], interpolation: str, out: np.ndarray
    ) -> dict[int, str]:
        """See Backend."""
        stored, failures = self.stored.read_chunk(ids)
        failures = (
            self._decode_batch(stored, self.stored.dimensions(ids), windows, shape, interpolation, out) | failures
        )
        return self.stored.sentences(ids, failures)
