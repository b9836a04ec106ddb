"""A cache of staged files: foreign files in its folder are not touched, and damaged copies are fetched again."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.backends import open_backend
from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.durable import sha256_of
from data_pipeline.loader import build_loader, evaluation_batches
from data_pipeline.manifest import open_manifest
from data_pipeline.order import Order
from data_pipeline.split import UsageError
from data_pipeline.storage import open_dataset
from data_pipeline.views import Crops
from tests.data_pipeline.shards import jpeg, write_split
from tests.data_pipeline.staging import config, fork, open_files, read_one, stage_in_a_process, staged
from tests.hostile.datasets import SAMPLES, contents, everything, flip_a_bit, needs_root, rewrite, split_entry
from tests.runs import ROOT


def test_a_cache_with_a_limit_does_not_touch_the_users_files(dataset, tmp_path):
    cache = tmp_path / "cache"
    foreign = [
        "results/thesis.pdf",
        "results/run.12.part",
        "notes.lock",
        "results/train-00000.tar",
        "0123456789abcdef/train-00000.tar",
    ]
    for name in foreign:
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_bytes(os.urandom(100_000))
        os.utime(cache / name, (1, 1))  # older than all other files
    before = contents(cache)
    shard_size = max(path.stat().st_size for path in dataset.glob("*.tar"))
    data = config(dataset, cache, cache_gb=(1000 + 1.5 * shard_size) / 1e9)
    split = open_dataset(data, training=False).split("train")
    own = next(cache.glob("cat-cache-*"))
    (split.folder / "by hand").write_bytes(bytes(100_000))
    (split.folder.with_name("parts")).joinpath("by hand").write_bytes(bytes(100_000))
    for number in (0, 1, 2):
        assert read_one(split, number) == (dataset / split.shards[number].file).read_bytes()
    assert staged(cache) == {"by hand", "train.index", "train-00002.tar"}
    assert [path.name for path in own.glob("*/parts/*")] == ["by hand"]
    assert {path: data for path, data in contents(cache).items() if own not in path.parents} == before


def test_a_folder_that_is_not_a_cache_is_refused(dataset, tmp_path):
    folder = tmp_path / "cache" / f"cat-cache-{os.geteuid()}"
    folder.mkdir(parents=True)
    (folder / "thesis.pdf").write_text("years")
    sentence = r"cat-cache-\d+ is not a cache, because it has no CACHEDIR\.TAG: choose another data\.cache_dir"
    with pytest.raises(UsageError, match=sentence):
        open_dataset(config(dataset, tmp_path / "cache"))
    assert (folder / "thesis.pdf").read_text() == "years"


@pytest.mark.parametrize("how", ["link", "writable", pytest.param("owner", marks=needs_root)])
def test_a_cache_that_another_user_has_prepared_is_refused(dataset, tmp_path, how):
    """Any user can do so in a shared folder before the first start."""
    folder, elsewhere = tmp_path / "cache" / f"cat-cache-{os.geteuid()}", tmp_path / "elsewhere"
    folder.parent.mkdir()
    elsewhere.mkdir(mode=0o700)
    if how == "link":
        folder.symlink_to(elsewhere)
    else:
        folder.mkdir(mode=0o700)
        folder.chmod(0o777) if how == "writable" else os.chown(folder, 65534, 65534)
    with pytest.raises(UsageError, match=r"cat-cache-\d+ was not made by you, or others may write to it"):
        open_dataset(config(dataset, tmp_path / "cache"))
    assert not list(elsewhere.iterdir())


def test_a_cache_is_closed_to_others_and_marked(dataset, tmp_path):
    open_dataset(config(dataset, tmp_path / "cache"))
    (folder,) = (tmp_path / "cache").iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "CACHEDIR.TAG").read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55")


def stage_as(user: int, data: DataConfig) -> None:
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    stage_in_a_process(data, [0, 1, 2])
    split = open_dataset(data, training=False).split("train")
    assert not any(batch.bad for _, batch in evaluation_batches(data, Crops(data, AugmentConfig()), split, 5))


@needs_root
def test_two_users_share_a_cache_folder(dataset):
    """Sequentially and in parallel, without and with a limit; each user removes only own files."""
    with tempfile.TemporaryDirectory() as name:  # other users cannot enter the folders of pytest
        folder = Path(name)
        folder.chmod(0o755)
        shutil.copytree(dataset, folder / "dataset")
        (folder / "cache").mkdir()
        (folder / "cache").chmod(0o1777)
        size = sum(path.stat().st_size for path in dataset.glob("train*"))
        for limit in (None, 1.1 * size / 1e9):
            data = config(folder / "dataset", folder / "cache", cache_gb=limit)
            processes = [fork.Process(target=stage_as, args=(user, data)) for user in (65533, 65534, 65533)]
            for process in processes:
                process.start()
            for process in processes:
                process.join(120)
            assert [process.exitcode for process in processes] == [0, 0, 0]
        assert {path.name for path in (folder / "cache").iterdir()} == {"cat-cache-65533", "cat-cache-65534"}


@needs_root
def test_the_error_for_a_cache_folder_of_another_user_is_one_sentence(dataset):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        shutil.copytree(dataset, folder / "dataset")
        (folder / "cache").mkdir(mode=0o755)
        code = "from data_pipeline.storage import *; open_dataset(DataConfig(path={!r}, cache_dir={!r}))"
        command = [sys.executable, "-c", code.format(str(folder / "dataset"), str(folder / "cache"))]
        nobody = ["setpriv", "--reuid=65534", "--clear-groups"]
        environment = {**os.environ, "HOME": "/"}
        result = subprocess.run([*nobody, *command], capture_output=True, text=True, cwd=ROOT, env=environment)
        assert f"UsageError: data.cache_dir {folder}/cache cannot be used: Permission denied." in result.stderr


# --- damage on the node's disk ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["flipped", "cut off"])
def test_a_damaged_file_of_the_cache_is_fetched_again(dataset, tmp_path, damage):
    data = config(dataset, tmp_path / "cache")
    split = open_dataset(data).split("train")
    expected = everything(split)
    place = int(split.records["offset"][5]) + 100
    path = split.folder / "train-00001.tar"
    flip_a_bit(path, place) if damage == "flipped" else os.truncate(path, place)
    stored = open_backend("webdataset", open_dataset(data).split("train")).stored
    assert stored.read(np.arange(SAMPLES)) == (expected, {})
    faults = [(fault.file, fault.error) for fault in stored.take_faults()]
    assert faults == [(str(path), "damaged on this node's disk, and fetched again")]
    assert path.read_bytes() == (dataset / path.name).read_bytes()


def test_a_damaged_index_of_the_cache_is_fetched_again(dataset, tmp_path):
    data = config(dataset, tmp_path / "cache")
    split = open_dataset(data).split("train")
    flip_a_bit(split.index_path, 16)
    labels = open_dataset(data).split("train").records["label"]
    assert labels.tolist() == [number % 10 for number in range(SAMPLES)]


def test_the_file_of_a_sample_that_was_damaged_before_packing_is_not_fetched_again(dataset, tmp_path):
    """Its file equals that of the manifest, so another copy would not help."""
    records = np.array(open_manifest(dataset).split("train").records)
    records["checksum"][[5, 6]] ^= 1
    records.tofile(dataset / "train.index")
    rewrite(dataset, split_entry(fingerprint=sha256_of(dataset / "train.index")))
    split = open_dataset(config(dataset, tmp_path / "cache")).split("train")
    stored = open_backend("webdataset", split).stored
    inode = None
    for _ in range(2):
        assert list(stored.read(np.arange(SAMPLES))[1]) == [5, 6]
        assert inode in (None, (split.folder / "train-00001.tar").stat().st_ino)
        inode = (split.folder / "train-00001.tar").stat().st_ino
    assert stored.take_faults() == ()


# --- descriptors -----------------------------------------------------------------------------------------------------


def test_every_loader_closes_its_files(dataset):
    split = open_manifest(dataset).split("train")
    data = config(dataset)
    for _ in range(3):
        assert len(list(evaluation_batches(data, Crops(data, AugmentConfig()), split, 5))) == 3
        with build_loader(data, Crops(data, AugmentConfig()), split, Order(1, SAMPLES, 4, 2)) as loader:
            next(loader)
        assert not [path for path in open_files(os.getpid()) if path.endswith(".tar")]


def read_with_few_descriptors(folder: Path, left: int) -> None:
    import resource

    split = open_manifest(folder).split("train")
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + left,) * 2)
    data = config(folder)
    for _ in range(2):
        assert not any(batch.bad for _, batch in evaluation_batches(data, Crops(data, AugmentConfig()), split, 8))


@pytest.mark.parametrize("left", [12, 60])
def test_few_descriptors_and_many_shards(tmp_path, left):
    write_split(tmp_path, [jpeg(number, 16, 16) for number in range(100)], per_shard=1)
    process = fork.Process(target=read_with_few_descriptors, args=(tmp_path, left))
    process.start()
    process.join(120)
    assert process.exitcode == 0
