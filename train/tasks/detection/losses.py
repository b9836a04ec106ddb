"""Losses of detection, dense: over all places of all images of a micro-batch, of weight zero where nothing is learned.

So all shapes are fixed, no step waits for the device, and sums have one order.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from train.tasks.detection.assign import area, to_sides


def focal_loss(logits: Tensor, classes: Tensor) -> Tensor:
    """The sum of the focal loss (arXiv 1708.02002, alpha 0.25, gamma 2) over places and classes.

    logits: [m, A, K]. classes: int64 [m, A], K: background, -1: ignored.
    """
    targets = (classes[..., None] == torch.arange(logits.shape[-1], device=logits.device)).to(logits.dtype)
    loss = sigmoid_focal_loss(logits, targets, alpha=0.25, gamma=2.0)
    return (loss * (classes >= 0)[..., None]).sum()


def iou_loss(boxes: Tensor, targets: Tensor) -> Tensor:
    """-log of the intersection over union of boxes with targets, [..., 4] -> [...]; at least 1e-6 is taken for it."""
    common, union = _common_and_union(boxes, targets)
    return -(common / union.clamp(min=1e-6)).clamp(min=1e-6).log()


def giou_loss(boxes: Tensor, targets: Tensor) -> Tensor:
    """1 - the generalised intersection over union (arXiv 1902.09630) of boxes with targets, [..., 4] -> [...].

    torchvision.ops.generalized_box_iou_loss without its indexing by masks, for which the host waits.
    """
    common, union = _common_and_union(boxes, targets)
    around = torch.cat(
        [torch.minimum(boxes[..., :2], targets[..., :2]), torch.maximum(boxes[..., 2:], targets[..., 2:])], dim=-1
    )
    hull = area(around)
    return 1 - common / (union + 1e-7) + (hull - union) / (hull + 1e-7)


def centerness(points: Tensor, boxes: Tensor) -> Tensor:
    """How central points [..., 2] lie in boxes [..., 4]: 1 in the middle, 0 on the edge (arXiv 1904.01355); [...].

    0 outside of them, too.
    """
    left, top, right, bottom = to_sides(points, boxes).clamp(min=0).unbind(-1)
    horizontal = torch.minimum(left, right) / torch.maximum(left, right).clamp(min=1e-6)
    vertical = torch.minimum(top, bottom) / torch.maximum(top, bottom).clamp(min=1e-6)
    return (horizontal * vertical).sqrt()


def centerness_loss(logits: Tensor, targets: Tensor, learns: Tensor) -> Tensor:
    """The sum of the binary cross-entropy over the places that learn a box (bool); all are [m, A]."""
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (loss * learns).sum()


def _common_and_union(boxes: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Areas of intersection and union, [..., 4] -> [...]."""
    sides = torch.minimum(boxes[..., 2:], targets[..., 2:]) - torch.maximum(boxes[..., :2], targets[..., :2])
    sides = sides.clamp(min=0)
    common = sides[..., 0] * sides[..., 1]
    return common, area(boxes) + area(targets) - common
