"""Walk through a folder of images or shards."""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from data_pipeline.faults import LASTING, retried
from data_pipeline.preparation.tars import IMAGE_SUFFIXES
from data_pipeline.split import DataError

T = TypeVar("T")


def walk(
    root: Path, suffixes: tuple[str, ...] = IMAGE_SUFFIXES, prefix: str = "", above: tuple[tuple[int, int], ...] = ()
) -> Iterator[tuple[str, int, int]]:
    """(name relative to the root, 0, size) of every file below `root`, and of every folder, whose name ends in a slash.
    Follows links, ignores hidden files.

    suffixes: of files that must be regular. above: the (device, inode) of the enclosing folders; a link to one of them
    would make the recursion endless. Raises DataError for what cannot be read, StorageError if it may be later.
    """
    folder = os.path.join(root, prefix)
    here = _attempt(os.stat, folder)
    if (here.st_dev, here.st_ino) in above:
        raise DataError(f"{folder.rstrip('/')} is a link to a folder that contains it: remove it.")
    above = (*above, (here.st_dev, here.st_ino))
    for name in _attempt(os.listdir, folder):
        if name.startswith(".") or name == "__MACOSX":
            continue
        found = _attempt(os.stat, folder + name)
        if stat.S_ISDIR(found.st_mode):
            yield f"{prefix}{name}/", 0, 0
            yield from walk(root, suffixes, f"{prefix}{name}/", above)
            continue
        if not stat.S_ISREG(found.st_mode) and name.lower().endswith(suffixes):
            raise DataError(f"{folder}{name} is not a regular file: remove it.")
        yield prefix + name, 0, found.st_size


def _attempt(call: Callable[[str], T], path: str) -> T:
    """`call(path)`, again after errors that may pass."""

    def attempt() -> T:
        try:
            return call(path)
        except OSError as error:  # a dangling or circular link, a folder without permission
            if isinstance(error, LASTING) or error.errno == errno.ELOOP:
                raise DataError(f"cannot read {path}: {error.strerror}.") from error
            raise

    return retried(attempt, path)
