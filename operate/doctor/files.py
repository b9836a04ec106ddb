"""The disk that checkpoints go to, the dataset, and how fast this rank's cores make pixels of it."""

import errno
import hashlib
import os
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np

from data_pipeline.backends import open_backend
from data_pipeline.backends.stored import StoredSamples
from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.loader import build_loader
from data_pipeline.manifest import FILE_NAME, Manifest, Split
from data_pipeline.order import Order

CHUNK = 8 * 2**20  # bytes between two fsyncs
MOST = 2**30  # bytes that a rank writes at most
WRITING, DECODING = 3.0, 2.0  # seconds, about
SHARDS, SAMPLES = 16, 256  # that a rank looks at, of each split


def disk(output: Path, amount: int, mark: str) -> dict:
    """Write about `amount` bytes where `output`'s checkpoints go, all ranks at the same time, as in a save. Nothing of it stays.

    mark: a file that rank 0 has made there ("": it could not). `same`: this node sees it, too.
    """
    folder = checkpoint_folder(output)
    found = {
        "folder": str(folder),
        "free": _free(folder),
        "held": _size_of(output / "checkpoints"),
        "same": not mark or os.path.exists(mark),
    }
    try:
        return {**found, "bytes_per_second": _write(folder, amount)}
    except OSError as error:
        return {**found, "error": error.strerror}


def leave_mark(output: Path) -> str:
    """A new file where checkpoints go, by which the other nodes see that it is the same folder; "" where none can be made."""
    try:
        descriptor, path = tempfile.mkstemp(prefix=".doctor_", dir=checkpoint_folder(output))
    except OSError:  # `disk` meets it, too, and says so
        return ""
    os.close(descriptor)
    return path


def checkpoint_folder(output: Path) -> Path:
    """Where `output`'s checkpoints go, or will: the nearest folder that exists."""
    folder = (output / "checkpoints").absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def _write(folder: Path, amount: int) -> float:
    """Bytes a second."""
    data, written, seconds = os.urandom(CHUNK), 0, 0.0  # random: some file systems compress
    descriptor, path = tempfile.mkstemp(prefix=".doctor_", dir=folder)
    try:
        os.unlink(path)  # nothing is left, however this ends
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
    """Check the checksums of a sample of images, another one on every rank; opening `manifest` has checked sizes and indexes.

    `fingerprints` are compared between the nodes.
    """
    damaged, checked = [], 0
    for split in manifest.splits.values():
        stored = open_backend(data.backend, split).stored
        ids = sample_ids(stored, 1 if data.cache_dir else SHARDS, rank)  # with a cache, to look into a shard is to copy it
        failures = stored.read(ids)[1]
        damaged += stored.sentences(ids, failures).values()
        checked += len(ids)
    text = (manifest.folder / FILE_NAME).read_bytes() if data.cache_dir is None else _names(manifest)
    return {
        "fingerprint": hashlib.sha256(text).hexdigest(),
        "samples": manifest.split("train").samples,
        "checked": checked,
        "damaged": damaged,
    }


def sample_ids(stored: StoredSamples, shards: int, seed: int) -> np.ndarray:
    """Ids of up to SAMPLES samples that lie in up to `shards` files, which `seed` chooses. In memory that does not grow with the split."""
    random = np.random.default_rng(seed)
    chosen = np.sort(random.permutation(len(stored.files))[:shards])
    # A shard's samples have ids that follow each other.
    counts = [shard.samples for shard in stored.split.shards] if len(stored.files) > 1 else [stored.split.samples]
    ends = np.cumsum(counts)
    sizes = np.array(counts)[chosen]
    places = random.choice(int(sizes.sum()), min(SAMPLES, int(sizes.sum())), replace=False)
    within = np.searchsorted(np.cumsum(sizes), places, side="right")
    return np.sort(places - (np.cumsum(sizes) - sizes)[within] + (ends - counts)[chosen][within])


def decoding(data: DataConfig, augment: AugmentConfig, split: Split, rank: int) -> dict:
    """Images a second that this rank's `data.workers` threads decode while the others decode, too; and how many cores they may use."""
    batch = min(64, split.samples)
    order = Order(rank, split.samples, batch, batch, data.shuffle)
    with build_loader(data, augment, split, order) as loader:
        list(islice(loader, data.prefetch + 1))  # threads start, files open
        began, images = time.perf_counter(), 0
        while (seconds := time.perf_counter() - began) < DECODING:
            next(loader)
            images += batch
    return {"images_per_second": images / seconds, "cores": len(os.sched_getaffinity(0)), "threads": data.workers}


def _names(manifest: Manifest) -> bytes:
    return "".join(f"{name} {split.fingerprint}\n" for name, split in sorted(manifest.splits.items())).encode()


def _free(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def _size_of(folder: Path) -> int:
    """Bytes of the files below `folder`: checkpoints that the run has already."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
