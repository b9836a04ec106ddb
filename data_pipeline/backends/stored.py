"""The stored bytes of samples, by id, from whatever files hold them: one pread per sample. No file format is read here, only the index."""

import functools
import os
import threading
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from ..manifest import DataError, Split


class StoredSamples:
    """Random access to the bytes at `records` (manifest.RECORD, [samples]), whose `shard` is an index into `files`, files of `split`.

    Thread-safe: pread has no position to share, and files open on first use. Set `closing` before leaving: it ends a file's staging.
    """

    def __init__(self, records: np.ndarray, files: Sequence[Path], split: Split):
        self.records, self.files, self.split = records, files, split
        self.closing = threading.Event()
        self._file = functools.lru_cache(split.keep_open)(self._open)

    def read(self, ids: np.ndarray) -> tuple[list[bytes], dict[int, str]]:
        """The bytes of each sample, and {row: why} of those that cannot be read (their bytes are empty).

        Every read is checked against the index's CRC-32: 2 % of the decoding time for a photograph of 110 KB.
        """
        records = self.records[ids]  # one gather from the memory map for the batch
        columns = (records[name].tolist() for name in ("shard", "offset", "size", "checksum"))
        encoded, failures = [], {}
        for row, (shard, offset, length, checksum) in enumerate(zip(*columns, strict=True)):
            data = b""
            try:
                file = self._file(shard)  # held while reading: the cache alone does not keep it open
                data = os.pread(file.descriptor, length, offset)
                if len(data) != length:
                    raise ValueError(f"only {len(data)} of {length} bytes are there")
                if zlib.crc32(data) != checksum:
                    raise ValueError("its checksum does not match the index")
            except (ValueError, OSError, IndexError) as error:
                data, failures[row] = b"", str(error)
            encoded.append(data)
        return encoded, failures

    def will_need(self, ids: np.ndarray) -> None:
        """Have the system begin to read these samples from the disk, so that the threads that decode need not wait for it."""
        records = self.records[ids]
        for shard, offset, length in zip(*(records[name].tolist() for name in ("shard", "offset", "size")), strict=True):
            with suppress(OSError, IndexError):  # `read` meets it again, and says so
                os.posix_fadvise(self._file(shard).descriptor, offset, length, os.POSIX_FADV_WILLNEED)

    def dimensions(self, ids: np.ndarray) -> np.ndarray:
        """The (width, height) of each image according to the index, [n, 2]."""
        records = self.records[ids]
        return np.stack([records["width"], records["height"]], axis=1)

    def sentence(self, number: int, reason: str) -> str:
        """Names the file and the sample of a failure."""
        shard, offset, size = (int(self.records[name][number]) for name in ("shard", "offset", "size"))
        path = self.files[shard] if shard < len(self.files) else f"shard {shard}"
        return f"{path}: sample {number} of split {self.split.name!r} (bytes {offset} to {offset + size}) cannot be read: {reason}."

    def sentences(self, ids: np.ndarray, failures: dict[int, str]) -> dict[int, str]:
        """{row: why} with each reason as a sentence that names the file and the sample."""
        return {row: self.sentence(int(ids[row]), reason) for row, reason in failures.items()}

    def _open(self, shard: int) -> "_File":
        return _File(self.split.open_file(self.files[shard], self.closing))


class _File:
    """An open file, closed when the last thread that reads it lets go: the cache may drop it while another thread is reading."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


def stored_in_shards(split: Split) -> StoredSamples:
    """The samples of the split's WebDataset shards. DataError where it has none."""
    if not split.shards:
        raise DataError(
            f"{split.folder} has no WebDataset shards of split {split.name!r}, only an FFCV file: train with data.backend=ffcv, or make "
            "them with: python launch/prepare.py SOURCE DEST --formats webdataset"
        )
    return StoredSamples(split.records, [split.folder / shard.file for shard in split.shards], split)


def stored_in_beton(split: Split) -> StoredSamples:
    """The samples of the split's FFCV file. DataError where it has none."""
    if not split.beton:
        raise DataError(
            f"{split.folder} has no FFCV file of split {split.name!r}: train with data.backend=webdataset, or make one with: "
            f"python launch/prepare.py SOURCE {split.folder} --formats webdataset,ffcv"
        )
    return StoredSamples(split.beton_records, [split.folder / split.beton.file], split)
