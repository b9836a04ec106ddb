"""A split of a prepared dataset: its files, its index and its annotations."""

import hashlib
import os
import resource
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

# offset and size locate the encoded image inside its shard (bytes); checksum is the CRC-32 of those bytes.
RECORD = np.dtype(
    [
        ("offset", "<u8"),
        ("size", "<u4"),
        ("shard", "<u4"),
        ("label", "<u4"),
        ("checksum", "<u4"),
        ("width", "<u2"),
        ("height", "<u2"),
    ]
)

# An object of detection: its box in pixels of the stored image (left, top, width, height), area, label, whether it
# stands for a crowd, and its source's id. The numbers are the source's own, to the bit.
OBJECT = np.dtype(
    [
        ("x", "<f8"),
        ("y", "<f8"),
        ("width", "<f8"),
        ("height", "<f8"),
        ("area", "<f8"),
        ("label", "<u4"),
        ("crowd", "u1"),
        ("id", "<i8"),
    ]
)
# A sample's objects are those of `objects` from `first` on; image_id is the id that its source gave the image.
IMAGE = np.dtype([("first", "<u8"), ("count", "<u4"), ("image_id", "<i8")])

# The annotations that preparing writes. Segmentation: where the label maps lie in the shards, a RECORD a sample.
LABEL_MAP = "label_map"
# Detection (objects.py): where each sample's JSON lies in the shards, a RECORD a sample; an IMAGE a sample; the OBJECTs
# of all samples in the order of the samples; the source's number of each class.
OBJECT_JSON, IMAGES, OBJECTS, CATEGORY_IDS = DETECTION = ("object_json", "images", "objects", "category_ids")
TABLES = {
    LABEL_MAP: RECORD,
    OBJECT_JSON: RECORD,
    IMAGES: IMAGE,
    OBJECTS: OBJECT,
    CATEGORY_IDS: np.dtype("<i8"),
}


class DataError(Exception):
    """The dataset is missing or damaged; the message names the file and the remedy."""

    exit_code = os.EX_DATAERR


class UsageError(Exception):
    """The request cannot be fulfilled; the message is one sentence with the remedy."""

    exit_code = os.EX_CONFIG


@dataclass(frozen=True)
class Shard:
    """One shard file: its name inside the dataset's folder, samples, size in bytes and SHA-256."""

    file: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Beton:
    """An FFCV file that holds a whole split, in the order of its ids: its name inside the dataset's folder, size in
    bytes and SHA-256.

    mode: "jpeg" (each image's original bytes) or "raw" (its pixels, uint8 [height, width, 3]). fingerprint: the SHA-256
    of `<file>.index`, the table of `RECORD`s that says where the images lie in it, with the checksums of what is stored
    there and `shard` 0.
    """

    file: str
    bytes: int
    sha256: str
    mode: str
    fingerprint: str


@dataclass(frozen=True)
class Annotation:
    """A named array in a .npy file: its name inside the dataset's folder, size in bytes and SHA-256.

    It has one row per sample, except for `objects` and `category_ids`.
    """

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """One split (`train`, `val`) of a dataset.

    `fingerprint` is the SHA-256 of its index, and so of every label and image in it.
    """

    folder: Path
    name: str
    samples: int
    fingerprint: str
    shards: tuple[Shard, ...]
    beton: Beton | None = None
    annotations: dict[str, Annotation] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """SHA-256 that identifies everything that training reads of the split: images, labels and annotations."""
        if not self.annotations:
            return self.fingerprint
        parts = [self.fingerprint, *(f"{name} {self.annotations[name].sha256}" for name in sorted(self.annotations))]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def table_paths(self) -> list[Path]:
        """The files that are memory-mapped as a whole: indexes and annotations."""
        paths = [self.index_path, *(self.folder / annotation.file for annotation in self.annotations.values())]
        return [*paths, self.beton_index_path] if self.beton else paths

    def annotation(self, name: str) -> np.ndarray:
        """The memory-mapped array `name`, mostly [samples, …]. Raises DataError if the split has none of that name."""
        if name not in self.annotations:
            raise DataError(
                f"split {self.name!r} of {self.folder} has no annotation {name!r}. Prepare the dataset again."
            )
        return np.load(self.folder / self.annotations[name].file, mmap_mode="r")

    @property
    def keep_open(self) -> int:
        """Files that a reader keeps open at most: an eighth of what the process may open, as training and evaluation
        both read, with label maps by two readers each. The shards of ImageNet, about 1,150, should fit, because a full
        shuffle uses them all in turn.
        """
        return min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8)

    def open_file(self, path: Path, closing: threading.Event, note: Callable[[str, str], None]) -> int:
        """A descriptor, for reading, of one of this split's files.

        closing: set when the reader is about to close. note: told (file, what was wrong) of faults that passed.
        """
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def mend(self, path: Path, closing: threading.Event, note: Callable[[str, str], None]) -> bool:
        """Called when `path` has a damaged sample. Returns whether reading it again may give other bytes."""
        return False

    @property
    def index_path(self) -> Path:
        return self.folder / f"{self.name}.index"

    @cached_property
    def records(self) -> np.ndarray:
        """The memory-mapped table of `RECORD`s, [samples]."""
        return np.memmap(self.index_path, dtype=RECORD, mode="r", shape=(self.samples,))

    def listing(self) -> list[tuple[str, int, str]]:
        """(name in the dataset's folder, size in bytes, SHA-256) of each of its files."""
        files = [(self.index_path.name, self.samples * RECORD.itemsize, self.fingerprint)]
        files += [(file.file, file.bytes, file.sha256) for file in (*self.shards, *self.annotations.values())]
        if self.beton:
            files += [(self.beton.file, self.beton.bytes, self.beton.sha256)]
            files += [(f"{self.beton.file}.index", self.samples * RECORD.itemsize, self.beton.fingerprint)]
        return files

    @property
    def beton_index_path(self) -> Path:
        return self.folder / f"{self.beton.file}.index"

    @cached_property
    def beton_records(self) -> np.ndarray:
        """The memory-mapped table of the beton's `RECORD`s, [samples]."""
        return np.memmap(self.beton_index_path, dtype=RECORD, mode="r", shape=(self.samples,))
