"""WebDataset shards (plain tar files), read at any place through the manifest's index and decoded by the project's decoder."""

import numpy as np

from ..decode import decode_batch
from ..manifest import Split
from .stored import StoredSamples


class WebDatasetBackend:
    """Samples of `split` by id. Thread-safe."""

    def __init__(self, split: Split):
        files = [split.folder / shard.file for shard in split.shards]
        self.stored = StoredSamples(split.records, files, f"split {split.name!r}")

    def decode_batch(self, ids: np.ndarray, windows: np.ndarray, size: int, interpolation: str, out: np.ndarray) -> dict[int, str]:
        """See Backend."""
        encoded, failures = self.stored.read(ids)
        dimensions = np.stack([self.stored.records[name][ids] for name in ("width", "height")], axis=1)
        failures = decode_batch(encoded, dimensions, windows, size, interpolation, out) | failures
        return {row: self.stored.sentence(int(ids[row]), reason) for row, reason in failures.items()}
