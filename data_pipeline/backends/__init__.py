"""Backends: random access to the samples of a prepared split, decoded and cropped.

They do nothing else, so the recipe exists once.
"""

from typing import Protocol

import numpy as np

from ..split import Split
from .stored import StoredSamples


class Backend(Protocol):
    """What the loader needs of a backend.

    Called from several threads at once. `stored`: where it has the bytes of samples from.
    """

    stored: StoredSamples

    def decode_batch(
        self, ids: np.ndarray, windows: np.ndarray, shape: tuple[int, int], interpolation: str, out: np.ndarray
    ) -> dict[int, str]:
        """Samples `ids` (int64 [n]), cut at `windows` (int32 [n, 5], crop.py) and resized to `shape` (height, width),
        into `out` (uint8 [n, height, width, 3], RGB).

        `out` is a contiguous numpy array; for dali it may also be a CUDA tensor, on whose device the images are then
        decoded.

        Returns {row: one sentence that names the file, the sample and what is wrong} of those that cannot be read.
        """


def open_backend(name: str, split: Split) -> Backend:
    """The backend that DataConfig.backend names. Cheap: call it early, for its errors.

    UsageError where its library is not installed, DataError where the split has no files for it.
    """
    if name == "dali":
        from .dali import DALIBackend

        return DALIBackend(split)
    from .decoded import DecodedBackend

    return DecodedBackend(split, beton=name == "ffcv")
