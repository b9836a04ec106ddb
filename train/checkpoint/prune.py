"""What may go from a run's folder of checkpoints: old ones, and what a killed run has left behind. Nothing else is touched.

Only folders with this program's names are removed, and of those only what it writes into them: a file that somebody has put there stays,
and is named.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from data_pipeline.faults import retried
from train.checkpoint.format import MANIFEST, CheckpointError, list_checkpoints, read_info_once

# shard_… and its like while safetensors writes it (.tmp…), and what NFS keeps of a file that is removed while somebody reads it.
OWN = re.compile(rf"shard_\d{{5,}}\.safetensors|{re.escape(MANIFEST)}|\.tmp\w{{6}}|\.nfs[0-9a-f]+")
LEFT_BEHIND = re.compile(r"\.(step_\d{8,})(\.[0-9a-z]+)?\.(tmp|replaced)")


def clean_up(folder: Path) -> list[str]:
    """Undo what a run that was killed while it saved has left in `folder`; returns what could not be removed, in sentences for the log.

    One rank calls this, before any save. Raises StorageError where a checkpoint cannot be given its name again.
    """
    for replaced, final in _left_behind(folder, "replaced"):
        if not final.exists():
            retried(lambda old=replaced, new=final: os.rename(old, new), str(final))  # killed between two renames
    return _remove_all(path for kind in ("replaced", "tmp") for path, _ in _left_behind(folder, kind))


def prune(folder: Path, step: int, keep: int) -> list[str]:
    """After the save at `step`: remove all up to it but the `keep` newest and the one with the best score, of equals the earliest.

    Returns what could not be removed, in sentences: it is tried again at the next call. Later checkpoints stay and do not count: this run
    passed them over as damaged, or went back behind them. Nor do damaged ones, and links, which are a user's. One rank calls this. Raises
    OSError, and has removed nothing, where it cannot be known what is there.
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
            half = path.with_name(f".{path.name}.removed.tmp")  # under its own name it is whole or not there
            try:
                _refuse_foreign(path)
                os.rename(path, half)
            except OSError as error:
                failed.append(_sentence(path, error))
    # Those, and what could not be removed before. Other temporary names may be the next save's by now.
    halves = [path for path, _ in _left_behind(folder, "tmp") if ".removed." in path.name]
    return failed + _remove_all(halves + [path for path, final in _left_behind(folder, "replaced") if final.exists()])


def _left_behind(folder: Path, kind: str) -> list[tuple[Path, Path]]:
    """Folders that a save or a removal did not end with, and the checkpoints whose names they have."""
    found = sorted(folder.iterdir()) if folder.is_dir() else ()
    matches = [(path, LEFT_BEHIND.fullmatch(path.name)) for path in found if path.is_dir() and not path.is_symlink()]
    return [(path, folder / match[1]) for path, match in matches if match and match[3] == kind]


def _remove_all(folders: Iterable[Path]) -> list[str]:
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
    foreign = sorted(path.name for path in folder.iterdir() if path.is_dir() or not OWN.fullmatch(path.name))
    if foreign:
        raise OSError(f"{foreign[0]} in it is not a checkpoint's")


def _sentence(path: Path, error: OSError) -> str:
    return f"{path} is not removed: {error.strerror or error}"
