"""Transient I/O faults: which errors are retried and which are not."""

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
    """Raises `error` at the first `failures` calls, then returns bytes."""

    def __init__(self, error: OSError, failures: int):
        self.error, self.failures, self.calls = error, failures, 0

    def read(self) -> bytes:
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error
        return b"data"


def test_a_transient_fault_is_retried_and_noted():
    disk, noted = Disk(OSError(errno.ESTALE, "Stale file handle"), 3), []
    assert retried(disk.read, "shard", note=noted.append) == b"data"
    assert [error.errno for error in noted] == [errno.ESTALE] * 3


def test_a_lasting_fault_is_an_error_of_storage_that_names_the_file():
    disk = Disk(OSError(errno.EIO, "Input/output error"), 99)
    sentence = r"train-0\.tar cannot be read after 4 attempts: Input/output error\. Start again when it can be read\."
    with pytest.raises(StorageError, match=sentence) as caught:
        retried(disk.read, "train-0.tar")
    assert caught.value.exit_code == 74 and disk.calls == 4


def test_a_missing_file_is_not_retried():
    disk = Disk(FileNotFoundError(errno.ENOENT, "No such file"), 99)
    with pytest.raises(FileNotFoundError):
        retried(disk.read, "shard")
    assert disk.calls == 1


def test_closing_ends_the_waiting(monkeypatch):
    monkeypatch.setattr(faults, "PAUSES", (60.0,))
    disk, closing = Disk(OSError(errno.EIO, ""), 99), threading.Event()
    closing.set()
    with pytest.raises(CancelledError):
        retried(disk.read, "shard", closing=closing)
    assert disk.calls == 1
