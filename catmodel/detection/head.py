"""The head of a one-stage detector: two towers of convolutions, shared by all levels of the pyramid."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from catmodel.detection.kinds import Kind

PRIOR = 0.01  # initial probability of a class at every place (arXiv 1708.02002, section 3.3)
GROUPS = 32


class TowerConv(nn.Module):
    """A 3 x 3 convolution, GroupNorm if `group_norm` (the convolution then has no bias), and ReLU."""

    def __init__(self, in_channels: int, channels: int, group_norm: bool):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=not group_norm)
        self.gn = nn.GroupNorm(GROUPS, channels) if group_norm else nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.relu(self.gn(self.conv(x_BCHW)))


class FloatConv(nn.Conv2d):
    """A convolution in fp32, whatever the type of its weights and input: its outputs are logarithms of sizes in pixels,
    of which bf16's 8 bits would leave errors of a percent.
    """

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self._conv_forward(x_BCHW.float(), self.weight.float(), self.bias.float())


class DetectionHead(nn.Module):
    """Maps of a pyramid -> class logits and boxes at every place, and centerness logits if the kind has them.

    anchors: number of anchors at a pixel.
    """

    def __init__(
        self, kind: Kind, levels: int, in_channels: int, channels: int, convs: int, num_classes: int, anchors: int
    ):
        super().__init__()
        self.num_classes, self.centerness_branch = num_classes, kind.centerness

        def tower() -> nn.Sequential:
            return nn.Sequential(
                *(TowerConv(channels if i else in_channels, channels, kind.group_norm) for i in range(convs))
            )

        def last(outputs: int, kind: type[nn.Conv2d] = nn.Conv2d) -> nn.Conv2d:
            return kind(channels if convs else in_channels, outputs, 3, padding=1)

        self.cls_convs, self.reg_convs = tower(), tower()
        self.conv_cls = last(anchors * num_classes)
        self.conv_reg = last(anchors * 4, nn.Conv2d if kind.anchor_scale else FloatConv)
        self.conv_centerness = last(anchors) if kind.centerness else None
        self.scales = nn.Parameter(torch.ones(levels)) if kind.level_scales else None
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.constant_(self.conv_cls.bias, -math.log((1 - PRIOR) / PRIOR))

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Maps [B, in_channels, H_i, W_i] -> [B, A, num_classes], [B, A, 4] and, if there is one, [B, A]."""
        levels = []
        for i, x_BCHW in enumerate(maps):
            for_classes, for_boxes = self.cls_convs(x_BCHW), self.reg_convs(x_BCHW)
            boxes = self.conv_reg(for_boxes)
            if self.scales is not None:
                boxes = boxes * self.scales[i]
            level = [self.conv_cls(for_classes), boxes]
            if self.conv_centerness is not None:
                level.append(self.conv_centerness(for_classes if self.centerness_branch == "classes" else for_boxes))
            levels.append([output.permute(0, 2, 3, 1).flatten(1, 2) for output in level])
        classes, boxes, *centerness = (torch.cat(parts, dim=1) for parts in zip(*levels, strict=True))
        return by_anchor(classes, self.num_classes), by_anchor(boxes, 4), *(part.flatten(1) for part in centerness)


def by_anchor(x_BNC: Tensor, size: int) -> Tensor:
    """Pixels [B, N, k * size] -> their anchors [B, N * k, size]."""
    return x_BNC.unflatten(2, (-1, size)).flatten(1, 2)
