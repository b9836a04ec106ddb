import contextlib
import functools
import hashlib
import http.server
import importlib.util
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest

from data_pipeline import storage
from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.loader import build_loader, evaluation_batches
from data_pipeline.manifest import DataError, UsageError, open_manifest
from data_pipeline.order import Order
from data_pipeline.storage import open_dataset
from tests.data_pipeline.shards import jpeg, write_split

SAMPLES, PER_SHARD = 60, 5
fork = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """12 shards of 5 images, 10 kB each or a little more."""
    folder = tmp_path_factory.mktemp("dataset")
    write_split(folder, [jpeg(number, 40, 36) for number in range(SAMPLES)], per_shard=PER_SHARD)
    return folder


@pytest.fixture
def copied(dataset, tmp_path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "copy"))


def config(path: object, cache: object = None, **changes) -> DataConfig:
    cache = None if cache is None else str(cache)
    return DataConfig(path=str(path), cache_dir=cache, image_size=16, workers=2, prefetch=2, **changes)


def every_batch(data: DataConfig, **order) -> list[tuple]:
    """An epoch, and an evaluation of the same split."""
    split = open_dataset(data).split("train")
    with build_loader(data, AugmentConfig(), split, Order(1, SAMPLES, 10, 5, **order)) as loader:
        found = [next(loader) for _ in range(12)]
    found += [batch for _, batch in evaluation_batches(data, split, 16)]
    assert not any(batch.bad for batch in found)
    return [(batch.ids.tolist(), batch.labels.tolist(), batch.images.numpy().tobytes()) for batch in found]


def staged(cache: Path) -> set[str]:
    """Whole files in the cache, by name."""
    return {path.name for path in cache.glob("*/*") if path.suffix not in (".lock", ".part")}


def parts(cache: Path) -> list[Path]:
    return list(cache.glob("*/*.part"))


def read_one(split, number: int = 0) -> bytes:
    """The bytes of shard `number`, through the cache."""
    descriptor = split.open_file(split.folder / split.shards[number].file, threading.Event())
    with open(descriptor, "rb") as file:
        return file.read()


# --- what a loader sees ----------------------------------------------------------------------------------------------------------------


def test_a_staged_folder_gives_the_same_batches(dataset, tmp_path):
    assert every_batch(config(dataset, tmp_path / "cache")) == every_batch(config(dataset))
    assert staged(tmp_path / "cache") == {path.name for path in dataset.iterdir()} - {"manifest.json"}
    assert parts(tmp_path / "cache") == []


def test_what_is_staged_is_not_read_again(copied, tmp_path):
    expected = every_batch(config(copied, tmp_path / "cache"))
    for path in copied.glob("*.tar"):
        path.write_bytes(bytes(path.stat().st_size))  # as large as before, and of no use
    assert every_batch(config(copied, tmp_path / "cache")) == expected


@pytest.mark.parametrize("shuffle", ["full", "block"])
def test_files_are_fetched_before_their_turn(dataset, tmp_path, shuffle):
    data = config(dataset, tmp_path / "cache")
    split = open_dataset(data).split("train")
    assert staged(tmp_path / "cache") == {"train.index"}
    with build_loader(data, AugmentConfig(), split, Order(1, SAMPLES, 10, 5, shuffle)):
        wait_for(lambda: len(staged(tmp_path / "cache")) == 13)  # though only two micro-batches are decoded ahead


def test_file_url(dataset, tmp_path):
    assert every_batch(config(f"file://{dataset}", tmp_path / "cache")) == every_batch(config(dataset))


def test_memory_url(dataset, tmp_path):
    fsspec.filesystem("memory").put(str(dataset), "/somewhere/dataset", recursive=True)
    assert every_batch(config("memory://somewhere/dataset/", tmp_path / "cache")) == every_batch(config(dataset))


def test_http_url(dataset, tmp_path):
    """Python's own web server, in a process of its own, on the loopback interface."""
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(dataset)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            url = re.search(r"http://\S+:\d+", server.stdout.readline()).group()
            assert every_batch(config(url, tmp_path / "cache")) == every_batch(config(dataset))
        finally:
            server.kill()


# --- a web server that can be slow, cut off, and counts --------------------------------------------------------------------------------


