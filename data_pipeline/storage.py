"""Staging: copy a dataset's files to the node's own disk before use (`data.cache_dir`).

The dataset may lie in a folder or behind any URL that fsspec reads. All copies lie in one folder of `cache_dir`,
`cat-cache-<user number>`, which only this user may write to and which CACHEDIR.TAG marks as a cache. It has a folder
per dataset, named after the SHA-256 of its manifest, with the files needed so far:

    files/<name>         complete, with the SHA-256 of the manifest; never written to again
    parts/<key>.<bytes>  being copied; those of a killed process are removed at the next start or when space is needed
    locks/<key>          empty; locked by the process that copies the file, while the others on the node wait

The key of a file is a hash of its name. Files without a lock were not made here and are neither counted nor removed.

`cache_gb` limits the total size of these files over all datasets; the least recently opened ones are removed first. A
process that is reading a removed file is not disturbed, because its descriptor outlives the name. With a limit, no
descriptor is kept open for later, so that removing a file frees its space.
"""

import fcntl
import hashlib
import os
from collections.abc import Iterator, Sequence
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
from .durable import fsync, publish, sha256_of
from .faults import retried
from .fetch import Location, Note, ignore_fault
from .manifest import (
    FILE_NAME,
    Manifest,
    check_indexes,
    check_sizes,
    first_of_node,
    open_manifest,
    parse_manifest,
    read_manifest,
)
from .order import BLOCK, POOL
from .split import LABEL_MAP, DataError, Split, UsageError

COPIERS = 4  # files that a rank copies in parallel, ahead of their use
TAG = "CACHEDIR.TAG"  # marks a folder that backups leave out (the Cache Directory Tagging Specification)
SIGNATURE = (
    "Signature: 8a477f597d28d172789f06886806bc55\n"
    "# Copies of datasets, made by data.cache_dir; all of it may be deleted.\n"
)


def open_dataset(data: DataConfig, *, training: bool = True) -> Manifest:
    """The dataset that `data` describes: as manifest.open_manifest, but with a `cache_dir` its files are staged on use.

    The manifest and the indexes are fetched at once. training: check that cache_gb is enough for the files that
    data.shuffle keeps in use. Raises DataError for a missing or damaged dataset, UsageError for invalid settings,
    StorageError if the dataset cannot be fetched at present.
    """
    if data.cache_dir is None:
        return open_manifest(data.path)
    if "://" not in data.path and first_of_node():
        check_sizes(read_manifest(data.path))  # possible for a folder, but not for a URL
    source = Location(data.path)
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
        os.close(retried(lambda index=index: cache.open(index, Event(), ignore_fault), str(index)))
    if first_of_node():
        try:
            check_indexes(manifest)
        except DataError:
            for index in indexes:
                cache.mend(index, Event(), ignore_fault)
            check_indexes(manifest)
    return replace(manifest, splits=splits)


@dataclass(frozen=True)
class StagedSplit(Split):
    """A split whose files are copied to `cache` when they are opened."""

    cache: "Cache" = None

    @property
    def keep_open(self) -> int:
        return super().keep_open if self.cache.limit is None else 0

    def open_file(self, path: Path, closing: Event, note: Note) -> int:
        return self.cache.open(path, closing, note)

    def mend(self, path: Path, closing: Event, note: Note) -> bool:
        self.cache.mend(path, closing, note)
        return True  # also of a sound file: the reader may have opened an earlier, damaged copy


