"""Reading of samples in chunks by the compiled library, against Python's own reading."""

import errno
import os
import resource
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import native
from data_pipeline.backends.stored import FILES_AT_ONCE, stored_in_shards
from data_pipeline.config import AugmentConfig
from data_pipeline.loader import build_loader
from data_pipeline.manifest import open_manifest
from data_pipeline.order import Order
from data_pipeline.split import Split
from data_pipeline.views import Crops
from tests.data_pipeline.shards import jpeg, write_split
from tests.data_pipeline.staging import config

pytestmark = pytest.mark.skipif(native.LIBRARY is None, reason="the compiled library is not built")

LENGTHS = np.array([*range(70), 4095, 4096, 4097, 100_003])


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "samples"
    path.write_bytes(np.random.default_rng(0).integers(0, 256, LENGTHS.sum(), np.uint8).tobytes())
    descriptor = os.open(path, os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


def places(file: int) -> tuple[list[bytes], np.ndarray, np.ndarray, np.ndarray]:
    """The bytes of each sample, a descriptor, an offset and a checksum for each."""
    offsets = np.cumsum(LENGTHS) - LENGTHS
    expected = [os.pread(file, length, offset) for offset, length in zip(offsets, LENGTHS, strict=True)]
    return expected, np.full(len(LENGTHS), file), offsets, np.array([zlib.crc32(data) for data in expected])


def test_samples_of_every_length_are_read_and_have_zlibs_checksum(file):
    expected, files, offsets, checksums = places(file)
    chunk, rows = native.Chunk(LENGTHS), np.arange(len(LENGTHS))
    for part in (rows[1::2], rows[::2]):
        assert native.read_samples(chunk, part, files[part], offsets[part], checksums[part]) == {}
    assert list(chunk) == expected


def test_each_failure_is_named_by_its_row_and_the_others_are_read(file):
    expected, files, offsets, checksums = places(file)
    checksums[3] ^= 1
    offsets[40] = LENGTHS.sum() - 39  # one byte short
    files[7] = os.open(os.devnull, os.O_WRONLY)
    chunk, rows = native.Chunk(LENGTHS), np.arange(len(LENGTHS))
    failed = native.read_samples(chunk, rows, files, offsets, checksums)
    os.close(files[7])
    assert failed == {3: native.UNSOUND, 7: errno.EBADF, 40: native.UNSOUND}
    sound = [row for row in rows.tolist() if row not in failed]
    assert [chunk[row] for row in sound] == [expected[row] for row in sound]


def test_an_empty_chunk():
    chunk = native.Chunk(np.array([], np.uint32))
    assert list(chunk) == []
    nothing = np.array([], np.int64)
    assert native.read_samples(chunk, nothing, nothing, nothing, nothing) == {}


def test_a_chunk_of_many_files_is_the_same_as_without_the_library(tmp_path, monkeypatch):
    images = [jpeg(number, 30 + number % 7, 20) for number in range(3 * FILES_AT_ONCE)]
    write_split(tmp_path, images, per_shard=1)
    split = open_manifest(tmp_path).split("train")
    path = tmp_path / split.shards[20].file
    damaged = bytearray(path.read_bytes())
    damaged[int(split.records["offset"][20])] ^= 1
    path.write_bytes(damaged)
    os.unlink(tmp_path / split.shards[33].file)
    ids = np.random.default_rng(1).permutation(np.delete(np.arange(len(images)), 33))
    stored = stored_in_shards(split)
    stored.will_need(ids)
    found, failures = stored.read(ids)
    row = ids.tolist().index(20)
    assert failures == {row: "its checksum does not match the index"}
    assert found[row] == b""
    assert [data for data in found if data] == [images[number] for number in ids.tolist() if number != 20]
    monkeypatch.setattr(native, "LIBRARY", None)
    assert stored.read(ids) == (found, failures)


def test_the_training_thread_opens_no_shard_and_each_is_opened_once(tmp_path, monkeypatch):
    """Twice as many shards as were kept open before November 2026, in a full shuffle, for three epochs."""
    split = write_split(tmp_path, [jpeg(number % 8, 16, 16) for number in range(512)], per_shard=1)
    opened, open_file = [], Split.open_file

    def noted(self: Split, path: Path, *arguments) -> int:
        opened.append((threading.current_thread() is threading.main_thread(), path))
        return open_file(self, path, *arguments)

    monkeypatch.setattr(Split, "open_file", noted)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (8 * 512, 8 * 512))
    data = config(tmp_path)
    with build_loader(data, Crops(data, AugmentConfig()), split, Order(0, 512, 64, 64)) as loader:
        for _ in range(3 * 8):
            next(loader)
        assert len(loader._stored[0]._open) == 512
    assert not any(in_main for in_main, _ in opened)
    assert len(opened) < 2 * 512  # two threads may open one shard at the same time


def test_a_file_that_cannot_be_opened_is_reported_by_its_name(tmp_path):
    write_split(tmp_path, [jpeg(number, 20, 20) for number in range(4)], per_shard=2)
    split = open_manifest(tmp_path).split("train")
    stored = stored_in_shards(split)
    os.unlink(tmp_path / split.shards[1].file)
    with pytest.raises(Exception, match=rf"{split.shards[1].file} cannot be read any more: No such file"):
        stored.read(np.arange(4))
    assert stored.read(np.arange(2))[1] == {}
