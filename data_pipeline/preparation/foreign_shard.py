"""The work of a worker process of index (foreign.py): check the samples of one shard that another program made."""

import errno
import json
import os
import re
import zlib
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_pipeline.durable import sha256_of
from data_pipeline.faults import read_fully, retried
from data_pipeline.formatting import first_five
from data_pipeline.label_png import check_label, stored_coding
from data_pipeline.object_json import read_objects
from data_pipeline.preparation.labels import LONGEST_NAME, fault_of_name
from data_pipeline.preparation.pack import INDEX, done_path, read_done, tables_of, write_done
from data_pipeline.preparation.tars import IMAGE_SUFFIXES, check_name, tar_files
from data_pipeline.preparation.workers import count
from data_pipeline.split import IMAGES, LABEL_MAP, OBJECT, OBJECT_JSON, OBJECTS, Shard
from data_pipeline.validate import BadImage, check_image, check_size, errors_as_bad_image, shortened

CLASSES_NAME = "classes.txt"
LABEL_KEYS = ("label", "class", "cls")  # fields of .json that are tried if --label-key is not given
MAX_LABEL_BYTES = 1 << 24  # of a .cls or .json
LABEL = OBJECT.names.index("label")


@dataclass(frozen=True)
class IndexTask:
    """Arguments for checking one shard.

    beside: the ending of what its samples have beside their images (pack.tables_of). classes: how many classes.txt
    names. slot: its index in the table of progress.
    """

    dest: Path
    file: str
    label_key: str | None
    beside: str
    classes: int
    slot: int

    def identity(self) -> list:
        """A `.done` file is valid for this: the current state of the shard, and the arguments."""
        stat = (self.dest / self.file).stat()
        beside = {"cls": [], "png": [self.classes], "json": [self.classes, OBJECTS]}[self.beside]
        return [stat.st_size, stat.st_mtime_ns, self.label_key, *beside]


def is_done(task: IndexTask) -> bool:
    path = done_path(task.dest, task.file)
    return path.exists() and read_done(path)[0]["identity"] == task.identity()


def index_shard(task: IndexTask) -> None:
    """Check every sample of one shard and write its `.done` file, where `label` is an index into `labels`."""
    header, tables = retried(lambda: _read_shard(task), str(task.dest / task.file))
    write_done(done_path(task.dest, task.file), header, tables)
    count(task.slot, header["shard"]["bytes"])


def _read_shard(task: IndexTask) -> tuple[dict, dict[str, np.ndarray]]:
    path, identity = task.dest / task.file, task.identity()
    found, codes, listed, outcomes, pixels = [], {}, [], Counter(), Counter()
    check = {"cls": _check_label_of, "png": _check_label_map, "json": _check_objects}[task.beside]
    with open(path, "rb") as file:
        for key, members in samples_of(path, file).items():
            try:
                record, label, rows, of_classes = check(file.fileno(), members, task)
            except BadImage as error:
                listed.append((f"{task.file}/{key}", "excluded", str(error)))
                outcomes["convertible"] += isinstance(error, _Convertible)
            else:
                code = codes.setdefault(label, len(codes))
                found.append(((*record[:3], code, *record[3:]), rows))
                outcomes["kept"] += 1
                pixels.update(of_classes)
                outcomes["objects"] += len(rows.get(OBJECTS, ()))
            count(task.slot, members[-1][1])
    joined = defaultdict(list)
    for record, rows in sorted(found, key=lambda each: each[0][0]):  # as in the file, for sequential reads
        joined[INDEX].append(record)
        for name, more in rows.items():
            joined[name] += more
    shard = Shard(task.file, len(found), identity[0], sha256_of(path))
    return {
        "shard": asdict(shard),
        "outcomes": outcomes,
        "pixels": pixels,
        "listed": listed,
        "labels": list(codes),
        "identity": identity,
    }, tables_of(joined, task.beside)


def samples_of(path: Path, file: BinaryIO) -> dict[str, list[tuple[str, int, int]]]:
    """(ending, offset, size) of the members of each sample of the shard, by the sample's name."""
    samples = {}
    for name, offset, size in tar_files(path, file, 0, path.stat().st_size):
        folder, slash, base = name.rpartition("/")
        if not base:
            continue
        check_name(path, name)
        key, _, ending = base.partition(".")
        samples.setdefault(folder + slash + key, []).append((ending.lower(), offset, size))
    return samples


class _Convertible(BadImage):
    """An image or label map that prepare would have converted to a usable one."""


