"""Where images come from before they are packed: an image folder, a tar of one, or a torchvision dataset.

A source is listed once (`list_source`) and then read image by image, in any order and from any process (`read_image`). A listing is
sorted by name, so the same pictures in a folder and in a tar make the same dataset.
"""

import bz2
import functools
import gzip
import hashlib
import io
import lzma
import os
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.manifest import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
SPLITS = ("train", "val")


class UsageError(Exception):
    """The arguments cannot be carried out; the message is one sentence for the person who gave them."""

    exit_code = 78


@dataclass(frozen=True)
class Source:
    """Where to read: `kind` is "folder", "tar" or "torchvision"; `path` the folder, the plain tar, or the torchvision dataset's root."""

    kind: str
    path: Path
    dataset: str = ""  # torchvision only: the class's name


@dataclass(frozen=True)
class Items:
    """Images of one split, parallel columns, [n]. `sizes` are bytes (an estimate for torchvision); `offsets` are bytes into a tar."""

    names: list[str]
    labels: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray

    def take(self, positions: np.ndarray) -> "Items":
        return Items([self.names[i] for i in positions], self.labels[positions], self.offsets[positions], self.sizes[positions])


@dataclass(frozen=True)
class Listing:
    """All images of a source. Labels index `classes`; `ignored` counts the files that are no images of any split."""

    classes: tuple[str, ...]
    splits: dict[str, Items]
    ignored: int = 0

    def digest(self) -> str:
        """SHA-256 of every class, name, label, offset and size: equal exactly if a resumed run would read the same source."""
        digest = hashlib.sha256(repr(self.classes).encode("utf-8", "surrogateescape"))
        for split, items in self.splits.items():
            digest.update(f"\0{split}\0".encode())
            for name in items.names:
                digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
            for column in (items.labels, items.offsets, items.sizes):
                digest.update(column.astype("<i8").tobytes())
        return digest.hexdigest()


def open_source(text: str, work: Path) -> Source:
    """Find out what `text` (a path, `NAME` or `NAME:ROOT` of a torchvision dataset) is; a compressed tar is first unpacked into `work`.

    Raises UsageError where there is no such source, DataError where it cannot be read.
    """
    path = Path(text)
    if path.is_dir():
        return Source("folder", path.resolve())
    if path.is_file():
        return Source("tar", _plain_tar(path.resolve(), work))
    name, _, root = text.partition(":")
    if name.lower() == "imagefolder":
        # The folder's own reader keeps the original bytes and knows train/ and val/; torchvision's ImageFolder would do neither.
        if not Path(root).is_dir():
            raise UsageError(f"{text}: there is no folder {root!r}.")
        return Source("folder", Path(root).resolve())
    if "/" not in name and (dataset := _torchvision_class(name)):
        return Source("torchvision", Path(root).resolve() if root else work / "download", dataset)
    raise UsageError(f"{text} is neither a folder, nor a tar file, nor the name of a torchvision dataset.")


def list_source(source: Source) -> Listing:
    """List every image with its split and label. Raises DataError, in one sentence, where there are none or the layout is unclear."""
    if source.kind == "torchvision":
        return _list_torchvision(source)
    entries = dict(_walk(source.path) if source.kind == "folder" else _tar_members(source.path))
    listing = _sort_into_splits(source.path, entries)
    if not listing.splits:
        raise DataError(f"{source.path} contains no images ({listing.ignored} other files).")
    return listing


def read_image(source: Source, name: str, offset: int, size: int) -> bytes:
    """One image's encoded bytes: as they lie in the source, or, from torchvision, as a JPEG. Raises DataError where it cannot be read."""
    if source.kind == "torchvision":
        split, _, position = name.partition("/")
        return encode_jpeg(_torchvision_dataset(source, split)[int(position)][0])
    try:
        if source.kind == "folder":
            data = (source.path / name).read_bytes()
        else:
            data = os.pread(_descriptor(source.path), size, offset)
    except OSError as error:
        raise DataError(f"cannot read {name} from {source.path}: {error.strerror}.") from error
    if len(data) != size:
        raise DataError(f"{name} in {source.path} has {len(data)} bytes, not {size} as when it was listed: the source has changed.")
    return data