class Handler(http.server.SimpleHTTPRequestHandler):
    def copyfile(self, source, output) -> None:
        self.server.requests.append(self.path.rpartition("/")[2])
        data = source.read()
        if self.path.endswith(".tar") and self.server.cut > 0:
            self.server.cut -= 1
            data = data[: len(data) // 2]
        if not self.path.endswith(".tar") or not self.server.slow:
            output.write(data)
            return
        while data and not self.server.stopping:
            output.write(data[:1000])
            data = data[1000:]
            time.sleep(self.server.slow)

    def log_message(self, *_: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    """slow: seconds per kilobyte of a shard. cut: shards still to be sent only in half. requests: names of the files that were sent."""

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        self.slow, self.cut, self.stopping, self.requests = 0.0, 0, False, []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        pass  # a client that was killed


@pytest.fixture
def server(dataset):
    server = Server(dataset)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.stopping = True
    server.shutdown()
    server.server_close()


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def stage_in_a_process(data: DataConfig, numbers: list[int]) -> None:
    split = open_dataset(data).split("train")
    for number in numbers:
        assert hashlib.sha256(read_one(split, number)).hexdigest() == split.shards[number].sha256


def start(data: DataConfig, numbers: list[int]) -> multiprocessing.Process:
    process = fork.Process(target=stage_in_a_process, args=(data, numbers))
    process.start()
    return process


def open_files(pid: int) -> list[str]:
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed
            found.append(os.readlink(link))
    return found


def test_processes_of_a_node_fetch_a_file_once(server, tmp_path):
    server.slow = 0.002
    data = config(server.url, tmp_path / "cache")
    processes = [start(data, [*range(first, 12), *range(first)]) for first in (0, 0, 5)]
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sorted(name for name in server.requests if name.endswith(".tar")) == [f"train-{number:05d}.tar" for number in range(12)]
    assert server.requests.count("train.index") == 1


def test_a_process_that_is_killed_while_copying_is_relieved_by_one_that_waits(server, tmp_path):
    server.slow = 1.0
    data = config(server.url, tmp_path / "cache")
    first = start(data, [3])
    wait_for(lambda: any(part.stat().st_size for part in parts(tmp_path / "cache")))
    second = start(data, [3])
    wait_for(lambda: any(path.endswith("/train-00003.tar.lock") for path in open_files(second.pid)))
    assert first.is_alive()
    os.kill(first.pid, signal.SIGKILL)
    server.slow = 0.0
    first.join()
    second.join(60)
    assert second.exitcode == 0
    assert parts(tmp_path / "cache") == []
    assert server.requests.count("train-00003.tar") == 2


def test_what_a_killed_process_left_behind_is_removed_and_what_it_finished_is_kept(server, tmp_path):
    data = config(server.url, tmp_path / "cache")
    stage_in_a_process(data, [1])
    server.slow = 1.0
    process = start(data, [1, 2])
    wait_for(lambda: any(part.stat().st_size for part in parts(tmp_path / "cache")))
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    server.slow = 0.0
    assert [part.name.split(".")[0] for part in parts(tmp_path / "cache")] == ["train-00002"]
    split = open_dataset(data).split("train")
    assert parts(tmp_path / "cache") == []
    read_one(split, 1)
    assert server.requests.count("train-00001.tar") == 1


def test_a_broken_connection_is_tried_again(server, tmp_path):
    server.cut = 1
    split = open_dataset(config(server.url, tmp_path / "cache")).split("train")
    assert hashlib.sha256(read_one(split, 4)).hexdigest() == split.shards[4].sha256
    assert server.requests.count("train-00004.tar") == 2


def test_closing_a_loader_ends_what_is_being_fetched(server, tmp_path):
    server.slow = 0.5
    data = config(server.url, tmp_path / "cache")
    split = open_dataset(data).split("train")
    loader = build_loader(data, AugmentConfig(), split, Order(1, SAMPLES, 10, 5))
    wait_for(lambda: any(part.stat().st_size for part in parts(tmp_path / "cache")))
    loader.close()
    assert parts(tmp_path / "cache") == []
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith(("decode", "stage"))] == []


# --- a limit ---------------------------------------------------------------------------------------------------------------------------


def size_of(cache: Path) -> int:
    """What the cache takes; of what is being copied, what it will take."""
    total = 0
    for path in cache.glob("*/*"):
        try:
            total += int(path.suffixes[-2][1:]) if path.suffix == ".part" else path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def limited(dataset: Path, cache: Path, shards: float) -> DataConfig:
    """Room for the index and a number of shards."""
    shard, index = (dataset / "train-00000.tar").stat().st_size, (dataset / "train.index").stat().st_size
    return config(dataset, cache, cache_gb=(index + shards * shard) / 1e9)


def test_the_file_opened_longest_ago_makes_room(dataset, tmp_path):
    manifest = open_dataset(limited(dataset, tmp_path, 3.1), training=False)
    split = manifest.split("train")
    for number in (0, 1, 2, 0, 3):
        assert read_one(split, number) == (dataset / split.shards[number].file).read_bytes()
    assert staged(tmp_path) == {"train.index", "train-00000.tar", "train-00002.tar", "train-00003.tar"}


def test_a_file_that_is_being_read_stays_readable_and_no_descriptor_is_kept(dataset, tmp_path):
    data = limited(dataset, tmp_path, 1.1)
    split = open_dataset(data, training=False).split("train")
    descriptor = split.open_file(split.folder / "train-00000.tar", threading.Event())
    read_one(split, 1)
    assert staged(tmp_path) == {"train.index", "train-00001.tar"}
    with open(descriptor, "rb") as file:
        assert file.read() == (dataset / "train-00000.tar").read_bytes()
    assert len(split.records) == SAMPLES  # the index stays open
    before = len(os.listdir("/proc/self/fd"))
    assert len(list(evaluation_batches(data, split, 16))) == 4
    assert len(os.listdir("/proc/self/fd")) <= before


def test_the_limit_holds_while_processes_and_threads_fetch(dataset, tmp_path):
    data = limited(dataset, tmp_path, 4.1)
    limit, largest = int(data.cache_gb * 1e9), 0
    processes = [start(data.model_copy(update={"cache_gb": 1e9}), [])]  # another run, without a limit of its own: it fetches nothing
    split = open_dataset(data, training=False).split("train")
    processes += [fork.Process(target=evaluate_in_a_process, args=(data,)) for _ in range(3)]
    for process in processes[1:]:
        process.start()
    while any(process.is_alive() for process in processes):
        largest = max(largest, size_of(tmp_path))
        time.sleep(0.001)
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    assert limit / 2 < largest <= limit
    assert len(split.shards) == 12


def evaluate_in_a_process(data: DataConfig) -> None:
    split = open_dataset(data, training=False).split("train")
    for rank in range(3):
        for _, batch in evaluation_batches(data, split, 4, rank=rank, world=3):
            assert not batch.bad


def test_other_datasets_make_room_too(dataset, tmp_path):
    other, cache = tmp_path / "other", tmp_path / "cache"
    write_split(other, [jpeg(100 + number, 40, 36) for number in range(20)], per_shard=PER_SHARD)
    old = open_dataset(config(other, cache)).split("train")
    for number in range(4):
        read_one(old, number)
    split = open_dataset(limited(dataset, cache, 4.5), training=False).split("train")
    for number in range(4):
        read_one(split, number)
    assert {path.name for path in cache.glob("*/*.tar")} == {f"train-{number:05d}.tar" for number in range(4)}
    assert len(list(old.folder.glob("*.tar"))) == 0
    assert read_one(old, 2) == (other / "train-00002.tar").read_bytes()


def test_a_limit_below_what_training_keeps_in_use_is_refused(dataset, tmp_path):
    with pytest.raises(UsageError, match=r"data\.cache_gb .* is less than the .* GB that training keeps in use: .*data\.shuffle=block"):
        open_dataset(limited(dataset, tmp_path, 11))
    open_dataset(limited(dataset, tmp_path, 11), training=False)


def test_a_file_that_is_larger_than_the_limit_is_refused(dataset, tmp_path):
    split = open_dataset(limited(dataset, tmp_path, 0.5), training=False).split("train")
    with pytest.raises(DataError, match=r"data\.cache_gb .* has no room for a file of"):
        read_one(split)


# --- what is wrong -----------------------------------------------------------------------------------------------------------------------


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_damaged_shard_is_named_and_not_kept(copied, tmp_path):
    flip_a_bit(copied / "train-00007.tar")
    data = config(copied, tmp_path / "cache")
    with pytest.raises(DataError, match=r"copy/train-00007\.tar is damaged: its SHA-256 is not the manifest's"):
        every_batch(data)
    assert "train-00007.tar" not in staged(tmp_path / "cache")
    assert parts(tmp_path / "cache") == []


def test_a_damaged_index_is_named(copied, tmp_path):
    flip_a_bit(copied / "train.index")
    with pytest.raises(DataError, match=r"train\.index is damaged"):
        open_dataset(config(copied, tmp_path / "cache"))


def test_another_dataset_in_the_same_place_is_another(copied, tmp_path):
    data = config(copied, tmp_path / "cache")
    read_one(open_dataset(data).split("train"))
    shutil.rmtree(copied)
    write_split(copied, [jpeg(500 + number, 40, 36) for number in range(SAMPLES)], per_shard=PER_SHARD)
    assert every_batch(data) == every_batch(config(copied))


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("memory://nowhere", r"memory://nowhere/manifest\.json is missing\. Make one with: python launch/prepare\.py"),
        ("http://127.0.0.1:1/dataset", r"http://127\.0\.0\.1:1/dataset/manifest\.json cannot be fetched: .*127\.0\.0\.1"),
    ],
)
def test_no_dataset_there(url, sentence, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "ATTEMPTS", 1)  # they take 7 seconds
    with pytest.raises(DataError, match=sentence):
        open_dataset(config(url, tmp_path))


