"""The door for Python: `from train import run`.

Light: a mistake in the config or a missing dataset is reported before torch is imported.
"""

import os
from collections.abc import Sequence
from pathlib import Path


def run(
    config: str | Path,
    overrides: Sequence[str] = (),
    *,
    output: str | Path | None = None,
    resume: str = "auto",
    resume_with_changes: bool = False,
) -> Path:
    """Train the recipe `config` with `section.key=value` overrides to its end, and return the run's folder; every rank
    calls this.

    output: that folder, by default runs/<config name>. resume: "auto", "never" or a checkpoint's path.
    resume_with_changes: go on although settings changed that alter what a step computes. The ranks are those of the
    environment's variables RANK and WORLD_SIZE, as torchrun and deepspeed set them; without them this process is the
    only one. Stop signals (TERM, USR1, INT, HUP) end the run with a checkpoint.

    Raises ConfigError, DataError, StorageError, Unavailable, TrainingFailed, StateLost, NotSaved or Stopped, each with
    an `exit_code`.
    """
    from train.guard.signals import stop_signals

    installed = stop_signals.install()
    try:
        return _run(config, overrides, output, resume, resume_with_changes)
    finally:
        if installed:
            stop_signals.uninstall()


def _run(
    config: str | Path, overrides: Sequence[str], output: str | Path | None, resume: str, resume_with_changes: bool
) -> Path:
    from data_pipeline.backends import open_backend
    from data_pipeline.storage import open_dataset
    from train.checkpoint.resume_point import Resume
    from train.checks import check_start, checked_order
    from train.config import load_config
    from train.guard.run_lock import RunLock, cannot_write

    settings = load_config(config, list(overrides))
    manifest = open_dataset(settings.data)
    settings.check_dataset(manifest)
    for split in manifest.splits.values():
        open_backend(settings.data.backend, split)  # for its errors: a library or files that are missing
    order = checked_order(settings, manifest)
    folder = Path(output or Path("runs") / Path(config).stem)
    start = Resume.decide(folder, resume, resume_with_changes)
    check_start(settings, int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), start)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from error
    lock = RunLock(folder) if os.environ.get("RANK", "0") == "0" else None
    if lock:
        lock.acquire()
    try:
        from train.trainer import train

        train(settings, manifest, order, folder, lock, start)
    finally:
        if lock:
            lock.release()
    return folder
