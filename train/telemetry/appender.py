"""Append-only files that survive full and temporarily failing disks without stopping training or leaving torn lines."""

import contextlib
import os
import sys
from collections import deque
from pathlib import Path


class Alarm:
    """Reports on stderr that a run's files cannot be written (once for all of them), and that a file can be again."""

    def __init__(self):
        self._failing: set[Path] = set()

    def failed(self, path: Path, error: OSError) -> None:
        """A write failed. Reported only if no other file is failing."""
        if not self._failing:
            _print(
                f"alarm: {path} cannot be written ({error.strerror}): "
                "training goes on, and its lines are kept in memory until it can be"
            )
        self._failing.add(path)

    def recovered(self, path: Path, lost: int) -> None:
        """All lines kept in memory have been written; before that, the `lost` oldest were dropped."""
        self._failing.discard(path)
        result = f"{lost} lines are lost, the oldest of those kept" if lost else "nothing is lost"
        _print(f"{path} is written again; {result}")

    def ended(self, path: Path, lost: int) -> None:
        """The file was closed without writing `lost` lines."""
        _print(f"alarm: {path} could not be written until the end: {lost} lines are lost")


class Appender:
    """A file to which lines or records are appended in order, each completely or not at all.

    Only one thread of one process may use it. Data that cannot be written is kept in memory and written later, before
    newer data; beyond `limit` bytes the oldest is dropped.
    """

    def __init__(self, path: Path, alarm: Alarm, limit: int = 64 << 20):
        self._path, self._alarm, self._limit = path, alarm, limit
        self._file: int | None = None
        self._end: int | None = None  # end of the last complete line in the file
        self._kept: deque[bytes] = deque()
        self._bytes = self._lost = 0
        self._failing = False

    def write(self, data: bytes) -> None:
        """Append `data`, now or as soon as possible. Does not raise OSError."""
        self._kept.append(data)
        self._bytes += len(data)
        try:
            while self._kept:
                self._append_first()
        except OSError as error:
            self._failing = True
            self._alarm.failed(self._path, error)
            while self._bytes > self._limit:
                self._bytes -= len(self._kept.popleft())
                self._lost += 1
        else:
            if self._failing:
                self._alarm.recovered(self._path, self._lost)
                self._failing, self._lost = False, 0

    def close(self) -> None:
        """Try once more to write the data kept in memory, and close the file."""
        if self._failing:
            self.write(b"")
        if self._failing:
            self._alarm.ended(self._path, sum(map(bool, self._kept)) + self._lost)
        self._close()

    def _append_first(self) -> None:
        if self._file is None:
            self._open()
        try:
            self._end = os.fstat(self._file).st_size
            rest = memoryview(self._kept[0])
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError:
            # Remove a part that may have been written. If the handle is stale, this fails too; the next attempt then
            # opens the file anew and truncates it.
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._end)
            self._close()
            raise
        self._bytes -= len(self._kept.popleft())

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.fstat(self._file).st_size
            if self._end is not None:
                os.ftruncate(self._file, min(size, self._end))
            elif size and os.pread(self._file, 1, size - 1) != b"\n":
                os.write(self._file, b"\n")  # end a killed run's torn last line
            self._end = os.fstat(self._file).st_size
        except OSError:
            self._close()
            raise

    def _close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # some file systems report failed writes here, too late to repeat them
                os.close(self._file)
            self._file = None


def _print(text: str) -> None:
    with contextlib.suppress(OSError):  # stderr may be on the same full disk
        print(text, file=sys.stderr, flush=True)
