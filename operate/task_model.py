"""A config's task, and its model on the meta device, for tools that may run where the dataset is not."""

import torch
import torch.distributed as dist
from torch import nn

from data_pipeline.manifest import Manifest
from train.config import Config
from train.engine.deepspeed_engine import DTYPES
from train.tasks.base import Task, build_task

CLASSES = 1000  # assumed without a dataset: ImageNet's


def task_of(config: Config, manifest: Manifest | None = None) -> Task:
    """The config's task for the dataset; without a manifest, for a dataset like ImageNet."""
    return build_task(config, manifest.classes) if manifest else _numbered_classes(config, CLASSES)


def agreed_task(config: Config, manifest: Manifest | None, device: torch.device) -> Task:
    """The same task on all ranks, of which some may lack the dataset; every rank calls this."""
    classes = torch.tensor(len(manifest.classes) if manifest else 0, device=device)
    dist.all_reduce(classes, op=dist.ReduceOp.MAX)
    return _numbered_classes(config, int(classes) or CLASSES)


def meta_model(task: Task) -> nn.Module:
    """The task's model in the precision that it is computed in, on the meta device."""
    with torch.device("meta"):
        return task.build_model().to(DTYPES[task.config.train.precision])


def _numbered_classes(config: Config, count: int) -> Task:
    return build_task(config, [str(number) for number in range(count)])
