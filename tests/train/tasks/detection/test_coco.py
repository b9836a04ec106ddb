"""COCO's scores against pycocotools, to the last bit, over the results file; kinds of errors."""

import json

import numpy as np
import pytest

from tests.train.tasks.detection.coco_cases import as_json, detections_of, objects_of, pycocotools_of, random_case
from train.tasks.detection.coco import KINDS, NAMES, Truth, coco_scores, write_results


def names(classes: int) -> list[str]:
    return [f"class {label}" for label in range(classes)]


def compare(truth: Truth, detections: np.ndarray, classes: int, tmp_path) -> None:
    """Every number of the two evaluations; pycocotools reads what write_results writes."""
    scores = coco_scores(truth, detections, names(classes))
    source = as_json(truth, classes)
    write_results(tmp_path / "results.json", truth, [row["id"] for row in source["categories"]], detections)
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results) == len(detections)
    oracle = pycocotools_of(source, results)
    for name, expected in zip(NAMES, oracle.stats.tolist(), strict=True):
        assert scores.values[name] == expected or (expected == -1 and np.isnan(scores.values[name])), name
    for label in range(classes):
        precision = oracle.eval["precision"][:, :, label, 0, 2]
        for found, values in ((scores.by_class, precision), (scores.by_class_50, precision[0])):
            values = values[values > -1]
            assert found[label] == values.mean() if values.size else np.isnan(found[label])


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(digits=7),
        dict(digits=0, classes=2),  # hardly any scores but 0 and 1
        dict(crowds=0.6),
        dict(images=1),
        dict(images=8, most=400, classes=2),  # more than 100 detections of a class in an image
        dict(images=120, classes=40, most=60),
    ],
    ids=lambda settings: ",".join(f"{key}={value}" for key, value in settings.items()) or "plain",
)
def test_every_number_is_pycocotools(settings, tmp_path):
    for seed in range(3):
        truth, detections = random_case(seed, **settings)
        compare(truth, detections, settings.get("classes", 6), tmp_path)


def test_no_detections_and_no_objects(tmp_path):
    truth, detections = random_case(0)
    compare(truth, detections[:0], 6, tmp_path)
    assert coco_scores(truth, detections[:0], names(6)).values["ap"] == 0.0
    nothing = Truth(truth.ids, truth.image_ids, np.zeros_like(truth.counts), truth.objects[:0])
    compare(nothing, detections, 6, tmp_path)
    found = coco_scores(nothing, detections, names(6))
    assert np.isnan(list(found.values.values())).all() and np.isnan(found.by_class).all()


def test_a_class_without_objects_is_left_out_of_the_mean():
    truth, detections = random_case(3)
    scores = coco_scores(truth, detections, names(6))
    assert np.isnan(scores.by_class[5]) and np.isfinite(scores.by_class[:5]).all()
    assert scores.values["ap"] == pytest.approx(np.mean(scores.by_class[:5]), rel=1e-12)


def test_the_order_of_equal_scores_matters_and_is_kept(tmp_path):
    """Two detections of one object with one score: which comes first decides what the object is matched with."""
    box = np.array([[10.0, 10, 50, 50]])
    truth = Truth(np.array([0]), np.array([9]), np.array([1]), objects_of(box, np.array([0])))
    near = np.concatenate([box, box + [[0, 0, 20, 0]], box + 200])
    found = detections_of(np.zeros(3), near, np.full(3, 0.5), np.zeros(3))
    other = found[[2, 1, 0]]
    for detections in (found, other):
        compare(truth, detections, 1, tmp_path)
    scores = [coco_scores(truth, detections, ["a"]).values["ap"] for detections in (found, other)]
    assert scores[0] > 0.99 and scores[1] < 0.5


def test_an_annotation_of_id_0_can_be_found():
    """pycocotools marks a match with the annotation's id, and 0 is its mark for none."""
    box = np.array([[10.0, 10, 50, 50]])
    truth = Truth(np.array([0]), np.array([9]), np.array([1]), objects_of(box, np.array([0]), id=0))
    found = detections_of(np.zeros(1), box, np.ones(1), np.zeros(1))
    assert coco_scores(truth, found, ["a"]).values["ap"] > 0.99
    results = [{"image_id": 9, "category_id": 1, "bbox": box[0].tolist(), "score": 1.0}]
    assert pycocotools_of(as_json(truth, 1), results).stats[0] == 0.0


def test_errors_are_counted_by_kind():
    box = np.array([[10.0, 10, 50, 50], [120, 10, 50, 50], [10, 120, 50, 50]])
    truth = Truth(np.array([4]), np.array([1]), np.array([3]), objects_of(box, np.array([0, 1, 0])))
    boxes = np.array(
        [
            [10.0, 10, 50, 50],  # right
            [12, 10, 50, 50],  # again
            [120, 12, 50, 50],  # another class
            [10, 150, 50, 50],  # IoU 0.25
            [150, 10, 50, 50],  # another class, IoU 0.25
            [250, 150, 50, 50],  # nothing is there
        ]
    )
    detections = detections_of(np.full(6, 4), boxes, np.linspace(0.9, 0.4, 6), np.zeros(6))
    scores = coco_scores(truth, detections, names(2))
    assert list(scores.counts) == list(KINDS)
    assert scores.counts == {"class": 1, "place": 1, "both": 1, "duplicate": 1, "background": 1, "missed": 0}
    assert scores.gains["place"] > 0
