"""Boxes as a network predicts them, and back: offsets from anchors, or distances from points.

The last dimension of every tensor of boxes is x1, y1, x2, y2 in pixels.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Of a predicted logarithm of width or height / the anchor's; the exponential of anything larger is not useful.
LARGEST_LOG = abs(math.log(16 / 1000))


def encode_offsets(anchors: Tensor, boxes: Tensor, std: Sequence[float]) -> Tensor:
    """Boxes [..., A, 4] of positive width and height -> their offsets from the anchors [A, 4], in units of std.

    Those of the centre are relative to the anchor's width and height; of width and height they are logarithms.
    """
    (anchor_centre, anchor_sides), (centre, sides) = _centre_and_sides(anchors), _centre_and_sides(boxes)
    offsets = torch.cat([(centre - anchor_centre) / anchor_sides, (sides / anchor_sides).log()], dim=-1)
    return torch.stack([part / unit for part, unit in zip(offsets.unbind(-1), std, strict=True)], dim=-1)


def decode_offsets(anchors: Tensor, offsets: Tensor, std: Sequence[float]) -> Tensor:
    """The inverse of `encode_offsets`, with sides of at most 62.5 and at least 0.016 times the anchor's."""
    anchor_centre, anchor_sides = _centre_and_sides(anchors)
    parts = [
        part * unit for part, unit in zip(offsets.unbind(-1), std, strict=True)
    ]  # no tensor made of the host's numbers
    shift, logarithm = torch.stack(parts, dim=-1).split(2, dim=-1)
    centre = anchor_centre + shift * anchor_sides
    half = anchor_sides * logarithm.clamp(-LARGEST_LOG, LARGEST_LOG).exp() * 0.5
    return torch.cat([centre - half, centre + half], dim=-1)


def encode_distances(points: Tensor, boxes: Tensor) -> Tensor:
    """Boxes [..., A, 4] -> logarithms of the distances from the points [A, 2] inside to the four sides."""
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], dim=-1).log()


def decode_distances(points: Tensor, logarithms: Tensor) -> Tensor:
    """The inverse of `encode_distances`."""
    before, after = logarithms.exp().split(2, dim=-1)
    return torch.cat([points - before, points + after], dim=-1)


def _centre_and_sides(boxes: Tensor) -> tuple[Tensor, Tensor]:
    low, high = boxes.split(2, dim=-1)
    return (low + high) * 0.5, high - low
