"""Datasets that are copied to the node's own disk before use: `data.cache_dir`, and any URL that fsspec reads as `data.path`.

`cache_dir` has a folder per dataset, named after its manifest's SHA-256, with the files that were needed so far:

    <name>                whole, its SHA-256 is the manifest's; never written to again
    <name>.<bytes>.part   being copied; or left behind by a process that was killed, until the next start, or the next need of its room
    <name>.lock           empty; held by whoever copies, so that one process of a node copies a file while the others wait

`cache_gb` bounds the sum of these files, whatever dataset they are of: those opened longest ago are removed first. A process that reads
one at that moment is not disturbed, as its descriptor outlives the name; and with a limit set no descriptor is kept for later, so what
was removed does not go on taking room.
"""

import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from stat import S_ISREG
from threading import Event
from typing import IO

import numpy as np

from .backends.stored import StoredSamples
from .config import DataConfig
from .manifest import FILE_NAME, RECORD, DataError, Manifest, Split, UsageError, open_manifest, parse_manifest, publish, sha256_of
from .order import BLOCK, POOL

COPIERS = 4  # files that a rank copies at once, ahead of their use
ATTEMPTS = 4  # to fetch a file, with 1, 2 and 4 seconds in between
TIMEOUT = 60  # seconds of silence after which a web server is given up


def open_dataset(data: DataConfig, *, training: bool = True) -> Manifest:
    """The dataset that `data` describes: as manifest.open_manifest, or, where there is a `cache_dir`, with files that are staged on use.

    The manifest and the indexes are fetched at once. `training`: check that cache_gb has room for what data.shuffle keeps in use.
    Raises DataError for a dataset that is missing or damaged, UsageError for settings that cannot be.
    """
    if data.cache_dir is None:
        return open_manifest(data.path)
    if "://" not in data.path:
        open_manifest(data.path)  # a folder can be checked as a whole
    source = _Source(data.path)
    text = source.read(FILE_NAME)
    root = Path(data.cache_dir)
    manifest = parse_manifest(text, root / hashlib.sha256(text).hexdigest()[:16], source.url(FILE_NAME))
    if training and data.cache_gb is not None:
        _check_room(manifest, data)
    cache = Cache(source, root, manifest, None if data.cache_gb is None else int(data.cache_gb * 1e9))
    splits = {}
    for name, split in manifest.splits.items():
        splits[name] = StagedSplit(**{field.name: getattr(split, field.name) for field in fields(split)}, cache=cache)
        for index in [split.index_path] + ([split.beton_index_path] if split.beton else []):
            os.close(cache.open(index, Event()))
    return replace(manifest, splits=splits)


@dataclass(frozen=True)
class StagedSplit(Split):
    """A split whose files are in `cache`, or will be when they are opened."""

    cache: "Cache" = None

    @property
    def keep_open(self) -> int:
        return Split.keep_open if self.cache.limit is None else 0

    def open_file(self, path: Path, closing: Event) -> int:
        return self.cache.open(path, closing)


