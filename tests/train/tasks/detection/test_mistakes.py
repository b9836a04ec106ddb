"""The first mistake of an image: its kind against hotcoco's counts, and what counts as one."""

import collections

import numpy as np
import pytest

from tests.train.tasks.detection.coco_cases import detections_of, objects_of, random_case
from train.tasks.detection.coco import KINDS, coco_scores
from train.tasks.detection.mistakes import Mistake, first_mistake

NAMES = [f"class {label}" for label in range(6)]


@pytest.mark.parametrize("seed", range(3))
def test_kinds_are_counted_as_hotcoco_counts_them(seed):
    """Of one detection in an image, and of a second one of the same object, which is then a duplicate."""
    truth, detections = random_case(seed, images=400, crowds=0.0, most=2)
    _, first = np.unique(detections["image"], return_index=True)
    single = detections[first]
    kinds = collections.Counter()
    starts = dict(zip(truth.ids.tolist(), np.cumsum(truth.counts) - truth.counts, strict=True))
    counts = dict(zip(truth.ids.tolist(), truth.counts, strict=True))
    for row in single:
        number = int(row["image"])
        objects = truth.objects[starts[number] : starts[number] + counts[number]]
        twice = np.repeat(row[None], 2)
        mistake = first_mistake(objects, twice[:1])
        kinds[mistake.kind if mistake else "right"] += 1
        if mistake is None:
            again = first_mistake(objects, twice)
            kinds["duplicate"] += again.kind == "duplicate" and again.row == 1
            assert objects["label"][again.other] == row["label"] and again.iou >= 0.5
        elif mistake.other is None:
            assert mistake.kind == "background"
        else:
            same = objects["label"][mistake.other] == row["label"]
            assert same == (mistake.kind == "place") or mistake.kind == "both"
            assert mistake.iou >= 0.5 if mistake.kind == "class" else 0.1 <= mistake.iou
    expected = coco_scores(truth, single, NAMES).counts
    assert {kind: kinds[kind] for kind in KINDS if kind not in ("missed", "duplicate")} == {
        kind: count for kind, count in expected.items() if kind not in ("missed", "duplicate")
    }
    assert kinds["duplicate"] == kinds["right"] > 20 and min(expected["class"], expected["place"]) > 5


def test_the_first_mistake_comes_after_right_detections():
    boxes = np.array([[10.0, 10, 50, 50], [120, 10, 50, 50]])
    objects = objects_of(boxes, np.array([0, 1]))
    found = detections_of(np.zeros(4), np.concatenate([boxes, boxes]), np.array([0.9, 0.8, 0.7, 0.6]), [0, 1, 1, 1])
    mistake = first_mistake(objects, found)
    assert (mistake.row, mistake.kind, mistake.other, mistake.iou) == (2, "class", 0, 1.0)
    assert first_mistake(objects, found[:2]) is None and first_mistake(objects, found[:0]) is None
    assert first_mistake(objects[:0], found) == Mistake(0, "background", None, 0.0)
    assert first_mistake(objects[:0], found[:0]) is None


def test_half_of_an_object_is_enough():
    """An IoU of 0.5, to the bit."""
    objects = objects_of(np.array([[0.0, 0, 40, 40]]), np.array([0]))
    found = detections_of(np.zeros(2), np.array([[0.0, 0, 40, 20]] * 2), np.array([0.9, 0.8]), np.zeros(2))
    assert first_mistake(objects, found[:1]) is None
    assert first_mistake(objects, found) == Mistake(1, "duplicate", 0, 0.5)
    found["label"] = 1
    assert first_mistake(objects, found) == Mistake(0, "class", 0, 0.5)


def test_detections_in_a_crowd_are_no_mistakes():
    crowd = np.concatenate(
        [
            objects_of(np.array([[0.0, 0, 200, 200]]), np.array([0]), crowd=1),
            objects_of(np.array([[10.0, 10, 30, 30]]), np.array([0])),
        ]
    )
    inside = np.array([[10.0, 10, 30, 30], [50, 50, 30, 30]])
    found = detections_of(np.zeros(2), inside, np.array([0.9, 0.8]), np.zeros(2))
    assert first_mistake(crowd, found) is first_mistake(crowd, found[[0, 0]]) is None  # found twice
    found["label"] = 1
    assert first_mistake(crowd[:1], found).kind == "background"