def encode_jpeg(image) -> bytes:
    """A Pillow image as a JPEG of quality 95, 4:4:4: gray stays gray, everything else becomes RGB, transparency is dropped."""
    from PIL import Image

    if image.mode.startswith("I;16"):  # Pillow's own conversion would clip 16-bit gray to white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode != "L":
        image = image.convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


# --- folders and tars ------------------------------------------------------------------------------------------------------------------


def _walk(root: Path, prefix: str = ""):
    """(name relative to the root, (0, size)) of every file below `root`, links followed, hidden ones left out."""
    try:
        for entry in os.scandir(root / prefix):
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _walk(root, f"{prefix}{entry.name}/")
            else:
                yield prefix + entry.name, (0, entry.stat().st_size)
    except OSError as error:  # a dangling link, a folder without permission
        raise DataError(f"cannot read {error.filename}: {error.strerror}.") from error


def _tar_members(path: Path):
    """(name, (offset, size)) of every regular file in a plain tar; a name that comes twice counts once, its last content."""
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # tarfile keeps every member otherwise: gigabytes for a million images
                name = member.name.removeprefix("./")
                hidden = any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
                if member.isreg() and not hidden:
                    yield name, (member.offset_data, member.size)
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{path} is not a whole tar archive ({error}).") from error


def _sort_into_splits(root: Path, entries: dict[str, tuple[int, int]]) -> Listing:
    """Split and class of every image from its path: [one folder/][train|val/]class/…/image."""
    names = sorted(name for name in entries if name.lower().endswith(IMAGE_SUFFIXES))
    ignored = len(entries) - len(names)
    parts = {name: name.split("/") for name in names}
    if len({p[0] for p in parts.values()}) == 1 and all(len(p) > 2 and p[0] not in SPLITS for p in parts.values()):
        parts = {name: p[1:] for name, p in parts.items()}
    tops = {p[0] for p in parts.values()}
    # A class may be called "train", too: a split's folder is one that holds folders only.
    if tops & set(SPLITS) and all(len(p) > 2 for p in parts.values() if p[0] in SPLITS):
        others = sorted(tops - set(SPLITS))
        if others and not set(SPLITS) <= tops:
            raise DataError(f"{root} has the folders {_some(tops)}; expected train and val beside each other, or only classes.")
        ignored += sum(p[0] not in SPLITS for p in parts.values())
        parts = {name: p for name, p in parts.items() if p[0] in SPLITS}
    else:
        parts = {name: ["train", *p] for name, p in parts.items()}
    for name, p in parts.items():
        if len(p) < 3:
            raise DataError(f"{name} in {root} lies in no class folder; expected train/<class>/<image> or <class>/<image>.")
    found = {split: {p[1] for p in parts.values() if p[0] == split} for split in SPLITS}
    if found["train"] and found["val"] and found["train"] != found["val"]:
        only = {split: found[split] - found[other] for split, other in (SPLITS, SPLITS[::-1])}
        raise DataError(
            f"{root}: train and val must have the same classes, but "
            + " and ".join(f"only {split} has {_some(odd)}" for split, odd in only.items() if odd)
            + "."
        )
    classes = tuple(sorted(found["train"] | found["val"]))
    label = {name: i for i, name in enumerate(classes)}
    splits = {}
    for split in SPLITS:
        chosen = [name for name, p in parts.items() if p[0] == split]
        if chosen:
            table = np.array([(label[parts[name][1]], *entries[name]) for name in chosen], dtype=np.int64)
            splits[split] = Items(chosen, table[:, 0], table[:, 1], table[:, 2])
    return Listing(classes, splits, ignored)


def _some(names) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _plain_tar(path: Path, work: Path) -> Path:
    """The tar itself, or where it is compressed a plain copy in `work`: only a plain tar can be read at any place."""
    with open(path, "rb") as file:
        magic = file.read(6)
    openers = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open, b"\x28\xb5\x2f\xfd": _open_zstd}
    opener = next((opener for start, opener in openers.items() if magic.startswith(start)), None)
    if opener is None:
        return path
    # Named after the content's identity, so that a copy of an earlier state of the file is never taken for this one.
    stat = path.stat()
    plain = work / f"source-{stat.st_size}-{stat.st_mtime_ns}.tar"
    if not plain.exists():
        temporary = work / "source.tmp"
        try:
            with opener(path, "rb") as compressed, open(temporary, "wb") as file:
                shutil.copyfileobj(compressed, file, 1 << 20)
                file.flush()
                os.fsync(file.fileno())
        except (EOFError, lzma.LZMAError, gzip.BadGzipFile, subprocess.CalledProcessError) as error:
            raise DataError(f"{path} cannot be decompressed: {error}.") from error
        except OSError as error:
            if error.errno is not None:  # the disk's error, not the compressed stream's
                raise
            raise DataError(f"{path} cannot be decompressed: {error}.") from error
        os.replace(temporary, plain)
    return plain


