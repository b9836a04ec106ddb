"""A detector as other programs want it: from one image to its objects."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from catmodel.detection.detector import Detector
from catmodel.detection.kinds import KINDS
from catmodel.detection.postprocess import detect_one

Objects = Sequence[Tensor]  # boxes [n, 4], scores [n], classes [n]


class OneImage(nn.Module):
    """One image [1, 3, H, W] -> boxes [n, 4] (x1, y1, x2, y2 in its pixels), scores [n] and classes [n], best first.

    Of any size; nothing of it counts as padding. The arguments: see `postprocess.detect`. score_threshold is a buffer,
    so it can be changed in an exported file.
    """

    def __init__(
        self,
        detector: Detector,
        score_threshold: float = 0.05,
        before_nms: int = 1000,
        nms: float | None = None,
        detections: int = 100,
    ):
        super().__init__()
        self.detector, self._before_nms, self._detections = detector, before_nms, detections
        self._nms = KINDS[detector.kind].nms if nms is None else nms
        self.register_buffer("score_threshold", torch.tensor(score_threshold))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        height, width = image.shape[2:]
        grid = self.detector.new_grid(height, width, image.device)
        classes, boxes, *centerness = self.detector(image)
        boxes = self.detector.decode(grid, boxes)
        inside = torch.stack([torch.scalar_tensor(side) for side in (0, 0, width, height)])
        return detect_one(
            classes[0],
            boxes[0],
            centerness[0][0] if centerness else None,
            grid.starts,
            inside,
            self.score_threshold,
            self._before_nms,
            self._nms,
            self._detections,
        )


def telling_threshold(detector: Detector, images: Sequence[Tensor]) -> float:
    """A score threshold above which the detector finds something in images [1, 3, H, W] of any content: 10 to 20
    probabilities in each, on average. No probability is close to it.
    """
    probabilities = torch.cat([detector(image)[0].sigmoid().flatten() for image in images])
    highest = probabilities.sort(descending=True).values[10 * len(images) : 20 * len(images) + 1]
    place = (highest[:-1] - highest[1:]).argmax()
    return ((highest[place] + highest[place + 1]) / 2).item()


def largest_difference(expected: Objects, found: Objects) -> float:
    """Between two lists of objects in any order: each is compared with the nearest of its class in the other list.

    Of scores, and of boxes relative to the largest coordinate. Infinite for an object that only one list has.
    """
    (boxes, scores, classes), (other_boxes, other_scores, other_classes) = expected, found
    if not len(scores) or not len(other_scores):
        return 0.0 if len(scores) == len(other_scores) else float("inf")
    scale = boxes.abs().max().clamp(min=1)
    box = (boxes[:, None] - other_boxes).abs().amax(dim=2) / scale
    difference = torch.maximum(box, (scores[:, None] - other_scores).abs())
    difference = difference.masked_fill(classes[:, None] != other_classes, float("inf"))
    return torch.maximum(difference.amin(dim=0).max(), difference.amin(dim=1).max()).item()
