"""Index WebDataset shards for classification that other programs made.

A manifest and an index per split are written beside the shards, which are not changed. As in WebDataset, a sample
consists of the members of a tar that share folder and name up to the first dot. Its image is the member with an image
suffix; its one label comes from `.cls` or from a field of `.json`; other members are ignored. Only JPEGs that training
can read unchanged are used; images that prepare would transcode or repair are excluded, and the report gives the
reason.
"""

import json
import os
import re
import zlib
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data_pipeline.durable import sha256_of
from data_pipeline.faults import retried
from data_pipeline.labels import LONGEST_NAME, check_names, fault_of_name, read_lines
from data_pipeline.manifest import FILE_NAME, parse_manifest
from data_pipeline.ownership import WORK, claim, remove_work_folder, work_folder
from data_pipeline.pack import done_path, read_done, write_done
from data_pipeline.prepare import REPORT_NAME, files_beside, finish, read_arguments
from data_pipeline.progress import Progress
from data_pipeline.split import RECORD, DataError, Shard, UsageError
from data_pipeline.tars import IMAGE_SUFFIXES, tar_files
from data_pipeline.validate import BadImage, check_image, check_size, errors_as_bad_image, shortened
from data_pipeline.workers import count, run_tasks

CLASSES_NAME = "classes.txt"
LABEL_KEYS = ("label", "class", "cls")  # fields of .json that are tried if --label-key is not given
SPLIT_WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
MAX_CLASSES = 1_000_000
MAX_LABEL_BYTES = 1 << 24  # of a .cls or .json


def index(dest: Path, *, workers: int, split: str | None = None, label_key: str | None = None) -> None:
    """Index every `*.tar` below `dest`, or continue a run that was killed. Replaces an earlier index.

    split: the split of all shards; None takes it from their names. label_key: the field of `.json` with the label; None
    takes the label from `.cls`, else from LABEL_KEYS. Raises UsageError, DataError, StorageError, OSError, or
    BrokenProcessPool if a worker was killed.
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
    with work_folder(dest) as work:
        if (work / "plan.json").exists():
            raise UsageError(f"{dest} is being prepared from {read_arguments(work / 'plan.json')['source']}.")
        stale = claim(dest, files_beside(splits), earlier)
        tasks = [_Task(dest, file, label_key, slot) for slot, file in enumerate(files)]
        sizes = [(dest / file).stat().st_size for file in files]
        missing = [task for task in tasks if not _is_done(task)]
        with Progress(
            "bytes", "indexing", sum(sizes), sum(sizes) - sum(sizes[task.slot] for task in missing)
        ) as progress:
            if missing:
                run_tasks(_index_shard, missing, min(workers, len(missing)), len(tasks), progress)
        found = {value: file for file in reversed(files) for value in read_done(done_path(dest, file))[0]["labels"]}
        classes, numbers = _number_classes(dest, found, classes)

        def read(file: str) -> tuple[dict, np.ndarray]:
            header, records = read_done(done_path(dest, file))
            records["label"] = np.array([numbers[value] for value in header["labels"]], np.uint32)[records["label"]]
            return header, records

        report = {"arguments": {"index": True, "split": split, "label_key": label_key}}
        finish(dest, classes, {name: splits[name] for name in sorted(splits)}, report, read, stale)
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
    return files_beside(name for name in manifest.splits if name in SPLIT_WORDS.values())


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
    names = read_lines(path)
    if "" in names:
        line = names.index("") + 1
        raise DataError(f"{path}, line {line} is empty: every line must name a class, in the order of the labels.")
    check_names(path, names)
    return tuple(names)


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
    slot: int

    def identity(self) -> list:
        """A `.done` file is valid for this: the current state of the shard, and the arguments."""
        stat = (self.dest / self.file).stat()
        return [stat.st_size, stat.st_mtime_ns, self.label_key]


def _is_done(task: _Task) -> bool:
    path = done_path(task.dest, task.file)
    return path.exists() and read_done(path)[0]["identity"] == task.identity()


def _index_shard(task: _Task) -> None:
    """Check every sample of one shard and write its `.done` file, where `label` is an index into `labels`."""
    header, records = retried(lambda: _read_shard(task), str(task.dest / task.file))
    write_done(done_path(task.dest, task.file), header, records)
    count(task.slot, header["shard"]["bytes"])


def _read_shard(task: _Task) -> tuple[dict, np.ndarray]:
    path, identity = task.dest / task.file, task.identity()
    records, codes, listed, outcomes = [], {}, [], Counter()
    with open(path, "rb") as file:
        samples = {}
        for name, offset, size in tar_files(path, file, 0, identity[0]):
            folder, slash, base = name.rpartition("/")
            key, _, ending = base.partition(".")
            samples.setdefault(folder + slash + key, []).append((ending.lower(), offset, size))
        for key, members in samples.items():
            try:
                record, label = _check_sample(file.fileno(), members, task.label_key)
            except BadImage as error:
                listed.append((f"{task.file}/{key}", "excluded", str(error)))
                outcomes["convertible"] += isinstance(error, _Convertible)
            else:
                records.append((*record[:3], codes.setdefault(label, len(codes)), *record[3:]))
                outcomes["kept"] += 1
            count(task.slot, members[-1][1])
    records = np.sort(np.array(records, RECORD), order="offset")  # in the order of the file, for sequential reads
    shard = Shard(task.file, len(records), identity[0], sha256_of(path))
    return {
        "shard": asdict(shard),
        "outcomes": outcomes,
        "listed": listed,
        "labels": list(codes),
        "identity": identity,
    }, records


class _Convertible(BadImage):
    """An image that prepare would have converted to a usable one."""


def _check_sample(
    descriptor: int, members: list[tuple[str, int, int]], label_key: str | None
) -> tuple[tuple, int | str]:
    """The sample's RECORD without its label, and the label as it is written in the shard. Raises BadImage."""
    images = [member for member in members if f".{member[0]}" in IMAGE_SUFFIXES]
    if len(images) != 1:
        raise BadImage("more than one image" if images else "no image")
    [(_, offset, size)] = images
    check_size(size)
    label = _read_label(descriptor, members, label_key)
    data = os.pread(descriptor, size, offset)
    image = check_image(data)
    if image.outcome != "kept":
        raise _Convertible(f"{image.why}: not done here, because the shard is not changed")
    return (offset, size, 0, zlib.crc32(data), image.width, image.height), label


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
