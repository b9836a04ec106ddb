"""A detector as other programs want it: from one image to its objects."""

import torch
from torch import Tensor, nn

from catmodel.detection.detector import Detector
from catmodel.detection.kinds import KINDS
from catmodel.detection.postprocess import detect_one


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
        inside = torch.stack(
            [torch.zeros(()), torch.zeros(()), torch.scalar_tensor(width), torch.scalar_tensor(height)]
        )
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