class Cache:
    """The files of one dataset below `root`, which all runs and datasets of this user share.

    Safe for threads and processes.
    limit: maximal size of all files below `root` in bytes, or None.
    """

    def __init__(self, source: Location, root: Path, manifest: Manifest, limit: int | None):
        self.source, self.root, self.folder, self.limit = source, root, manifest.folder, limit
        self.files = {
            name: (size, sha256) for split in manifest.splits.values() for name, size, sha256 in split.listing()
        }
        self._sound: set[Path] = set()  # files that `mend` has verified against the manifest
        _own(root)
        for part in _parts(root):
            _remove_if_abandoned(part)

    def open(self, path: Path, closing: Event, note: Note) -> int:
        """A descriptor for reading the file `path` of `folder`, which is fetched first if it is missing.

        Raises DataError if it is missing or damaged at its source, StorageError if the source does not answer,
        CancelledError as soon as `closing` is set.
        """
        while True:
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                self.stage(path, closing, note)
                continue  # try again: another process may have removed the file already, to free space
            os.utime(descriptor)  # _remove_for removes the least recently opened files first
            return descriptor

    def stage(self, path: Path, closing: Event, note: Note, *, wait: bool = True) -> None:
        """Fetch the file `path` of `folder` unless it is there.

        wait: if another process is fetching it, wait until that is done; otherwise return at once.
        """
        with self._lock(path, closing, wait) as mine:
            if mine and not path.exists():
                self._fetch(path, closing, note)

    def mend(self, path: Path, closing: Event, note: Note) -> None:
        """Fetch `path` again if it differs from the manifest."""
        if path in self._sound:
            return
        with self._lock(path, closing, wait=True):
            try:
                sha256 = retried(lambda: sha256_of(path), str(path), closing=closing)
            except FileNotFoundError:  # removed to free space
                return
            if sha256 == self._wanted(path)[2]:
                self._sound.add(path)
                return
            note(str(path), "damaged on this node's disk, and fetched again")
            with self._lock_all():
                path.unlink(missing_ok=True)
            self._fetch(path, closing, note)

    def _wanted(self, path: Path) -> tuple[str, int, str]:
        """Name, size in bytes and SHA-256 of a file of `folder`."""
        name = path.relative_to(self.folder).as_posix()
        return name, *self.files[name]

    def _fetch(self, path: Path, closing: Event, note: Note) -> None:
        """Copy a file whose lock is held, and give it its final name when it is complete."""
        name, size, sha256 = self._wanted(path)
        part = self.folder.with_name("parts") / f"{_key(name)}.{size}"
        for folder in (path.parent, part.parent):
            folder.mkdir(parents=True, exist_ok=True)
        part.unlink(missing_ok=True)
        try:
            self._make_room(part, size, closing)
            for attempt in range(2):  # the copy may have been damaged in transfer
                self.source.fetch(name, part, size, closing, note)
                if sha256_of(part) == sha256:
                    break
                if attempt:
                    url = self.source.url(name)
                    raise DataError(
                        f"{url} is damaged: its SHA-256 is not the manifest's. "
                        "Copy it again, or prepare the dataset again."
                    )
                note(self.source.url(name), "damaged on its way, and fetched again")
            fsync(part)
            with self._lock_all():  # so that _remove_for counts this file exactly once
                publish(part, path)
        finally:
            part.unlink(missing_ok=True)

    def _make_room(self, part: Path, size: int, closing: Event) -> None:
        """Remove files until `size` more bytes are within the limit, and reserve them by creating `part`."""
        while self.limit is not None:
            with self._lock_all():
                if self._remove_for(size):
                    part.touch()
                    return
            if closing.wait(0.1):  # files that are being copied can be removed when they are complete
                raise CancelledError

    def _remove_for(self, size: int) -> bool:
        """Remove files until `size` more bytes are within the limit.

        False if files being copied prevent it at present.
        """
        total, others, removable = size, False, []
        for part in _parts(self.root):
            if not _remove_if_abandoned(part):
                total, others = total + int(part.suffix[1:]), True
        for folder in self.root.glob("*/files"):
            for path in folder.rglob("*"):
                try:
                    stat = path.lstat()
                except FileNotFoundError:  # damaged, and removed by another process
                    continue
                lock = folder.with_name("locks") / _key(path.relative_to(folder).as_posix())
                if not S_ISREG(stat.st_mode) or not lock.exists():
                    continue
                total += stat.st_size
                if path.suffix not in (".index", ".npy"):
                    removable.append((stat.st_mtime_ns, stat.st_size, path))
        excess = total - self.limit
        if excess > sum(bytes for _, bytes, _ in removable):
            if others:
                return False
            raise UsageError(
                f"data.cache_gb {self.limit / 1e9:g} is too small for a file of {size / 1e9:.3g} GB: raise it."
            )
        for _, bytes, path in sorted(removable):
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= bytes
        return True

    @contextmanager
    def _lock(self, path: Path, closing: Event, wait: bool) -> Iterator[bool]:
        """Hold the lock of a file of `folder`. Yields False if another process holds it and `wait` is false."""
        lock = self.folder.with_name("locks") / _key(self._wanted(path)[0])
        lock.parent.mkdir(parents=True, exist_ok=True)
        with open(lock, "a") as file:
            yield _locked(file, closing, wait)

    def _lock_all(self) -> IO:
        """Lock all of `root` while files are counted, removed or renamed. Closing the file releases the lock."""
        lock = open(self.root / "lock", "a")
        fcntl.flock(lock, fcntl.LOCK_EX)
        return lock


