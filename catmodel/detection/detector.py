"""RetinaNet (arXiv 1708.02002), FCOS (1904.01355) and ATSS (1912.02424) on any backbone of catmodel.

As in mmdetection 2.x, with which CAT's and PVT's papers trained them.
"""

from typing import Any

import torch
from torch import Tensor, nn

import catmodel
from catmodel.dense import Dense
from catmodel.detection.boxes import decode_distances, decode_offsets, encode_distances, encode_offsets
from catmodel.detection.grid import Grid, anchor_sides, cached_grid, make_grid
from catmodel.detection.head import GROUPS, DetectionHead
from catmodel.detection.kinds import KINDS
from catmodel.fpn import FPN

FIRST = 1  # the finest stage that a detector uses
EXTRA = 2  # levels after the backbone's


class Detector(Dense):
    """A backbone, a feature pyramid and a head.

    The pyramid has the maps of all stages but the first, and two coarser ones: strides 8, 16, 32, 64, 128.

    kind: a key of `kinds.KINDS`. backbone: a network of catmodel with features_only. neck_channels, head_channels: of
    the pyramid and of the head's towers of head_convs convolutions. anchor_scale: None: the published one.
    """

    def __init__(
        self,
        kind: str,
        backbone: nn.Module,
        num_classes: int,
        neck_channels: int = 256,
        head_channels: int = 256,
        head_convs: int = 4,
        anchor_scale: float | None = None,
    ):
        super().__init__(backbone)
        self.kind, self.num_classes, settings = kind, num_classes, KINDS[kind]
        self._std, self._sides = settings.deltas_std, None
        if settings.anchor_scale is not None:
            scale = settings.anchor_scale if anchor_scale is None else anchor_scale
            self._sides = anchor_sides(scale, settings.anchor_octaves, settings.anchor_ratios)
        stages = [backbone.feature_info[i] for i in backbone.out_indices[FIRST:]]
        if not stages:
            raise ValueError("a detector uses the maps of all stages but the first: give depths two numbers or more")
        self.strides = tuple(stage["reduction"] for stage in stages)
        self.strides += tuple(self.strides[-1] * 2 ** (i + 1) for i in range(EXTRA))
        widths = [stage["num_chs"] for stage in stages]
        self.neck = FPN(widths, neck_channels, EXTRA, settings.extra_on_input, settings.extra_relu)
        anchors = 1 if self._sides is None else len(self._sides)
        self.head = DetectionHead(
            settings, len(self.strides), neck_channels, head_channels, head_convs, num_classes, anchors
        )

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Images [m, 3, H, W] -> class logits [m, A, num_classes], raw boxes [m, A, 4] and, for fcos and atss,
        centerness logits [m, A]. For the order of the A places see `Grid`.
        """
        return self.head(self.neck(self.backbone(image)[FIRST:]))

    def grid(self, height: int, width: int, device: torch.device | str = "cpu") -> Grid:
        """The places of inputs of height x width pixels, kept for the next calls.

        A step that is recorded as a CUDA graph must have these tensors as inputs: old ones are dropped.
        """
        return cached_grid(height, width, self.strides, self._sides, torch.device(device))

    def new_grid(self, height: int, width: int, device: torch.device | str = "cpu") -> Grid:
        """The same, computed anew; height and width may be symbols of torch.export."""
        return make_grid(height, width, self.strides, self._sides, device)

    def encode(self, grid: Grid, boxes: Tensor) -> Tensor:
        """Boxes [..., A, 4] (x1, y1, x2, y2 in pixels of the input), one for each place -> what `forward` should give.

        Width and height must be above 0, and for fcos the box must contain its point: otherwise not finite.
        """
        if grid.anchors is None:
            return encode_distances(grid.points, boxes)
        return encode_offsets(grid.anchors, boxes, self._std)

    def decode(self, grid: Grid, boxes: Tensor) -> Tensor:
        """The raw boxes [m, A, 4] of `forward` -> x1, y1, x2, y2 in pixels of the input, not clipped."""
        if grid.anchors is None:
            return decode_distances(grid.points, boxes)
        return decode_offsets(grid.anchors, boxes, self._std)


def create_detector(
    kind: str,
    name: str,
    num_classes: int,
    neck_channels: int = 256,
    head_channels: int = 256,
    head_convs: int = 4,
    anchor_scale: float | None = None,
    **overrides: Any,
) -> Detector:
    """A detector on the backbone `name`, with initial weights drawn from torch's default generator.

    kind: "retinanet", "fcos" or "atss". overrides: arguments of the backbone's class, e.g. drop_path_rate, or img_size,
    which sets the grid of its position tables. The other arguments: see `Detector`. Raises ValueError as
    `catmodel.create_model` does.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown detector {kind!r}: known are {', '.join(KINDS)}")
    if KINDS[kind].group_norm and head_channels % GROUPS:
        raise ValueError(
            f"head_channels {head_channels} must be a multiple of {GROUPS}, the groups that {kind} normalises"
        )
    backbone = catmodel.create_model(name, features_only=True, **overrides)
    return Detector(kind, backbone, num_classes, neck_channels, head_channels, head_convs, anchor_scale)