class _open_zstd:
    """A .zst file's content, through the `zstd` program: Python reads the format itself only from 3.14 on."""

    def __init__(self, path: Path, mode: str):
        if shutil.which("zstd") is None:
            raise UsageError(f"{path} is compressed with zstd, and there is no zstd program here: install it, or decompress the file.")
        self.process = subprocess.Popen(["zstd", "-dcq", str(path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def __enter__(self):
        return self.process.stdout

    def __exit__(self, kind, *_):
        if kind is not None:
            self.process.kill()
        self.process.stdout.close()
        if self.process.wait() and kind is None:
            raise subprocess.CalledProcessError(self.process.returncode, "zstd")


@functools.lru_cache(maxsize=1)
def _descriptor(path: Path) -> int:
    return os.open(path, os.O_RDONLY)


# --- torchvision -----------------------------------------------------------------------------------------------------------------------


def _torchvision_class(name: str) -> str | None:
    import torchvision.datasets

    matches = [known for known in torchvision.datasets.__all__ if known.lower() == name.lower()]
    return matches[0] if matches else None


@functools.lru_cache(maxsize=2)  # a worker reads from one split, then from the other
def _torchvision_dataset(source: Source, split: str):
    """`split` of the dataset, downloaded into its root where it is not there and torchvision can. Raises DataError in one sentence."""
    import inspect

    import torchvision.datasets

    cls = getattr(torchvision.datasets, source.dataset)
    known = inspect.signature(cls.__init__).parameters
    arguments = {"root": str(source.path)}
    if "train" in known:
        choices = [{"train": split == "train"}]
    elif "split" in known:
        choices = [{"split": "train"}] if split == "train" else [{"split": "val"}, {"split": "test"}]
    else:
        raise UsageError(f"torchvision's {source.dataset} has neither train= nor split=: save its images as train/<class>/<image> instead.")
    first_error = None
    for choice in choices:
        try:
            return cls(**arguments, **choice)
        except Exception as error:  # each torchvision class has its own way to say "not there"
            first_error = first_error or error
    if "download" in known:
        for choice in choices:
            try:
                return cls(**arguments, **choice, download=True)
            except Exception as error:
                first_error = error
    reason = " ".join(str(first_error).split())
    raise DataError(f"torchvision cannot open or download {source.dataset} at {source.path} ({type(first_error).__name__}: {reason}).")


def _list_torchvision(source: Source) -> Listing:
    splits, classes = {}, None
    for split in SPLITS:
        dataset = _torchvision_dataset(source, split)
        labels = next((getattr(dataset, name) for name in ("targets", "labels", "_labels") if hasattr(dataset, name)), None)
        if labels is None:
            labels = [dataset[i][1] for i in range(len(dataset))]
        labels = np.asarray(labels)
        if labels.shape != (len(dataset),) or not np.issubdtype(labels.dtype, np.integer):
            raise UsageError(f"torchvision's {source.dataset} is no classification dataset: its targets are not one integer per image.")
        if classes is None:
            classes = [str(name) for name in getattr(dataset, "classes", range(int(labels.max()) + 1))]
        # Class names are sorted here as everywhere; torchvision's own order of labels may be another.
        rank = np.argsort(np.argsort(classes))
        # The encoded size is known only after encoding; the mean of a few images is good enough to plan shards of about a size.
        some = range(0, len(dataset), max(1, len(dataset) // 16))
        size = sum(len(encode_jpeg(dataset[i][0])) for i in some) // len(some)
        names = [f"{split}/{i}" for i in range(len(dataset))]
        splits[split] = Items(names, rank[labels], np.zeros(len(dataset), np.int64), np.full(len(dataset), size, np.int64))
    return Listing(tuple(sorted(classes)), splits)
