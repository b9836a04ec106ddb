"""Retries after transient I/O errors, such as a Lustre eviction, a stale NFS handle or a soft timeout.

Damaged contents (a wrong checksum, a file that is too short) are not transient and are not retried here.
"""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

PAUSES = (0.25, 0.5, 1, 2, 4, 8, 16, 32)  # seconds between attempts: about a minute in all
# Errors that a retry does not change. All others can be transient on network file systems.
LASTING = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)


class StorageError(Exception):
    """A file could not be read or written because of the file system, not its contents; a later start may succeed."""

    exit_code = os.EX_IOERR


@dataclass(frozen=True)
class PassingFault:
    """`count` attempts to read `file` failed with `error`; each was retried."""

    file: str
    error: str
    count: int


def read_fully(descriptor: int, size: int, offset: int) -> bytes:
    """`size` bytes at `offset` of an open file, fewer only where the file ends.

    One read also returns fewer where an I/O error follows, which the next read raises.
    """
    data = b""
    while len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
        data += more
    return data


def retried(
    action: Callable[[], T],
    what: str,
    *,
    note: Callable[[OSError], None] = lambda error: None,
    closing: threading.Event | None = None,
    pauses: Sequence[float] | None = None,
) -> T:
    """Call `action`, again after each OSError with pauses in between, and return its result.

    action: should open its files itself, so that a retry does not use a stale handle. what: the file's name in the
    error. note: called with each error that is retried. closing: when set, ends the pauses. pauses: seconds, default
    PAUSES. Raises LASTING errors unchanged and at once; StorageError after the last attempt; CancelledError when
    `closing` is set.
    """
    closing = closing or threading.Event()
    pauses = PAUSES if pauses is None else pauses
    for pause in pauses:
        try:
            return action()
        except LASTING:
            raise
        except OSError as error:
            note(error)
        if closing.wait(pause):
            raise CancelledError
    try:
        return action()
    except LASTING:
        raise
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        text = f"{what} cannot be read after {len(pauses) + 1} attempts: {reason}. Start again when it can be read."
        raise StorageError(text) from error
