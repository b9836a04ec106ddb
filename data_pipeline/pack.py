"""The work of a worker process of prepare: read, check and store the images of one shard.

A sample is an image with one integer label (classification), `<key>.jpg` and `<key>.cls`, or with a label map
(segmentation), `<key>.jpg` and `<key>.png`.
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
from data_pipeline.label_png import LabelCoding, StoredLabel, check_label
from data_pipeline.listing import read_image
from data_pipeline.ownership import WORK
from data_pipeline.split import RECORD, Shard
from data_pipeline.validate import BadImage, Encoding, StoredImage, check_image
from data_pipeline.workers import count

BLOCK = 512  # bytes: everything in a tar file starts at a multiple of it


@dataclass(frozen=True)
class ShardTask:
    """Arguments for writing one shard. first: the key of its first sample. slot: its index in the table of progress.

    coding: of the items' label maps, in segmentation.
    """

    dest: Path
    file: str
    items: Items
    first: int
    slot: int
    encoding: Encoding
    coding: LabelCoding | None = None


def done_path(dest: Path, file: str) -> Path:
    return dest / WORK / f"{file}.done"


def write_done(path: Path, header: dict, records: np.ndarray) -> None:
    """Write the `.done` file of a finished shard: a line of JSON, then its records: [1, n] of the images, or [2, n] of
    the images and their label maps.
    """
    path.parent.mkdir(parents=True, exist_ok=True)  # foreign shards may lie in subfolders
    write_atomically(path, json.dumps({**header, "tables": len(records)}).encode() + b"\n" + records.tobytes())


def read_done(path: Path) -> tuple[dict, np.ndarray]:
    line, _, records = path.read_bytes().partition(b"\n")
    header = json.loads(line)
    return header, np.frombuffer(records, dtype=RECORD).reshape(header.get("tables", 1), -1).copy()


def pack(task: ShardTask) -> None:
    """Write one shard under a temporary name, rename it, then write its `.done` file."""
    items, samples = task.items, 0
    records = np.zeros((2 if task.coding else 1, len(items.names)), RECORD)
    outcomes, listed = Counter(), []
    digest, position = hashlib.sha256(), 0
    temporary = task.dest / WORK / f"{task.file}.{os.getpid()}.tmp"
    with open(temporary, "wb") as file:
        for number, name in enumerate(items.names):
            try:
                image = check_image(_read(items, number), task.encoding)
                label_map = _check_label_map(task, number, image) if task.coding else None
            except BadImage as error:
                listed.append((name, "excluded", str(error)))
                continue
            finally:
                count(task.slot, number + 1)
            outcomes[image.outcome] += 1
            if image.why:
                listed.append((name, image.outcome, image.why))
            key, label = f"{task.first + number:09d}", int(items.labels[number])
            block = _tar_member(f"{key}.jpg", image.data)
            records[0, samples] = _record(position, image, label)
            if label_map:
                outcomes["labels_rewritten"] += bool(label_map.why)
                records[1, samples] = _record(position + len(block), label_map, 0)
                block += _tar_member(f"{key}.png", label_map.data)
            else:
                block += _tar_member(f"{key}.cls", str(label).encode())
            samples += 1
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
    write_done(done_path(task.dest, task.file), header, records[:, :samples])


def _read(items: Items, number: int) -> bytes:
    return read_image(items.source, items.names[number], int(items.offsets[number]), int(items.sizes[number]))


def _check_label_map(task: ShardTask, number: int, image: StoredImage) -> StoredLabel:
    """The label map to store beside `image`. Raises BadImage, which names the file."""
    maps = task.items.maps
    try:
        return check_label(_read(maps, number), task.coding, image.full_size, (image.width, image.height))
    except BadImage as error:
        raise BadImage(f"its label {maps.names[number]}: {error}") from error


def _record(position: int, stored: StoredImage | StoredLabel, label: int) -> tuple:
    """The RECORD of a tar member at byte `position`."""
    return position + BLOCK, len(stored.data), 0, label, zlib.crc32(stored.data), stored.width, stored.height


def _tar_member(name: str, data: bytes) -> bytes:
    info = tarfile.TarInfo(name)  # owner, time and mode are constants, so that equal shards have equal bytes
    info.size = len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % BLOCK)
