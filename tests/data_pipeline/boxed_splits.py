"""Small splits with boxes, each drawn as a rectangle of its class's colour, and what the loader makes of them."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import simplejpeg

from data_pipeline.config import DataConfig
from data_pipeline.durable import sha256_of
from data_pipeline.grouped_order import GroupedOrder
from data_pipeline.loader import MicroBatch, build_loader, evaluation_batches
from data_pipeline.object_targets import ObjectTargets
from data_pipeline.scaled_boxes import ScaledBoxes
from data_pipeline.split import CATEGORY_IDS, IMAGE, IMAGES, OBJECT, OBJECTS, Annotation, Split
from tests.data_pipeline.shards import write_split

SIZES = [(90, 60), (60, 90), (90, 60), (48, 48), (64, 48), (48, 64), (120, 50), (90, 60), (31, 77), (90, 66), (50, 60)]
COLOURS = np.array([(250, 30, 30), (30, 250, 30), (30, 30, 250), (250, 250, 30)], np.uint8)
GRAY = 120

SCALES = ScaledBoxes(((213, 96), (213, 112), (213, 128)), (213, 128))
CROPS = replace(SCALES, crop_scales=((213, 80), (213, 110)), crop_range=(48, 72))
RANGE = replace(SCALES, scales=((213, 90), (213, 160)), mode="range", divisor=64)


def boxes_of(number: int, width: int, height: int) -> list[tuple[int, int, int, int, int]]:
    """One to four objects (left, top, width, height, label), each in its own quarter: labels differ."""
    random = np.random.default_rng(number)
    found = []
    for label in range(4) if number % 5 else (number % 4,):
        w, h = random.integers(8, width // 2 - 1), random.integers(8, height // 2 - 1)
        x = random.integers(0, width // 2 - w) + (label % 2) * (width // 2)
        y = random.integers(0, height // 2 - h) + (label // 2) * (height // 2)
        found.append((*map(int, (x, y, w, h)), label))
    return found


def picture(boxes: Sequence[tuple], width: int, height: int) -> np.ndarray:
    """Rectangles on gray, uint8 [height, width, 3]."""
    image = np.full((height, width, 3), GRAY, np.uint8)
    for x, y, w, h, label in boxes:
        image[max(0, y) : y + h, max(0, x) : x + w] = COLOURS[label]
    return image


def jpeg(image: np.ndarray) -> bytes:
    return simplejpeg.encode_jpeg(image, quality=98, colorsubsampling="444")


def add_objects(split: Split, objects: Sequence[Sequence[tuple]], classes: int = len(COLOURS)) -> Split:
    """A split with objects, rows of OBJECT for each sample. They are not in its manifest."""
    counts = [len(rows) for rows in objects]
    images = np.zeros(len(objects), IMAGE)
    images["first"], images["count"], images["image_id"] = np.cumsum([0, *counts[:-1]]), counts, range(len(objects))
    tables = {
        OBJECTS: np.array([row for rows in objects for row in rows], OBJECT),
        IMAGES: images,
        CATEGORY_IDS: np.arange(classes),
    }
    annotations = dict(split.annotations)
    for name, table in tables.items():
        path = split.folder / f"{split.name}.{name}.npy"
        np.save(path, table)
        annotations[name] = Annotation(path.name, path.stat().st_size, sha256_of(path))
    return replace(split, annotations=annotations)


def write(folder: Path, boxes: Sequence[Sequence[tuple]] | None = None, sizes=SIZES) -> Split:
    """A split of drawn images; `boxes` of each (left, top, width, height, label), by default `boxes_of`."""
    boxes = boxes or [boxes_of(number, *size) for number, size in enumerate(sizes)]
    images = [jpeg(picture(some, *size)) for some, size in zip(boxes, sizes, strict=True)]
    split = write_split(folder, images, labels=[0] * len(images), per_shard=4)
    rows = [
        [(x, y, w, h, w * h, label, 0, 100 * number + at) for at, (x, y, w, h, label) in enumerate(some)]
        for number, some in enumerate(boxes)
    ]
    return add_objects(split, rows)


def config_of(split: Split, **changes) -> DataConfig:
    return DataConfig(
        **{"path": str(split.folder), "workers": 2, "prefetch": 2, "interpolation": "bilinear", **changes}
    )


def train(
    split: Split, count: int = 20, *, views=SCALES, batch=(4, 2), seed: int = 0, first: int = 0, **options
) -> list[MicroBatch]:
    place = {name: options.pop(name) for name in ("rank", "world") if name in options}
    order = GroupedOrder.of(split, seed, *batch)
    targets = ObjectTargets(split, training=True)
    with build_loader(config_of(split, **options), views, split, order, targets, start_step=first, **place) as loader:
        return list(islice(loader, count))


def evaluate(split: Split, batch_size: int = 2, rank: int = 0, world: int = 1, *, views=SCALES, **options) -> list:
    targets, data = ObjectTargets(split, training=False), config_of(split, **options)
    return list(evaluation_batches(data, views, split, batch_size, targets, rank=rank, world=world))
