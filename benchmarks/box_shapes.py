#!/usr/bin/env python
"""Count the shapes that the micro-batches of an epoch of detection have.

    python benchmarks/box_shapes.py DATASET [--images N] [--micro-batch N]

The dataset's images, of all its splits, are repeated to N; only their sizes are used. For the published scales and for
several multiples to which images are padded, a row gives the shapes that come up in the first epoch, the shapes that
are possible, and the mean area of an image with its padding.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.markdown import markdown
from data_pipeline.grouped_order import GroupedOrder
from data_pipeline.manifest import Manifest, open_manifest
from data_pipeline.randomness import Stream, fold, make_key
from data_pipeline.scaled_boxes import ScaledBoxes

SHORT = [(1333, side) for side in range(480, 801, 32)]
SCALES = {
    "800": dict(scales=((1333, 800),)),
    "480 to 800, step 32": dict(scales=tuple(SHORT)),
    "the same, half of the images cropped": dict(
        scales=tuple(SHORT), crop_scales=((4200, 400), (4200, 500), (4200, 600))
    ),
    "640 to 800, any": dict(scales=((1333, 640), (1333, 800)), mode="range"),
}
DIVISORS = (32, 64, 128)


def sizes_of(manifest: Manifest, count: int) -> np.ndarray:
    """(width, height) of the images of all splits, repeated to `count`: int64 [count, 2]."""
    records = [manifest.split(name).records for name in manifest.splits]
    found = np.concatenate([np.stack([split["width"], split["height"]], axis=1) for split in records])
    return np.resize(found.astype(np.int64), (count, 2))


def shapes_of(views: ScaledBoxes, sizes: np.ndarray, micro_batch: int) -> np.ndarray:
    """(height, width) of each micro-batch of the first epoch: [micro-batches, 2]."""
    portrait = sizes[:, 0] < sizes[:, 1]
    half = len(sizes) // (2 * micro_batch) * micro_batch  # an epoch in a step or two
    order = GroupedOrder(0, len(sizes), half, micro_batch, portrait=portrait)
    keys = fold(make_key(0, Stream.CROP, 0), np.arange(len(sizes)))
    draws = [order.draws(step, range(order.micro_batches)) for step in range(order.steps_per_epoch)]
    ids = np.concatenate(draws).reshape(-1, micro_batch)
    return views.shapes(keys[ids], *np.moveaxis(sizes[ids], 2, 0))


def main(arguments: argparse.Namespace) -> None:
    sizes = sizes_of(open_manifest(arguments.dataset), arguments.images)
    rows = []
    for name, settings in SCALES.items():
        counts, areas = [], []
        for divisor in DIVISORS:
            views = ScaledBoxes(test_scale=(1333, 800), divisor=divisor, **settings)
            shapes = shapes_of(views, sizes, arguments.micro_batch)
            counts.append(f"{len(np.unique(shapes, axis=0)):,} of {views.most_shapes:,}")
            areas.append(f"{shapes.prod(axis=1).mean() / 1e6:.2f}")
        rows.append([name, *counts, ", ".join(areas)])
    first, *others = DIVISORS
    padded = [f"multiples of {first}", *(f"of {divisor}" for divisor in others)]
    print(markdown(["scales", *padded, "megapixels an image, with padding"], rows))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", metavar="DATASET", help="a dataset for detection, prepared by launch/prepare.py")
    parser.add_argument("--images", type=int, default=117_000, metavar="N", help="an epoch (default: %(default)s)")
    parser.add_argument("--micro-batch", type=int, default=2, metavar="N", help="default: %(default)s")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_arguments())
