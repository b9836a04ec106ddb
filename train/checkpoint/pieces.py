"""Reading ranges of tensors from the shards of a checkpoint, at any world size.

A shard is a safetensors file. Byte ranges are read with `preadv` rather than by memory-mapping: a fault of the file
system is then an error that can be retried, instead of a signal that ends the process. Headers are checked before use,
because files may be untrusted.
"""

import contextlib
import json
import os
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.faults import LASTING, retried
from train.checkpoint.info import CheckpointError

AT_ONCE = 1024  # buffers filled by one system call, at most (IOV_MAX)
HEADER = 100_000_000  # maximum size of a header in bytes, as in safetensors
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
}


@dataclass
class Piece:
    """A tensor in a shard: elements [start, start + numel) of the whole tensor in C order.

    offset: position of its first byte in the file.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    numel: int
    start: int
    offset: int


@dataclass
class Wanted:
    """A request: copy elements [start, start + target.numel()) of the flattened tensor `key` into the 1-D `target`.

    target: contiguous. missing: number of elements not copied yet. found: ranges copied, as (first, end).
    """

    key: str
    start: int
    target: Tensor
    missing: int = field(init=False)
    found: list[tuple[int, int]] = field(init=False, default_factory=list)
    bytes: memoryview | None = field(init=False, default=None)  # the target's memory, if on the CPU

    def __post_init__(self) -> None:
        self.missing = self.target.numel()
        if self.target.device.type == "cpu":
            self.bytes = _bytes_of(self.target)


class Shard:
    """A shard, open for reading; `pieces` are its tensors by key.

    Raises CheckpointError if the file is damaged, StorageError if the file system fails persistently.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file: int | None = None
        size = self._attempt(lambda: os.fstat(self._file).st_size)
        length = int.from_bytes(self._bytes(8, 0), "little")
        if length > min(HEADER, size - 8):
            raise CheckpointError(f"{path} is damaged: its header is too long")
        try:
            self.pieces = _parse(self._bytes(length, 8), 8 + length, size)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{path} is damaged: its header is not a valid shard header ({type(error).__name__}: {error})"
            ) from error

    def __enter__(self) -> "Shard":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def read(self, places: list[tuple[int, memoryview]]) -> None:
        """Fill buffers, each from its offset in the file. Adjacent ranges are read by one system call."""
        beside: list[memoryview] = []
        begin = end = 0
        for offset, buffer in sorted(places, key=lambda place: place[0]):
            if offset != end or len(beside) == AT_ONCE:
                self._fill(beside, begin)
                beside, begin, end = [], offset, offset
            beside.append(buffer)
            end += len(buffer)
        self._fill(beside, begin)

    def _bytes(self, count: int, offset: int) -> bytearray:
        buffer = bytearray(count)
        self._fill([memoryview(buffer)], offset)
        return buffer

    def _fill(self, buffers: list[memoryview], offset: int) -> None:
        def read() -> None:
            left, place = deque(buffer for buffer in buffers if len(buffer)), offset
            while left:
                count = os.preadv(self._file, left, place)
                if not count:
                    raise CheckpointError(f"{self.path} is damaged: it is cut off")
                place += count
                while left and count >= len(left[0]):
                    count -= len(left.popleft())
                if count:
                    left[0] = left[0][count:]

        self._attempt(read)

    def _attempt(self, action):
        """The result of `action` on the open file, retried with the file opened anew after a fault."""

        def attempt():
            try:
                if self._file is None:
                    self._file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
                return action()
            except OSError:
                self._close()
                raise

        try:
            return retried(attempt, str(self.path))
        except LASTING as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}") from error

    def _close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.close(self._file)
            self._file = None


def _parse(header: bytearray, begin: int, size: int) -> dict[str, Piece]:
    """The pieces that a shard's JSON header lists. Raises ValueError, KeyError or others if it is not valid.

    begin: offset of the first tensor's bytes. size: of the file, in bytes.
    """
    document = json.loads(header)
    starts = json.loads(document.pop("__metadata__", {}).get("starts", "{}"))
    pieces = {}
    for key, entry in document.items():
        first, last = entry["data_offsets"]
        shape, start = tuple(entry["shape"]), starts.get(key, 0)
        if any(type(number) is not int or number < 0 for number in (first, last, start, *shape)):
            raise ValueError(f"{key!r} has an offset or size that is not a natural number")
        dtype, numel = DTYPES[entry["dtype"]], prod(shape)
        if last - first != numel * dtype.itemsize or begin + last > size:
            raise ValueError(f"{key!r} does not lie inside the file")
        pieces[key] = Piece(dtype, shape, numel, start, begin + first)
    return pieces


def fill(shards: Iterable[Path], wanted: Iterable[Wanted]) -> None:
    """Copy all `wanted` ranges from `shards`, which are opened one by one in order until nothing is missing.

    Raises CheckpointError if elements are in none of the shards, or in several.
    """
    missing: dict[str, list[Wanted]] = {}
    for want in wanted:
        if want.missing:
            missing.setdefault(want.key, []).append(want)
    path = None
    for path in shards:
        if not missing:
            return
        with Shard(path) as shard:
            straight: list[tuple[int, memoryview]] = []
            for key in [key for key in missing if key in shard.pieces]:
                for want in missing[key]:
                    _take(shard, shard.pieces[key], want, straight)
                missing[key] = [want for want in missing[key] if want.missing > 0]
                if not missing[key]:
                    del missing[key]
            shard.read(straight)
    if missing:
        key, (want, *_) = next(iter(missing.items()))
        where = path.parent if path else "a checkpoint without shards"
        if not want.found:
            raise CheckpointError(
                f"{where} has no {key}; it was written with other settings (EMA, optimizer) than this run has"
            )
        count = want.target.numel()
        raise CheckpointError(f"{where}: {key} has {count - want.missing} of the {count} elements from {want.start} on")


def _take(shard: Shard, piece: Piece, want: Wanted, straight: list[tuple[int, memoryview]]) -> None:
    """Copy the part of `piece` that is wanted.

    If the bytes can be read into the target directly (same type, on the CPU), append the read to `straight` instead.
    """
    low, high = max(piece.start, want.start), min(piece.start + piece.numel, want.start + want.target.numel())
    if low >= high:
        return
    size, first = piece.dtype.itemsize, low - want.start
    offset = piece.offset + (low - piece.start) * size
    if want.bytes is not None and want.target.dtype == piece.dtype:
        straight.append((offset, want.bytes[first * size : (first + high - low) * size]))
    else:
        copy = torch.empty(high - low, dtype=piece.dtype)
        shard.read([(offset, _bytes_of(copy))])
        want.target[first : first + high - low].copy_(copy)
    want.missing -= high - low
    want.found.append((low, high))
    if want.missing <= 0:  # complete, unless some elements were found twice
        ends = [want.start, *(end for pair in sorted(want.found) for end in pair)]
        if any(begin != end for end, begin in zip(ends[::2], ends[1::2], strict=False)):
            raise CheckpointError(f"{shard.path} is damaged: elements of {want.key} are in another shard, too")


def pieces_of(shards: Iterable[Path]) -> dict[str, list[Piece]]:
    """All pieces of `shards` by key. Only headers are read."""
    found: dict[str, list[Piece]] = {}
    for path in shards:
        with Shard(path) as shard:
            for key, piece in shard.pieces.items():
                found.setdefault(key, []).append(piece)
    return found


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().view(torch.uint8).numpy())
