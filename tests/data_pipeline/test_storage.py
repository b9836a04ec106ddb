import hashlib
import importlib.util
import json
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

from data_pipeline import faults
from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.faults import StorageError
from data_pipeline.loader import build_loader, evaluation_batches
from data_pipeline.manifest import open_manifest
from data_pipeline.order import Order
from data_pipeline.split import DataError, UsageError
from data_pipeline.storage import open_dataset
from data_pipeline.views import Crops
from tests.data_pipeline.shards import jpeg, write_split
from tests.data_pipeline.staging import (
    PER_SHARD,
    SAMPLES,
    Server,
    config,
    open_files,
    read_one,
    stage_in_a_process,
    staged,
    start,
)


@pytest.fixture
def copied(dataset, tmp_path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "copy"))


def every_batch(data: DataConfig, **order) -> list[tuple]:
    """The batches of an epoch and of an evaluation of the same split."""
    split = open_dataset(data).split("train")
    with build_loader(data, Crops(data, AugmentConfig()), split, Order(1, SAMPLES, 10, 5, **order)) as loader:
        found = [next(loader) for _ in range(12)]
    found += [batch for _, batch in evaluation_batches(data, Crops(data, AugmentConfig()), split, 16)]
    assert not any(batch.bad for batch in found)
    return [(batch.ids.tolist(), batch.targets.tolist(), batch.images.numpy().tobytes()) for batch in found]


def parts(cache: Path) -> list[Path]:
    return list(cache.glob("cat-cache-*/*/parts/*"))


# --- the loader with staged files ------------------------------------------------------------------------------------


def test_a_staged_folder_gives_the_same_batches(dataset, tmp_path):
    """Also of samples that are used twice in a row."""
    copies = {"repeats": 2}
    assert every_batch(config(dataset, tmp_path / "cache"), **copies) == every_batch(config(dataset), **copies)
    assert staged(tmp_path / "cache") == {path.name for path in dataset.iterdir()} - {"manifest.json"}
    assert parts(tmp_path / "cache") == []


def test_staged_files_are_not_read_again_from_the_source(copied, tmp_path):
    expected = every_batch(config(copied, tmp_path / "cache"))
    for path in copied.glob("*.tar"):
        path.write_bytes(bytes(path.stat().st_size))  # zeros of the same size
    assert every_batch(config(copied, tmp_path / "cache")) == expected


@pytest.mark.parametrize("shuffle", ["full", "block"])
def test_files_are_fetched_ahead(dataset, tmp_path, shuffle):
    data = config(dataset, tmp_path / "cache")
    split = open_dataset(data).split("train")
    assert staged(tmp_path / "cache") == {"train.index"}
    with build_loader(data, Crops(data, AugmentConfig()), split, Order(1, SAMPLES, 10, 5, shuffle)):
        wait_for(lambda: len(staged(tmp_path / "cache")) == 13)  # although only two micro-batches are decoded ahead


def test_file_url(dataset, tmp_path):
    assert every_batch(config(f"file://{dataset}", tmp_path / "cache")) == every_batch(config(dataset))


def test_memory_url(dataset, tmp_path):
    fsspec.filesystem("memory").put(str(dataset), "/somewhere/dataset", recursive=True)
    assert every_batch(config("memory://somewhere/dataset/", tmp_path / "cache")) == every_batch(config(dataset))


def test_http_url(dataset, tmp_path):
    """Python's web server in another process, on the loopback interface."""
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(dataset)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            url = re.search(r"http://\S+:\d+", server.stdout.readline()).group()
            assert every_batch(config(url, tmp_path / "cache")) == every_batch(config(dataset))
        finally:
            server.kill()


# --- a web server that can be slow or cut files ----------------------------------------------------------------------


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
        assert time.monotonic() < deadline, f"not true after {seconds} s"
        time.sleep(0.005)


@pytest.mark.slow
def test_processes_of_a_node_fetch_a_file_once(server, tmp_path):
    server.slow = 0.002
    data = config(server.url, tmp_path / "cache")
    processes = [start(data, [*range(first, 12), *range(first)]) for first in (0, 0, 5)]
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    shards = sorted(name for name in server.requests if name.endswith(".tar"))
    assert shards == [f"train-{number:05d}.tar" for number in range(12)]
    assert server.requests.count("train.index") == 1


def test_a_waiting_process_takes_over_from_one_that_is_killed_while_copying(server, tmp_path):
    server.slow = 1.0
    data = config(server.url, tmp_path / "cache")
    first = start(data, [3])
    wait_for(lambda: any(part.stat().st_size for part in parts(tmp_path / "cache")))
    second = start(data, [3])
    wait_for(lambda: any("/locks/" in path for path in open_files(second.pid)))
    assert first.is_alive()
    os.kill(first.pid, signal.SIGKILL)
    server.slow = 0.0
    first.join()
    second.join(60)
    assert second.exitcode == 0
    assert parts(tmp_path / "cache") == []
    assert server.requests.count("train-00003.tar") == 2


def test_unfinished_files_of_a_killed_process_are_removed_and_finished_ones_kept(server, tmp_path):
    data = config(server.url, tmp_path / "cache")
    stage_in_a_process(data, [1])
    server.slow = 1.0
    process = start(data, [1, 2])
    wait_for(lambda: any(part.stat().st_size for part in parts(tmp_path / "cache")))
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    server.slow = 0.0
    assert len(parts(tmp_path / "cache")) == 1
    assert staged(tmp_path / "cache") == {"train.index", "train-00001.tar"}
    split = open_dataset(data).split("train")
    assert parts(tmp_path / "cache") == []
    read_one(split, 1)
    assert server.requests.count("train-00001.tar") == 1


