"""Check the disk that checkpoints go to, the dataset, and how fast this rank's cores decode it."""

import errno
import hashlib
import os
import tempfile
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np

from data_pipeline.backends import open_backend
from data_pipeline.backends.stored import StoredSamples
from data_pipeline.config import DataConfig
from data_pipeline.loader import build_loader
from data_pipeline.manifest import FILE_NAME, Manifest
from data_pipeline.split import Split
from train.checkpoint.info import list_checkpoints
from train.tasks.base import Task

CHUNK = 8 * 2**20  # bytes between two fsyncs
MOST = 2**30  # bytes that a rank writes at most
WRITING, DECODING = 3.0, 2.0  # approximate duration of these checks, in seconds
SHARDS, SAMPLES = 16, 256  # checked per rank and split, at most


def disk(output: Path, amount: int, mark: str) -> dict:
    """Write about `amount` bytes where `output`'s checkpoints go, all ranks at the same time, as in a save.

    Nothing is left behind. mark: a file that rank 0 has made there, or "" if it could not; "same" is whether this node
    sees it. Returns bytes under "free" and "held" (by checkpoints that the run will remove), and "bytes_per_second" or
    "error".
    """
    folder = checkpoint_folder(output)
    found = {
        "folder": str(folder),
        "free": _free(folder),
        "held": sum(_size_of(checkpoint) for checkpoint in list_checkpoints(output / "checkpoints")),
        "same": not mark or os.path.exists(mark),
    }
    try:
        return {**found, "bytes_per_second": _write(folder, amount)}
    except OSError as error:
        return {**found, "error": error.strerror}


def leave_mark(output: Path) -> str:
    """Make a file where checkpoints go, by which other nodes verify that they see the same folder; "" on failure."""
    try:
        descriptor, path = tempfile.mkstemp(prefix=".doctor_", dir=checkpoint_folder(output))
    except OSError:  # `disk` meets and reports it, too
        return ""
    os.close(descriptor)
    return path


def checkpoint_folder(output: Path) -> Path:
    """The folder of `output`'s checkpoints, or its nearest parent that exists."""
    folder = (output / "checkpoints").absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def _write(folder: Path, amount: int) -> float:
    """Write and fsync about `amount` bytes; returns bytes per second."""
    data, written, seconds = os.urandom(CHUNK), 0, 0.0  # random: some file systems compress
    descriptor, path = tempfile.mkstemp(prefix=".doctor_", dir=folder)
    try:
        os.unlink(path)  # nothing is left behind, however this ends
        while written < min(max(amount, CHUNK), MOST) and seconds < WRITING:
            began = time.perf_counter()
            if os.write(descriptor, data) < CHUNK:  # the rest of a nearly full disk
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
            written, seconds = written + CHUNK, seconds + time.perf_counter() - began
    finally:
        os.close(descriptor)
    return written / seconds


def dataset(data: DataConfig, manifest: Manifest, rank: int) -> dict:
    """Check the checksums of a random sample of images, a different one on every rank.

    Opening the manifest has checked sizes and indexes already. The "fingerprint" is compared between nodes.
    """
    damaged, checked = [], 0
    for split in manifest.splits.values():
        stored = open_backend(data.backend, split).stored
        shards = 1 if data.cache_dir else SHARDS  # with a cache, reading from a shard copies it
        ids = sample_ids(stored, shards, rank)
        failures = stored.read(ids)[1]
        damaged += stored.sentences(ids, failures).values()
        checked += len(ids)
    text = (manifest.folder / FILE_NAME).read_bytes() if data.cache_dir is None else _index_hashes(manifest)
    return {
        "fingerprint": hashlib.sha256(text).hexdigest(),
        "samples": manifest.split("train").samples,
        "checked": checked,
        "damaged": damaged,
    }


def sample_ids(stored: StoredSamples, shards: int, seed: int) -> np.ndarray:
    """Ids of up to SAMPLES random samples in up to `shards` random files; memory does not grow with the split."""
    random = np.random.default_rng(seed)
    chosen = np.sort(random.permutation(len(stored.files))[:shards])
    # A shard's samples have consecutive ids.
    counts = [shard.samples for shard in stored.split.shards] if len(stored.files) > 1 else [stored.split.samples]
    ends = np.cumsum(counts)
    sizes = np.array(counts)[chosen]
    places = random.choice(int(sizes.sum()), min(SAMPLES, int(sizes.sum())), replace=False)
    within = np.searchsorted(np.cumsum(sizes), places, side="right")
    return np.sort(places - (np.cumsum(sizes) - sizes)[within] + (ends - counts)[chosen][within])


def decoding(data: DataConfig, task: Task, split: Split, rank: int) -> dict:
    """Measure images per second decoded by this rank's `data.workers` threads while the other ranks decode, too."""
    views, order = task.views(), task.config.order(split, seed=rank, global_batch=1, micro_batch=1)
    # Where shapes vary, those of a run: a micro-batch has the largest height and width of its images.
    most = 64 if views.most_shapes == 1 else task.config.train.micro_batch
    batch = min(most, *(size for size in order.groups if size))
    order = replace(order, global_batch=batch, micro_batch=batch)
    with build_loader(data, views, split, order, task.targets(split, training=True)) as loader:
        list(islice(loader, data.prefetch + 1))  # start threads, open files
        began, images = time.perf_counter(), 0
        while (seconds := time.perf_counter() - began) < DECODING:
            next(loader)
            images += batch
    return {"images_per_second": images / seconds, "cores": len(os.sched_getaffinity(0)), "threads": data.workers}


def _index_hashes(manifest: Manifest) -> bytes:
    return "".join(f"{name} {split.fingerprint}\n" for name, split in sorted(manifest.splits.items())).encode()


def _free(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def _size_of(folder: Path) -> int:
    """Bytes of the files below `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
