"""Index WebDataset shards that other programs made, for classification, segmentation or detection.

A manifest and an index per split are written beside the shards, which are not changed. As in WebDataset, a sample
consists of the members of a tar that share folder and name up to the first dot. Its image is the member with an image
suffix; its one label comes from `.cls` or from a field of `.json`; other members are ignored. Only JPEGs that training
can read unchanged are used; images that prepare would transcode or repair are excluded, and the report gives the
reason.

Shards whose first sample has a `.png` beside its `.jpg`, and no `.cls`, are those of segmentation: the PNG is the
sample's label map, which must have the stored form (label_png.py).

Shards whose first sample has a `.json` with `objects`, and neither `.cls` nor a label, are those of detection: each
sample's JSON must have the stored form (object_json.py).
"""

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
from data_pipeline.faults import retried
from data_pipeline.finish import REPORT_NAME, files_beside, finish
from data_pipeline.label_png import check_label, stored_coding
from data_pipeline.labels import LONGEST_NAME, class_names, fault_of_name, read_lines
from data_pipeline.manifest import FILE_NAME, parse_manifest
from data_pipeline.object_json import read_objects
from data_pipeline.ownership import WORK, claim, remove_work_folder, work_folder
from data_pipeline.pack import INDEX, done_path, read_done, tables_of, write_done
from data_pipeline.prepare import read_arguments
from data_pipeline.progress import Progress
from data_pipeline.split import (
    DETECTION,
    IMAGES,
    LABEL_MAP,
    OBJECT,
    OBJECT_JSON,
    OBJECTS,
    TABLES,
    DataError,
    Shard,
    UsageError,
)
from data_pipeline.tars import IMAGE_SUFFIXES, tar_files
from data_pipeline.validate import BadImage, check_image, check_size, errors_as_bad_image, shortened
from data_pipeline.workers import count, run_tasks

CLASSES_NAME = "classes.txt"
LABEL_KEYS = ("label", "class", "cls")  # fields of .json that are tried if --label-key is not given
SPLIT_WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
MAX_CLASSES = 1_000_000
MAX_LABEL_BYTES = 1 << 24  # of a .cls or .json
LABEL = OBJECT.names.index("label")


def index(dest: Path, *, workers: int, split: str | None = None, label_key: str | None = None) -> None:
    """Index every `*.tar` below `dest`, or continue a run that was killed. Replaces an earlier index.

    split: the split of all shards; None takes it from their names. label_key: the field of `.json` with the label; None
    takes the label from `.cls`, else from LABEL_KEYS; for classification only. Raises UsageError, DataError,
    StorageError, OSError, or BrokenProcessPool if a worker was killed.
    """
    if not dest.is_dir():
        raise UsageError(f"there is no folder {dest}.")
    dest = dest.resolve()
    earlier = _earlier_index(dest)
    files = _find_shards(dest)
    splits = {}
    for file in files:
        splits.setdefault(split or _split_of(file), []).append(file)
    classes = _read_classes(dest / CLASSES_NAME)
    beside = _beside(dest, files[0], classes, label_key)
    annotations = {"cls": (), "png": (LABEL_MAP,), "json": DETECTION}[beside]
    with work_folder(dest) as work:
        if (work / "plan.json").exists():
            raise UsageError(f"{dest} is being prepared from {read_arguments(work / 'plan.json')['source']}.")
        stale = claim(dest, files_beside(splits, annotations), earlier)
        tasks = [_Task(dest, file, label_key, beside, len(classes or ()), slot) for slot, file in enumerate(files)]
        sizes = [(dest / file).stat().st_size for file in files]
        missing = [task for task in tasks if not _is_done(task)]
        with Progress(
            "bytes", "indexing", sum(sizes), sum(sizes) - sum(sizes[task.slot] for task in missing)
        ) as progress:
            if missing:
                run_tasks(_index_shard, missing, min(workers, len(missing)), len(tasks), progress)
        found = {value: file for file in reversed(files) for value in read_done(done_path(dest, file))[0]["labels"]}
        classes, numbers = _number_classes(dest, found, classes)

        def read(file: str) -> tuple[dict, dict[str, np.ndarray]]:
            header, tables = read_done(done_path(dest, file))
            records = tables[INDEX]
            records["label"] = np.array([numbers[value] for value in header["labels"]], np.uint32)[records["label"]]
            return header, tables

        report = {"arguments": {"index": True, "split": split, "label_key": label_key}}
        if beside != "cls":
            report["segmentation" if beside == "png" else "detection"] = {"classes": len(classes)}
        category_ids = range(1, len(classes) + 1) if beside == "json" else None
        finish(dest, classes, {name: splits[name] for name in sorted(splits)}, report, read, stale, category_ids)
        remove_work_folder(dest)