def test_a_broken_connection_is_retried(server, tmp_path):
    server.cut = 1
    split = open_dataset(config(server.url, tmp_path / "cache")).split("train")
    assert hashlib.sha256(read_one(split, 4)).hexdigest() == split.shards[4].sha256
    assert server.requests.count("train-00004.tar") == 2


def test_a_file_that_is_damaged_on_its_way_is_fetched_again(server, tmp_path):
    server.damaged = 1
    split, notes = open_dataset(config(server.url, tmp_path / "cache")).split("train"), []
    os.close(split.open_file(split.folder / "train-00004.tar", threading.Event(), lambda *fault: notes.append(fault)))
    assert hashlib.sha256(read_one(split, 4)).hexdigest() == split.shards[4].sha256
    assert server.requests.count("train-00004.tar") == 2
    assert notes == [(f"{server.url}/train-00004.tar", "damaged on its way, and fetched again")]


def test_closing_a_loader_ends_its_fetches(server, tmp_path):
    server.slow = 0.5
    data = config(server.url, tmp_path / "cache")
    split = open_dataset(data).split("train")
    loader = build_loader(data, Crops(data, AugmentConfig()), split, Order(1, SAMPLES, 10, 5))
    wait_for(lambda: any(part.stat().st_size for part in parts(tmp_path / "cache")))
    loader.close()
    assert parts(tmp_path / "cache") == []
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith(("decode", "stage"))] == []


# --- faults ----------------------------------------------------------------------------------------------------------


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


def test_what_is_wrong_with_a_staged_folder_is_named_at_the_start(copied, tmp_path):
    text = (copied / "manifest.json").read_text()
    (copied / "manifest.json").write_text(json.dumps({**json.loads(text), "classes": ["one"]}))
    with pytest.raises(DataError, match=r"train\.index cannot be right: of sample 1 it says that its class is none of"):
        open_dataset(config(copied, tmp_path / "cache"))
    (copied / "manifest.json").write_text(text)
    (copied / "train-00007.tar").unlink()
    with pytest.raises(DataError, match=r"copy/train-00007\.tar is missing, though the manifest names it"):
        open_dataset(config(copied, tmp_path / "cache"))


def test_another_dataset_in_the_same_place_is_staged_separately(copied, tmp_path):
    data = config(copied, tmp_path / "cache")
    read_one(open_dataset(data).split("train"))
    shutil.rmtree(copied)
    write_split(copied, [jpeg(500 + number, 40, 36) for number in range(SAMPLES)], per_shard=PER_SHARD)
    assert every_batch(data) == every_batch(config(copied))


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("memory://nowhere", r"memory://nowhere/manifest\.json is missing\. Make one with: python launch/prepare\.py"),
        (
            "http://127.0.0.1:1/dataset",
            r"127\.0\.0\.1:1/dataset/manifest\.json cannot be read after 1 attempts: .*127\.0\.0\.1",
        ),
    ],
)
def test_the_error_for_a_missing_dataset(url, sentence, tmp_path, monkeypatch):
    monkeypatch.setattr(faults, "PAUSES", ())
    with pytest.raises((DataError, StorageError), match=sentence):
        open_dataset(config(url, tmp_path))


def test_a_missing_shard_is_named(dataset, tmp_path):
    memory = fsspec.filesystem("memory")
    memory.put(str(dataset), "/incomplete", recursive=True)
    memory.rm("/incomplete/train-00002.tar")
    with pytest.raises(DataError, match=r"memory://incomplete/train-00002\.tar is missing"):
        every_batch(config("memory://incomplete", tmp_path))


@pytest.mark.parametrize(("url", "sentence"), [("s3://bucket/dataset", "s3fs"), ("nonsense://dataset", "nonsense")])
def test_an_unavailable_protocol_is_named(url, sentence, tmp_path):
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
def test_settings_that_do_not_fit_together_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        DataConfig(**settings)


def test_an_impossible_cache_dir_is_refused(dataset, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"data\.cache_dir .*cache cannot be used: Not a directory"):
        open_dataset(config(dataset, tmp_path / "file" / "cache"))


def test_a_full_disk_is_reported_and_leaves_no_unfinished_file(dataset, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "none", disk], capture_output=True).returncode:
        pytest.skip("mounting a small disk is not permitted here")
    try:
        split = open_dataset(config(dataset, disk / "cache")).split("train")
        with pytest.raises(StorageError, match=r"data\.cache_dir: .* is full: free some space"):
            for number in range(12):
                read_one(split, number)
        assert parts(disk / "cache") == []
        assert staged(disk / "cache") > {"train.index"}
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_staged_dataset_has_the_contents_of_the_manifest(dataset, tmp_path):
    staged_manifest, manifest = open_dataset(config(dataset, tmp_path)), open_manifest(dataset)
    assert staged_manifest.classes == manifest.classes
    one, other = staged_manifest.split("train"), manifest.split("train")
    assert (one.samples, one.fingerprint, one.shards) == (other.samples, other.fingerprint, other.shards)
    assert np.array_equal(one.records, other.records)
