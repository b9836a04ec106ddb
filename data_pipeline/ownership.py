"""What prepare and index may delete and overwrite in a dataset's folder: what they made, and nothing else.

What is under way lies in `DEST/.work`, where a file that holds DEST's path marks it as theirs: a `.work` that came with a dataset is not
trusted. Beside it they write names that they have claimed there before: a name that is in use, and neither claimed nor of an earlier index,
is the owner's, and the command is refused. So a run that was killed at any moment knows its own files again, and no others.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from data_pipeline.manifest import UsageError, write_atomically

WORK = ".work"
MARK = "made-by-prepare"
# What is written beside `.work` before it gets its name (manifest.write_atomically, beton.write_beton), and what is written into it.
_TEMPORARY = re.compile(r"(manifest\.json|(train|val|test)\.beton(\.index)?)\.\d+\.tmp")
_INSIDE = re.compile(rf"{MARK}|lock|(plan|claimed)\.json|source-\d+-\d+\.tar|source\.tmp|.+\.done|.+\.\d+\.tmp")
DOWNLOAD = "download"  # inside: torchvision's folder


@contextlib.contextmanager
def work_folder(dest: Path) -> Iterator[Path]:
    """`dest/.work`, made where it is not there, for this process alone; what a killed run left half-written is gone from both folders.

    dest: resolved. The lock goes with the process, however it ends. Raises UsageError where another process has it, or where the folder is
    not this program's.
    """
    work = dest / WORK
    work.mkdir(parents=True, exist_ok=True)
    marked = (work / MARK).is_file() and (work / MARK).read_bytes() == os.fsencode(dest)
    if not marked:
        if work.is_symlink() or any(not name.startswith(MARK) for name in os.listdir(work)):
            raise UsageError(f"{work} was not made here by this program (or by an earlier version of it): move it away, or delete it.")
        write_atomically(work / MARK, os.fsencode(dest))
    with open(work / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another process is preparing {dest} at this moment.") from None
        left_over = [path for path in dest.iterdir() if _TEMPORARY.fullmatch(path.name)]
        for path in [*left_over, *(path for path in work.glob("*.tmp") if _INSIDE.fullmatch(path.name))]:
            path.unlink()
        try:
            yield work
        finally:
            if work.is_dir() and set(os.listdir(work)) == {MARK, "lock"}:  # nothing has been done yet
                remove_work_folder(dest)


def claim(dest: Path, names: Iterable[str], earlier: Iterable[str] = ()) -> list[str]:
    """Enter `names`, files of `dest`, in the work folder as this program's. earlier: names that are its own already.

    Returns what else is its own. Raises UsageError where one of the names is in use, and is the owner's.
    """
    path, names = dest / WORK / "claimed.json", set(names)
    claimed = {*earlier, *(json.loads(path.read_text()) if path.exists() else ())}
    for name in sorted(names - claimed):
        if os.path.lexists(dest / name):
            raise UsageError(f"{dest / name} is in the way, and was not made by this program: move it away.")
    write_atomically(path, json.dumps(sorted(claimed | names)).encode())
    return sorted(claimed - names)


def remove_work_folder(dest: Path) -> None:
    """Remove the work folder when all is done. Files that this program did not make stay."""
    work = dest / WORK
    if (work / DOWNLOAD).is_dir():
        shutil.rmtree(work / DOWNLOAD)
    for folder, _, files in os.walk(work, topdown=False):
        for name in sorted(filter(_INSIDE.fullmatch, files), key=MARK.__eq__):  # the mark goes last
            os.unlink(os.path.join(folder, name))
        with contextlib.suppress(OSError):  # not empty
            os.rmdir(folder)
