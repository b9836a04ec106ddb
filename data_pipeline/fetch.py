"""Fetching a dataset's files from a folder or a URL, through fsspec."""

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
from .manifest import FILE_NAME, DataError, UsageError

TIMEOUT = 60  # seconds of silence after which a web server is given up
AT_START = 3  # pauses between the attempts to read the manifest: few, because the URL may be mistyped

Note = Callable[[str, str], None]  # called with (file, error) for each fault that passed
T = TypeVar("T")


def unheard(file: str, error: str) -> None:
    """A Note of what happens before there is a run to tell it to."""


class Source:
    """The folder or URL `path`. UsageError where fsspec has no way to it."""

    def __init__(self, path: str):
        self.path = path.rstrip("/")
        try:
            self._filesystem, self._root = _open_filesystem(self.path)
        except (ImportError, ValueError) as error:  # a library that is not installed, an unknown protocol
            raise UsageError(f"data.path {path} cannot be opened: {error}.") from error

    def url(self, name: str) -> str:
        return f"{self.path}/{name}"

    def read_manifest(self) -> bytes:
        """Raises DataError where it is missing or may not be read, StorageError where the server does not answer."""
        url, place = self.url(FILE_NAME), self._place(FILE_NAME)
        try:
            return self._try(url, lambda: self._filesystem.cat_file(place), Event(), unheard, faults.PAUSES[:AT_START])
        except FileNotFoundError:
            raise DataError(f"{url} is missing. Make one with: python launch/prepare.py SOURCE DEST") from None
        except LASTING as error:
            raise DataError(f"{url} cannot be read: {_reason(error)}. See that you may read it.") from None

    def fetch(self, name: str, target: Path, size: int, closing: Event, note: Note) -> None:
        """Copy a file of `size` bytes to `target`. Raises DataError where it is not there, StorageError where it cannot be had for now."""
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
                    sentence = f"data.cache_dir: {target.parent} is full: free some room, or set data.cache_gb below what it has."
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
            raise StorageError(f"{url} cannot be read: {_reason(error)}. Start again once you may read it.") from None

    def _place(self, name: str) -> str:
        """Where fsspec finds a file: its name, or, on the web, what stands for it in a URL."""
        return f"{self._root}/{quote(os.fsencode(name)) if self.path.startswith(('http://', 'https://')) else name}"

    def _try(self, url: str, action: Callable[[], T], closing: Event, note: Note, pauses: Sequence[float]) -> T:
        """The result of `action`, after some attempts. LASTING errors as they are."""

        def attempt() -> T:
            try:
                return action()
            except (*LASTING, StorageError, CancelledError):
                raise
            except Exception as error:  # every file system has its own
                if getattr(error, "status", None) in (401, 403):
                    raise PermissionError(_reason(error)) from None
                raise OSError(_reason(error)) from None

        return retried(attempt, url, note=lambda error: note(url, str(error)), closing=closing, pauses=pauses)


def _reason(error: Exception) -> str:
    """What an error says, on one line, without the secrets of an address that a server may have sent us on to."""
    return without_secrets(" ".join(str(getattr(error, "strerror", None) or error).split())) or type(error).__name__


def _open_filesystem(path: str):
    """fsspec's file system for a path or URL, and the path in it."""
    import fsspec

    options = {}
    if path.startswith(("http://", "https://")):
        import aiohttp

        # Its default gives up a file that takes more than five minutes, however well it comes along.
        options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT)}
    return fsspec.core.url_to_fs(path, **options)
