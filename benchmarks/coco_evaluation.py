#!/usr/bin/env python
"""Time of COCO's evaluation: hotcoco, as this project calls it, beside pycocotools, in turns on the same detections.

    python benchmarks/coco_evaluation.py [--images 5000] [--classes 80] [--rounds 3] [--json FILE]

Objects and detections are random, about as many as on COCO's val split. Both begin with arrays in memory, and their
twelve numbers must be equal to the bit.
"""

import argparse
import contextlib
import io
import json
import statistics
import sys
import time
from datetime import date
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.environment import machine, versions
from benchmarks.markdown import markdown

OBJECTS, DETECTIONS = 7, 48  # of an image, on average


def random_split(images: int, classes: int, seed: int = 0) -> tuple:
    """(train.tasks.detection.coco.Truth, FOUND) of images of 640 x 480."""
    from data_pipeline.split import OBJECT
    from train.tasks.detection.coco import BOX, FOUND, Truth

    random = np.random.default_rng(seed)
    counts = random.poisson(OBJECTS, images)
    objects = np.zeros(counts.sum(), OBJECT)
    near = random.integers(0, 2 * DETECTIONS - 2 * OBJECTS + 1, images)
    owners = np.concatenate([np.repeat(np.arange(images), counts), np.repeat(np.arange(images), near)])
    found = np.zeros(len(owners), FOUND)
    sides = np.exp(random.uniform(2, 5.5, (len(owners), 2)))
    boxes = np.column_stack([random.uniform(0, 600, len(owners)), random.uniform(0, 440, len(owners)), sides])
    noise = random.normal(0, 4, boxes.shape)
    noise[:, 2:] = np.abs(noise[:, 2:])
    for place, name in enumerate(BOX):
        objects[name], found[name] = boxes[: len(objects), place], boxes[:, place] + noise[:, place]
    objects["label"], objects["id"] = random.integers(0, classes, len(objects)), 1 + np.arange(len(objects))
    objects["area"] = objects["width"] * objects["height"] * random.uniform(0.4, 1, len(objects))
    objects["crowd"] = random.random(len(objects)) < 0.01
    found["label"] = random.integers(0, classes, len(found))
    found["label"][: len(objects)] = objects["label"]
    found["image"], found["score"] = owners, random.random(len(found))
    found = found[np.lexsort((-found["score"], found["image"]))]
    ids = np.arange(images)
    return Truth(ids, ids + 1, counts, objects), found


def pycocotools_scores(truth: dict, found: np.ndarray) -> list[float]:
    """The twelve numbers by pycocotools. found: float64 [d, 7], as its loadRes takes it."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        dataset = COCO()
        dataset.dataset = truth
        dataset.createIndex()
        evaluation = COCOeval(dataset, dataset.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist()


def source_of(truth, classes: int) -> dict:
    """The objects as COCO's dict."""
    owners = np.repeat(truth.image_ids, truth.counts).tolist()
    annotations = [
        {"id": number, "image_id": image, "category_id": label + 1, "bbox": box, "area": area, "iscrowd": crowd}
        for image, (*box, area, label, crowd, number) in zip(owners, truth.objects.tolist(), strict=True)
    ]
    return {
        "images": [{"id": number, "width": 640, "height": 480} for number in truth.image_ids.tolist()],
        "categories": [{"id": label + 1, "name": str(label)} for label in range(classes)],
        "annotations": annotations,
    }


def main(arguments: argparse.Namespace) -> None:
    from train.tasks.detection.coco import BOX, coco_scores, columns

    truth, found = random_split(arguments.images, arguments.classes)
    classes = [str(label) for label in range(arguments.classes)]
    source = source_of(truth, arguments.classes)
    table = np.column_stack([truth.image_ids[found["image"]], columns(found, [*BOX, "score"]), found["label"] + 1.0])
    seconds: dict[str, list[float]] = {"hotcoco": [], "pycocotools": []}
    for number in range(arguments.rounds):
        began = time.perf_counter()
        ours = [*coco_scores(truth, found, classes).values.values()]
        middle = time.perf_counter()
        theirs = pycocotools_scores(source, table)
        seconds["hotcoco"].append(middle - began)
        seconds["pycocotools"].append(time.perf_counter() - middle)
        assert ours == theirs, (ours, theirs)
        print(f"round {number + 1}: {seconds['hotcoco'][-1]:.2f} s, {seconds['pycocotools'][-1]:.2f} s", flush=True)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rows = [[name, f"{value:.2f}", f"{medians['pycocotools'] / value:.0f}"] for name, value in medians.items()]
    print(markdown(["", "seconds", "times as fast as pycocotools"], rows))
    if arguments.json:
        about = {
            "command": f"python benchmarks/coco_evaluation.py --images {arguments.images} --classes "
            f"{arguments.classes} --rounds {arguments.rounds}",
            "date": date.today().isoformat(),
            "machine": machine(),
            **versions(),
            "images": arguments.images,
            "classes": arguments.classes,
            "objects": len(truth.objects),
            "detections": len(found),
            "scores": ours,
            "seconds": {name: [round(value, 3) for value in values] for name, values in seconds.items()},
        }
        arguments.json.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    main(parser.parse_args())