def _check_label_map(descriptor: int, members: list[tuple[str, int, int]], task: IndexTask) -> tuple:
    """The RECORD without label of a sample's image, no label, the rows of the other tables, and the number of pixels of
    each class. Raises BadImage.
    """
    data, offset = _read_one(descriptor, members, "png", "label")
    record = _check_image(descriptor, _image_of([member for member in members if member[0] != "png"]))
    try:
        label_map = check_label(data, stored_coding(task.classes), record[-2:], record[-2:])
    except BadImage as error:
        raise BadImage(f"its label: {error}") from error
    if label_map.why:
        raise _Convertible(f"its label is {label_map.why}: not rewritten here, because the shard is not changed")
    return record, 0, {LABEL_MAP: [_record(data, offset, record[-2:])]}, label_map.pixels


def _check_objects(descriptor: int, members: list[tuple[str, int, int]], task: IndexTask) -> tuple:
    """As `_check_label_map`."""
    data, offset = _read_one(descriptor, members, "json", "boxes")
    record = _check_image(descriptor, _image_of(members))
    image_id, objects = read_objects(data, record[-2:])
    if odd := next((row for row in objects if row[LABEL] >= task.classes), None):
        raise BadImage(f"object {odd[-1]} has the label {odd[LABEL]}; {CLASSES_NAME} names {task.classes} classes")
    places = [_record(data, offset, record[-2:])]
    return record, 0, {OBJECT_JSON: places, IMAGES: [(0, len(objects), image_id)], OBJECTS: objects}, {}


def _check_label_of(descriptor: int, members: list[tuple[str, int, int]], task: IndexTask) -> tuple:
    """The RECORD without label of a sample's image, and the label as it is written in the shard. Raises BadImage."""
    image = _image_of(members)
    label = _read_label(descriptor, members, task.label_key)
    return _check_image(descriptor, image), label, {}, {}


def _read_one(descriptor: int, members: list[tuple[str, int, int]], ending: str, what: str) -> tuple[bytes, int]:
    """The bytes and the place of the one member with this ending. Raises BadImage."""
    found = [place for name, *place in members if name == ending]
    if len(found) != 1:
        raise BadImage(f"more than one {what} (.{ending})" if found else f"no {what} (.{ending})")
    [(offset, size)] = found
    check_size(size)
    return _read(descriptor, offset, size), offset


def _read(descriptor: int, offset: int, size: int) -> bytes:
    """Raises OSError if the shard has become shorter, so that it is read again, which then names what is cut off."""
    data = read_fully(descriptor, size, offset)
    if len(data) < size:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    return data


def _record(data: bytes, offset: int, size: tuple[int, int]) -> tuple:
    return offset, len(data), 0, 0, zlib.crc32(data), *size


def _image_of(members: list[tuple[str, int, int]]) -> tuple[str, int, int]:
    """The one image among the members of a sample. Raises BadImage."""
    images = [member for member in members if f".{member[0]}" in IMAGE_SUFFIXES]
    if not images:
        raise BadImage(f"no image: it has {first_five([ending for ending, *_ in members])}")
    if len(images) > 1:
        raise BadImage("more than one image")
    check_size(images[0][2])
    return images[0]


def _check_image(descriptor: int, member: tuple[str, int, int]) -> tuple:
    """The RECORD of an image, without label. Raises BadImage."""
    _, offset, size = member
    data = _read(descriptor, offset, size)
    image = check_image(data)
    if image.outcome != "kept":
        raise _Convertible(f"{image.why}: not done here, because the shard is not changed")
    return offset, size, 0, zlib.crc32(data), image.width, image.height


def _read_label(descriptor: int, members: list[tuple[str, int, int]], label_key: str | None) -> int | str:
    texts = {}
    for ending, offset, size in members:
        if ending in ("cls", "json"):
            if ending in texts:
                raise BadImage(f"more than one .{ending}")
            if size > MAX_LABEL_BYTES:
                raise BadImage(f"no label: its .{ending} has {size} bytes, more than {MAX_LABEL_BYTES}")
            texts[ending] = _read(descriptor, offset, size)
    with errors_as_bad_image("its label cannot be read: "):  # not JSON, not text, JSON that is not an object
        if "cls" in texts and label_key is None:
            label = texts["cls"].decode().strip()
        else:
            fields = json.loads(texts.get("json", b"{}"))
            label = next((fields[key] for key in ([label_key] if label_key else LABEL_KEYS) if key in fields), None)
        if isinstance(label, str) and re.fullmatch(r"-?\d+", label):
            label = int(label)
    if label is None:
        wanted = (
            f"a field {label_key!r}" if label_key else f".cls, or a field {' or '.join(map(repr, LABEL_KEYS))} in .json"
        )
        raise BadImage(f"no label: it has no {wanted}")
    if isinstance(label, str) and (fault := fault_of_name(label)):
        raise BadImage(f"no label: {label[:LONGEST_NAME]!r} {fault}")
    if (
        isinstance(label, bool)
        or not isinstance(label, int | str)
        or (isinstance(label, int) and not 0 <= label < 1 << 63)
    ):
        raise BadImage(f"no label: {shortened(repr(label))}")
    return label
