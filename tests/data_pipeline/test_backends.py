import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from data_pipeline.backends import open_backend, webdataset
from data_pipeline.decode import crop_and_resize, decode_rgb
from data_pipeline.manifest import DataError, Split, open_manifest
from tests.data_pipeline.shards import jpeg, write_split


@pytest.fixture
def images() -> list[bytes]:
    return [jpeg(number, 40 + number, 70 - number) for number in range(20)]


@pytest.fixture
def split(tmp_path, images) -> Split:
    write_split(tmp_path, images, per_shard=6)
    return open_manifest(tmp_path).split("train")


def read(split: Split, ids, windows=None, size: int = 24) -> np.ndarray:
    ids = np.asarray(ids, np.int64)
    out = np.zeros((len(ids), size, size, 3), np.uint8)
    windows = np.tile(np.array([2, 3, 30, 33], np.int32), (len(ids), 1)) if windows is None else windows
    open_backend("webdataset", split).decode_batch(ids, windows, size, "bicubic", out)
    return out


def test_any_samples_in_any_order(split, images):
    ids = [19, 0, 7, 7, 12]
    expected = np.zeros((24, 24, 3), np.uint8)
    for pixels, number in zip(read(split, ids), ids, strict=False):
        crop_and_resize(decode_rgb(images[number]), (2, 3, 30, 33), 24, "bicubic", expected)
        assert np.array_equal(pixels, expected)


def damage(split: Split, number: int, data: bytes) -> None:
    record = split.records[number]
    with open(split.folder / split.shards[record["shard"]].file, "r+b") as file:
        file.seek(int(record["offset"]) + int(record["size"]) // 2)
        file.write(data)


def test_a_damaged_sample_is_named(split):
    damage(split, 8, b"\x00\x01\x02\x03")
    read(split, [7, 9])
    with pytest.raises(DataError, match=r"train-00001\.tar: sample 8 of split 'train'.*checksum.*verify"):
        read(split, [7, 8])


def test_a_truncated_shard_is_named(split):
    path = split.folder / split.shards[2].file
    os.truncate(path, int(split.records[13]["offset"]) + 10)
    with pytest.raises(DataError, match=r"train-00002\.tar: sample 13 .*only 10 of \d+ bytes"):
        read(split, [13])


def test_a_missing_shard_is_named(split):
    (split.folder / split.shards[3].file).unlink()
    with pytest.raises(DataError, match=r"train-00003\.tar: sample 19 .*No such file"):
        read(split, [19])


def rewrite_index(split: Split, number: int, **fields) -> Split:
    records = np.array(split.records)
    for name, value in fields.items():
        records[name][number] = value
    records.tofile(split.index_path)
    return open_manifest(split.folder).split("train")


def test_an_index_that_disagrees_is_named(split):
    with pytest.raises(DataError, match="sample 4 .*it is 44x66 pixels where the index says 44x60"):
        read(rewrite_index(split, 4, height=60), [4])
    with pytest.raises(DataError, match="shard 99: sample 4 "):
        read(rewrite_index(split, 4, shard=99), [4])


def test_more_shards_than_may_be_open_and_many_threads(split, monkeypatch):
    monkeypatch.setattr(webdataset, "OPEN_SHARDS", 1)
    before = len(os.listdir("/proc/self/fd"))
    backend = open_backend("webdataset", split)
    expected = read(split, range(20))
    windows = np.tile(np.array([2, 3, 30, 33], np.int32), (20, 1))

    def work(seed: int, backend=backend) -> bool:
        ids = np.random.default_rng(seed).permutation(20)
        out = np.zeros((20, 24, 24, 3), np.uint8)
        backend.decode_batch(ids, windows, 24, "bicubic", out)
        return np.array_equal(out, expected[ids])

    def slow_open(*arguments, opened=os.open) -> int:
        time.sleep(0.001)  # so that several threads open the same shard at once
        return opened(*arguments)

    monkeypatch.setattr(webdataset.os, "open", slow_open)
    with ThreadPoolExecutor(8) as executor:
        assert all(executor.map(work, range(40)))
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_an_unknown_backend_is_refused(split):
    with pytest.raises(ValueError, match="no data backend 'nfs'"):
        open_backend("nfs", split)