class Cache:
    """The files of one dataset in the folder `root`, which other runs and other datasets may share. Thread-safe and process-safe.

    limit: bytes that all files below `root` may take, or None.
    """

    def __init__(self, source: "_Source", root: Path, manifest: Manifest, limit: int | None):
        self.source, self.root, self.folder, self.limit = source, root, manifest.folder, limit
        self.files = _files_of(manifest)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"data.cache_dir {root} cannot be used: {error.strerror}.") from error
        for part in root.glob("*/**/*.part"):
            _remove_if_abandoned(part)

    def open(self, path: Path, closing: Event) -> int:
        """A descriptor, for reading, of the file `path` of `folder`; it is fetched first where it is not there.

        Raises DataError where that fails, CancelledError as soon as `closing` is set.
        """
        while True:
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                self.stage(path, closing)
                continue  # and look again: another process may have needed its room already
            os.utime(descriptor)  # room is made by what was opened longest ago
            return descriptor

    def stage(self, path: Path, closing: Event, *, wait: bool = True) -> None:
        """Fetch the file `path` of `folder`, unless it is there. Where somebody else is fetching it: wait for that, or leave it to them."""
        name = path.relative_to(self.folder).as_posix()
        size, sha256 = self.files[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(_lock_of(path), "w") as lock:
            if not _locked(lock, closing, wait) or path.exists():
                return
            part = path.with_name(f"{path.name}.{size}.part")
            part.unlink(missing_ok=True)
            try:
                self._make_room(part, size, closing)
                self.source.fetch(name, part, size, closing)
                if sha256_of(part) != sha256:
                    url = self.source.url(name)
                    raise DataError(f"{url} is damaged: its SHA-256 is not the manifest's. Copy it again, or prepare the dataset again.")
                _flush(part)
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
        for path in self.root.glob("*/**/*"):
            try:
                stat = path.stat()
            except FileNotFoundError:  # a part that was given up
                continue
            if not S_ISREG(stat.st_mode):
                continue
            if path.suffix == ".part":
                if not _remove_if_abandoned(path):
                    total, others = total + int(path.suffixes[-2][1:]), True
            elif path.suffix != ".lock":
                total += stat.st_size
                if path.suffix != ".index":
                    removable.append((stat.st_mtime_ns, stat.st_size, path))
        excess = total - self.limit
        if excess > sum(bytes for _, bytes, _ in removable):
            if others:
                return False
            raise DataError(f"data.cache_gb {self.limit / 1e9:g} has no room for a file of {size / 1e9:.3g} GB: raise it.")
        for _, bytes, path in sorted(removable):
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= bytes
        return True

    def _lock_all(self) -> IO:
        """A lock on all of `root`, held while files are added up, removed or named; closing it lets go."""
        lock = open(self.root / ".lock", "w")
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
            self._stored.split.cache.stage(path, self._stored.closing, wait=False)
        self._begun.discard(path)


class _Source:
    """Where a dataset is fetched from: a folder or a URL, through fsspec."""

    def __init__(self, path: str):
        self.path = path.rstrip("/")
        try:
            self._filesystem, self._root = _open_filesystem(self.path)
        except (ImportError, ValueError) as error:  # a library that is not installed, a protocol that nobody knows
            raise UsageError(f"data.path {path} cannot be opened: {error}.") from error

    def url(self, name: str) -> str:
        return f"{self.path}/{name}"

    def read(self, name: str) -> bytes:
        """The contents of a small file."""
        return self._try(name, lambda: self._filesystem.cat_file(f"{self._root}/{name}"), Event())

    def fetch(self, name: str, target: Path, size: int, closing: Event) -> None:
        """Copy a file of `size` bytes to `target`."""
        from fsspec.callbacks import Callback

        class Until(Callback):
            def relative_update(self, increment: int = 1) -> None:
                if closing.is_set():
                    raise CancelledError

        def copy() -> None:
            self._filesystem.get_file(f"{self._root}/{name}", str(target), callback=Until())
            if target.stat().st_size != size:
                raise OSError(f"it has {target.stat().st_size} bytes where the manifest says {size}")

        try:
            self._try(name, copy, closing)
        except OSError as error:
            raise DataError(f"data.cache_dir: {target.parent} is full: free some room, or set data.cache_gb below what it has.") from error

    def _try(self, name: str, action, closing: Event):
        """The result of `action`, after some attempts. DataError where all fail; OSError where the disk is full."""
        for attempt in range(ATTEMPTS):
            try:
                return action()
            except FileNotFoundError:
                hint = "Make one with: python launch/prepare.py SOURCE DEST" if name == FILE_NAME else "Copy it again."
                raise DataError(f"{self.url(name)} is missing. {hint}") from None
            except CancelledError:
                raise
            except Exception as error:  # every file system has its own
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise
                if attempt + 1 == ATTEMPTS:
                    reason = " ".join(str(error).split()) or type(error).__name__
                    raise DataError(f"{self.url(name)} cannot be fetched: {reason}. Start again once it can.") from error
            if closing.wait(2**attempt):
                raise CancelledError


def _open_filesystem(path: str):
    """fsspec's file system for a path or URL, and the path in it."""
    import fsspec

    options = {}
    if path.startswith(("http://", "https://")):
        import aiohttp

        # Its default gives up a file that takes more than five minutes, however well it comes along.
        options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT)}
    return fsspec.core.url_to_fs(path, **options)


def _files_of(manifest: Manifest) -> dict[str, tuple[int, str]]:
    """Size in bytes and SHA-256 of every file that the manifest names."""
    files = {}
    for split in manifest.splits.values():
        files[split.index_path.name] = (split.samples * RECORD.itemsize, split.fingerprint)
        files |= {shard.file: (shard.bytes, shard.sha256) for shard in split.shards}
        if split.beton:
            files[split.beton.file] = (split.beton.bytes, split.beton.sha256)
            files[split.beton_index_path.name] = (split.samples * RECORD.itemsize, split.beton.fingerprint)
    return files


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


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _lock_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


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


def _remove_if_abandoned(part: Path) -> bool:
    """Remove a half-copied file that nobody is copying any more."""
    name = part.name.removesuffix("".join(part.suffixes[-2:]))
    with open(_lock_of(part.with_name(name)), "w") as lock:
        if not _locked(lock, Event(), wait=False):
            return False
        part.unlink(missing_ok=True)
        return True