def _earlier_index(dest: Path) -> list[str]:
    """The files that an earlier `index` wrote into `dest`. Raises UsageError if `prepare` made the folder."""
    try:
        manifest = parse_manifest((dest / FILE_NAME).read_bytes(), dest, str(dest / FILE_NAME))
    except (FileNotFoundError, DataError):  # no manifest, or one of another program
        return []
    if "index" not in read_arguments(dest / REPORT_NAME):
        raise UsageError(
            f"{dest} is a prepared dataset with its own index: give a folder of shards that another program made."
        )
    names = [name for name in manifest.splits if name in SPLIT_WORDS.values()]
    return files_beside(
        names, TABLES.keys() & {name for split in manifest.splits.values() for name in split.annotations}
    )


def _find_shards(dest: Path) -> list[str]:
    """The names of all tars below `dest`, sorted."""
    paths = [path for path in dest.rglob("*.tar") if path.parent != dest / WORK and not path.is_dir()]
    if odd := next((path for path in paths if not path.is_file()), None):
        raise DataError(f"{odd} is not a regular file: move it away.")
    if not paths:
        raise DataError(
            f"there is no *.tar in {dest}. (Compressed shards have no random access: decompress them first.)"
        )
    return sorted(str(path.relative_to(dest)) for path in paths)


def _split_of(file: str) -> str:
    """The split that the name of a shard, or else of its folder, contains."""
    for part in reversed(Path(file).with_suffix("").parts):
        found = {SPLIT_WORDS[word] for word in re.findall("[a-z]+", part.lower()) if word in SPLIT_WORDS}
        if len(found) == 1:
            return found.pop()
    raise UsageError(
        f"the name {file} does not contain its split (train, val, …): give the split of all shards with --split."
    )


def _read_classes(path: Path) -> tuple[str, ...] | None:
    """The names in the file, in label order; None if there is no file. Raises DataError."""
    if not path.exists():
        return None
    return class_names(path, read_lines(path))


def _beside(dest: Path, first: str, classes: tuple[str, ...] | None, label_key: str | None) -> str:
    """The ending of what the first sample of the shard `first` has beside its image: "png" for a label map, "json" for
    objects, or "cls" for a label, wherever it is. Raises UsageError, DataError.
    """
    path = dest / first
    with open(path, "rb") as file:
        members = {ending: place for ending, *place in next(iter(_samples(path, file).values()), [])}
        if not members.keys() & {"jpg", "jpeg"} or "cls" in members:
            return "cls"
        if "png" in members:
            ending, what = "png", "label maps (.png beside .jpg)"
        elif "json" in members and label_key is None and _has_objects(file, *members["json"]):
            ending, what = "json", "objects (in .json beside .jpg)"
        else:
            return "cls"
    if label_key:
        raise UsageError(f"{path} has {what}: leave --label-key out.")
    if classes is None:
        raise DataError(f"{path} has {what}: name the classes in {dest / CLASSES_NAME}, one a line.")
    return ending


def _has_objects(file: BinaryIO, offset: int, size: int) -> bool:
    """Whether a JSON has objects and no label."""
    file.seek(offset)
    try:
        fields = json.loads(file.read(min(size, MAX_LABEL_BYTES)))
    except (ValueError, RecursionError):
        return False
    return isinstance(fields, dict) and "objects" in fields and not fields.keys() & set(LABEL_KEYS)


def _number_classes(
    dest: Path, found: dict[int | str, str], classes: tuple[str, ...] | None
) -> tuple[tuple[str, ...], dict[int | str, int]]:
    """The class names in label order, and the number of each label.

    found: label → a shard that has it. classes: the names in classes.txt, or None.
    """
    words = [label for label in found if isinstance(label, str)]
    if classes is not None:
        path = dest / CLASSES_NAME
        numbers = {name: number for number, name in enumerate(classes)} | {
            number: number for number in range(len(classes))
        }
        for label, file in found.items():
            if label not in numbers:
                raise DataError(
                    f"{dest / file} has the label {label!r}, which {path} does not name ({len(classes)} classes)."
                )
        if words and len(set(classes)) < len(classes):
            raise DataError(f"{path} has two classes of one name, so labels that are words are ambiguous.")
        return classes, numbers
    if words and len(words) < len(found):
        number = next(label for label in found if label not in words)
        raise DataError(
            f"some labels are words ({words[0]!r} in {found[words[0]]}), others numbers ({number} in {found[number]})."
        )
    if words:
        if len(words) > MAX_CLASSES:
            raise DataError(
                f"{dest} has {len(words)} different labels, no classes: name the field of the label with --label-key."
            )
        classes = tuple(sorted(words))
        return classes, {name: number for number, name in enumerate(classes)}
    largest = max(found, default=0)
    if largest >= MAX_CLASSES:
        raise DataError(
            f"{dest / found[largest]} has the label {largest}, no class number: "
            "name the field of the label with --label-key."
        )
    return tuple(map(str, range(largest + 1))), {number: number for number in range(largest + 1)}


# --- in a worker -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
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


