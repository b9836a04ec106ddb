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
import re
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_pipeline.faults import retried
from data_pipeline.manifest import FILE_NAME, parse_manifest
from data_pipeline.preparation.finish import REPORT_NAME, files_beside, finish
from data_pipeline.preparation.folders import walk
from data_pipeline.preparation.foreign_shard import (
    CLASSES_NAME,
    LABEL_KEYS,
    MAX_LABEL_BYTES,
    IndexTask,
    index_shard,
    is_done,
    samples_of,
)
from data_pipeline.preparation.image_source import SPLIT_NAMES
from data_pipeline.preparation.labels import class_names, read_lines
from data_pipeline.preparation.ownership import claim, remove_work_folder, work_folder
from data_pipeline.preparation.pack import INDEX, done_path, read_done
from data_pipeline.preparation.prepare import read_arguments
from data_pipeline.preparation.progress import Progress
from data_pipeline.preparation.workers import run_tasks
from data_pipeline.split import DETECTION, LABEL_MAP, TABLES, DataError, UsageError

SPLIT_WORDS = {**SPLIT_NAMES, "test": "test"}
COMPRESSED = tuple(f".{ending}" for ending in ("tar.gz", "tgz", "tar.xz", "txz", "tar.bz2", "tbz2", "tar.zst", "tzst"))
MAX_CLASSES = 1_000_000


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
    beside = retried(lambda: _beside(dest, files[0], classes, label_key), str(dest / files[0]))
    annotations = {"cls": (), "png": (LABEL_MAP,), "json": DETECTION}[beside]
    with work_folder(dest) as work:
        if (work / "plan.json").exists():
            raise UsageError(f"{dest} is being prepared from {read_arguments(work / 'plan.json')['source']}.")
        stale = claim(dest, files_beside(splits, annotations), earlier)
        tasks = [IndexTask(dest, file, label_key, beside, len(classes or ()), slot) for slot, file in enumerate(files)]
        sizes = [(dest / file).stat().st_size for file in files]
        missing = [task for task in tasks if not is_done(task)]
        with Progress(
            "bytes", "indexing", sum(sizes), sum(sizes) - sum(sizes[task.slot] for task in missing)
        ) as progress:
            if missing:
                run_tasks(index_shard, missing, min(workers, len(missing)), len(tasks), progress)
        found = {value: file for file in reversed(files) for value in read_done(done_path(dest, file))[0]["labels"]}
        classes, numbers = _number_classes(dest, found, classes)
        if found and len(classes) == 1 and beside != "json":
            or_field = ", or the field of the label with --label-key" if beside == "cls" else ""
            raise DataError(
                f"all samples of {dest} that can be used are of one class, {classes[0]!r}, so there is nothing to tell "
                f"apart: name all classes in {CLASSES_NAME}{or_field}."
            )

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
    """The names of all tars below `dest`, sorted. The walk ignores hidden files, and so WORK."""
    names = sorted(name for name, *_ in walk(dest, (".tar",)))
    if packed := [name for name in names if name.lower().endswith(COMPRESSED)]:
        raise DataError(
            f"{len(packed)} tars in {dest} are compressed, the first is {packed[0]}: decompress them, because "
            "compressed shards have no random access, or move them away."
        )
    shards = [name for name in names if name.lower().endswith(".tar")]
    if not shards:
        raise DataError(f"there is no *.tar in {dest}.")
    places = {}
    for name in shards:
        found = (dest / name).stat()
        if (other := places.setdefault((found.st_dev, found.st_ino), name)) != name:
            raise DataError(f"{other} and {name} in {dest} are one file: remove the link.")
    return shards


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
        members = {ending: place for ending, *place in next(iter(samples_of(path, file).values()), [])}
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
