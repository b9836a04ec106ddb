"""Post-processing, compared with a plain computation in NumPy."""

import itertools

import numpy as np
import pytest
import torch

from catmodel.detection import detect, detect_one
from catmodel.detection.kinds import KINDS
from tests.catmodel.detection.small_detector import small_detector

SIZE = (64, 96)  # height, width of the inputs
INSIDE = torch.tensor([[0, 0, 96, 64], [0, 0, 85, 51]])
SETTINGS = dict(score_threshold=0.3, before_nms=20, detections=12)


def outputs(kind: str, classes: int = 5, levels: int | None = None) -> tuple:
    """A detector, random outputs and the places. levels: number of different scores, so that there are ties."""
    model = small_detector(kind, classes=classes)
    grid, generator = model.grid(*SIZE), torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    found = [draw(2, len(grid), classes), draw(2, len(grid), 4) * (1 if kind == "fcos" else 0.3)]
    if kind == "fcos":
        found[1] += 3
    found += [draw(2, len(grid))] if kind != "retinanet" else []
    if levels:
        found[0] = (found[0] * levels).round() / levels
        found[2:] = [torch.zeros_like(output) for output in found[2:]]
    return model, found, grid


def plain(model, found, grid, image: int, score_threshold: float, before_nms: int, detections: int, nms=None):
    """Boxes, scores and classes of one image, in NumPy's loops."""
    classes, raw, *rest = (output[image].double().numpy() for output in found)
    points, anchors = (
        grid.points.double().numpy(),
        grid.anchors if grid.anchors is None else grid.anchors.double().numpy(),
    )
    probability = 1 / (1 + np.exp(-classes))
    factor = 1 / (1 + np.exp(-rest[0])) if rest else np.ones(len(classes))
    left, top, right, bottom = INSIDE[image].tolist()

    def box(i: int) -> list[float]:
        if anchors is None:
            distance = np.exp(raw[i])
            x1, y1, x2, y2 = *(points[i] - distance[:2]), *(points[i] + distance[2:])
        else:
            std = [0.1, 0.1, 0.2, 0.2] if model.kind == "atss" else [1, 1, 1, 1]
            dx, dy, dw, dh = raw[i] * std
            width, height = anchors[i, 2] - anchors[i, 0], anchors[i, 3] - anchors[i, 1]
            x, y = anchors[i, 0] + width / 2 + dx * width, anchors[i, 1] + height / 2 + dy * height
            width, height = width * np.exp(dw), height * np.exp(dh)
            x1, y1, x2, y2 = x - width / 2, y - height / 2, x + width / 2, y + height / 2
        return [
            min(max(x1, left), right),
            min(max(y1, top), bottom),
            min(max(x2, left), right),
            min(max(y2, top), bottom),
        ]

    candidates = []
    for first, last in itertools.pairwise(grid.starts):
        best = sorted(range(first, last), key=lambda i: -(probability[i].max() * factor[i]))  # stable
        for i in best[:before_nms]:
            for label in np.nonzero(probability[i] > score_threshold)[0]:
                candidates.append((probability[i, label] * factor[i], box(i), int(label)))
    candidates.sort(key=lambda candidate: -candidate[0])
    threshold = {"retinanet": 0.5, "fcos": 0.5, "atss": 0.6}[model.kind] if nms is None else nms
    kept = []
    for score, one, label in candidates:
        if all(label != other or overlap(one, taken) <= threshold for _, taken, other in kept):
            kept.append((score, one, label))
    return kept[:detections], len(candidates), len(kept)


def overlap(a: list[float], b: list[float]) -> float:
    """Intersection over union; 0 of two boxes without area."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union else 0.0


def assert_equal(found, expected) -> None:
    boxes, scores, labels = found
    assert labels.tolist() == [label for _, _, label in expected]
    np.testing.assert_allclose(scores, [score for score, _, _ in expected], rtol=1e-5)
    np.testing.assert_allclose(boxes, [box for _, box, _ in expected], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "changed", [{}, {"before_nms": 1000, "detections": 400}, {"nms": 0.2}, {"score_threshold": 0.6}]
)
def test_detections_are_those_of_a_plain_computation(kind, changed):
    model, found, grid = outputs(kind)
    for image, one in enumerate(detect(model, found, grid, INSIDE, **SETTINGS | changed)):
        expected, candidates, kept = plain(model, found, grid, image, **SETTINGS | changed)
        assert candidates > kept > 2, "some are suppressed"
        assert_equal(one, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_of_equal_scores_the_earlier_place_comes_first(kind):
    model, found, grid = outputs(kind, levels=2)
    for image, one in enumerate(detect(model, found, grid, INSIDE, **SETTINGS)):
        assert len(one[1].unique()) < len(one[1]), "there are ties"
        assert_equal(one, plain(model, found, grid, image, **SETTINGS)[0])


@pytest.mark.parametrize("kind", ["retinanet", "fcos"])
def test_an_image_does_not_depend_on_the_others(kind):
    model, found, grid = outputs(kind)
    together = detect(model, found, grid, INSIDE, **SETTINGS)
    for i in range(2):
        (alone,) = detect(model, [output[i : i + 1] for output in found], grid, INSIDE[i : i + 1], **SETTINGS)
        assert all(map(torch.equal, alone, together[i]))


def test_suppression_is_as_exact_for_the_last_of_many_classes():
    """Of small boxes at the far corner of a large image, in float32 beside an offset of a thousand images."""
    generator = torch.Generator().manual_seed(0)
    centres = 1000 + 300 * torch.rand(200, 2, generator=generator).repeat_interleave(10, dim=0)
    centres += 1.5 * torch.randn(2000, 2, generator=generator)
    half = 3 + 2 * torch.rand(2000, 2, generator=generator)
    boxes, scores = torch.cat([centres - half, centres + half], dim=1), torch.randn(2000, generator=generator)
    found = []
    for label in (0, 1202):
        logits = torch.full((2000, 1203), -9.0)
        logits[:, label] = scores
        kept = detect_one(logits, boxes, None, (0, 2000), torch.tensor([0, 0, 1333, 1333]), 0.05, 2000, 0.5, 2000)
        assert set(kept[2].tolist()) == {label} and 200 < len(kept[1]) < 2000
        found.append(kept)
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_nothing_above_the_threshold():
    model, found, grid = outputs("atss")
    found[0] -= 20
    for boxes, scores, labels in detect(model, found, grid, INSIDE):
        assert boxes.shape == (0, 4) and scores.shape == labels.shape == (0,)


def test_centerness_is_not_part_of_the_threshold():
    """As in mmdetection 2.x: a class's probability is compared with it, before it is multiplied."""
    model, found, grid = outputs("atss", classes=1)
    found[0].fill_(-20.0)
    found[0][:, 7] = 0.0
    found[2].fill_(-5.0)
    for _, scores, labels in detect(model, found, grid, INSIDE, score_threshold=0.4):
        assert labels.tolist() == [0] and scores.item() == pytest.approx(0.5 / (1 + np.exp(5.0)))


def test_networks_in_bf16_are_decoded_in_float32():
    model, found, grid = outputs("fcos")
    halves = [output.bfloat16() for output in found]
    expected = detect(model, [output.float() for output in halves], grid, INSIDE, **SETTINGS)
    for one, other in zip(detect(model, halves, grid, INSIDE, **SETTINGS), expected, strict=True):
        assert one[0].dtype == one[1].dtype == torch.float32 and all(map(torch.equal, one, other))
