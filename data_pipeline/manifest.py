"""A prepared dataset: a folder with `manifest.json`, shards, and one binary index per split.

`manifest.json` names the classes and, for each split, its shards and its index. The index is a flat table of `RECORD`s,
one per sample, in the order of the sample ids 0 … N-1; it is memory-mapped, so its size costs a rank nothing.

A split may also be stored as one FFCV file (preparation/beton.py), with an index of its own. Its shards may then be
absent (`shards` is empty); `<split>.index` stays, because it identifies the samples; its hash is the split's
fingerprint whatever file holds the images.

A record has one integer label. Further labels of the samples are *annotations* (annotations.py): named arrays, mostly
with one row per sample.
"""

import hashlib
import json
import os
import posixpath
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from .durable import sha256_of, write_atomically
from .faults import LASTING, retried
from .split import (
    CATEGORY_IDS,
    DETECTION,
    IMAGES,
    OBJECTS,
    RECORD,
    TABLES,
    Annotation,
    Beton,
    DataError,
    Shard,
    Split,
)

VERSION = 1
FILE_NAME = "manifest.json"
LARGEST = 2**48  # samples, or bytes of a file: beyond it a manifest is damaged
CHUNK = 2**20  # records of an index that are checked at once: 28 MB


@dataclass(frozen=True)
class Manifest:
    """A prepared dataset: its folder, the class names in label order, and its splits by name."""

    folder: Path
    classes: tuple[str, ...]
    splits: dict[str, Split]

    def split(self, name: str) -> Split:
        if name not in self.splits:
            raise DataError(
                f"{self.folder} has no split {name!r}; it has {', '.join(sorted(self.splits))}. Prepare it again "
                "with that split."
            )
        return self.splits[name]


def open_manifest(folder: str | Path) -> Manifest:
    """Read `folder`'s manifest, and check the sizes of all files and the contents of all indexes, but no samples.

    One process of a node checks: LOCAL_RANK 0, or the only one. The others rely on it, because no rank trains without
    it. Raises DataError with one sentence if something is wrong, StorageError if a file cannot be read at the moment.
    """
    manifest = read_manifest(folder)
    if first_of_node():
        check_sizes(manifest)
        check_indexes(manifest)
    return manifest


def first_of_node() -> bool:
    """Whether this process checks a dataset's files for all ranks of its node."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def read_manifest(folder: str | Path) -> Manifest:
    """Read `folder`'s manifest without checking the files that it names. Raises DataError."""
    folder = Path(folder)
    path = folder / FILE_NAME
    try:
        text = retried(lambda: path.read_bytes() if path.is_file() else None, str(path))
    except LASTING as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. See that you may read it.") from error
    if text is None:
        raise DataError(
            f"no dataset at {folder}: {FILE_NAME} is missing. Make one with: python launch/prepare.py SOURCE {folder}"
        )
    return parse_manifest(text, folder, str(path))


def parse_manifest(text: bytes, folder: Path, path: str) -> Manifest:
    """Parse the manifest `text` of a dataset in `folder`. Raises DataError, which names `path`, if it is damaged.

    It may be a stranger's: every file that it names lies inside `folder`, each has one name, and every number is one
    that can be.
    """
    try:
        document = json.loads(text)
        version = document["version"]
        if version != VERSION:
            raise DataError(
                f"{path} has format version {version}, this program reads version {VERSION}. Prepare the dataset again."
            )
        splits = {name: _parse_split(folder, name, entry) for name, entry in document["splits"].items()}
        classes = document["classes"]
        if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
            raise ValueError("classes must be a list of names")
        _check_names([name for split in splits.values() for name, _, _ in split.listing()])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error}). Prepare the dataset again.") from error
    return Manifest(folder, tuple(classes), splits)


