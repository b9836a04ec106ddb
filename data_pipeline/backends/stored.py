"""Random access to the stored bytes of samples by id: one pread per sample, at the place that the index gives.

This module knows no file format; it serves tar shards and FFCV files. The compiled library reads a whole chunk of
samples in one call: threads that took back the interpreter's lock after every pread would wait for one another, and for
the thread that trains. What it cannot read soundly is read again here, which retries, mends and reports.
"""

import errno
import os
import threading
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property

import numpy as np

from .. import native
from ..faults import LASTING, PassingFault, StorageError, read_fully, retried
from ..split import DataError, Split

# Files that one call of the library reads from. A thread keeps so many open beside those in the table.
FILES_AT_ONCE = 16


class StoredSamples:
    """Random access to the bytes of `split`'s samples in its shards, or in its FFCV file (`beton`).

    annotation: in place of the images, what this annotation of the split points to in the shards; it has a RECORD for
    each sample.

    Thread-safe: pread uses no shared file position, and files and the index of images are opened on first use. To end,
    set `closing`, which interrupts the staging of files and the pauses between attempts, then call `close`.
    """

    def __init__(self, split: Split, *, beton: bool = False, annotation: str | None = None):
        self.split, self._beton, self._annotation = split, beton, annotation
        self.files = [split.folder / file.file for file in ([split.beton] if beton else split.shards)]
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._open: dict[int, _File] = {}  # in order of use, the least recently used first
        self._faults: Counter[tuple[str, str]] = Counter()
        if annotation:
            self.records = split.annotation(annotation)  # now: CPython 3.11 cannot do it in many threads

    @cached_property
    def records(self) -> np.ndarray:
        """split.RECORD, [samples]; `shard` is an index into `files`."""
        return self.split.beton_records if self._beton else self.split.records

    def read(self, ids: np.ndarray) -> tuple[list[bytes], dict[int, str]]:
        """The bytes of each sample, and {row: reason} of the damaged ones (their bytes are empty); see `read_chunk`."""
        chunk, failures = self.read_chunk(ids)
        return list(chunk), failures

    def read_chunk(self, ids: np.ndarray) -> tuple[native.Chunk, dict[int, str]]:
        """As `read`, with the bytes in one buffer.

        Every read is checked against the CRC-32 in the index, which takes 2 % of the decoding time for a photograph of
        110 KB. Errors of the file system are not damage: the read is retried, and a lasting error raises StorageError.
        """
        records = self.records[ids]  # one gather from the memory map for the chunk
        chunk, failures = native.Chunk(records["size"]), {}
        places = [records[name].tolist() for name in ("shard", "offset", "size", "checksum")]
        for row, outcome in sorted(self._read_together(chunk, records).items()):
            shard, offset, length, checksum = (column[row] for column in places)
            if outcome > 0:
                self._note_fault(shard, OSError(outcome, os.strerror(outcome)))
            try:
                data = self._read_sound(shard, offset, length, checksum)
            except ValueError as error:
                failures[row] = str(error)
                chunk.lengths[row] = 0
            else:
                chunk.buffer[chunk.starts[row] : chunk.starts[row] + length] = np.frombuffer(data, np.uint8)
        return chunk, failures

    def take_faults(self) -> tuple[PassingFault, ...]:
        """The faults that were noted since the last call."""
        with self._lock:
            faults, self._faults = self._faults, Counter()
        return tuple(PassingFault(*key, count) for key, count in faults.items())

    def note(self, file: str, error: str) -> None:
        """Count a fault of `file` from which reading recovered."""
        with self._lock:
            self._faults[file, error] += 1

    def will_need(self, ids: np.ndarray) -> None:
        """Ask the system to read these samples ahead, so that decoding threads do not wait for the disk."""
        if native.LIBRARY is None:
            return
        records = self.records[ids]
        with suppress(OSError):  # `read` gets the same error and reports it
            for rows, descriptors in self._by_files(records["shard"]):
                native.will_need(descriptors, records["offset"][rows], records["size"][rows])
                if self.closing.is_set():
                    break

    def close(self) -> None:
        """Close all files. Do not read after this."""
        self._forget(*self._open)

    def dimensions(self, ids: np.ndarray) -> np.ndarray:
        """The (width, height) of each image according to the index, [n, 2]."""
        records = self.records[ids]
        return np.stack([records["width"], records["height"]], axis=1)

    def sentence(self, number: int, reason: str) -> str:
        """The error sentence of sample `number`, with its file and place."""
        shard, offset, size = (int(self.records[name][number]) for name in ("shard", "offset", "size"))
        what = f"{self._annotation.replace('_', ' ')} of " if self._annotation else ""
        place = f"{what}sample {number} of split {self.split.name!r} (bytes {offset} to {offset + size})"
        return f"{self.files[shard]}: {place} cannot be read: {reason}."

    def sentences(self, ids: np.ndarray, failures: dict[int, str]) -> dict[int, str]:
        """{row: reason} with each reason turned into a sentence that names the file and the sample."""
        return {row: self.sentence(int(ids[row]), reason) for row, reason in failures.items()}

    def _read_together(self, chunk: native.Chunk, records: np.ndarray) -> dict[int, int]:
        """Fill the chunk by the compiled library.

        Returns {row: outcome (native.read_samples)} of the rows that it could not read: all without the library.
        """
        failed = dict.fromkeys(range(len(chunk)), native.UNSOUND)
        if native.LIBRARY is None:
            return failed
        with suppress(OSError):  # of a file that cannot be opened: `_read` gets the same error and reports it
            for rows, descriptors in self._by_files(records["shard"]):
                part = records[rows]
                found = native.read_samples(chunk, rows, descriptors, part["offset"], part["checksum"])
                for row in rows.tolist():
                    del failed[row]
                failed |= found
        return failed

    def _by_files(self, shards: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The rows of `shards` (int [n]) in groups with few files each: (rows, a descriptor per row).

        The descriptors are open until the next group is asked for.
        """
        distinct, which = np.unique(shards, return_inverse=True)
        for start in range(0, len(distinct), FILES_AT_ONCE):
            files = [self._file(shard) for shard in distinct[start : start + FILES_AT_ONCE].tolist()]
            rows = np.flatnonzero((which >= start) & (which < start + FILES_AT_ONCE))
            yield rows, np.array([file.descriptor for file in files])[which[rows] - start]

    def _note_fault(self, shard: int, error: OSError) -> None:
        """Count an error that is retried. Its handle may be stale, so the file is opened again; if too many files are
        open, all of them are closed.
        """
        self.note(str(self.files[shard]), error.strerror or str(error))
        self._forget(*(list(self._open) if error.errno in (errno.EMFILE, errno.ENFILE) else [shard]))

    def _read_sound(self, shard: int, offset: int, length: int, checksum: int) -> bytes:
        """The bytes, checked against the checksum. A damaged staged file is first replaced by a new copy.

        Raises ValueError if the bytes are damaged at their source.
        """
        try:
            return _check(self._read(shard, offset, length), length, checksum)
        except ValueError:
            if not self.split.mend(self.files[shard], self.closing, self.note):
                raise
        self._forget(shard)
        return _check(self._read(shard, offset, length), length, checksum)

    def _read(self, shard: int, offset: int, length: int) -> bytes:
        path = self.files[shard]

        def attempt() -> bytes:
            file = self._file(shard)  # this reference keeps the file open if another thread drops it from the table
            return read_fully(file.descriptor, length, offset)

        try:
            return retried(attempt, str(path), note=lambda error: self._note_fault(shard, error), closing=self.closing)
        except LASTING as error:  # the file was readable at the start
            raise StorageError(
                f"{path} cannot be read any more: {error.strerror}. Start again when it can be read."
            ) from error

    def _file(self, shard: int) -> "_File":
        """The open file; at most `split.keep_open` stay open."""
        with self._lock:
            if file := self._open.pop(shard, None):
                self._open[shard] = file
                return file
        file = _File(self.split.open_file(self.files[shard], self.closing, self.note))
        with self._lock:
            self._open[shard] = file
            while len(self._open) > self.split.keep_open:
                del self._open[next(iter(self._open))]
        return file

    def _forget(self, *shards: int) -> None:
        with self._lock:
            for shard in shards:
                self._open.pop(shard, None)


class _File:
    """An open file, closed with its last reference. The table may drop it while another thread is reading."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


def _check(data: bytes, length: int, checksum: int) -> bytes:
    if len(data) != length:
        raise ValueError(f"only {len(data)} of {length} bytes are there")
    if zlib.crc32(data) != checksum:
        raise ValueError("its checksum does not match the index")
    return data


def stored_in_shards(split: Split) -> StoredSamples:
    """The samples of the split's WebDataset shards. Raises DataError if it has none."""
    if not split.shards:
        raise DataError(
            f"{split.folder} has no WebDataset shards of split {split.name!r}, only an FFCV file: "
            "train with data.backend=ffcv, or make them with: "
            "python launch/prepare.py SOURCE DEST --formats webdataset"
        )
    return StoredSamples(split)


def stored_in_beton(split: Split) -> StoredSamples:
    """The samples of the split's FFCV file. Raises DataError if it has none."""
    if not split.beton:
        raise DataError(
            f"{split.folder} has no FFCV file of split {split.name!r}: "
            "train with data.backend=webdataset, or make one with: "
            f"python launch/prepare.py SOURCE {split.folder} --formats webdataset,ffcv"
        )
    return StoredSamples(split, beton=True)