class Ahead:
    """Stages the files of the next `count` micro-batches, in the order of use. stored: what reads the samples.

    needs: the sample ids of each micro-batch, in the order of use. Call `advance` when a micro-batch has been taken.
    """

    def __init__(self, stored: Sequence[StoredSamples], needs: Iterator[np.ndarray], count: int):
        self._stored, self._needs = stored, needs
        self._cache = stored[0].split.cache
        self._executor = ThreadPoolExecutor(COPIERS, thread_name_prefix="stage")
        self._begun: set[Path] = set()
        self._missing = {path for one in stored for path in one.files}
        for _ in range(count):
            self.advance()

    def advance(self) -> None:
        if self._cache.limit is None and not self._missing:
            return  # all files have been requested, and without a limit none is removed again
        ids = next(self._needs, np.empty(0, np.int64))
        for stored in self._stored:
            for number in np.unique(stored.records["shard"][ids]).tolist():
                path = stored.files[number]
                self._missing.discard(path)
                if path not in self._begun and not path.exists():
                    self._begun.add(path)
                    self._executor.submit(self._stage, path, stored)

    def close(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _stage(self, path: Path, stored: StoredSamples) -> None:
        # The thread that reads the file gets the same error and reports it.
        with suppress(Exception):
            self._cache.stage(path, stored.closing, stored.note, wait=False)
        self._begun.discard(path)


def _check_room(manifest: Manifest, data: DataConfig) -> None:
    """Raise UsageError if training keeps more than data.cache_gb in use: files would be fetched again and again."""

    def files(split: Split) -> list:
        if split.beton and (data.backend == "ffcv" or not split.shards):
            return [split.beton, *(split.shards if LABEL_MAP in split.annotations else ())]
        return list(split.shards)

    everything = sum(file.bytes for split in manifest.splits.values() for file in files(split))
    used, split = everything, manifest.split("train")
    if data.shuffle == "block" and split.beton not in files(split):
        # The current pool, the previous one, whose last samples may still be read, and the next one, which is fetched
        # ahead.
        touched = 3 * (POOL / BLOCK) * (1 + BLOCK * len(files(split)) / split.samples)
        used = min(everything, touched * sum(file.bytes for file in files(split)) / len(files(split)))
    if used > data.cache_gb * 1e9:
        hint = "raise it, or set data.shuffle=block, which needs less" if data.shuffle == "full" else "raise it"
        raise UsageError(
            f"data.cache_gb {data.cache_gb:g} is less than the {used / 1e9:.3g} GB that training keeps in use: {hint}."
        )


def _own(root: Path) -> None:
    """Create the folder of this user's cache, or check an existing one. Raises UsageError."""
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            root.mkdir(mode=0o700)
        stat = root.lstat()
        if not S_ISDIR(stat.st_mode) or stat.st_uid != os.geteuid() or S_IMODE(stat.st_mode) & 0o022:
            raise UsageError(
                f"data.cache_dir: {root} was not made by you, or others may write to it: choose another data.cache_dir."
            )
        tag = root / TAG
        if any(root.iterdir()) and not tag.exists():
            raise UsageError(
                f"data.cache_dir: {root} is not a cache, because it has no {TAG}: choose another data.cache_dir."
            )
        with suppress(FileExistsError), open(tag, "x") as file:
            file.write(SIGNATURE)
    except OSError as error:
        raise UsageError(f"data.cache_dir {root.parent} cannot be used: {error.strerror}.") from error


def _key(name: str) -> str:
    """The name of a file's lock and of its part."""
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:16]


def _locked(lock: IO, closing: Event, wait: bool) -> bool:
    """Lock an open file until it is closed. Returns False if another process holds the lock and `wait` is false."""
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
    """The incomplete files of all datasets."""
    return [part for part in root.glob("*/parts/*") if _lock_of_part(part).exists()]


def _lock_of_part(part: Path) -> Path:
    return part.parent.with_name("locks") / part.stem


def _remove_if_abandoned(part: Path) -> bool:
    """Remove an incomplete file unless a process is copying it. Returns whether it was removed."""
    with open(_lock_of_part(part), "a") as lock:
        if not _locked(lock, Event(), wait=False):
            return False
        part.unlink(missing_ok=True)
        return True
