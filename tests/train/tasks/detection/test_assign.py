"""The rules of assignment against plain loops over boxes and places, written from mmdetection's description of them."""

import math

import numpy as np
import pytest
import torch

from train.tasks.detection.assign import BACKGROUND, IGNORED, by_overlap, by_range, by_statistics, learned

STRIDES = (8, 16, 32)
SHAPE = (96, 128)  # height, width of the input
BOXES = 7  # of which the last two are not real


def corners() -> list[tuple[int, int, int]]:
    """(x, y, stride) of the places of all levels, finest first, then rows, then columns."""
    height, width = SHAPE
    return [(x, y, stride) for stride in STRIDES for y in range(0, height, stride) for x in range(0, width, stride)]


def anchors(scales, ratios, centre=0.0) -> np.ndarray:
    found = []
    for x, y, stride in corners():
        for ratio in ratios:
            for scale in scales:
                w, h = stride * scale / math.sqrt(ratio), stride * scale * math.sqrt(ratio)
                middle = x + centre * stride, y + centre * stride
                found.append([middle[0] - w / 2, middle[1] - h / 2, middle[0] + w / 2, middle[1] + h / 2])
    return np.array(found, np.float32)


def random_boxes(seed: int, whole: bool) -> tuple[np.ndarray, np.ndarray]:
    """BOXES boxes of many sizes, and which are real. whole: in whole pixels, so that there are equal overlaps."""
    dice = np.random.RandomState(seed)
    sides = np.exp(dice.uniform(np.log(4), np.log(90), (BOXES, 2)))
    start = dice.uniform(0, 1, (BOXES, 2)) * (np.array(SHAPE[::-1]) - sides)
    boxes = np.concatenate([start, start + sides], 1)
    if whole:
        boxes = np.round(boxes / 4) * 4
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 4)
    boxes[1] = boxes[0]  # two equal boxes
    return boxes.astype(np.float32), np.arange(BOXES) < BOXES - 2


def iou(a, b) -> np.float32:
    width = max(np.float32(0), min(a[2], b[2]) - max(a[0], b[0]))
    height = max(np.float32(0), min(a[3], b[3]) - max(a[1], b[1]))
    common = width * height
    return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)


def is_valid(places: np.ndarray, columns: int = 96) -> np.ndarray:
    """As if the image filled only the left columns of the input."""
    return (places[:, 0] + places[:, 2]) / 2 < columns - 0.5


def tensors(*arrays) -> list[torch.Tensor]:
    return [torch.from_numpy(array) for array in arrays]


@pytest.mark.parametrize("whole", [True, False])
def test_retinanet_learns_by_overlap(whole):
    places = anchors([4 * 2 ** (i / 3) for i in range(3)], (0.5, 1.0, 2.0))
    valid = is_valid(places)
    kinds = set()
    for seed in range(6):
        boxes, real = random_boxes(seed, whole)
        expected = np.full(len(places), IGNORED)
        best_of = [max(iou(box, place) for place, ok in zip(places, valid, strict=True) if ok) for box in boxes]
        for a, place in enumerate(places):
            if not valid[a]:
                continue
            values = [iou(box, place) if real[g] else np.float32(-1) for g, box in enumerate(boxes)]
            most = max(values)
            expected[a] = values.index(most) if most >= 0.5 else BACKGROUND if most < np.float32(0.4) else IGNORED
            for g in range(len(boxes)):
                if real[g] and best_of[g] > 0 and values[g] == best_of[g]:
                    expected[a] = g
        found = by_overlap(*tensors(boxes, real, places, valid)).numpy()
        assert np.array_equal(found, expected)
        kinds |= set(found.tolist())
    assert {IGNORED, BACKGROUND, 1, 2, 3, 4} <= kinds <= {IGNORED, BACKGROUND, 0, 1, 2, 3, 4}


