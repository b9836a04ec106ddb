"""Datasets that are copied to the node's own disk before use: `data.cache_dir`, and any URL that fsspec reads as `data.path`.

All lies in one folder of `cache_dir`, `cat-cache-<user number>`, which this user alone may write to and which CACHEDIR.TAG marks as a
cache. In it there is a folder per dataset, named after its manifest's SHA-256, with the files that were needed so far:

    files/<name>         whole, its SHA-256 was the manifest's; never written to again
    parts/<key>.<bytes>  being copied; or left behind by a process that was killed, until the next start, or the next need of its room
    locks/<key>          empty; locked by the process that copies the file, while the others on the node wait

A file's key is a hash of its name. What has no lock was not made here: it is neither counted nor removed.

`cache_gb` bounds the sum of these files, whatever dataset they are of: those opened longest ago are removed first. A process that reads
one at that moment is not disturbed, as its descriptor outlives the name; and with a limit set no descriptor is kept for later, so what
was removed does not go on taking room.
"""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from stat import S_IMODE, S_ISDIR, S_ISREG
from threading import Event
from typing import IO

import numpy as np

from .backends.stored import StoredSamples
from .config import DataConfig
from .faults import retried
from .fetch import Note, Source, unheard
from .manifest import (
    FILE_NAME,
    DataError,
    Manifest,
    Split,
    UsageError,
    check_indexes,
    check_sizes,
    first_of_node,
    fsync,
    open_manifest,
    parse_manifest,
    publish,
    read_manifest,
    sha256_of,
)
from .order import BLOCK, POOL

COPIERS = 4  # files that a rank copies at once, ahead of their use
TAG = "CACHEDIR.TAG"  # bford.info/cachedir: what makes backups leave a folder out
SIGNATURE = "Signature: 8a477f597d28d172789f06886806bc55\n# Copies of datasets, made by data.cache_dir; all of it may be deleted.\n"


def open_dataset(data: DataConfig, *, training: bool = True) -> Manifest:
    """The dataset that `data` describes: as manifest.open_manifest, or, where there is a `cache_dir`, with files that are staged on use.

    The manifest and the indexes are fetched at once. `training`: check that cache_gb has room for what data.shuffle keeps in use.
    Raises DataError for a dataset that is missing or damaged, UsageError for settings that cannot be, StorageError where it cannot be
    fetched for now.
    """
    if data.cache_dir is None:
        return open_manifest(data.path)
    if "://" not in data.path and first_of_node():
        check_sizes(read_manifest(data.path))  # a folder can be checked as a whole
    source = Source(data.path)
    text = source.read_manifest()
    root = Path(data.cache_dir) / f"cat-cache-{os.geteuid()}"
    manifest = parse_manifest(text, root / hashlib.sha256(text).hexdigest()[:16] / "files", source.url(FILE_NAME))
    if training and data.cache_gb is not None:
        _check_room(manifest, data)
    cache = Cache(source, root, manifest, None if data.cache_gb is None else int(data.cache_gb * 1e9))
    splits = {}
    for name, split in manifest.splits.items():
        splits[name] = StagedSplit(**{field.name: getattr(split, field.name) for field in fields(split)}, cache=cache)
    indexes = [path for split in splits.values() for path in split.table_paths]
    for index in indexes:
        os.close(retried(lambda index=index: cache.open(index, Event(), unheard), str(index)))
    if first_of_node():
        try:
            check_indexes(manifest)
        except DataError:
            for index in indexes:
                cache.mend(index, Event(), unheard)
            check_indexes(manifest)
    return replace(manifest, splits=splits)


@dataclass(frozen=True)
class StagedSplit(Split):
    """A split whose files are in `cache`, or will be when they are opened."""

    cache: "Cache" = None

    @property
    def keep_open(self) -> int:
        return super().keep_open if self.cache.limit is None else 0

    def open_file(self, path: Path, closing: Event, note: Note) -> int:
        return self.cache.open(path, closing, note)

    def mend(self, path: Path, closing: Event, note: Note) -> bool:
        return self.cache.mend(path, closing, note)


