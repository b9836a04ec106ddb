"""Backend for WebDataset shards (plain tar files), with random access through the manifest's index.

The project's decoder decodes the images.
"""

import numpy as np

from ..decode import decode_batch
from ..split import Split
from .stored import stored_in_shards


class WebDatasetBackend:
    """Decodes samples of `split` by id. Thread-safe. Raises DataError if the split has no shards."""

    def __init__(self, split: Split):
        self.stored = stored_in_shards(split)

    def decode_batch(
        self, ids: np.ndarray, windows: np.ndarray, shape: tuple[int, int], interpolation: str, out: np.ndarray
    ) -> dict[int, str]:
        """See Backend."""
        encoded, failures = self.stored.read_chunk(ids)
        failures = decode_batch(encoded, self.stored.dimensions(ids), windows, shape, interpolation, out) | failures
        return self.stored.sentences(ids, failures)
