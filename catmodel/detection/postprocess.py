"""From a detector's outputs to boxes with scores and classes, as mmdetection 2.x does for one-stage detectors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from catmodel.detection.detector import Detector
from catmodel.detection.grid import Grid
from catmodel.detection.kinds import KINDS

Detections = tuple[Tensor, Tensor, Tensor]


def detect(
    detector: Detector,
    outputs: Sequence[Tensor],
    grid: Grid,
    inside: Tensor,
    score_threshold: float = 0.05,
    before_nms: int = 1000,
    nms: float | None = None,
    detections: int = 100,
) -> list[Detections]:
    """For each image boxes [n, 4] (x1, y1, x2, y2 in pixels of the input), scores [n] and classes [n], best first.

    outputs: of `detector`, for m images. inside: [m, 4] left, top, right, bottom of the image in the input, to which
    boxes are clipped. The other arguments: see `detect_one`; nms None: the published value.
    """
    classes, boxes, *centerness = (output.float() for output in outputs)
    boxes, limits = detector.decode(grid, boxes), inside.to(boxes)
    threshold = KINDS[detector.kind].nms if nms is None else nms
    return [
        detect_one(*parts, grid.starts, limit, score_threshold, before_nms, threshold, detections)
        for *parts, limit in zip(classes, boxes, *(centerness or [[None] * len(boxes)]), limits, strict=True)
    ]


def detect_one(
    classes: Tensor,
    boxes: Tensor,
    centerness: Tensor | None,
    starts: Sequence[int],
    inside: Tensor,
    score_threshold: float,
    before_nms: int,
    nms: float,
    detections: int,
) -> Detections:
    """The detections in one image: class logits [A, K], decoded boxes [A, 4] and centerness logits [A], if any.

    Of each level the `before_nms` places are kept whose best class scores highest; a score is the class's probability
    times the centerness. Classes of a probability above score_threshold compete: of two boxes of a class that overlap
    by more than `nms`, the one of the lower score is dropped. The best `detections` remain. Of equal scores the one of
    the earlier place, and at a place of the earlier class, comes first. Can be exported.
    """
    from torchvision.ops import nms as suppress

    probabilities = classes.sigmoid()
    factors = None if centerness is None else centerness.sigmoid()
    best = probabilities.max(dim=1).values
    best = best if factors is None else best * factors
    kept = torch.cat(
        [
            first + best[first:last].sort(descending=True, stable=True).indices[:before_nms]
            for first, last in zip(starts[:-1], starts[1:], strict=True)
        ]
    )
    probabilities, boxes = probabilities[kept], boxes[kept]
    place, label = (probabilities > score_threshold).nonzero(as_tuple=True)
    scores = probabilities[place, label]
    scores = scores if factors is None else scores * factors[kept][place]
    low, high = inside.split(2)
    boxes = torch.minimum(torch.maximum(boxes, low.repeat(2)), high.repeat(2))[place]
    # Boxes of different classes are moved apart, so that they do not overlap. In float64, where the coordinates of the
    # thousandth class are as exact as those of the first. ONNX's operator takes float32: see export.py.
    apart = label.double()[:, None] * (inside.max().double() + 1)
    order = suppress(boxes.double() + apart, scores.double(), nms)[:detections]
    return boxes[order], scores[order], label[order]