class Cache:
    """The files of one dataset in the folder `root`, which this user's other runs and other datasets share. Thread-safe, process-safe.

    limit: bytes that all files below `root` may take, or None.
    """

    def __init__(self, source: Source, root: Path, manifest: Manifest, limit: int | None):
        self.source, self.root, self.folder, self.limit = source, root, manifest.folder, limit
        self.files = {name: (size, sha256) for split in manifest.splits.values() for name, size, sha256 in split.listing()}
        self._sound: set[Path] = set()  # what `mend` has found to be as the manifest says
        _own(root)
        for part in _parts(root):
            _remove_if_abandoned(part)

    def open(self, path: Path, closing: Event, note: Note) -> int:
        """A descriptor, for reading, of the file `path` of `folder`; it is fetched first where it is not there.

        Raises DataError where it is missing or damaged at its source, StorageError where that does not answer, CancelledError as soon as
        `closing` is set.
        """
        while True:
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                self.stage(path, closing, note)
                continue  # and look again: another process may have needed its room already
            os.utime(descriptor)  # room is made by what was opened longest ago
            return descriptor

    def stage(self, path: Path, closing: Event, note: Note, *, wait: bool = True) -> None:
        """Fetch the file `path` of `folder`, unless it is there. Where somebody else is fetching it: wait for that, or leave it to them."""
        with self._lock(path, closing, wait) as mine:
            if mine and not path.exists():
                self._fetch(path, closing, note)

    def mend(self, path: Path, closing: Event, note: Note) -> bool:
        """Fetch `path` anew where it is not what the manifest says. False where it is known to be: it need not be read again."""
        if path in self._sound:
            return False
        with self._lock(path, closing, wait=True):
            try:
                sha256 = retried(lambda: sha256_of(path), str(path), closing=closing)
            except FileNotFoundError:  # its room was needed
                return True
            if sha256 == self._wanted(path)[2]:
                self._sound.add(path)
                return True
            note(str(path), "damaged on this node's disk, and fetched again")
            with self._lock_all():
                path.unlink(missing_ok=True)
            self._fetch(path, closing, note)
        return True

    def _wanted(self, path: Path) -> tuple[str, int, str]:
        """Name, size in bytes and SHA-256 of a file of `folder`."""
        name = path.relative_to(self.folder).as_posix()
        return name, *self.files[name]

    def _fetch(self, path: Path, closing: Event, note: Note) -> None:
        """Copy a file whose lock is held, and give it its name when it is whole."""
        name, size, sha256 = self._wanted(path)
        part = self.folder.with_name("parts") / f"{_key(name)}.{size}"
        for folder in (path.parent, part.parent):
            folder.mkdir(parents=True, exist_ok=True)
        part.unlink(missing_ok=True)
        try:
            self._make_room(part, size, closing)
            for attempt in range(2):  # the copy may have been damaged on its way
                self.source.fetch(name, part, size, closing, note)
                if sha256_of(part) == sha256:
                    break
                if attempt:
                    url = self.source.url(name)
                    raise DataError(f"{url} is damaged: its SHA-256 is not the manifest's. Copy it again, or prepare the dataset again.")
                note(self.source.url(name), "damaged on its way, and fetched again")
            fsync(part)
            with self._lock_all():  # so that who adds up the files meets this one once
                publish(part, path)
        finally:
            part.unlink(missing_ok=True)

    def _make_room(self, part: Path, size: int, closing: Event) -> None:
        """Remove files until `size` bytes more stay within the limit, and claim them by creating `part`."""
        while self.limit is not None:
            with self._lock_all():
                if self._remove_for(size):
                    part.touch()
                    return
            if closing.wait(0.1):  # until others have finished copying: then theirs can go
                raise CancelledError

    def _remove_for(self, size: int) -> bool:
        """False where files that are being copied leave no room at present."""
        total, others, removable = size, False, []
        for part in _parts(self.root):
            if not _remove_if_abandoned(part):
                total, others = total + int(part.suffix[1:]), True
        for folder in self.root.glob("*/files"):
            for path in folder.rglob("*"):
                try:
                    stat = path.lstat()
                except FileNotFoundError:  # damaged, and removed by who met it
                    continue
                if not S_ISREG(stat.st_mode) or not (folder.with_name("locks") / _key(path.relative_to(folder).as_posix())).exists():
                    continue
                total += stat.st_size
                if path.suffix not in (".index", ".npy"):
                    removable.append((stat.st_mtime_ns, stat.st_size, path))
        excess = total - self.limit
        if excess > sum(bytes for _, bytes, _ in removable):
            if others:
                return False
            raise UsageError(f"data.cache_gb {self.limit / 1e9:g} has no room for a file of {size / 1e9:.3g} GB: raise it.")
        for _, bytes, path in sorted(removable):
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= bytes
        return True

    @contextmanager
    def _lock(self, path: Path, closing: Event, wait: bool) -> Iterator[bool]:
        """Hold the lock of a file of `folder`; False where another process holds it and `wait` is false."""
        lock = self.folder.with_name("locks") / _key(self._wanted(path)[0])
        lock.parent.mkdir(parents=True, exist_ok=True)
        with open(lock, "a") as file:
            yield _locked(file, closing, wait)

    def _lock_all(self) -> IO:
        """A lock on all of `root`, held while files are added up, removed or named; closing it lets go."""
        lock = open(self.root / "lock", "a")
        fcntl.flock(lock, fcntl.LOCK_EX)
        return lock


