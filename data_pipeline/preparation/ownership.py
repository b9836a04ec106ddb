"""The files that prepare and index may delete or overwrite in a dataset's folder: only those that they made themselves.

Unfinished work lies in `DEST/.work`. A file in it that contains the path of DEST marks it as made here, so a `.work`
that was copied with a dataset is not trusted. Files outside `.work` are written only under names that were claimed in
it before. A name that exists, and was neither claimed nor written by an earlier index, belongs to the user, and the
command is refused. So a run recognises the files of a run that was killed at any moment, and no others.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from data_pipeline.durable import write_atomically
from data_pipeline.split import UsageError

WORK = ".work"
MARK = "made-by-prepare"
# Temporary names beside `.work` (manifest.write_atomically, beton.write_beton), and all names inside it.
_TEMPORARY = re.compile(r"(manifest\.json|(train|val|test)\.beton(\.index)?)\.\d+\.tmp")
_INSIDE = re.compile(rf"{MARK}|lock|(plan|claimed)\.json|source-\d+-\d+\.tar|source\.tmp|.+\.done|.+\.\d+\.tmp")
DOWNLOAD = "download"  # folder in `.work` for downloads of torchvision


@contextlib.contextmanager
def work_folder(dest: Path) -> Iterator[Path]:
    """Create and lock `dest/.work`, and remove the half-written files of a killed run from it and from `dest`. Without
    work, no new folder is left.

    dest: a resolved path. The lock ends with the process. Raises UsageError if another process holds it, or if the
    folder was not made by this program.
    """
    work, new = dest / WORK, [path for path in (dest, *dest.parents) if not path.exists()]
    work.mkdir(parents=True, exist_ok=True)
    marked = (work / MARK).is_file() and (work / MARK).read_bytes() == os.fsencode(dest)
    if not marked:
        if work.is_symlink() or any(not name.startswith(MARK) for name in os.listdir(work)):
            raise UsageError(
                f"{work} was not made here by this program (or by an earlier version of it): "
                "move it away, or delete it."
            )
        write_atomically(work / MARK, os.fsencode(dest))
    with open(work / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another process is preparing {dest}: wait until it has ended.") from None
        left_over = [path for path in dest.iterdir() if _TEMPORARY.fullmatch(path.name)]
        for path in [*left_over, *(path for path in work.glob("*.tmp") if _INSIDE.fullmatch(path.name))]:
            path.unlink()
        try:
            yield work
        finally:
            if work.is_dir() and set(os.listdir(work)) == {MARK, "lock"}:  # no work was done
                remove_work_folder(dest)
                with contextlib.suppress(OSError):  # another process may have put something beside it
                    for path in new:
                        path.rmdir()


def claim(dest: Path, names: Iterable[str], earlier: Iterable[str] = ()) -> list[str]:
    """Record in the work folder that the files `names` of `dest` are this program's.

    earlier: names that are known to be this program's. Returns those of its names that are not in `names`. Raises
    UsageError if one of `names` exists and belongs to the user.
    """
    path, names = dest / WORK / "claimed.json", set(names)
    claimed = {*earlier, *(json.loads(path.read_text()) if path.exists() else ())}
    for name in sorted(names - claimed):
        if os.path.lexists(dest / name):
            raise UsageError(f"{dest / name} is in the way, and was not made by this program: move it away.")
    write_atomically(path, json.dumps(sorted(claimed | names)).encode())
    return sorted(claimed - names)


def remove_work_folder(dest: Path) -> None:
    """Remove the work folder after the last step. Files in it that this program did not make are kept."""
    work = dest / WORK
    if (work / DOWNLOAD).is_dir():
        shutil.rmtree(work / DOWNLOAD)
    for folder, _, files in os.walk(work, topdown=False):
        for name in sorted(filter(_INSIDE.fullmatch, files), key=MARK.__eq__):  # the mark is removed last
            os.unlink(os.path.join(folder, name))
        with contextlib.suppress(OSError):  # the folder is not empty
            os.rmdir(folder)
