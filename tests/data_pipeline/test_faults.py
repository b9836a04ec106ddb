"""Passing I/O faults: what is tried again, and what is not."""

import errno
import threading
from concurrent.futures import CancelledError

import pytest

from data_pipeline import faults
from data_pipeline.faults import StorageError, retried


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(faults, "PAUSES", (0.0, 0.0, 0.0))


class Disk:
    """Answers `failures` times with an error, then with the bytes."""

    def __init__(self, error: OSError, failures: int):
        self.error, self.failures, self.calls = error, failures, 0

    def read(self) -> bytes:
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error
        return b"data"


def test_a_fault_that_passes_costs_time_only():
    disk, noted = Disk(OSError(errno.ESTALE, "Stale file handle"), 3), []
    assert retried(disk.read, "shard", note=noted.append) == b"data"
    assert [error.errno for error in noted] == [errno.ESTALE] * 3


def test_a_fault_that_stays_names_the_file_and_is_no_bad_data():
    disk = Disk(OSError(errno.EIO, "Input/output error"), 99)
    with pytest.raises(StorageError, match="train-0.tar cannot be read after 4 attempts: Input/output error") as caught:
        retried(disk.read, "train-0.tar")
    assert caught.value.exit_code == 74 and disk.calls == 4


def test_what_is_not_there_is_not_asked_for_again():
    disk = Disk(FileNotFoundError(errno.ENOENT, "No such file"), 99)
    with pytest.raises(FileNotFoundError):
        retried(disk.read, "shard")
    assert disk.calls == 1


def test_closing_ends_the_waiting(monkeypatch):
    monkeypatch.setattr(faults, "PAUSES", (60.0,))
    closing = threading.Event()
    closing.set()
    with pytest.raises(CancelledError):
        retried(Disk(OSError(errno.EIO, ""), 99).read, "shard", closing=closing)
