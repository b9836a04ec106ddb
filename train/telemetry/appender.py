"""Files that a run appends to: a disk that is full, or fails for a while, neither ends training nor tears what is in them."""

import contextlib
import os
import sys
from collections import deque
from pathlib import Path


class Alarm:
    """Says once, on stderr, that files cannot be written, and once that they can again."""

    def __init__(self):
        self._failing: set[Path] = set()

    def failed(self, path: Path, error: OSError) -> None:
        if not self._failing:
            _say(f"alarm: {path} cannot be written ({error.strerror}): training goes on, and its lines are kept in memory until it can be")
        self._failing.add(path)

    def recovered(self, path: Path, lost: int) -> None:
        self._failing.discard(path)
        _say(f"{path} is written again; " + (f"{lost} lines are lost, the oldest of those kept" if lost else "nothing is lost"))

    def ended(self, path: Path, lost: int) -> None:
        _say(f"alarm: {path} could not be written until the end: {lost} lines are lost")


class Appender:
    """A file to which lines or records are appended, each whole or not at all, in their order; one process writes it, in one thread.

    What cannot be written is kept in memory, up to `limit` bytes of the newest, and written before the next that can be.
    """

    def __init__(self, path: Path, alarm: Alarm, limit: int = 64 << 20):
        self._path, self._alarm, self._limit = path, alarm, limit
        self._file: int | None = None
        self._end: int | None = None  # where the file's last whole line ends
        self._kept: deque[bytes] = deque()
        self._bytes = self._lost = 0
        self._failing = False

    def write(self, data: bytes) -> None:
        """Append `data`, now or as soon as it can be; raises no OSError."""
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
        """Try a last time to write what was kept."""
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
            # Part of it may be in the file. The handle may be stale: the next attempt opens the file anew, and cuts it where this cannot.
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
                os.write(self._file, b"\n")  # a killed run's last line may be torn: ours must not continue it
            self._end = os.fstat(self._file).st_size
        except OSError:
            self._close()
            raise

    def _close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # some file systems report here what a write could not do: it is past mending
                os.close(self._file)
            self._file = None


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # stderr may be a file on the same full disk
        print(text, file=sys.stderr, flush=True)