def _parse_split(folder: Path, name: str, entry: dict) -> Split:
    if not re.fullmatch(r"[\w-][\w.-]*", name):
        raise ValueError(f"{name!r} cannot be a split's name")
    shards = tuple(Shard(**shard) for shard in entry["shards"])
    beton = Beton(**entry["beton"]) if "beton" in entry else None
    annotations = {key: Annotation(**value) for key, value in entry.get("annotations", {}).items()}
    split = Split(folder, name, entry["samples"], entry["fingerprint"], shards, beton, annotations)
    _check_number("samples", split.samples)
    if not split.samples:
        raise ValueError(f"split {name!r} has no samples")
    for shard in shards:
        _check_number("samples", shard.samples)
    if shards and sum(shard.samples for shard in shards) != split.samples:
        raise ValueError(f"the shards of split {name!r} do not add up to its {split.samples} samples")
    files = (*shards, *annotations.values(), *([beton] if beton else []))
    for file in files:
        _check_number("bytes", file.bytes)
    for digest in (split.fingerprint, *(file.sha256 for file in files), *([beton.fingerprint] if beton else [])):
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise ValueError(f"{digest!r} is no SHA-256")
    if beton and beton.mode not in ("jpeg", "raw"):
        raise ValueError(f"{beton.mode!r} is no mode of an FFCV file")
    return split


def _check_number(name: str, value: object) -> None:
    if type(value) is not int or not 0 <= value <= LARGEST:
        raise ValueError(f"{name} must be a whole number from 0 to {LARGEST}")


def _check_names(names: list[str]) -> None:
    """Raise ValueError if a file is outside the dataset's folder, or two files have the same name."""
    seen = {FILE_NAME}
    for name in names:
        if (
            not isinstance(name, str)
            or not name
            or re.search(r"[\x00-\x1f\x7f]", name)
            or name != posixpath.normpath(name)
        ):
            raise ValueError(f"{name!r} cannot be a file's name")
        os.fsencode(name)  # a ValueError if it is not valid text
        if name.startswith(("/", "../")) or name in (".", ".."):
            raise ValueError(f"{name!r} lies outside the dataset's folder")
        if name in seen:
            raise ValueError(f"there are two files {name!r}")
        seen.add(name)
    for name in names:
        if any(parent in seen for parent in map(str, Path(name).parents)):
            raise ValueError(f"{name!r} lies in a folder whose name is a file's")


def check_sizes(manifest: Manifest) -> None:
    """Raise DataError unless every file that the manifest names exists with its size."""
    for split in manifest.splits.values():
        for name, size, _ in split.listing():
            _check_size(manifest.folder / name, size)


def check_indexes(manifest: Manifest) -> None:
    """Raise DataError unless every index has the manifest's hash and refers only to existing classes and files."""
    for split in manifest.splits.values():
        classes, shards = len(manifest.classes), [shard.bytes for shard in split.shards]
        _check_index(split.index_path, split.fingerprint, classes, shards)
        if split.beton:
            _check_index(split.beton_index_path, split.beton.fingerprint, classes, [split.beton.bytes])
        for name, annotation in split.annotations.items():
            path = manifest.folder / annotation.file
            rows = {OBJECTS: None, CATEGORY_IDS: classes}.get(name, split.samples)
            table = _check_annotation(path, annotation, rows)
            kind = TABLES.get(name)
            if kind and (table.dtype != kind or table.ndim != 1):
                what = name.replace("_", " ").removesuffix("s") + "s"
                raise DataError(f"{path} cannot be right: it is no table of {what}. Prepare the dataset again.")
            if kind == RECORD and (fault := _first_fault(table, classes, shards)):
                raise DataError(_cannot_be_right(path, *fault))
        if OBJECTS in split.annotations:
            _check_objects(split, classes)


def _check_objects(split: Split, classes: int) -> None:
    """Raise DataError unless the tables of objects fit one another, and every label is a class."""
    if missing := [name for name in DETECTION if name not in split.annotations]:
        raise DataError(f"split {split.name!r} has objects and no {' or '.join(missing)}. Prepare the dataset again.")
    images, objects = split.annotation(IMAGES), split.annotation(OBJECTS)
    counts = images["count"].astype(np.uint64)
    if not np.array_equal(images["first"], np.cumsum(counts) - counts) or counts.sum() != len(objects):
        why = f"it does not share out the {len(objects)} objects"
        raise DataError(f"{split.annotations[IMAGES].file} cannot be right: {why}. Prepare the dataset again.")
    if (wrong := objects["label"] >= classes).any():
        why = f"the class of object {int(np.argmax(wrong))} is none of the {classes}"
        raise DataError(f"{split.annotations[OBJECTS].file} cannot be right: {why}. Prepare the dataset again.")


