"""What a prepared dataset is: a folder with `manifest.json`, shards, and one binary index per split.

`manifest.json` names the classes and, for each split, its shards and its index. The index is a flat table of `RECORD`s, one per
sample, in the order of the sample ids 0 … N-1; it is memory-mapped, so its size costs a rank nothing.

A split may also lie there as one FFCV file (beton.py), with an index of its own. Its shards may then be gone (`shards` is empty);
`<split>.index` stays, for it says what the samples are, and its hash is the dataset's fingerprint whatever file holds the images.
"""

import hashlib
import json
import os
import threading
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

VERSION = 1
FILE_NAME = "manifest.json"

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


class DataError(Exception):
    """The dataset is missing or damaged; the message names what, and the remedy."""

    exit_code = 65


class UsageError(Exception):
    """What was asked for cannot be done; the message is one sentence for the person who asked, with the remedy."""

    exit_code = 78


@dataclass(frozen=True)
class Shard:
    """One shard file: its name inside the dataset's folder, samples, size in bytes and SHA-256."""

    file: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Beton:
    """An FFCV file that holds a whole split, in the order of its ids: its name inside the dataset's folder, size in bytes and SHA-256.

    mode: "jpeg" (each image's original bytes) or "raw" (its pixels, uint8 [height, width, 3]). fingerprint: the SHA-256 of `<file>.index`,
    the table of `RECORD`s that says where the images lie in it, with the checksums of what is stored there and `shard` 0.
    """

    file: str
    bytes: int
    sha256: str
    mode: str
    fingerprint: str


@dataclass(frozen=True)
class Split:
    """One split (`train`, `val`) of a dataset. `fingerprint` is the SHA-256 of its index, and so of every label and image in it."""

    folder: Path
    name: str
    samples: int
    fingerprint: str
    shards: tuple[Shard, ...]
    beton: Beton | None = None

    # What reads files keeps this many open at most: below the usual limit of 1024, with room for everything else the process opens.
    keep_open = 256

    def open_file(self, path: Path, closing: threading.Event) -> int:
        """A descriptor, for reading, of one of this split's files. `closing` is set when the reader is about to close."""
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    @property
    def index_path(self) -> Path:
        return self.folder / f"{self.name}.index"

    @cached_property
    def records(self) -> np.ndarray:
        """The memory-mapped table of `RECORD`s, [samples]."""
        return np.memmap(self.index_path, dtype=RECORD, mode="r", shape=(self.samples,))

    @property
    def beton_index_path(self) -> Path:
        return self.folder / f"{self.beton.file}.index"

    @cached_property
    def beton_records(self) -> np.ndarray:
        """The memory-mapped table of the beton's `RECORD`s, [samples]."""
        return np.memmap(self.beton_index_path, dtype=RECORD, mode="r", shape=(self.samples,))


@dataclass(frozen=True)
class Manifest:
    """A prepared dataset: its folder, the class names in label order, and its splits by name."""

    folder: Path
    classes: tuple[str, ...]
    splits: dict[str, Split]

    def split(self, name: str) -> Split:
        if name not in self.splits:
            raise DataError(
                f"{self.folder} has no split {name!r}; it has {', '.join(sorted(self.splits))}. Prepare it again with that split."
            )
        return self.splits[name]


def open_manifest(folder: str | Path) -> Manifest:
    """Read `folder`'s manifest and check, without reading any sample, that every file it names is there and has its size.

    Raises DataError with one sentence otherwise. Contents are checked by `verify.verify`, not here.
    """
    folder = Path(folder)
    path = folder / FILE_NAME
    if not path.is_file():
        raise DataError(f"no dataset at {folder}: {FILE_NAME} is missing. Make one with: python launch/prepare.py SOURCE {folder}")
    manifest = parse_manifest(path.read_bytes(), folder, str(path))
    for split in manifest.splits.values():
        _check_size(split.index_path, split.samples * RECORD.itemsize)
        for shard in split.shards:
            _check_size(folder / shard.file, shard.bytes)
        if split.beton:
            _check_size(folder / split.beton.file, split.beton.bytes)
            _check_size(split.beton_index_path, split.samples * RECORD.itemsize)
    return manifest


def parse_manifest(text: bytes, folder: Path, path: str) -> Manifest:
    """The manifest in `text`, of a dataset in `folder`. Raises DataError, which names `path`, where it is damaged."""
    try:
        document = json.loads(text)
        version = document["version"]
        if version != VERSION:
            raise DataError(f"{path} has format version {version}, this program reads version {VERSION}. Prepare the dataset again.")
        splits = {
            name: Split(
                folder,
                name,
                entry["samples"],
                entry["fingerprint"],
                tuple(Shard(**shard) for shard in entry["shards"]),
                Beton(**entry["beton"]) if "beton" in entry else None,
            )
            for name, entry in document["splits"].items()
        }
        return Manifest(folder, tuple(document["classes"]), splits)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error}). Prepare the dataset again.") from error


def write_manifest(manifest: Manifest) -> None:
    """Write `manifest.json` atomically; the shards, betons and index files must be in place already."""
    splits = {}
    for name, split in manifest.splits.items():
        splits[name] = {"samples": split.samples, "fingerprint": split.fingerprint, "shards": [asdict(shard) for shard in split.shards]}
        if split.beton:
            splits[name]["beton"] = asdict(split.beton)
    document = {"version": VERSION, "classes": list(manifest.classes), "splits": splits}
    write_atomically(manifest.folder / FILE_NAME, json.dumps(document, indent=1).encode())


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that, whenever the machine dies, it is there with all of `data` or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
    publish(temporary, path)


def publish(temporary: Path, path: Path) -> None:
    """Give a finished file its name: contents and name are on the disk when this returns."""
    fsync(temporary)
    os.replace(temporary, path)
    fsync(path.parent)


def fsync(path: Path) -> None:
    """A file's contents, or a folder's names, are on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's contents, in hexadecimal. (`hashlib.file_digest` would need Python 3.11.)"""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _check_size(path: Path, expected: int) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise DataError(f"{path} is missing, though the manifest names it. Copy it again, or prepare the dataset again.") from None
    if size != expected:
        raise DataError(f"{path} has {size} bytes where the manifest says {expected}. Copy it again, or prepare the dataset again.")
