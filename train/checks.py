"""What a run checks before anything expensive; the doctor, submit and plan check it before a run.

Light: without torch.
"""

import os

from data_pipeline.manifest import FILE_NAME, Manifest, open_manifest
from data_pipeline.order import Order
from train.checkpoint.init_from import check_source
from train.checkpoint.resume_point import Resume
from train.config import Config, ConfigError


def check_start(config: Config, rank: int, world: int, resume: Resume) -> None:
    """Raise ConfigError if `world` ranks cannot share a step, or the first weights are missing: needs no dataset."""
    sizes = config.train
    order = Order(sizes.seed, sizes.global_batch, sizes.global_batch, config.smallest_micro_batch)
    try:
        order.share(rank, world)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    check_source(config, resume)


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