class Ahead:
    """Stages, in the order of need, what the next `count` micro-batches will read.

    needs: the sample ids of each micro-batch, in the order of use. Call `advance` when one has been taken.
    """

    def __init__(self, stored: StoredSamples, needs: Iterator[np.ndarray], count: int):
        self._stored, self._needs = stored, needs
        self._executor = ThreadPoolExecutor(COPIERS, thread_name_prefix="stage")
        self._begun: set[Path] = set()
        self._missing = set(stored.files)
        for _ in range(count):
            self.advance()

    def advance(self) -> None:
        cache = self._stored.split.cache
        if cache.limit is None and not self._missing:
            return  # all have been asked for, and none is removed again
        ids = next(self._needs, np.empty(0, np.int64))
        for number in np.unique(self._stored.records["shard"][ids]).tolist():
            path = self._stored.files[number]
            self._missing.discard(path)
            if path not in self._begun and not path.exists():
                self._begun.add(path)
                self._executor.submit(self._stage, path)

    def close(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _stage(self, path: Path) -> None:
        # Whoever needs the file meets the same failure in its turn, and says it.
        with suppress(Exception):
            self._stored.split.cache.stage(path, self._stored.closing, self._stored.note, wait=False)
        self._begun.discard(path)


def _check_room(manifest: Manifest, data: DataConfig) -> None:
    """Raise UsageError where the files that training keeps in use are more than data.cache_gb: they would be fetched again and again."""

    def files(split: Split) -> list:
        return [split.beton] if split.beton and (data.backend == "ffcv" or not split.shards) else list(split.shards)

    everything = sum(file.bytes for split in manifest.splits.values() for file in files(split))
    used = everything
    if data.shuffle == "block":
        # The pool in use, the one before it, whose last samples may still be read, and the one that is fetched ahead.
        split = manifest.split("train")
        touched = 3 * (POOL / BLOCK) * (1 + BLOCK * len(files(split)) / split.samples)
        used = min(everything, touched * sum(file.bytes for file in files(split)) / len(files(split)))
    if used > data.cache_gb * 1e9:
        hint = "raise it, or set data.shuffle=block, which needs less" if data.shuffle == "full" else "raise it"
        raise UsageError(f"data.cache_gb {data.cache_gb:g} is less than the {used / 1e9:.3g} GB that training keeps in use: {hint}.")


def _own(root: Path) -> None:
    """Make the folder of this user's cache, or see that it is one. Raises UsageError."""
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            root.mkdir(mode=0o700)
        stat = root.lstat()
        if not S_ISDIR(stat.st_mode) or stat.st_uid != os.geteuid() or S_IMODE(stat.st_mode) & 0o022:
            raise UsageError(f"data.cache_dir: {root} was not made by you, or others may write to it: choose another data.cache_dir.")
        tag = root / TAG
        if any(root.iterdir()) and not tag.exists():
            raise UsageError(f"data.cache_dir: {root} is no cache, as there is no {TAG} in it: choose another data.cache_dir.")
        with suppress(FileExistsError), open(tag, "x") as file:
            file.write(SIGNATURE)
    except OSError as error:
        raise UsageError(f"data.cache_dir {root.parent} cannot be used: {error.strerror}.") from error


def _key(name: str) -> str:
    """What a file's lock and its part are called."""
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:16]


def _locked(lock: IO, closing: Event, wait: bool) -> bool:
    """Lock an open file, until it is closed. False where somebody else has it and we do not wait."""
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if not wait:
                return False
        if closing.wait(0.02):
            raise CancelledError


def _parts(root: Path) -> list[Path]:
    """Half-copied files of all datasets."""
    return [part for part in root.glob("*/parts/*") if _lock_of_part(part).exists()]


def _lock_of_part(part: Path) -> Path:
    return part.parent.with_name("locks") / part.stem


def _remove_if_abandoned(part: Path) -> bool:
    """Remove a half-copied file that nobody is copying any more."""
    with open(_lock_of_part(part), "a") as lock:
        if not _locked(lock, Event(), wait=False):
            return False
        part.unlink(missing_ok=True)
        return True
