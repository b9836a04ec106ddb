"""The shards of a checkpoint, read: any range of any tensor, at any world size.

A shard is a safetensors file. It is read here by ranges and not memory-mapped, so a fault of the file system is an error that can be tried
again, where a mapped file would end the process. What a file says of itself is checked before it is used: it may be a stranger's.
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
from train.config import ConfigError
from train.telemetry.formatting import printable

AT_ONCE = 1024  # buffers that one system call fills
HEADER = 100_000_000  # bytes that safetensors allows for a file's header
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
}


class CheckpointError(ConfigError):
    """A checkpoint cannot be used; the message names it and says why."""

    def __init__(self, text: str):
        super().__init__(printable(text))


@dataclass
class Piece:
    """A tensor of a shard: elements [start, start + numel) of the whole one, in C order; `offset` is where its bytes begin in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    numel: int
    start: int
    offset: int


@dataclass
class Wanted:
    """Elements [start, start + target.numel()) of the flattened tensor `key`, to be copied into the 1-D `target`."""

    key: str
    start: int
    target: Tensor
    missing: int = field(init=False)
    found: list[tuple[int, int]] = field(init=False, default_factory=list)
    bytes: memoryview | None = field(init=False, default=None)  # the target's own, where they lie in the host's memory in one piece

    def __post_init__(self) -> None:
        self.missing = self.target.numel()
        if self.target.device.type == "cpu" and self.target.is_contiguous():
            self.bytes = _bytes_of(self.target)


class Shard:
    """One shard, open for reading. `pieces`: what is in it, by key. Raises CheckpointError where it is damaged, StorageError where its
    disk does not answer."""

    def __init__(self, path: Path):
        self.path = path
        self._file: int | None = None
        size = self._attempt(lambda: os.fstat(self._file).st_size)
        length = int.from_bytes(self._bytes(8, 0), "little")
        if length > min(HEADER, size - 8):
            raise CheckpointError(f"{path} is damaged: its header does not fit into it")
        try:
            self.pieces = _parse(self._bytes(length, 8), 8 + length, size)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path} is damaged: its header is not one of a shard ({type(error).__name__}: {error})") from error

    def __enter__(self) -> "Shard":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def read(self, places: list[tuple[int, memoryview]]) -> None:
        """Fill buffers, each from its offset in the file; what lies side by side there is read at once."""
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
        """The result of `action` on the open file, which is opened anew after a fault."""

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
    """The pieces that the header of a file of `size` bytes names; the tensors' bytes begin at `begin`. Raises ValueError and others."""
    document = json.loads(header)
    starts = json.loads(document.pop("__metadata__", {}).get("starts", "{}"))
    pieces = {}
    for key, entry in document.items():
        first, last = entry["data_offsets"]
        shape, start = tuple(entry["shape"]), starts.get(key, 0)
        if any(type(number) is not int or number < 0 for number in (first, last, start, *shape)):
            raise ValueError(f"{key!r} has a place that is not a number of elements or bytes")
        dtype, numel = DTYPES[entry["dtype"]], prod(shape)
        if last - first != numel * dtype.itemsize or begin + last > size:
            raise ValueError(f"{key!r} does not lie inside the file")
        pieces[key] = Piece(dtype, shape, numel, start, begin + first)
    return pieces


def fill(shards: Iterable[Path], wanted: Iterable[Wanted]) -> None:
    """Copy all that is `wanted` from `shards`, which are opened one after the other, in their order, until nothing is missing.

    Raises CheckpointError where something is in none of them, or twice.
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
            raise CheckpointError(f"{where} has no {key}; it was written with other settings (EMA, optimizer) than this run has")
        count = want.target.numel()
        raise CheckpointError(f"{where}: {key} has {count - want.missing} of the {count} elements from {want.start} on")


def _take(shard: Shard, piece: Piece, want: Wanted, straight: list[tuple[int, memoryview]]) -> None:
    """Copy what is wanted of `piece`, or note it in `straight`, where its bytes can be read right to where they belong."""
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
    if want.missing <= 0:  # as many elements as are wanted, so none of them twice is all of them
        ends = [want.start, *(end for pair in sorted(want.found) for end in pair)]
        if any(begin != end for end, begin in zip(ends[::2], ends[1::2], strict=False)):
            raise CheckpointError(f"{shard.path} is damaged: elements of {want.key} are in another shard, too")


def pieces_of(shards: Iterable[Path]) -> dict[str, list[Piece]]:
    """All pieces of `shards`, by key, read from the headers alone."""
    found: dict[str, list[Piece]] = {}
    for path in shards:
        with Shard(path) as shard:
            for key, piece in shard.pieces.items():
                found.setdefault(key, []).append(piece)
    return found


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().view(torch.uint8).numpy())
