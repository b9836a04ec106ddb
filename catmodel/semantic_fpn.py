"""Semantic FPN (Panoptic Feature Pyramid Networks, arXiv 1901.02446, section 3.1): segmentation on any backbone.

As in mmsegmentation 0.x, with which CAT's and PVT's papers trained it.
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

import catmodel
from catmodel.dense import Dense
from catmodel.fixed_order import resize, upsample
from catmodel.fpn import FPN
from catmodel.patches import may_be_nonzero


class ChannelDropout(nn.Module):
    """Dropout of whole channels: in training, each channel of each image [B, C, H, W] is zero with probability `rate`.

    Other channels are scaled by 1 / (1 - rate). Draws from torch's default generator of the tensor's device.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x_BCHW
        keep = 1.0 - self.rate
        return x_BCHW * x_BCHW.new_empty(*x_BCHW.shape[:2], 1, 1).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"


class ScaleConv(nn.Module):
    """A 3 x 3 convolution without bias, batch norm and ReLU; then the map is enlarged by 2, if `enlarge`."""

    def __init__(self, in_channels: int, out_channels: int, enlarge: bool):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.enlarge = enlarge
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = F.relu(self.bn(self.conv(x_BCHW)), inplace=True)
        return upsample(y_BCHW, 2) if self.enlarge else y_BCHW


class SemanticFPNHead(nn.Module):
    """Maps of a pyramid -> logits of the finest map's size.

    Each map is brought to the size of the finest by as many `ScaleConv` as there are steps between them (the finest
    passes one that does not enlarge); their sum is classified pixel by pixel.
    """

    def __init__(self, levels: int, in_channels: int, channels: int, num_classes: int, dropout: float):
        super().__init__()
        self.scale_heads = nn.ModuleList(
            nn.Sequential(
                *(ScaleConv(channels if i else in_channels, channels, enlarge=level > 0) for i in range(max(level, 1)))
            )
            for level in range(levels)
        )
        self.dropout = ChannelDropout(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps [B, in_channels, H_i, W_i] -> logits [B, num_classes, H_0, W_0].

        If a map's sides are not exact multiples of the next one's (images whose sides are not multiples of the last
        stride), the enlarged maps are resized to the finest.
        """
        total = self.scale_heads[0](maps[0])
        height, width = total.shape[2:]
        for head, x_BCHW in zip(self.scale_heads[1:], maps[1:], strict=True):
            y_BCHW = head(x_BCHW)
            if may_be_nonzero(y_BCHW.shape[2] - height, y_BCHW.shape[3] - width):
                y_BCHW = resize(y_BCHW, (height, width), "bilinear")
            total = total + y_BCHW
        return self.conv_seg(self.dropout(total))


class SemanticFPN(Dense):
    """A backbone, a feature pyramid and a head that classifies every pixel of the finest map.

    backbone: a network of catmodel with features_only. num_classes: without the ignored one. dropout: of the head's
    channels. neck_channels, channels: of the pyramid and of the head. full_size: `forward` enlarges the logits to the
    image's size (bilinear), as users want them; training does not.

    `stride`: pixels of the image per pixel of the other logits; 4, but for cat_nano 2.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        dropout: float = 0.1,
        neck_channels: int = 256,
        channels: int = 128,
        full_size: bool = False,
    ):
        super().__init__(backbone)
        self.full_size = full_size
        widths = [backbone.feature_info[i]["num_chs"] for i in backbone.out_indices]
        self.num_classes, self.stride = num_classes, backbone.feature_info[backbone.out_indices[0]]["reduction"]
        self.neck = FPN(widths, neck_channels)
        self.head = SemanticFPNHead(len(widths), neck_channels, channels, num_classes, dropout)

    def forward(self, image: Tensor) -> Tensor:
        """Images [B, 3, H, W] of any size -> logits [B, num_classes, ceil(H / stride), ceil(W / stride)], or with
        full_size [B, num_classes, H, W].
        """
        logits = self.head(self.neck(self.backbone(image)))
        return at_image_size(logits, image.shape[2:]) if self.full_size else logits


def create_segmenter(
    name: str,
    num_classes: int,
    dropout: float = 0.1,
    neck_channels: int = 256,
    channels: int = 128,
    full_size: bool = False,
    **overrides: Any,
) -> SemanticFPN:
    """Semantic FPN on the backbone `name`, with initial weights drawn from torch's default generator.

    overrides: arguments of the backbone's class, e.g. drop_path_rate, or img_size, which sets the grid of its position
    tables. The other arguments: see `SemanticFPN`. Raises ValueError as `catmodel.create_model` does.
    """
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout {dropout} must be in [0, 1)")
    backbone = catmodel.create_model(name, features_only=True, **overrides)
    return SemanticFPN(backbone, num_classes, dropout, neck_channels, channels, full_size)


def at_image_size(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Logits [B, classes, h, w] -> [B, classes, *size], bilinear. For a training step see `fixed_order.upsample`."""
    return resize(logits, tuple(size), "bilinear")
