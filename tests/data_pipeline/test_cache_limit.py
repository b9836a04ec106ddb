"""`data.cache_gb`: staged files never exceed the limit."""

import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.backends.stored import stored_in_shards
from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.fetch import ignore_fault
from data_pipeline.loader import evaluation_batches
from data_pipeline.manifest import Manifest
from data_pipeline.order import POOL, Order
from data_pipeline.split import LABEL_MAP, Annotation, Beton, Shard, Split, UsageError
from data_pipeline.storage import _check_room, open_dataset
from data_pipeline.views import Crops
from tests.data_pipeline.shards import jpeg, write_split
from tests.data_pipeline.staging import PER_SHARD, SAMPLES, config, fork, open_files, read_one, staged, start


def size_of(cache: Path) -> int:
    """The size of the cache; files that are being copied count with their final size."""
    total = 0
    for path in [*cache.glob("cat-cache-*/*/files/*"), *cache.glob("cat-cache-*/*/parts/*")]:
        try:
            total += int(path.suffix[1:]) if path.parent.name == "parts" else path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def limited(dataset: Path, cache: Path, shards: float) -> DataConfig:
    """A config with room for the index and a number of shards."""
    shard, index = (dataset / "train-00000.tar").stat().st_size, (dataset / "train.index").stat().st_size
    return config(dataset, cache, cache_gb=(index + shards * shard) / 1e9)


def test_the_least_recently_opened_file_is_removed(dataset, tmp_path):
    manifest = open_dataset(limited(dataset, tmp_path, 3.1), training=False)
    split = manifest.split("train")
    for number in (0, 1, 2, 0, 3):
        assert read_one(split, number) == (dataset / split.shards[number].file).read_bytes()
    assert staged(tmp_path) == {"train.index", "train-00000.tar", "train-00002.tar", "train-00003.tar"}


def test_a_file_that_is_being_read_stays_readable_and_no_descriptor_is_kept(dataset, tmp_path):
    data = limited(dataset, tmp_path, 1.1)
    split = open_dataset(data, training=False).split("train")
    descriptor = split.open_file(split.folder / "train-00000.tar", threading.Event(), ignore_fault)
    read_one(split, 1)
    assert staged(tmp_path) == {"train.index", "train-00001.tar"}
    with open(descriptor, "rb") as file:
        assert file.read() == (dataset / "train-00000.tar").read_bytes()
    assert len(split.records) == SAMPLES  # the index stays open
    stored = stored_in_shards(split)
    assert stored.read(np.arange(SAMPLES))[1] == {}
    assert not [path for path in open_files(os.getpid()) if ".tar" in path and str(tmp_path) in path]


@pytest.mark.slow
def test_the_limit_holds_while_processes_and_threads_fetch(dataset, tmp_path):
    data = limited(dataset, tmp_path, 4.1)
    limit, largest = int(data.cache_gb * 1e9), 0
    processes = [
        start(data.model_copy(update={"cache_gb": 1e9}), [])
    ]  # another run with a large limit, without fetches
    split = open_dataset(data, training=False).split("train")
    processes += [fork.Process(target=evaluate_in_a_process, args=(data,)) for _ in range(3)]
    for process in processes[1:]:
        process.start()
    while any(process.is_alive() for process in processes):
        largest = max(largest, size_of(tmp_path))
        time.sleep(0.001)
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    assert limit / 2 < largest <= limit
    assert len(split.shards) * (split.shards[0].bytes) > 2 * limit  # so that files had to be removed


def evaluate_in_a_process(data: DataConfig) -> None:
    split = open_dataset(data, training=False).split("train")
    for rank in range(3):
        for _, batch in evaluation_batches(data, Crops(data, AugmentConfig()), split, 4, rank=rank, world=3):
            assert not batch.bad


def test_files_of_other_datasets_are_removed_too(dataset, tmp_path):
    other, cache = tmp_path / "other", tmp_path / "cache"
    write_split(other, [jpeg(100 + number, 40, 36) for number in range(20)], per_shard=PER_SHARD)
    old = open_dataset(config(other, cache)).split("train")
    for number in range(4):
        read_one(old, number)
    split = open_dataset(limited(dataset, cache, 4.5), training=False).split("train")
    for number in range(4):
        read_one(split, number)
    assert {path for path in staged(cache) if path.endswith(".tar")} == {
        f"train-{number:05d}.tar" for number in range(4)
    }
    assert len(list(old.folder.glob("*.tar"))) == 0
    assert read_one(old, 2) == (other / "train-00002.tar").read_bytes()


def test_a_limit_below_what_training_keeps_in_use_is_refused(dataset, tmp_path):
    with pytest.raises(
        UsageError, match=r"data\.cache_gb .* is less than the .* GB that training keeps in use: .*data\.shuffle=block"
    ):
        open_dataset(limited(dataset, tmp_path, 11))
    open_dataset(limited(dataset, tmp_path, 11), training=False)


def large(**more) -> Manifest:
    """A dataset of 4 million samples in 4,000 shards of 0.1 GB, of which there are no files."""
    shards = tuple(Shard(f"{number}.tar", 1000, 10**8, "") for number in range(4000))
    split = Split(Path("nowhere"), "train", 4_000_000, "", shards, **more)
    return Manifest(Path("nowhere"), ("a",), {"train": split})


def fits(manifest: Manifest, gigabytes: float, **settings: str) -> bool:
    """Whether training may begin with a cache of this size."""
    try:
        _check_room(manifest, DataConfig(path="nowhere", cache_dir="cache", cache_gb=gigabytes, **settings))
    except UsageError:
        return False
    return True


def test_shuffled_in_blocks_training_keeps_the_shards_of_three_pools_in_use():
    order = Order(0, 4_000_000, POOL, 256, "block")
    used = len(np.unique(np.concatenate([order.draws(step, range(64)) for step in (3, 4, 5)]) // 1000)) / 10  # in GB
    assert fits(large(), 1.1 * used, shuffle="block") and not fits(large(), 0.9 * used, shuffle="block")
    assert fits(large(), 401) and not fits(large(), 399) and not fits(large(), 1.1 * used)


def test_training_from_an_ffcv_file_keeps_that_in_use():
    """And the shards, if they have the label maps."""
    beton = Beton("train.beton", 50 * 10**9, "", "jpeg", "")
    both, alone = large(beton=beton), replace(large(beton=beton).split("train"), shards=())
    labelled = large(beton=beton, annotations={LABEL_MAP: Annotation("maps.npy", 1, "")})
    for shuffle in ("full", "block"):
        for manifest, size in ((both, 50), (labelled, 450)):
            assert fits(manifest, size + 1, backend="ffcv", shuffle=shuffle)
            assert not fits(manifest, size - 1, backend="ffcv", shuffle=shuffle)
    assert fits(replace(both, splits={"train": alone}), 51) and not fits(replace(both, splits={"train": alone}), 49)
    assert fits(both, 401) and not fits(both, 399)


def test_a_file_that_is_larger_than_the_limit_is_refused(dataset, tmp_path):
    split = open_dataset(limited(dataset, tmp_path, 0.5), training=False).split("train")
    with pytest.raises(UsageError, match=r"data\.cache_gb .* is too small for a file of"):
        read_one(split)
