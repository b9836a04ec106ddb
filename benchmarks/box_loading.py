#!/usr/bin/env python
"""Load images with boxes at 800 x 1333 pixels, beside torchvision's transforms for detection.

    python benchmarks/box_loading.py DATASET [--rounds N] [--json FILE]

All ways begin with the bytes of JPEGs in memory, resize to 800 pixels on the short side and at most 1333 on the long
one (bilinear, with antialiasing), mirror half of the images, and give uint8 pixels with their boxes, on one thread. In
a round they run one after the other, and what is compared is images per second of CPU time. This data path also pads
the images of a micro-batch to one shape, in one tensor; torchvision's are single tensors.
"""

import argparse
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks.environment import machine, versions
from benchmarks.measure import interleave, rates_table, summary
from data_pipeline.backends.stored import stored_in_shards
from data_pipeline.decode import decode_batch
from data_pipeline.grouped_order import GroupedOrder
from data_pipeline.manifest import open_manifest
from data_pipeline.object_targets import ObjectTargets
from data_pipeline.objects import ObjectTable
from data_pipeline.randomness import Stream, fold, make_key
from data_pipeline.scaled_boxes import ScaledBoxes
from data_pipeline.split import Split

SCALE = (1333, 800)
MICRO_BATCH = 2
UNIT = "img/s/core"


class Boxes:
    """The images of a split's first epoch, without those that fill no micro-batch."""

    def __init__(self, split: Split):
        self.split, self.table = split, ObjectTable(split)
        self.encoded, failures = stored_in_shards(split).read(np.arange(split.samples))
        assert not failures, failures
        self.order = GroupedOrder.of(split, 0, MICRO_BATCH, MICRO_BATCH)
        self.batches = [self.order.ids(step) for step in range(self.order.steps_per_epoch)]
        self.ids = np.concatenate(self.batches).tolist()

    def ours(self) -> Iterator[tuple[np.ndarray, dict[str, torch.Tensor]]]:
        """Pixels and targets of all micro-batches, as the loader makes them."""
        views, records = ScaledBoxes((SCALE,), SCALE), self.split.records
        targets = ObjectTargets(self.split, training=True)
        keys = fold(make_key(0, Stream.CROP, 0), np.arange(self.split.samples))
        for ids in self.batches:
            widths, heights = records["width"][ids], records["height"][ids]
            shapes = views.shapes(keys[ids][None], widths[None], heights[None])
            candidates = views.training(keys[ids], widths, heights, shapes.repeat(len(ids), axis=0))
            shape = tuple(shapes[0].tolist())
            cut = targets.read(ids, candidates, shape)
            encoded, sizes = [self.encoded[number] for number in ids], np.stack([widths, heights], axis=1)
            pixels = np.empty((len(ids), *shape, 3), np.uint8)
            failures = decode_batch(encoded, sizes, cut.windows, shape, "bilinear", pixels)
            assert not failures, failures
            yield pixels, targets.collate(cut.targets)

    def torchvision(self, kind: str) -> Callable[[], None]:
        """As its reference transforms. kind: "pil" resizes Pillow's images, "tensor" tensors of them, "jpeg" tensors
        that torchvision has decoded.
        """
        from PIL import Image
        from torchvision import tv_tensors
        from torchvision.io import ImageReadMode, decode_jpeg
        from torchvision.transforms import v2

        resize = [v2.RandomShortestSize(min(SCALE), max(SCALE)), v2.RandomHorizontalFlip()]
        first = [v2.PILToTensor()] if kind == "tensor" else []
        last = [v2.PILToTensor()] if kind == "pil" else []
        transform = v2.Compose([*first, *resize, *last, v2.SanitizeBoundingBoxes()])
        data = [torch.frombuffer(bytearray(encoded), dtype=torch.uint8) for encoded in self.encoded]

        def run() -> None:
            for number in self.ids:
                if kind == "jpeg":
                    image = decode_jpeg(data[number], ImageReadMode.RGB)
                    height, width = image.shape[1:]
                    image = tv_tensors.Image(image)
                else:
                    image = Image.open(io.BytesIO(self.encoded[number])).convert("RGB")
                    width, height = image.size
                objects = self.table.of(number)
                corner = np.stack([objects["x"], objects["y"], objects["width"], objects["height"]], axis=1)
                boxes = tv_tensors.BoundingBoxes(torch.from_numpy(corner), format="XYWH", canvas_size=(height, width))
                target = {"boxes": boxes, "labels": torch.from_numpy(objects["label"].astype(np.int64))}
                transform(image, target)

        return run

    def decoding(self) -> None:
        import simplejpeg

        for number in self.ids:
            simplejpeg.decode_jpeg(self.encoded[number], colorspace="RGB")


def exhaust(batches: Iterator) -> None:
    for _ in batches:
        pass


def main(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = Boxes(open_manifest(arguments.dataset).split("train"))
    base = "torchvision v2, resizing PIL images"
    ways = {
        "this data path": lambda: exhaust(images.ours()),
        base: images.torchvision("pil"),
        "torchvision v2, resizing tensors": images.torchvision("tensor"),
        "torchvision v2, its own decoder and tensors": images.torchvision("jpeg"),
        "bare full decode (libjpeg-turbo)": images.decoding,
    }
    rows = summary(interleave(ways, len(images.ids), arguments.rounds), base)
    print(f"{len(images.ids)} images, {arguments.rounds} rounds\n{rates_table(rows, UNIT, base)}")
    if arguments.json:
        about = {"command": " ".join(sys.argv), "date": date.today().isoformat(), "machine": machine(), **versions()}
        load = {
            "processes_waiting": round(os.getloadavg()[0], 1),
            "images": len(images.ids),
            "rounds": arguments.rounds,
        }
        result = {**about, **load, "unit": UNIT, "base": base, "rows": rows}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", metavar="DATASET", help="a prepared dataset of detection")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_arguments())
