"""Which places of a grid learn which boxes: the rules of RetinaNet, FCOS and ATSS, as mmdetection 2.x has them.

Everything here depends on the boxes and on the grid alone, not on the network, and all shapes are fixed: a task
computes it with its inputs, on the device, and nothing waits for a result. Of equal numbers the first one counts,
unless a function says otherwise.

Of one image: boxes float32 [G, 4] (x1, y1, x2, y2 in pixels of the network's input), real bool [G] (false for rows that
only fill the table), and A places, of which `valid` [A] are those over the image. A function returns, int64 [A], the
row of the box that each place learns, or BACKGROUND or IGNORED.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

BACKGROUND, IGNORED = -1, -2

POSITIVE, NEGATIVE = 0.5, 0.4  # RetinaNet: least overlap of a place with its box; overlap below which it has none
NEAREST = 9  # ATSS: candidates for a box on each level


def by_overlap(boxes: Tensor, real: Tensor, anchors: Tensor, valid: Tensor) -> Tensor:
    """RetinaNet (mmdetection's MaxIoUAssigner, min_pos_iou 0): an anchor learns the box that it overlaps most.

    With an intersection over union of at least POSITIVE; below NEGATIVE it is background, in between ignored. Besides,
    each box is learned by the anchors that overlap it most of all, however little; by the last of several such boxes.
    Anchors [A, 4] that are not valid are ignored.
    """
    overlap = intersection_over_union(boxes, anchors).masked_fill_(~(real[:, None] & valid), -1.0)
    most, match = overlap.max(dim=0)
    match = torch.where(most >= POSITIVE, match, torch.where(most < NEGATIVE, BACKGROUND, IGNORED))
    own = overlap.amax(dim=1, keepdim=True)
    rows = torch.arange(len(boxes), device=boxes.device)[:, None]
    last = rows.where((overlap == own) & (own > 0), -1).amax(dim=0)
    return torch.where(valid, torch.where(last >= 0, last, match), IGNORED)


def by_range(boxes: Tensor, real: Tensor, points: Tensor, strides: Tensor) -> Tensor:
    """FCOS (no centre sampling): a point learns the smallest box that it lies in, of those of its level's range.

    The longest of the distances to a box's four sides is between 4 and 8 strides; on the first level it may be shorter,
    on the last one longer. points: [A, 2]. strides: [A].
    """
    low = torch.where(strides == strides.amin(), 0.0, 4.0 * strides)
    high = torch.where(strides == strides.amax(), torch.inf, 8.0 * strides)
    distances = to_sides(points, boxes[:, None])
    longest = distances.amax(dim=-1)
    learns = real[:, None] & (distances.amin(dim=-1) > 0) & (longest >= low) & (longest <= high)
    size, match = torch.where(learns, area(boxes)[:, None], torch.inf).min(dim=0)
    return torch.where(size < torch.inf, match, BACKGROUND)


def by_statistics(boxes: Tensor, real: Tensor, anchors: Tensor, valid: Tensor, starts: Sequence[int]) -> Tensor:
    """ATSS (arXiv 1912.02424): a box sets its own least overlap, from the anchors that are near.

    Candidates are on each level the NEAREST valid anchors [A, 4] by distance of centres (the first of equal ones).
    Those learn the box whose overlap is at least the mean + the standard deviation of all candidates', and whose centre
    lies in the box; of several boxes an anchor learns the one that it overlaps most. starts: the first anchor of each
    level, and A. Anchors that are not valid are ignored.
    """
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    offsets = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2 - centres
    distance = torch.where(valid, offsets[..., 0] * offsets[..., 0] + offsets[..., 1] * offsets[..., 1], torch.inf)
    near = torch.cat(
        [
            first + distance[:, first:last].sort(dim=1, stable=True).indices[:, :NEAREST]
            for first, last in zip(starts[:-1], starts[1:], strict=True)
        ],
        dim=1,
    )

    overlap, counts = intersection_over_union(boxes, anchors).gather(1, near), valid[near]
    number = counts.sum(dim=1, keepdim=True)
    mean = (overlap * counts).sum(dim=1, keepdim=True) / number
    variance = ((overlap - mean).square() * counts).sum(dim=1, keepdim=True) / (number - 1)
    inside = to_sides(centres[near], boxes[:, None]).amin(dim=-1) > 0.01
    learns = real[:, None] & counts & (overlap >= mean + variance.sqrt()) & inside

    nothing = overlap.new_full((len(boxes), len(anchors)), -1.0)
    most, match = nothing.scatter_(1, near, torch.where(learns, overlap, -1.0)).max(dim=0)
    return torch.where(valid, torch.where(most >= 0, match, BACKGROUND), IGNORED)


def learned(match: Tensor, boxes: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """What the places of m images learn: classes int64 [m, A] (-1: ignored, `classes`: background), boxes [m, A, 4].

    match: int64 [m, A], rows of boxes [m, G, 4] and labels int64 [m, G], or BACKGROUND or IGNORED, for which there are
    the boxes of row 0.
    """
    rows = match.clamp(min=0)
    found = labels.gather(1, rows)
    found = torch.where(match >= 0, found, torch.where(match == BACKGROUND, classes, -1))
    return found, boxes.gather(1, rows[..., None].expand(-1, -1, 4))


def to_sides(points: Tensor, boxes: Tensor) -> Tensor:
    """Distances of points [..., 2] to the left, top, right and bottom of boxes [..., 4], positive inside: [..., 4]."""
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], dim=-1)


def area(boxes: Tensor) -> Tensor:
    """[..., 4] -> [...]"""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def intersection_over_union(boxes: Tensor, others: Tensor) -> Tensor:
    """Of each of boxes [G, 4] with each of others [A, 4]: [G, A]."""
    sides = torch.minimum(boxes[:, None, 2:], others[:, 2:]) - torch.maximum(boxes[:, None, :2], others[:, :2])
    sides = sides.clamp_(min=0)
    common = sides[..., 0] * sides[..., 1]
    return common / (area(boxes)[:, None] + area(others) - common).clamp_(min=1e-6)
