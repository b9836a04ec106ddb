"""Which checkpoint a run starts from, and whether it may."""

import contextlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist

from data_pipeline.manifest import Manifest
from train.checkpoint import CheckpointInfo, list_checkpoints, load_checkpoint, newest_valid, step_of, validate
from train.config import Config, ConfigError, differences, parse_config
from train.ema import Ema
from train.engine import Engine


@dataclass(frozen=True)
class Restored:
    """The step to go on from (0 without a checkpoint), the checkpoint and what its manifest says, and sentences for the log."""

    step: int = 0
    path: Path | None = None
    info: CheckpointInfo | None = None
    notes: list[str] = field(default_factory=list)


def restore(
    checkpoints: Path, config: Config, manifest: Manifest, engine: Engine, ema: Ema | None, resume: str, with_changes: bool
) -> Restored:
    """Load the checkpoint that `resume` ("auto", "never" or a path) means; every rank calls this and gets the same.

    Raises ConfigError where the checkpoint cannot or may not be used: never a fresh start instead.
    """
    # Rank 0 reads and hashes for all; its verdict, good or bad, is everybody's.
    verdict: list = [None]
    if dist.get_rank() == 0:
        try:
            verdict[0] = _choose(checkpoints, config, manifest, resume, with_changes)
        except ConfigError as error:
            verdict[0] = error
    dist.broadcast_object_list(verdict)
    if isinstance(verdict[0], ConfigError):
        raise verdict[0]
    path, info, notes = verdict[0]
    if path is None:
        return Restored(notes=notes)
    load_checkpoint(path, info, engine, ema)
    return Restored(info.step, path, info, notes)


def _choose(
    checkpoints: Path, config: Config, manifest: Manifest, resume: str, with_changes: bool
) -> tuple[Path | None, CheckpointInfo | None, list[str]]:
    if resume == "never":
        if list_checkpoints(checkpoints):
            raise ConfigError(f"{checkpoints} already has checkpoints; resume them (--resume auto) or choose another --output")
        return None, None, []
    if resume == "auto":
        path, skipped = newest_valid(checkpoints)
        if path is None and skipped:
            raise ConfigError(f"no checkpoint in {checkpoints} is sound ({skipped[0]}); remove them to start again")
    else:
        path, skipped = Path(resume), []
    if path is None:
        return None, None, []
    info = validate(path)
    notes = []
    if skipped:
        newest = step_of(list_checkpoints(checkpoints)[0])
        notes = [f"skipped a damaged checkpoint: {sentence}" for sentence in skipped]
        notes.append(f"going back to {path} instead costs {newest - info.step} steps")
    new = config.model_dump(mode="json")
    old = parse_config(info.config, source=str(path)).model_dump(mode="json")  # with the defaults of keys that are newer than it
    changed = differences(old, new, free=False)
    if info.dataset != manifest.split("train").fingerprint:
        changed.append(f"data.path ({info.config['data']['path']} → {config.data.path}: other images or labels)")
    if changed and not with_changes:
        raise ConfigError(
            f"{path} was trained with other settings: {', '.join(changed)}; set them back, choose another --output, "
            "or give --resume-with-changes to go on all the same"
        )
    notes += [f"changed since the checkpoint: {item}" for item in changed + differences(old, new, free=True)]
    if resume != "auto":
        notes += _set_aside(checkpoints, info.step)
    return path, info, notes


def _set_aside(checkpoints: Path, step: int) -> list[str]:
    """Rename checkpoints after `step`, behind which a user has gone back: the next start must not take them for this run's newest."""
    notes = []
    for path in list_checkpoints(checkpoints):
        if step_of(path) > step:
            aside = path.with_name(f"superseded_{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            notes.append(f"{path} is behind this start: renamed to {aside.name}")
    return notes


def lost_steps(metrics: Path, start: int) -> int:
    """How many steps after `start` an earlier start of the run has written to metrics.jsonl: they are taken again."""
    if not metrics.exists():
        return 0
    with open(metrics, "rb") as file:
        file.seek(max(0, metrics.stat().st_size - 1_000_000))
        for line in reversed(file.read().splitlines()):
            with contextlib.suppress(ValueError):  # cut at either end
                document = json.loads(line)
                if document["kind"] == "train":
                    return max(0, document["step"] - start)
    return 0
