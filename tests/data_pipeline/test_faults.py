"""Transient I/O faults: which errors are retried and which are not."""

import errno
import os
import threading
from concurrent.futures import CancelledError

import numpy as np
import pytest

from data_pipeline import faults
from data_pipeline.backends.stored import StoredSamples, stored_in_shards
from data_pipeline.faults import PassingFault, StorageError, retried
from data_pipeline.preparation import listing, workers
from data_pipeline.preparation import verify as verify_module
from data_pipeline.preparation.folders import walk
from data_pipeline.preparation.foreign_shard import IndexTask, index_shard
from data_pipeline.preparation.image_source import Source
from data_pipeline.preparation.listing import read_image
from data_pipeline.preparation.pack import done_path, read_done
from data_pipeline.split import DataError, Split
from tests.data_pipeline.images import make_folder, make_tar
from tests.data_pipeline.shards import jpeg, write_split


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


def test_a_folder_that_cannot_be_listed_for_a_while(tmp_path, monkeypatch):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat/1.jpg").write_bytes(b"image")
    disk, stat = Disk(OSError(errno.ESTALE, "Stale file handle"), 3), os.stat
    monkeypatch.setattr(os, "stat", lambda path, **options: (disk.read(), stat(path, **options))[1])
    assert list(walk(tmp_path)) == [("cat/", 0, 0), ("cat/1.jpg", 0, 5)]
    disk.failures = 99
    with pytest.raises(StorageError, match=f"{tmp_path}/ cannot be read after 4 attempts: Stale file handle"):
        list(walk(tmp_path))
    monkeypatch.undo()
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(DataError, match="cannot read .*/circle: Too many levels of symbolic links"):
        list(walk(tmp_path))


def test_a_tar_that_cannot_be_listed_for_a_while(tmp_path, monkeypatch):
    source = Source("tar", make_tar(make_folder(tmp_path / "pictures"), tmp_path / "pictures.tar"))
    disk, tar_files = Disk(OSError(errno.EIO, "Input/output error"), 3), listing.tar_files
    monkeypatch.setattr(listing, "tar_files", lambda *arguments: (disk.read(), tar_files(*arguments))[1])
    assert len(listing.list_source(source).splits["train"].names) == 15
    disk.failures = 99
    with pytest.raises(StorageError, match=r"pictures.tar cannot be read after 4 attempts: Input/output error"):
        listing.list_source(source)


def test_verify_reads_again_what_failed(split, monkeypatch):
    disk, check = Disk(OSError(errno.EIO, "Input/output error"), 3), verify_module._check_shard
    monkeypatch.setattr(verify_module, "_check_shard", lambda *arguments: (disk.read(), check(*arguments))[1])
    assert verify_module.verify(split.folder) == [] and disk.calls == 4
    disk.failures = 99
    with pytest.raises(StorageError, match=f"{split.shards[0].file} cannot be read after 4 attempts"):
        verify_module.verify(split.folder)


# --- an error in the middle of a sample: the kernel returns the bytes before it, and fails at the next call ----------


@pytest.fixture
def split(tmp_path) -> Split:
    return write_split(tmp_path, [jpeg(number, 40, 30) for number in range(3)])


@pytest.fixture
def disk_error(split, monkeypatch):
    """Makes one read in sample 1 fail. Returns the errors that were raised."""
    bad, read, raised = int(split.records["offset"][1]) + 100, os.pread, []

    def pread(descriptor: int, size: int, offset: int) -> bytes:
        if offset == bad and not raised:
            raised.append(OSError(errno.EIO, "Input/output error"))
            raise raised[0]
        return read(descriptor, bad - offset if offset < bad < offset + size and not raised else size, offset)

    monkeypatch.setattr(os, "pread", pread)
    return raised


def test_it_does_not_count_as_damage_in_training(split, disk_error, monkeypatch):
    monkeypatch.setattr(StoredSamples, "_read_together", lambda self, chunk, _: dict.fromkeys(range(len(chunk)), -1))
    stored = stored_in_shards(split)
    assert stored.read(np.arange(3)) == ([jpeg(number, 40, 30) for number in range(3)], {})
    path = str(split.folder / split.shards[0].file)
    assert disk_error and stored.take_faults() == (PassingFault(path, "Input/output error", 1),)


def test_it_does_not_count_as_damage_in_a_tar(split, disk_error):
    offset, size = (int(split.records[name][1]) for name in ("offset", "size"))
    source = Source("tar", split.folder / split.shards[0].file)
    assert read_image(source, "1.jpg", offset, size) == jpeg(1, 40, 30) and disk_error


def test_it_does_not_count_as_damage_in_index(split, disk_error, monkeypatch):
    monkeypatch.setattr(workers, "_counts", [0])
    file = split.shards[0].file
    index_shard(IndexTask(split.folder, file, None, "cls", 0, 0))
    header, _ = read_done(done_path(split.folder, file))
    assert header["shard"]["samples"] == 3 and not header["listed"] and disk_error


def test_a_shard_that_has_become_shorter_is_read_again(split, monkeypatch):
    monkeypatch.setattr(workers, "_counts", [0])
    path, read = split.folder / split.shards[0].file, os.pread

    def pread(descriptor: int, size: int, offset: int) -> bytes:
        os.truncate(path, int(split.records["offset"][1]) + 100)
        return read(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", pread)
    with pytest.raises(DataError, match=f"{path} is cut off: '00000001.jpg' does not end inside it"):
        index_shard(IndexTask(split.folder, path.name, None, "cls", 0, 0))
