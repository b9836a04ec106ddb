"""Which checkpoint a run starts from, and whether it may."""

from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist

from data_pipeline.manifest import Manifest
from train.checkpoint import CheckpointInfo, list_checkpoints, load_checkpoint, newest_valid, validate
from train.config import Config, ConfigError, differences, parse_config
from train.ema import Ema
from train.engine import Engine


@dataclass(frozen=True)
class Restored:
    """The step to go on from (0 without a checkpoint), the checkpoint, and sentences for the log."""

    step: int = 0
    path: Path | None = None
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
    return Restored(info.step, path, notes)


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
    notes = [f"skipped a damaged checkpoint: {sentence}" for sentence in skipped]
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
    return path, info, notes
