"""The three detectors, as in the released configurations of CAT and PVT for mmdetection 2.x. Without torch."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Kind:
    """What distinguishes a detector from the others.

    anchor_scale: side of the smallest anchor in strides; None: the detector predicts from points, without anchors.
    anchor_octaves: further anchors per octave of size. anchor_ratios: height / width.
    deltas_std: units of the predicted offsets of centre x, y and of the logarithms of width, height (anchors only).
    group_norm: the towers' convolutions are followed by GroupNorm and have no biases.
    level_scales: predicted boxes are multiplied by a learned factor per level.
    centerness: the branch that predicts it, if there is one.
    extra_on_input, extra_relu: see `catmodel.fpn.FPN`.
    nms: intersection over union above which a box of lower score is dropped.
    """

    anchor_scale: float | None
    extra_on_input: bool
    extra_relu: bool
    group_norm: bool
    level_scales: bool
    nms: float
    centerness: Literal["classes", "boxes"] | None = None
    anchor_octaves: int = 1
    anchor_ratios: tuple[float, ...] = (1.0,)
    deltas_std: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)


KINDS = {
    "retinanet": Kind(
        anchor_scale=4.0,
        anchor_octaves=3,
        anchor_ratios=(0.5, 1.0, 2.0),
        extra_on_input=True,
        extra_relu=False,
        group_norm=False,
        level_scales=False,
        nms=0.5,
    ),
    "fcos": Kind(
        anchor_scale=None,
        extra_on_input=False,
        extra_relu=True,
        group_norm=True,
        level_scales=True,
        centerness="classes",
        nms=0.5,
    ),
    "atss": Kind(
        anchor_scale=8.0,
        deltas_std=(0.1, 0.1, 0.2, 0.2),
        extra_on_input=False,
        extra_relu=False,
        group_norm=True,
        level_scales=True,
        centerness="boxes",
        nms=0.6,
    ),
}
