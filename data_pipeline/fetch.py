"""Fetch a dataset's files from a folder or a URL with fsspec."""

import errno
import os
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from threading import Event
from typing import TypeVar
from urllib.parse import quote

from . import faults
from .config import without_secrets
from .faults import LASTING, StorageError, retried
from .manifest import FILE_NAME
from .split import DataError, UsageError

TIMEOUT = 60  # seconds to wait for a connection, or for more data from a web server
AT_START = 3  # number of retries of the manifest: few, because the URL may be mistyped

Note = Callable[[str, str], None]  # called with (file, error) for each fault that was retried
T = TypeVar("T")


def ignore_fault(file: str, error: str) -> None:
    """A Note for the time before a run exists that could log faults."""


class Location:
    """The folder or URL `path` of a dataset. Raises UsageError if fsspec cannot open it."""

    def __init__(self, path: str):
        self.path = path.rstrip("/")
        try:
            self._filesystem, self._root = _open_filesystem(self.path)
        except (ImportError, ValueError) as error:  # a library that is not installed, an unknown protocol
            raise UsageError(f"data.path {path} cannot be opened: {error}.") from error

    def url(self, name: str) -> str:
        return f"{self.path}/{name}"

    def read_manifest(self) -> bytes:
        """Raises DataError if it is missing or may not be read, StorageError if the server does not answer."""
        url, place = self.url(FILE_NAME), self._place(FILE_NAME)
        try:
            return self._try(
                url, lambda: self._filesystem.cat_file(place), Event(), ignore_fault, faults.PAUSES[:AT_START]
            )
        except FileNotFoundError:
            raise DataError(f"{url} is missing. Make one with: python launch/prepare.py SOURCE DEST") from None
        except LASTING as error:
            raise DataError(f"{url} cannot be read: {_reason(error)}. Check its permissions.") from None

    def fetch(self, name: str, target: Path, size: int, closing: Event, note: Note) -> None:
        """Copy a file of `size` bytes to `target`.

        Raises DataError if it is missing, StorageError if it cannot be copied.
        """
        from fsspec.callbacks import Callback

        class Until(Callback):
            def relative_update(self, increment: int = 1) -> None:
                super().relative_update(increment)
                if closing.is_set():
                    raise CancelledError
                if self.value > size:
                    raise OSError(f"it has more bytes than the {size} of the manifest")

        def copy() -> None:
            try:
                self._filesystem.get_file(self._place(name), str(target), callback=Until())
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    sentence = (
                        f"data.cache_dir: {target.parent} is full: free some space, or set a smaller data.cache_gb."
                    )
                    raise StorageError(sentence) from error
                raise
            if target.stat().st_size != size:
                raise OSError(f"it has {target.stat().st_size} bytes where the manifest says {size}")

        url = self.url(name)
        try:
            self._try(url, copy, closing, note, faults.PAUSES)
        except FileNotFoundError:
            raise DataError(f"{url} is missing. Copy it again.") from None
        except LASTING as error:
            raise StorageError(f"{url} cannot be read: {_reason(error)}. Start again when you may read it.") from None

    def _place(self, name: str) -> str:
        """The path of a file for fsspec; quoted in a web address."""
        return f"{self._root}/{quote(os.fsencode(name)) if self.path.startswith(('http://', 'https://')) else name}"

    def _try(self, url: str, action: Callable[[], T], closing: Event, note: Note, pauses: Sequence[float]) -> T:
        """The result of `action`, with retries. LASTING errors are raised unchanged."""

        def attempt() -> T:
            try:
                return action()
            except (*LASTING, StorageError, CancelledError):
                raise
            except Exception as error:  # every file system has its own exceptions
                if getattr(error, "status", None) in (401, 403):
                    raise PermissionError(_reason(error)) from None
                raise OSError(_reason(error)) from None

        return retried(attempt, url, note=lambda error: note(url, str(error)), closing=closing, pauses=pauses)


def _reason(error: Exception) -> str:
    """The message of an error on one line, without the secrets of a URL to which a server may have redirected us."""
    return without_secrets(" ".join(str(getattr(error, "strerror", None) or error).split())) or type(error).__name__


def _open_filesystem(path: str):
    """fsspec's file system for a path or URL, and the path within it."""
    import fsspec

    options = {}
    if path.startswith(("http://", "https://")):
        import aiohttp

        # aiohttp's default aborts a file that takes more than five minutes, even if data arrives steadily.
        options["client_kwargs"] = {
            "timeout": aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT)
        }
    return fsspec.core.url_to_fs(path, **options)
