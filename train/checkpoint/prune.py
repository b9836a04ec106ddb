"""Removing old checkpoints, and what a killed run left behind, from a run's folder of checkpoints.

Only folders with this program's names are removed, and only if they contain nothing but files that it writes. A folder
with another file in it stays and is reported.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from data_pipeline.faults import retried
from train.checkpoint.info import MANIFEST, CheckpointError, list_checkpoints, read_info_once

# Files of a checkpoint: shards, also while safetensors writes them (.tmp…), the manifest, and removed files that NFS
# keeps while they are open (.nfs…).
OWN = re.compile(rf"shard_\d{{5,}}\.safetensors|{re.escape(MANIFEST)}|\.tmp\w{{6}}|\.nfs[0-9a-f]+")
LEFT_BEHIND = re.compile(r"\.(step_\d{8,})(\.[0-9a-z]+)?\.(tmp|replaced)")


def clean_up(folder: Path) -> list[str]:
    """Repair `folder` after a run that was killed while it saved; returns sentences about what could not be removed.

    One rank calls this, before any save. Raises StorageError if a checkpoint cannot be renamed back.
    """
    for replaced, final in _left_behind(folder, "replaced"):
        if not final.exists():
            # The run was killed between the two renames of `commit`.
            retried(lambda old=replaced, new=final: os.rename(old, new), str(final))
    return _remove_all(path for kind in ("replaced", "tmp") for path, _ in _left_behind(folder, kind))


def prune(folder: Path, step: int, keep: int) -> list[str]:
    """After the save at `step`, remove old checkpoints; one rank calls this.

    Kept are the `keep` newest up to `step`, and the one with the best score (of equal ones the earliest). Not counted,
    and not removed, are later checkpoints (this run found them damaged, or went back to an earlier one), damaged ones,
    and links made by a user.

    Returns sentences about what could not be removed, which the next call tries again. Raises OSError, before anything
    is removed, if the manifests cannot be read.
    """
    merits = {}
    for path in list_checkpoints(folder):
        try:
            info = read_info_once(path)
        except CheckpointError:
            continue
        if info.step <= step and not path.is_symlink():
            merits[path] = info.merit
    best = max((path for path in reversed(merits) if merits[path] is not None), key=merits.get, default=None)
    failed = []
    for path in list(merits)[keep:]:
        if path != best:
            half = path.with_name(f".{path.name}.removed.tmp")  # a folder with a checkpoint's name is always complete
            try:
                _refuse_foreign(path)
                os.rename(path, half)
            except OSError as error:
                failed.append(_sentence(path, error))
    # Remove these, and those that could not be removed before. Other temporary folders may belong to the next save.
    halves = [path for path, _ in _left_behind(folder, "tmp") if ".removed." in path.name]
    return failed + _remove_all(halves + [path for path, final in _left_behind(folder, "replaced") if final.exists()])


def _left_behind(folder: Path, kind: str) -> list[tuple[Path, Path]]:
    """Folders `.step_….<kind>` of an unfinished save or removal, each with its checkpoint's final path."""
    found = sorted(folder.iterdir()) if folder.is_dir() else ()
    matches = [(path, LEFT_BEHIND.fullmatch(path.name)) for path in found if path.is_dir() and not path.is_symlink()]
    return [(path, folder / match[1]) for path, match in matches if match and match[3] == kind]


def _remove_all(folders: Iterable[Path]) -> list[str]:
    """Remove folders with the files in them; returns sentences about those that could not be removed."""
    failed = []
    for folder in folders:
        try:
            _refuse_foreign(folder)
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()
        except OSError as error:
            failed.append(_sentence(folder, error))
    return failed


def _refuse_foreign(folder: Path) -> None:
    """Raise OSError if the folder contains anything but a checkpoint's files."""
    foreign = sorted(path.name for path in folder.iterdir() if path.is_dir() or not OWN.fullmatch(path.name))
    if foreign:
        raise OSError(f"it contains {foreign[0]}, which is not a checkpoint's file")


def _sentence(path: Path, error: OSError) -> str:
    return f"{path} is not removed: {error.strerror or error}"
