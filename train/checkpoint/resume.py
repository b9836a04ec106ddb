"""Which checkpoint a run starts from, and whether it may."""

import contextlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist

from data_pipeline.faults import StorageError, retried
from data_pipeline.manifest import Manifest
from data_pipeline.order import Order
from train.checkpoint.format import load_checkpoint
from train.checkpoint.info import CheckpointInfo, evaluated, first_sound, list_checkpoints, step_of
from train.checkpoint.resume_point import Resume, settings_of
from train.config import Config, ConfigError
from train.engine.deepspeed_engine import Engine
from train.engine.ema import Ema


@dataclass(frozen=True)
class Restored:
    """What a start goes on from.

    step: 0 without a checkpoint. path, info: the checkpoint and its manifest. elsewhere: whether it lies in another
    folder than the run's own. notes: sentences for the log.
    best: score of the best checkpoint in the run's folder up to that step. began: see CheckpointInfo; for the
    checkpoints that this start will save.
    """

    step: int = 0
    path: Path | None = None
    info: CheckpointInfo | None = None
    notes: list[str] = field(default_factory=list)
    best: float | None = None
    began: str | None = None
    elsewhere: bool = False


def restore(
    resume: Resume, config: Config, manifest: Manifest, order: Order, engine: Engine, ema: Ema | None
) -> Restored:
    """Load the checkpoint that `resume` asks for; every rank calls this and gets the same.

    Raises ConfigError if the checkpoint cannot or may not be used, StorageError if its disk does not answer; it never
    starts anew instead.
    """
    # Rank 0 reads and hashes; all ranks get its result or its error.
    result: list = [None]
    if dist.get_rank() == 0:
        try:
            result[0] = _choose(resume, config, manifest, order)
        except (ConfigError, StorageError) as error:
            result[0] = error
    dist.broadcast_object_list(result)
    if isinstance(result[0], Exception):
        raise result[0]
    restored = result[0]
    if restored.path is not None:
        load_checkpoint(restored.path, restored.info, engine, ema)
    return restored


def _choose(resume: Resume, config: Config, manifest: Manifest, order: Order) -> Restored:
    checkpoints = resume.checkpoints
    possible = resume.candidates()
    path, info, skipped = first_sound(possible)
    if path is None:
        if not skipped:
            return Restored()
        if resume.checkpoint is None:
            raise ConfigError(f"no checkpoint in {checkpoints} is sound ({skipped[0]}); remove them to start again")
        raise ConfigError(skipped[-1])
    notes = []
    if skipped:
        notes = [f"skipped a damaged checkpoint: {sentence}" for sentence in skipped]
        notes.append(f"going back to {path} instead costs {step_of(possible[0]) - info.step} steps")
    others = []
    if info.dataset != manifest.split("train").identity:
        others = [f"data.path ({info.config['data']['path']} → {config.data.path}: other images or labels)"]
    changes = resume.check_settings(path, info, config, *others)
    notes += [f"changed since the checkpoint: {item}" for item in changes]
    elsewhere = not resume.is_own(path)
    step = _converted(path, info, manifest, order, elsewhere=elsewhere)
    if step != info.step:
        notes.append(f"step {info.step}, the end of epoch {step // order.steps_per_epoch}, is step {step} from here on")
    began = info.began
    if resume.checkpoint is not None and path == possible[-1]:  # not a later one of this run
        began = resume.name_of(path)
        # The next start must not mistake the remaining checkpoints for this run's newest.
        own = list_checkpoints(checkpoints)
        notes += _set_aside(own if elsewhere else [other for other in own if step_of(other) > info.step])
    elif resume.checkpoint is not None:
        notes.append(
            f"this run began at {resume.checkpoint} before: it goes on from {path}. To begin there again, take "
            "another --output"
        )
    best = next((score for _, score in evaluated(checkpoints, until=step)), None)
    return Restored(step, path, info, notes, best, began, elsewhere)


def _converted(path: Path, info: CheckpointInfo, manifest: Manifest, order: Order, *, elsewhere: bool) -> int:
    """The step to go on from: the checkpoint's, or, if an epoch now has another number of steps, the same epoch's end.

    elsewhere: the run begins with a checkpoint of another folder, so that no checkpoint in its own folder counts the
    former steps.
    """
    before = info.steps_per_epoch
    if not before and info.dataset == manifest.split("train").identity:
        before = order.samples // settings_of(path, info).train.global_batch
    if before == order.steps_per_epoch:
        return info.step
    if not before:
        raise ConfigError(
            f"{path} is of another dataset, and does not say how many steps an epoch had: take it as model.init_from"
        )
    what = (
        f"{path}: an epoch had {before} steps there, and has {order.steps_per_epoch} with this train.global_batch "
        "and dataset"
    )
    if not elsewhere:
        raise ConfigError(f"{what}; go on in a new folder: --output NEW --resume {path} --resume-with-changes")
    if info.step % before:
        raise ConfigError(f"{what}; that can be gone on from at an epoch's end alone, and step {info.step} is none")
    return info.step // before * order.steps_per_epoch


def _set_aside(paths: Iterable[Path]) -> list[str]:
    """Rename checkpoints that the run will not continue; returns sentences for the log."""
    notes = []
    for path in paths:
        aside, number = path.with_name(f"superseded_{path.name}"), 1
        while aside.exists():
            number += 1
            aside = path.with_name(f"superseded_{path.name}_{number}")
        retried(lambda old=path, new=aside: os.rename(old, new), str(path))
        notes.append(f"{path} is behind this start: renamed to {aside.name}")
    return notes


def lost_steps(metrics: Path, start: int) -> int:
    """The number of steps after `start` that metrics.jsonl has from an earlier start; they will be taken again."""
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