def _check_index(path: Path, fingerprint: str, classes: int, files: list[int]) -> None:
    """files: see `_first_fault`."""

    def read() -> tuple[str, str | None]:
        digest, first, fault = hashlib.sha256(), 0, None
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK * RECORD.itemsize):
                digest.update(chunk)
                records = np.frombuffer(chunk, RECORD, len(chunk) // RECORD.itemsize)
                if fault is None and (found := _first_fault(records, classes, files)):
                    fault = _cannot_be_right(path, first + found[0], found[1])
                first += len(records)
        return digest.hexdigest(), fault

    try:
        sha256, fault = retried(read, str(path))
    except LASTING as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}. Copy it again, or prepare the dataset again."
        ) from error
    if sha256 != fingerprint:
        raise DataError(
            f"{path} is damaged: its SHA-256 is not the manifest's. Copy it again, or prepare the dataset again."
        )
    if fault:
        raise DataError(fault)


def _first_fault(records: np.ndarray, classes: int, files: list[int]) -> tuple[int, str] | None:
    """The first record that cannot be right, and why.

    files: size in bytes of each file that the records refer to; empty if those are absent, as beside an FFCV file.
    """
    fine = {
        f"its class is none of the {classes}": records["label"] < classes,
        "it has no pixels": (records["width"] > 0) & (records["height"] > 0),
    }
    if files:
        sizes = np.array(files, np.uint64)
        inside = records["shard"] < len(sizes)
        end = sizes[np.where(inside, records["shard"], 0)]
        # Without a sum, which might not fit into 64 bits.
        fine["it lies outside the files"] = (
            inside & (records["size"] <= end) & (records["offset"] <= end - records["size"])
        )
    wrong = {int(np.argmin(mask)): why for why, mask in fine.items() if not mask.all()}
    return min(wrong.items()) if wrong else None


def _cannot_be_right(path: Path, sample: int, why: str) -> str:
    return f"{path} cannot be right: of sample {sample} it says that {why}. Prepare the dataset again."


def _check_annotation(path: Path, annotation: Annotation, rows: int | None) -> np.ndarray:
    """The memory-mapped array. rows: that it must have, if not None."""
    try:
        sha256 = retried(lambda: sha256_of(path), str(path))
        array = np.load(path, mmap_mode="r")
    except LASTING as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}. Copy it again, or prepare the dataset again."
        ) from error
    except (ValueError, EOFError) as error:  # an empty file
        raise DataError(f"{path} is damaged ({error}). Prepare the dataset again.") from error
    if sha256 != annotation.sha256 or array.shape[:1] != (len(array) if rows is None else rows,):
        raise DataError(
            f"{path} is damaged: it is not the array that the manifest describes. Copy it again, or prepare the "
            "dataset again."
        )
    return array


def write_manifest(manifest: Manifest) -> None:
    """Write `manifest.json` atomically; the shards, betons and index files must be in place already."""
    splits = {}
    for name, split in manifest.splits.items():
        splits[name] = {
            "samples": split.samples,
            "fingerprint": split.fingerprint,
            "shards": [asdict(shard) for shard in split.shards],
        }
        if split.beton:
            splits[name]["beton"] = asdict(split.beton)
        if split.annotations:
            splits[name]["annotations"] = {key: asdict(value) for key, value in split.annotations.items()}
    document = {"version": VERSION, "classes": list(manifest.classes), "splits": splits}
    write_atomically(manifest.folder / FILE_NAME, json.dumps(document, indent=1).encode())


def _check_size(path: Path, expected: int) -> None:
    try:
        size = retried(path.stat, str(path)).st_size
    except FileNotFoundError:
        raise DataError(
            f"{path} is missing, though the manifest names it. Copy it again, or prepare the dataset again."
        ) from None
    except LASTING as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}. Copy it again, or prepare the dataset again."
        ) from error
    if size != expected:
        raise DataError(
            f"{path} has {size} bytes where the manifest says {expected}. Copy it again, or prepare the dataset again."
        )
