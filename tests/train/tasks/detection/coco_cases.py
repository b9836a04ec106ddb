"""Random objects and detections for the tests of scores, and pycocotools' scores of them."""

import contextlib
import io

import numpy as np

from train.tasks.detection.coco import BOX, FOUND, Truth

OBJECT = np.dtype(
    [*((name, "<f8") for name in (*BOX, "area")), ("label", "<u4"), ("crowd", "u1"), ("id", "<i8")]
)  # objects.OBJECT


def random_boxes(random: np.random.Generator, count: int) -> np.ndarray:
    """x, y, width, height, [count, 4]: of all of COCO's sizes, in images of 320 x 240."""
    sides = np.exp(random.uniform(1, 5.3, (count, 2)))
    return np.column_stack([random.uniform(-5, 300, count), random.uniform(-5, 220, count), sides])


def objects_of(boxes: np.ndarray, labels: np.ndarray, **others: object) -> np.ndarray:
    """OBJECT [n]. others: fields that are not the boxes' areas, no crowd, ids from 1."""
    rows = np.zeros(len(boxes), OBJECT)
    for name, column in zip(BOX, boxes.T, strict=True):
        rows[name] = column
    rows["label"], rows["area"], rows["id"] = labels, boxes[:, 2] * boxes[:, 3], 1 + np.arange(len(boxes))
    for name, values in others.items():
        rows[name] = values
    return rows


def detections_of(images: np.ndarray, boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """FOUND [n], by image and falling score."""
    rows = np.zeros(len(boxes), FOUND)
    for name, column in zip(BOX, boxes.T, strict=True):
        rows[name] = column
    rows["image"], rows["score"], rows["label"] = images, scores, labels
    return rows[np.lexsort((-rows["score"], rows["image"]))]


def random_case(
    seed: int,
    images: int = 50,
    classes: int = 6,
    crowds: float = 0.15,
    digits: int = 1,
    most: int = 30,
) -> tuple[Truth, np.ndarray]:
    """Objects of all classes but the last, in images of which some have none, and detections that resemble them.

    digits: of the scores; with few there are ties. most: false detections of an image. The ids of the images are
    neither ascending nor small.
    """
    random = np.random.default_rng(seed)
    counts = random.integers(0, 9, images) * (random.random(images) < 0.8)
    boxes, labels = random_boxes(random, counts.sum()), random.integers(0, classes - 1, counts.sum())
    crowd = random.random(len(boxes)) < crowds
    area = boxes[:, 2] * boxes[:, 3] * random.uniform(0.3, 1, len(boxes))
    objects = objects_of(boxes, labels, area=area, crowd=crowd)
    truth = Truth(np.arange(images) * 2, random.permutation(images) * 10**12 + 2**55, counts, objects)
    places = np.repeat(truth.ids, counts)
    copies = random.integers(0, 3, len(boxes))
    near = np.repeat(boxes, copies, axis=0) + random.normal(0, 4, (copies.sum(), 4))
    near[:, 2:] = np.maximum(near[:, 2:], 1)
    confused = np.where(random.random(len(near)) < 0.2, random.integers(0, classes, len(near)), labels.repeat(copies))
    false = random.integers(0, most + 1, images)
    every_image = np.concatenate([places.repeat(copies), truth.ids.repeat(false)])
    every_box = np.concatenate([near, random_boxes(random, false.sum())])
    every_label = np.concatenate([confused, random.integers(0, classes, false.sum())])
    scores = np.round(random.random(len(every_box)), digits).astype(np.float32)
    return truth, detections_of(every_image, every_box, scores, every_label)


def as_json(truth: Truth, classes: int) -> dict:
    """The truth as the source's JSON has it."""
    ids = np.repeat(truth.image_ids, truth.counts).tolist()
    return {
        "images": [{"id": number, "width": 320, "height": 240} for number in truth.image_ids.tolist()],
        "categories": [{"id": 7 * label + 1, "name": f"class {label}"} for label in range(classes)],
        "annotations": [
            {
                "id": int(row["id"]),
                "image_id": image,
                "category_id": 7 * int(row["label"]) + 1,
                "bbox": [float(row[name]) for name in BOX],
                "area": float(row["area"]),
                "iscrowd": int(row["crowd"]),
            }
            for image, row in zip(ids, truth.objects, strict=True)
        ],
    }


def pycocotools_of(truth: dict, results: list[dict]):
    """pycocotools' COCOeval after `summarize`. results: rows of COCO's results file."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        dataset = COCO()
        dataset.dataset = truth
        dataset.createIndex()
        found = COCO()
        if results:
            found = dataset.loadRes(results)
        else:  # which loadRes does not take
            found.dataset = {**truth, "annotations": []}
            found.createIndex()
        evaluation = COCOeval(dataset, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation
