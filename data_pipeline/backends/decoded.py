"""Backend for WebDataset shards and FFCV files, with random access through their index and the project's decoder.

FFCV itself is not needed; see preparation/beton.py.
"""

import numpy as np

from ..decode import crop_and_resize_batch, decode_batch
from ..split import Split
from .stored import stored_in_beton, stored_in_shards


class DecodedBackend:
    """Decodes samples of `split` by id: of its FFCV file (`beton`), or of its shards. Thread-safe.

    Raises DataError if the split has no such files.
    """

    def __init__(self, split: Split, *, beton: bool):
        self.stored = stored_in_beton(split) if beton else stored_in_shards(split)
        self._decode_batch = crop_and_resize_batch if beton and split.beton.mode == "raw" else decode_batch

    def decode_batch(
        self, ids: np.ndarray, windows: np.ndarray, shape: tuple[int, int], interpolation: str, out: np.ndarray
    ) -> dict[int, str]:
        """See Backend."""
        stored, failures = self.stored.read_chunk(ids)
        failures = (
            self._decode_batch(stored, self.stored.dimensions(ids), windows, shape, interpolation, out) | failures
        )
        return self.stored.sentences(ids, failures)
