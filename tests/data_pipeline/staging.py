"""Helpers for staging a small dataset: processes that stage, a web server that can be slow or cut files, the cache."""

import contextlib
import functools
import hashlib
import http.server
import multiprocessing
import os
import threading
import time
from pathlib import Path

from data_pipeline.config import DataConfig
from data_pipeline.fetch import ignore_fault
from data_pipeline.storage import open_dataset

SAMPLES, PER_SHARD = 60, 5
fork = multiprocessing.get_context("forkserver")


def config(path: object, cache: object = None, **changes) -> DataConfig:
    cache = None if cache is None else str(cache)
    return DataConfig(path=str(path), cache_dir=cache, image_size=16, workers=2, prefetch=2, **changes)


def staged(cache: Path) -> set[str]:
    """The names of the complete files in the cache."""
    return {path.name for path in cache.glob("cat-cache-*/*/files/*")}


def read_one(split, number: int = 0) -> bytes:
    """The bytes of shard `number`, read through the cache."""
    descriptor = split.open_file(split.folder / split.shards[number].file, threading.Event(), ignore_fault)
    with open(descriptor, "rb") as file:
        return file.read()


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
        with contextlib.suppress(FileNotFoundError):  # closed in the meantime
            found.append(os.readlink(link))
    return found


class Handler(http.server.SimpleHTTPRequestHandler):
    def copyfile(self, source, output) -> None:
        self.server.requests.append(self.path.rpartition("/")[2])
        data = source.read()
        if self.path.endswith(".tar") and self.server.cut > 0:
            self.server.cut -= 1
            data = data[: len(data) // 2]
        if self.path.endswith(".tar") and self.server.damaged > 0:
            self.server.damaged -= 1
            data = bytes(len(data))
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
    """A web server on the loopback interface.

    slow: seconds per kilobyte of a shard. cut, damaged: number of shards of which only half, or zeros, will be sent.
    requests: names of the files that were sent.
    """

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        self.slow, self.cut, self.damaged, self.stopping, self.requests = 0.0, 0, 0, False, []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        pass  # a client that was killed
