"""The work of a worker process of prepare: read, check and store the images of one shard.

A sample is an image with one integer label (classification): `<key>.jpg` and `<key>.cls`.
"""

import hashlib
import json
import os
import tarfile
import zlib
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data_pipeline.durable import publish, write_atomically
from data_pipeline.image_source import Items
from data_pipeline.listing import read_image
from data_pipeline.ownership import WORK
from data_pipeline.split import RECORD, Shard
from data_pipeline.validate import BadImage, Encoding, check_image
from data_pipeline.workers import count

BLOCK = 512  # bytes: everything in a tar file starts at a multiple of it


@dataclass(frozen=True)
class ShardTask:
    """Arguments for writing one shard. first: the key of its first sample. slot: its index in the table of progress."""

    dest: Path
    file: str
    items: Items
    first: int
    slot: int
    encoding: Encoding


def done_path(dest: Path, file: str) -> Path:
    return dest / WORK / f"{file}.done"


def write_done(path: Path, header: dict, records: np.ndarray) -> None:
    """Write the `.done` file of a finished shard: a line of JSON, then its records."""
    path.parent.mkdir(parents=True, exist_ok=True)  # foreign shards may lie in subfolders
    write_atomically(path, json.dumps(header).encode() + b"\n" + records.tobytes())


def read_done(path: Path) -> tuple[dict, np.ndarray]:
    header, _, records = path.read_bytes().partition(b"\n")
    return json.loads(header), np.frombuffer(records, dtype=RECORD).copy()


def pack(task: ShardTask) -> None:
    """Write one shard under a temporary name, rename it, then write its `.done` file."""
    items, encoding = task.items, task.encoding
    records, samples = np.zeros(len(items.names), RECORD), 0
    outcomes, listed = Counter(), []
    digest, position = hashlib.sha256(), 0
    temporary = task.dest / WORK / f"{task.file}.{os.getpid()}.tmp"
    with open(temporary, "wb") as file:
        columns = (column.tolist() for column in (items.labels, items.offsets, items.sizes))
        for number, (name, label, offset, size) in enumerate(zip(items.names, *columns, strict=True)):
            try:
                image = check_image(read_image(items.source, name, offset, size), encoding)
            except BadImage as error:
                listed.append((name, "excluded", str(error)))
                continue
            finally:
                count(task.slot, number + 1)
            outcomes[image.outcome] += 1
            if image.why:
                listed.append((name, image.outcome, image.why))
            key = f"{task.first + number:09d}"
            records[samples] = (
                position + BLOCK,
                len(image.data),
                0,
                label,
                zlib.crc32(image.data),
                image.width,
                image.height,
            )
            samples += 1
            block = _tar_member(f"{key}.jpg", image.data) + _tar_member(f"{key}.cls", str(label).encode())
            file.write(block)
            digest.update(block)
            position += len(block)
        end = bytes(2 * BLOCK)  # the tar format's end mark
        file.write(end)
        digest.update(end)
        position += len(end)
    publish(temporary, task.dest / task.file)
    shard = Shard(task.file, samples, position, digest.hexdigest())
    header = {"shard": asdict(shard), "outcomes": outcomes, "listed": listed}
    write_done(done_path(task.dest, task.file), header, records[:samples])


def _tar_member(name: str, data: bytes) -> bytes:
    info = tarfile.TarInfo(name)  # owner, time and mode are constants, so that equal shards have equal bytes
    info.size = len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % BLOCK)
