"""COCO's scores of detections, by hotcoco, whose numbers equal pycocotools' to the last bit. Without torch.

Objects and detections are rows of arrays, of which hotcoco makes its own tables: no Python object per row. Where
pycocotools has -1 (a class, or a size, without objects) a score is NaN. (One difference: pycocotools counts the
detection of an object whose annotation has id 0 as false.)
"""

import io
import json
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import hotcoco
import numpy as np

if TYPE_CHECKING:
    from data_pipeline.objects import ObjectTable

# A box in pixels of the stored image. image: the sample's id in its split.
FOUND = np.dtype(
    [
        ("image", "<i8"),
        ("x", "<f8"),
        ("y", "<f8"),
        ("width", "<f8"),
        ("height", "<f8"),
        ("score", "<f8"),
        ("label", "<u4"),
    ]
)
BOX = ["x", "y", "width", "height"]

# COCO's twelve numbers in the order of COCOeval.stats. s, m, l: objects of less than 32 x 32 pixels, up to 96 x 96,
# and larger ones, by their area. ar1, ar10, ar100: recall with so many detections of a class in an image.
NAMES = ("ap", "ap50", "ap75", "aps", "apm", "apl", "ar1", "ar10", "ar100", "ars", "arm", "arl")

# What is wrong with a detection, or that an object has none: TIDE's six kinds (Bolya et al., arXiv 2008.08115, section
# 2.2), and their names in hotcoco.
KINDS = {
    "class": "Cls",
    "place": "Loc",
    "both": "Both",
    "duplicate": "Dupe",
    "background": "Bkg",
    "missed": "Miss",
}


@dataclass(frozen=True)
class Truth:
    """The objects of n images of a split.

    ids: int64 [n], the samples, ascending. image_ids: int64 [n], the source's. counts: int64 [n], objects of each
    image. objects: objects.OBJECT [counts.sum()], in the order of the images.
    """

    ids: np.ndarray
    image_ids: np.ndarray
    counts: np.ndarray
    objects: np.ndarray


def truth_of(table: "ObjectTable", ids: np.ndarray) -> Truth:
    """The objects of the samples `ids`, int64 [n], ascending."""
    rows = [table.of(number) for number in ids.tolist()]
    return Truth(
        ids,
        np.array([table.image_id(number) for number in ids.tolist()], np.int64),
        np.array([len(row) for row in rows], np.int64),
        np.concatenate([*rows, table.of(0)[:0]]),
    )


@dataclass(frozen=True)
class CocoScores:
    """The scores, 0..1; NaN without an object to find.

    values: by NAMES. by_class, by_class_50: float64 [classes], AP and AP50. counts: errors by KINDS, at IoU 0.5. gains:
    by KINDS, by how much AP50 would be higher without the errors of that kind alone.
    """

    values: dict[str, float]
    by_class: np.ndarray
    by_class_50: np.ndarray
    counts: dict[str, int]
    gains: dict[str, float]


def coco_scores(truth: Truth, detections: np.ndarray, classes: Sequence[str]) -> CocoScores:
    """Scores of `detections`, FOUND [d], those of an image in a fixed order.

    Equal scores stay in the given order within an image and in the order of `image_ids` between images, as in
    pycocotools.
    """
    # COCO orders images and classes by their ids. Places in that order take the place of the ids, which may be any
    # integers, also ones that a float does not hold.
    order = np.argsort(truth.image_ids, kind="stable")
    places = np.empty(len(order), np.int64)
    places[order] = np.arange(len(order))
    objects, numbers = truth.objects, range(len(order))
    boxes = columns(objects, BOX)
    dataset = hotcoco.COCO.from_arrays(
        [{"id": number} for number in numbers],
        [{"id": label, "name": str(label)} for label in range(len(classes))],
        np.repeat(places, truth.counts),
        objects["label"].astype(np.int64),
        boxes,
        area=objects["area"].astype(np.float64),
        iscrowd=objects["crowd"].astype(np.int64),
    )
    images = places[np.searchsorted(truth.ids, detections["image"])]
    found = np.column_stack([images, columns(detections, [*BOX, "score"]), detections["label"]])
    evaluation = hotcoco.COCOeval(dataset, dataset.load_res(found), "bbox")
    with redirect_stdout(io.StringIO()):  # summarize prints
        evaluation.run()
    precision = evaluation.eval["precision"][..., 0, -1]  # [thresholds, recalls, classes], of all areas
    errors = evaluation.tide_errors()
    return CocoScores(
        {name: _or_nan(value) for name, value in zip(NAMES, evaluation.stats.tolist(), strict=True)},
        _mean_by_class(precision),
        _mean_by_class(precision[:1]),  # the first threshold is 0.5
        {kind: errors["counts"][name] for kind, name in KINDS.items()},
        {kind: errors["delta_ap"][name] for kind, name in KINDS.items()},
    )


def columns(rows: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Fields of structured rows [n] as float64 [n, len(names)]."""
    return np.column_stack([rows[name].astype(np.float64) for name in names])


def _mean_by_class(precision: np.ndarray) -> np.ndarray:
    """AP of each class: the mean over thresholds and recalls, which are all -1 if the class has no objects."""
    found = [values[values > -1] for values in np.moveaxis(precision, 2, 0)]
    return np.array([values.mean() if values.size else float("nan") for values in found], np.float64)


def _or_nan(value: float) -> float:
    return float("nan") if value == -1 else float(value)


def write_results(path: Path, truth: Truth, category_ids: np.ndarray, detections: np.ndarray) -> None:
    """Write detections as COCO's results file, with the ids of images and categories that the source has."""
    images = truth.image_ids[np.searchsorted(truth.ids, detections["image"])].tolist()
    categories = np.asarray(category_ids)[detections["label"]].tolist()
    rows = zip(images, categories, columns(detections, BOX).tolist(), detections["score"].tolist(), strict=True)
    with open(path, "w") as file:
        for number, (image, category, box, score) in enumerate(rows):
            row = {"image_id": image, "category_id": category, "bbox": box, "score": score}
            file.write(("[\n" if number == 0 else ",\n") + json.dumps(row))
        file.write("\n]\n" if len(detections) else "[]\n")
