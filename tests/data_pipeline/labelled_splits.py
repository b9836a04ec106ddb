"""Small splits with label maps, and what the loader makes of them."""

from itertools import islice

import numpy as np
import torch

from data_pipeline.config import DataConfig
from data_pipeline.label_maps import LabelMaps
from data_pipeline.loader import MicroBatch, build_loader, evaluation_batches
from data_pipeline.manifest import open_manifest
from data_pipeline.order import Order
from data_pipeline.split import Split
from data_pipeline.views import ScaledCrops
from tests.data_pipeline.shards import jpeg, png, write_split

SIZES = [(90, 60), (60, 90), (90, 60), (48, 48), (48, 48), (48, 48), (120, 40), (90, 60), (31, 77), (90, 60)]
CLASSES = 5
VIEWS = ScaledCrops((32, 48), (96, 48), (0.5, 2.0), 0.75, 0.5, (96, 48))


def label_map(number: int, width: int, height: int) -> np.ndarray:
    """Blocks of 8 pixels of random classes and of ignored ones."""
    blocks = np.random.default_rng(number).integers(0, CLASSES + 1, (height // 8 + 1, width // 8 + 1))
    labels = np.where(blocks == CLASSES, 255, blocks).astype(np.uint8)
    return labels.repeat(8, 0).repeat(8, 1)[:height, :width]


def images_of(sizes) -> list[bytes]:
    return [jpeg(number, *size) for number, size in enumerate(sizes)]


def maps_of(sizes) -> list[bytes]:
    return [png(label_map(number, *size)) for number, size in enumerate(sizes)]


def write(folder, label_maps=None, sizes=SIZES) -> Split:
    write_split(folder, images_of(sizes), label_maps=label_maps or maps_of(sizes), classes=CLASSES, per_shard=3)
    return open_manifest(folder).split("train")


def config_of(split: Split, **changes) -> DataConfig:
    return DataConfig(**{"path": str(split.folder), "workers": 2, "prefetch": 2, **changes})


def train(split: Split, count: int = 20, *, views=VIEWS, batch=(4, 2), seed: int = 0, **options) -> list[MicroBatch]:
    place = {name: options.pop(name) for name in ("rank", "world") if name in options}
    targets = LabelMaps(split, CLASSES, True, views.cat_max_ratio)
    order = Order(seed, split.samples, *batch)
    with build_loader(config_of(split, **options), views, split, order, targets, **place) as loader:
        return list(islice(loader, count))


def evaluate(split: Split, batch_size: int = 2, rank: int = 0, world: int = 1, **options) -> list:
    targets, data = LabelMaps(split, CLASSES, False), config_of(split, **options)
    return list(evaluation_batches(data, VIEWS, split, batch_size, targets, rank=rank, world=world))


def same(one: MicroBatch, other: MicroBatch, images: bool = True) -> bool:
    return (
        (one.step, one.index, one.bad) == (other.step, other.index, other.bad)
        and np.array_equal(one.draws, other.draws)
        and torch.equal(one.ids, other.ids)
        and (torch.equal(one.images, other.images) or not images)
        and one.targets.keys() == other.targets.keys()
        and all(torch.equal(one.targets[name], other.targets[name]) for name in one.targets)
    )
