"""The work of a worker process of prepare: read, check and store the images of one shard.

A sample is an image, `<key>.jpg`, with one integer label (classification, `<key>.cls`), with a label map (segmentation,
`<key>.png`) or with objects (detection, `<key>.json`).
"""

import hashlib
import json
import os
import tarfile
import zlib
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from data_pipeline.durable import publish, write_atomically
from data_pipeline.label_png import LabelCoding, check_label
from data_pipeline.object_json import read_objects
from data_pipeline.preparation.image_source import Items
from data_pipeline.preparation.listing import read_image
from data_pipeline.preparation.ownership import WORK
from data_pipeline.preparation.workers import count
from data_pipeline.split import IMAGES, LABEL_MAP, OBJECT_JSON, OBJECTS, RECORD, TABLES, Shard
from data_pipeline.validate import BadImage, Encoding, StoredImage, check_image

BLOCK = 512  # bytes: everything in a tar file starts at a multiple of it
INDEX = "index"  # among the names of a shard's tables: the RECORDs of the images


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

    @property
    def beside(self) -> str:
        """The ending of what lies beside an image."""
        return "json" if self.items.objects else "png" if self.coding else "cls"


def done_path(dest: Path, file: str) -> Path:
    return dest / WORK / f"{file}.done"


def write_done(path: Path, header: dict, tables: dict[str, np.ndarray]) -> None:
    """Write the `.done` file of a finished shard: a line of JSON, then the rows of its index and of its annotations, by
    name (INDEX, split.TABLES).
    """
    path.parent.mkdir(parents=True, exist_ok=True)  # foreign shards may lie in subfolders
    line = json.dumps({**header, "tables": {name: len(table) for name, table in tables.items()}})
    write_atomically(path, b"".join([line.encode(), b"\n", *(table.tobytes() for table in tables.values())]))


def read_done(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    line, _, data = path.read_bytes().partition(b"\n")
    header = json.loads(line)
    sizes = header.get("tables", 1)
    if isinstance(sizes, int):  # of an earlier version: so many tables of as many RECORDs
        sizes = dict.fromkeys((INDEX, LABEL_MAP)[:sizes], len(data) // RECORD.itemsize // sizes)
    tables, position = {}, 0
    for name, count_of_rows in sizes.items():
        kind = TABLES.get(name, RECORD)
        tables[name] = np.frombuffer(data, kind, count_of_rows, position).copy()
        position += tables[name].nbytes
    return header, tables


def tables_of(rows: dict[str, list[tuple]], beside: str) -> dict[str, np.ndarray]:
    """The tables of a shard from the rows of its samples. beside: the ending of what lies beside its images."""
    names = {"cls": (), "png": (LABEL_MAP,), "json": (OBJECT_JSON, IMAGES, OBJECTS)}[beside]
    return {name: np.array(rows.get(name, []), TABLES.get(name, RECORD)) for name in (INDEX, *names)}


def pack(task: ShardTask) -> None:
    """Write one shard under a temporary name, rename it, then write its `.done` file."""
    items, samples, rows = task.items, 0, defaultdict(list)
    outcomes, pixels, listed = Counter(), Counter(), []
    digest, position = hashlib.sha256(), 0
    temporary = task.dest / WORK / f"{task.file}.{os.getpid()}.tmp"
    with open(temporary, "wb") as file:
        for number, name in enumerate(items.names):
            try:
                image = check_image(_read(items, number), task.encoding)
                beside = _beside(task, number, image)
            except BadImage as error:
                listed.append((name, "excluded", str(error)))
                continue
            finally:
                count(task.slot, number + 1)
            outcomes[image.outcome] += 1
            outcomes.update(beside.outcomes)
            pixels.update(beside.pixels)
            if image.why:
                listed.append((name, image.outcome, image.why))
            key, size = f"{task.first + number:09d}", (image.width, image.height)
            block = _tar_member(f"{key}.jpg", image.data)
            rows[INDEX].append(_record(position, image.data, size, int(items.labels[number])))
            if beside.table:
                rows[beside.table].append(_record(position + len(block), beside.data, size))
            for table, more in beside.rows.items():
                rows[table] += more
            block += _tar_member(f"{key}.{beside.ending}", beside.data)
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
    header = {"shard": asdict(shard), "outcomes": outcomes, "pixels": pixels, "listed": listed}
    write_done(done_path(task.dest, task.file), header, tables_of(rows, task.beside))


@dataclass(frozen=True)
class _Beside:
    """What a sample has beside its image: a member of the shard, the table of the places of such members, and rows of
    further tables. pixels: of each class, in a label map.
    """

    ending: str
    data: bytes
    table: str | None = None
    rows: dict[str, list[tuple]] = field(default_factory=dict)
    outcomes: dict[str, int] = field(default_factory=dict)
    pixels: dict[int, int] = field(default_factory=dict)


def _beside(task: ShardTask, number: int, image: StoredImage) -> _Beside:
    """Raises BadImage, which names the file of a label map."""
    items, size = task.items, (image.width, image.height)
    if items.objects:
        document = items.objects.documents[number]
        image_id, objects = read_objects(document, size)
        rows = {IMAGES: [(0, len(objects), image_id)], OBJECTS: objects}
        return _Beside("json", document, OBJECT_JSON, rows, {"objects": len(objects)})
    if task.coding is None:
        return _Beside("cls", str(int(items.labels[number])).encode())
    try:
        label_map = check_label(_read(items.maps, number), task.coding, image.full_size, size)
    except BadImage as error:
        raise BadImage(f"its label {items.maps.names[number]}: {error}") from error
    outcomes = {"labels_rewritten": int(bool(label_map.why))}
    return _Beside("png", label_map.data, LABEL_MAP, outcomes=outcomes, pixels=label_map.pixels)


def _read(items: Items, number: int) -> bytes:
    return read_image(items.source, items.names[number], int(items.offsets[number]), int(items.sizes[number]))


def _record(position: int, data: bytes, size: tuple[int, int], label: int = 0) -> tuple:
    """The RECORD of a tar member at byte `position`. size: (width, height) of the sample's image."""
    return position + BLOCK, len(data), 0, label, zlib.crc32(data), *size


def _tar_member(name: str, data: bytes) -> bytes:
    info = tarfile.TarInfo(name)  # owner, time and mode are constants, so that equal shards have equal bytes
    info.size = len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % BLOCK)