def test_a_shard_that_is_missing(dataset, tmp_path):
    memory = fsspec.filesystem("memory")
    memory.put(str(dataset), "/incomplete", recursive=True)
    memory.rm("/incomplete/train-00002.tar")
    with pytest.raises(DataError, match=r"memory://incomplete/train-00002\.tar is missing"):
        every_batch(config("memory://incomplete", tmp_path))


@pytest.mark.parametrize(("url", "sentence"), [("s3://bucket/dataset", "s3fs"), ("nonsense://dataset", "nonsense")])
def test_a_protocol_that_is_not_there(url, sentence, tmp_path):
    if url.startswith("s3") and importlib.util.find_spec("s3fs"):
        pytest.skip("s3fs is installed")
    with pytest.raises(UsageError, match=rf"data\.path {url} cannot be opened: .*{sentence}"):
        open_dataset(config(url, tmp_path))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"path": "s3://bucket/dataset"}, "s3://bucket/dataset is a URL: set data.cache_dir"),
        ({"path": "dataset", "cache_gb": 3}, "data.cache_gb limits data.cache_dir"),
        ({"path": "dataset", "device": "gpu"}, "data.device gpu needs data.backend dali"),
    ],
)
def test_settings_that_do_not_fit_together(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        DataConfig(**settings)


def test_a_cache_that_cannot_be(dataset, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"data\.cache_dir .*cache cannot be used: Not a directory"):
        open_dataset(config(dataset, tmp_path / "file" / "cache"))


def test_a_full_disk_is_said_and_leaves_nothing_behind(dataset, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "none", disk], capture_output=True).returncode:
        pytest.skip("no right to mount a small disk here")
    try:
        split = open_dataset(config(dataset, disk / "cache")).split("train")
        with pytest.raises(DataError, match=r"data\.cache_dir: .* is full: free some room"):
            for number in range(12):
                read_one(split, number)
        assert parts(disk / "cache") == []
        assert staged(disk / "cache") > {"train.index"}
    finally:
        subprocess.run(["umount", disk], check=True)


def test_the_dataset_that_is_staged_is_the_manifests(dataset, tmp_path):
    staged_manifest, manifest = open_dataset(config(dataset, tmp_path)), open_manifest(dataset)
    assert staged_manifest.classes == manifest.classes
    one, other = staged_manifest.split("train"), manifest.split("train")
    assert (one.samples, one.fingerprint, one.shards) == (other.samples, other.fingerprint, other.shards)
    assert np.array_equal(one.records, other.records)
