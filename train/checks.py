"""What a run checks before anything expensive; the doctor, submit and plan check it before a run.

Light: without torch.
"""

import contextlib
import os

from data_pipeline.manifest import FILE_NAME, Manifest, open_manifest
from data_pipeline.order import Order
from train.checkpoint.info import CheckpointError, list_checkpoints, read_info
from train.checkpoint.init_from import check_source
from train.checkpoint.resume_point import Resume, settings_of
from train.config import Config, ConfigError


def check_start(config: Config, rank: int, world: int, resume: Resume) -> None:
    """Raise ConfigError if `world` ranks cannot share a step, the first weights are missing, or the run's
    checkpoint is of other settings: needs no dataset.
    """
    sizes = config.train
    order = Order(sizes.seed, sizes.global_batch, sizes.global_batch, config.smallest_micro_batch)
    try:
        order.share(rank, world)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    check_source(config, resume)
    check_resume(config, resume)


def check_resume(config: Config, resume: Resume) -> None:
    """Raise ConfigError if the run may not go on from its newest checkpoint, or has one although it must not.

    The dataset is not compared, and no shard is read: `restore` does so.
    """
    if resume.never and list_checkpoints(resume.checkpoints):
        raise ConfigError(
            f"{resume.checkpoints} already has checkpoints; resume them (--resume auto) or choose another --output"
        )
    if resume.checkpoint and (resume.checkpoint / "checkpoints").is_dir():
        raise ConfigError(
            f"--resume {resume.checkpoint} is a run's folder: name one of its checkpoints: "
            f"{resume.checkpoint}/checkpoints/step_N"
        )
    for path in resume.candidates():
        with contextlib.suppress(CheckpointError):
            info = read_info(path)
            if config.train.micro_batch == "auto":  # the run takes its checkpoint's
                config = config.with_micro_batch(settings_of(path, info).train.micro_batch)
            resume.check_settings(path, info, config)
            return


def checked_order(config: Config, manifest: Manifest) -> Order:
    """The order of the run's samples. Raises ConfigError if a step takes more than there are, or the warm-up is not
    shorter than the run.
    """
    try:
        order = config.order(manifest.split("train"))
    except ValueError as error:
        raise ConfigError(f"{config.data.path}: {error}") from error
    config.check_warmup(order.steps_per_epoch)
    return order


def visible_dataset(config: Config) -> Manifest | None:
    """The dataset, opened, if its folder is seen from this machine. Raises ConfigError if it is none for the task."""
    if not os.path.isfile(os.path.join(config.data.path, FILE_NAME)):
        return None
    manifest = open_manifest(config.data.path)
    config.check_dataset(manifest)
    return manifest