def _is_done(task: _Task) -> bool:
    path = done_path(task.dest, task.file)
    return path.exists() and read_done(path)[0]["identity"] == task.identity()


def _index_shard(task: _Task) -> None:
    """Check every sample of one shard and write its `.done` file, where `label` is an index into `labels`."""
    header, tables = retried(lambda: _read_shard(task), str(task.dest / task.file))
    write_done(done_path(task.dest, task.file), header, tables)
    count(task.slot, header["shard"]["bytes"])


def _read_shard(task: _Task) -> tuple[dict, dict[str, np.ndarray]]:
    path, identity = task.dest / task.file, task.identity()
    found, codes, listed, outcomes = [], {}, [], Counter()
    check = {"cls": _check_label_of, "png": _check_label_map, "json": _check_objects}[task.beside]
    with open(path, "rb") as file:
        for key, members in _samples(path, file).items():
            try:
                record, label, rows = check(file.fileno(), members, task)
            except BadImage as error:
                listed.append((f"{task.file}/{key}", "excluded", str(error)))
                outcomes["convertible"] += isinstance(error, _Convertible)
            else:
                code = codes.setdefault(label, len(codes))
                found.append(((*record[:3], code, *record[3:]), rows))
                outcomes["kept"] += 1
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
        "listed": listed,
        "labels": list(codes),
        "identity": identity,
    }, tables_of(joined, task.beside)


def _samples(path: Path, file: BinaryIO) -> dict[str, list[tuple[str, int, int]]]:
    """(ending, offset, size) of the members of each sample of the shard, by the sample's name."""
    samples = {}
    for name, offset, size in tar_files(path, file, 0, path.stat().st_size):
        folder, slash, base = name.rpartition("/")
        key, _, ending = base.partition(".")
        samples.setdefault(folder + slash + key, []).append((ending.lower(), offset, size))
    return samples


class _Convertible(BadImage):
    """An image or label map that prepare would have converted to a usable one."""


def _check_label_map(descriptor: int, members: list[tuple[str, int, int]], task: _Task) -> tuple:
    """The RECORD without label of a sample's image, no label, and the rows of the other tables. Raises BadImage."""
    data, offset = _read_one(descriptor, members, "png", "label")
    record = _check_image(descriptor, _image_of([member for member in members if member[0] != "png"]))
    try:
        label_map = check_label(data, stored_coding(task.classes), record[-2:], record[-2:])
    except BadImage as error:
        raise BadImage(f"its label: {error}") from error
    if label_map.why:
        raise _Convertible(f"its label is {label_map.why}: not rewritten here, because the shard is not changed")
    return record, 0, {LABEL_MAP: [_record(data, offset, record[-2:])]}


def _check_objects(descriptor: int, members: list[tuple[str, int, int]], task: _Task) -> tuple:
    """As `_check_label_map`."""
    data, offset = _read_one(descriptor, members, "json", "boxes")
    record = _check_image(descriptor, _image_of(members))
    image_id, objects = read_objects(data, record[-2:])
    if odd := next((row for row in objects if row[LABEL] >= task.classes), None):
        raise BadImage(f"object {odd[-1]} has the label {odd[LABEL]}; {CLASSES_NAME} names {task.classes} classes")
    places = [_record(data, offset, record[-2:])]
    return record, 0, {OBJECT_JSON: places, IMAGES: [(0, len(objects), image_id)], OBJECTS: objects}


def _check_label_of(descriptor: int, members: list[tuple[str, int, int]], task: _Task) -> tuple:
    """The RECORD without label of a sample's image, and the label as it is written in the shard. Raises BadImage."""
    image = _image_of(members)
    label = _read_label(descriptor, members, task.label_key)
    return _check_image(descriptor, image), label, {}


def _read_one(descriptor: int, members: list[tuple[str, int, int]], ending: str, what: str) -> tuple[bytes, int]:
    """The bytes and the place of the one member with this ending. Raises BadImage."""
    found = [place for name, *place in members if name == ending]
    if len(found) != 1:
        raise BadImage(f"more than one {what} (.{ending})" if found else f"no {what} (.{ending})")
    [(offset, size)] = found
    check_size(size)
    return os.pread(descriptor, size, offset), offset


def _record(data: bytes, offset: int, size: tuple[int, int]) -> tuple:
    return offset, len(data), 0, 0, zlib.crc32(data), *size


def _image_of(members: list[tuple[str, int, int]]) -> tuple[str, int, int]:
    """The one image among the members of a sample. Raises BadImage."""
    images = [member for member in members if f".{member[0]}" in IMAGE_SUFFIXES]
    if len(images) != 1:
        raise BadImage("more than one image" if images else "no image")
    check_size(images[0][2])
    return images[0]


def _check_image(descriptor: int, member: tuple[str, int, int]) -> tuple:
    """The RECORD of an image, without label. Raises BadImage."""
    _, offset, size = member
    data = os.pread(descriptor, size, offset)
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
            texts[ending] = os.pread(descriptor, size, offset)
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
