"""I/O faults that may pass: a Lustre eviction, a stale NFS handle, a soft timeout. They are tried again, with growing pauses.

Only the file system is asked again here. Damaged contents (a wrong checksum, a file that is too short) are not a fault of this kind.
"""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

PAUSES = (0.25, 0.5, 1, 2, 4, 8, 16, 32)  # seconds between attempts: about a minute in all
# What asking again does not change. Everything else that the system may answer has been seen to pass on network file systems.
LASTING = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)


class StorageError(Exception):
    """A file could not be read or written, though nothing is wrong with its contents; another start may find the file system well."""

    exit_code = os.EX_IOERR


@dataclass(frozen=True)
class PassingFault:
    """`count` attempts to read `file` that failed with `error`, and were followed by others."""

    file: str
    error: str
    count: int


def retried(
    action: Callable[[], T],
    what: str,
    *,
    note: Callable[[OSError], None] = lambda error: None,
    closing: threading.Event | None = None,
    pauses: Sequence[float] | None = None,
) -> T:
    """The result of `action`, which is called again after each OSError, with pauses in between; it should open its files anew.

    what: names the file in the error. note: called with each error that is followed by another attempt. closing: ends the pauses early.
    pauses: seconds, in place of PAUSES.
    Raises LASTING errors as they are, at once; StorageError after the last attempt; CancelledError once `closing` is set.
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
        text = f"{what} cannot be read after {len(pauses) + 1} attempts: {reason}. Start again once it can be."
        raise StorageError(text) from error