@pytest.mark.parametrize("whole", [True, False])
def test_fcos_learns_by_range(whole):
    points = np.array([(x + stride // 2, y + stride // 2) for x, y, stride in corners()], np.float32)
    strides = np.array([stride for *_, stride in corners()], np.int64)
    ranges = {8: (-1, 64), 16: (64, 128), 32: (128, math.inf)}
    levels = set()
    for seed in range(12):
        boxes, real = random_boxes(seed, whole)
        if seed % 2:
            boxes[2] = (0, 0, 128, 96)
        expected = np.full(len(points), BACKGROUND)
        for a, (x, y) in enumerate(points):
            smallest = math.inf
            for g, (x1, y1, x2, y2) in enumerate(boxes):
                sides = (x - x1, y - y1, x2 - x, y2 - y)
                low, high = ranges[int(strides[a])]
                size = (x2 - x1) * (y2 - y1)
                if real[g] and min(sides) > 0 and low <= max(sides) <= high and size < smallest:
                    smallest, expected[a] = size, g
        found = by_range(*tensors(boxes, real, points, strides)).numpy()
        assert np.array_equal(found, expected)
        levels |= set(strides[found >= 0].tolist())
    assert levels == {8, 16}  # no distance in this image is above 128


def test_the_ranges_of_fcos_are_the_published_ones():
    """One box around a point of each level, of growing size: 64, 128, 256 and 512 belong to both neighbours."""
    strides = torch.tensor([8, 16, 32, 64, 128])
    points = torch.full((5, 2), 2000.0)
    expected = {1: [0], 64: [0, 1], 65: [1], 128: [1, 2], 256: [2, 3], 257: [3], 512: [3, 4], 513: [4], 2000: [4]}
    for longest, levels in expected.items():
        box = torch.tensor([[2000.0 - longest, 1999.5, 2000.5, 2000.5]])
        found = by_range(box, torch.tensor([True]), points, strides)
        assert (found == 0).nonzero().flatten().tolist() == levels


@pytest.mark.parametrize(("whole", "columns"), [(True, 96), (False, 32)])
def test_atss_learns_by_statistics(whole, columns):
    """In 32 columns the last level has fewer places than a box has candidates."""
    places = anchors([8], (1.0,))
    valid = is_valid(places, columns)
    strides = np.array([stride for *_, stride in corners()])
    centres = (places[:, :2] + places[:, 2:]) / 2
    counts = [int((strides == stride).sum()) for stride in STRIDES]
    starts = [0, *np.cumsum(counts).tolist()]
    taken = 0
    for seed in range(8):
        boxes, real = random_boxes(seed, whole)
        best, expected = np.full(len(places), -1.0), np.where(valid, BACKGROUND, IGNORED)
        for g, box in enumerate(boxes):
            middle = (box[:2] + box[2:]) / 2
            candidates = []
            for start, end in zip(starts[:-1], starts[1:], strict=True):
                order = sorted(
                    (a for a in range(start, end) if valid[a]),
                    key=lambda a: (float(((middle - centres[a]) ** 2).sum()), a),
                )
                candidates += order[:9]
            values = [iou(box, places[a]) for a in candidates]
            threshold = np.mean(values) + np.std(values, ddof=1)
            for a, value in zip(candidates, values, strict=True):
                x, y = centres[a]
                inside = min(x - box[0], y - box[1], box[2] - x, box[3] - y) > 0.01
                if real[g] and value >= threshold and inside and value > best[a]:
                    best[a], expected[a] = value, g
        found = by_statistics(*tensors(boxes, real, places, valid), starts).numpy()
        assert np.array_equal(found, expected)
        taken += int((found >= 0).sum())
    assert taken > 30


@pytest.mark.parametrize("rule", ["overlap", "range", "statistics"])
def test_an_image_without_boxes_is_background(rule):
    """All rows fill the table only."""
    boxes, real = torch.zeros(8, 4), torch.zeros(8, dtype=torch.bool)
    (places,) = tensors(anchors([8], (1.0,)))
    valid = torch.ones(len(places), dtype=torch.bool)
    if rule == "overlap":
        found = by_overlap(boxes, real, places, valid)
    elif rule == "range":
        found = by_range(boxes, real, places[:, :2], torch.tensor([stride for *_, stride in corners()]))
    else:
        found = by_statistics(boxes, real, places, valid, [0, len(places)])
    assert (found == BACKGROUND).all()


def test_places_get_the_classes_and_boxes_that_they_learn():
    match = torch.tensor([[1, BACKGROUND, IGNORED, 0], [0, 0, BACKGROUND, BACKGROUND]])
    boxes = torch.arange(16.0).view(2, 2, 4)
    classes, found = learned(match, boxes, torch.tensor([[3, 4], [2, -1]]), 5)
    assert classes.tolist() == [[4, 5, -1, 3], [2, 2, 5, 5]]
    assert torch.equal(found[0, 0], boxes[0, 1]) and torch.equal(found[0, 3], boxes[0, 0])
    assert torch.equal(found[1, 0], boxes[1, 0])
