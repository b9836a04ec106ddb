"""CoTNet: Contextual Transformer Networks (arXiv 2107.12292).

In this order: CoT, other layers, blocks, the model, its variants. Parameter names are those of the released
checkpoints. Shape letters: B images, C channels, H W map.
"""

import itertools
import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from catmodel.aggregation import aggregate
from catmodel.fixed_order import MaxPool, pad_border
from catmodel.layers import DropPathAdd, draw_scales, recomputed
from catmodel.variants import Staged, build, select_stages

SHARE = 8  # channels that share their aggregation weights


class ContextualAttention(nn.Module):
    """CoT, the Contextual Transformer block (section 3.2, figure 2): [B, C, H, W] -> [B, C, H, W].

    A grouped 3 x 3 convolution computes the static context, which serves as keys. Keys and queries together determine a
    3 x 3 kernel for every pixel, which aggregates the values around it: the dynamic context. A softmax gate per channel
    mixes both contexts.

    key_groups: groups of the static context's convolution. groups: groups of the other convolutions. For more than one
    (CoTNeXt), the channels of query and key are interleaved.
    """

    def __init__(self, channels: int, key_groups: int, groups: int):
        super().__init__()
        self.groups, self.kernels, per_pixel = groups, True, channels // SHARE
        if not per_pixel or channels % per_pixel or per_pixel % groups or channels % key_groups:
            raise ValueError(
                f"width gives a stage's CoT {channels} channels: they must be a multiple of {SHARE} * groups, "
                f"{SHARE * groups}, and of key_groups, {key_groups}"
            )
        self.key_embed = nn.Sequential(*conv_norm(channels, channels, 3, groups=key_groups), nn.ReLU(inplace=True))
        self.embed = nn.Sequential(
            *conv_norm(2 * channels, channels // 2, groups=groups),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels // 2, 9 * per_pixel, 1, groups=groups),
            nn.GroupNorm(per_pixel, 9 * per_pixel),
        )
        self.conv1x1 = nn.Sequential(*conv_norm(channels, channels, groups=groups))
        self.bn = nn.BatchNorm2d(channels)
        hidden = max(channels // 2, 32)
        self.se = nn.Sequential(
            nn.Conv2d(channels, hidden, 1),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, 2 * channels, 1),
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        keys = self.key_embed(x_BCHW)
        both = torch.cat([x_BCHW, keys], 1) if self.groups == 1 else torch.stack([x_BCHW, keys], 2).flatten(1, 2)
        weights = rearrange(self.embed(both), "B (g G K) H W -> (B g) G K H W", g=self.groups, K=9)
        values = rearrange(self.conv1x1(x_BCHW), "B (g C) H W -> (B g) C H W", g=self.groups)
        dynamic = aggregate(values, weights, self.kernels).view_as(x_BCHW)
        dynamic = F.silu(self.bn(dynamic))
        gate = self.se((dynamic + keys).mean((2, 3), keepdim=True))
        gate = rearrange(gate, "B (C two) 1 1 -> two B C 1 1", two=2).softmax(0)
        return dynamic * gate[0] + keys * gate[1]


class SplitAttention(nn.Module):
    """ResNeSt's split attention of radix 1 (arXiv 2004.08955): a 3 x 3 convolution, then a gate per channel."""

    def __init__(self, channels: int, stride: int):
        super().__init__()
        hidden = max(channels // 4, 32)
        self.conv, self.bn0 = conv_norm(channels, channels, 3, stride)
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = F.silu(self.bn0(self.conv(x_BCHW)))
        gate = self.fc2(F.silu(self.bn1(self.fc1(x_BCHW.mean((2, 3), keepdim=True)))))
        return x_BCHW * gate.sigmoid()


class BlurPool(nn.Module):
    """A 3 x 3 binomial filter with stride 2 and reflection at the border (arXiv 1904.11486).

    [B, C, H, W] -> [B, C, ceil(H/2), ceil(W/2)]. Sides of one pixel cannot be reflected: borders are then repeated.
    """

    def __init__(self, channels: int):
        super().__init__()
        line = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("filter", torch.outer(line, line).expand(channels, 1, 3, 3).contiguous(), persistent=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        padded = pad_border(x_BCHW, reflect=min(x_BCHW.shape[2:]) > 1)
        return F.conv2d(padded, self.filter.to(x_BCHW.dtype), stride=2, groups=x_BCHW.shape[1])


def conv_norm(
    channels: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1
) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """A padded convolution without bias and its batch norm: the map's sides are divided by the stride, rounded up."""
    return nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(out)


# --------------------------------------------------------------------------------------------------------------- blocks


class Bottleneck(nn.Module):
    """1 x 1 convolution, `middle`, 1 x 1 convolution to `out` channels, with a residual around them.

    before, after: layers that halve the map before or after `middle`. shortcut: the residual's path (None: identity).
    """

    def __init__(
        self,
        channels: int,
        width: int,
        out: int,
        middle: nn.Module,
        before: nn.Module | None,
        after: nn.Module | None,
        shortcut: nn.Sequential | None,
        drop_path: float,
    ):
        super().__init__()
        self.conv1, self.bn1 = conv_norm(channels, width)
        self.before, self.conv2, self.after = before or nn.Identity(), middle, after or nn.Identity()
        self.conv3, self.bn3 = conv_norm(width, out)
        self.downsample = shortcut
        self.add = DropPathAdd(drop_path)

    def forward(self, x_BCHW: Tensor, scale: Tensor | None) -> Tensor:
        """scale: drop-path's factors, as `add.draw` returns them."""
        branch = F.relu(self.bn1(self.conv1(x_BCHW)), inplace=True)
        branch = self.bn3(self.conv3(self.after(self.conv2(self.before(branch)))))
        shortcut = x_BCHW if self.downsample is None else self.downsample(x_BCHW)
        return F.relu(self.add(shortcut, branch, scale), inplace=True)


# ---------------------------------------------------------------------------------------------------------------- model


class CoTNet(Staged):
    """CoTNet for classification or, with `features_only`, as a backbone: a ResNet whose 3 x 3 convolutions are CoT.

    img_size: not used, because images may have any size; accepted for the same interface as the other models.
    in_chans, num_classes: input channels; outputs of the head (0: no head, pooled features).
    depths: blocks per stage.
    width: channels of CoT / channels of a ResNet. key_groups, groups: see `ContextualAttention`.
    hybrid: the design of SE-CoTNetD: a stem of three convolutions of stem_width channels without max-pooling; split
        attention in place of CoT in the first two stages and in the odd blocks of the third; shortcuts that average
        before they project.
    blur: blocks that halve the map do so with BlurPool, after CoT or split attention.
    drop_rate: dropout before the head. drop_path_rate: rate of the last block; rates grow linearly from 0.
    features_only: `forward` returns the maps of the stages in out_indices (default: all). Stages after the last of
        these are not built.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        depths: Sequence[int] = (3, 4, 6, 3),
        width: float = 1.0,
        key_groups: int = 4,
        groups: int = 1,
        hybrid: bool = False,
        stem_width: int = 32,
        blur: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
    ):
        super().__init__()
        for name, rate in (("drop_rate", drop_rate), ("drop_path_rate", drop_path_rate)):
            if not 0.0 <= rate < 1.0:
                raise ValueError(f"{name} {rate} must be in [0, 1)")
        stages = len(depths)
        self.features_only, self.drop_rate = features_only, drop_rate
        self.out_indices = select_stages(out_indices, stages, features_only)
        self.stages = self.out_indices[-1] + 1 if features_only else stages
        self.grad_checkpointing = False
        if hybrid:
            channels = 2 * stem_width
            self.conv1 = nn.Sequential(
                *conv_norm(in_chans, stem_width, 3, stride=2),
                nn.ReLU(inplace=True),
                *conv_norm(stem_width, stem_width, 3),
                nn.ReLU(inplace=True),
                nn.Conv2d(stem_width, channels, 3, padding=1, bias=False),
            )
            self.bn1 = nn.BatchNorm2d(channels)
        else:
            channels = 64
            self.conv1, self.bn1 = conv_norm(in_chans, channels, 7, stride=2)
        self.pool = nn.Identity() if hybrid else MaxPool(3, stride=2)

        total, number = sum(depths), 0
        self.feature_info = []
        for i in range(self.stages):
            planes, blocks = 64 * 2**i, []
            inner, out = int(planes * width), 4 * planes
            for j in range(depths[i]):
                halves = j == 0 and (hybrid or i > 0)
                cot = not hybrid or i == 3 or (i == 2 and j % 2 == 0)
                before = nn.AvgPool2d(3, stride=2, padding=1) if halves and cot and not blur else None
                after = BlurPool(inner) if halves and blur else None
                if cot:
                    middle = ContextualAttention(inner, key_groups, groups)
                else:
                    middle = SplitAttention(inner, stride=2 if halves and not blur else 1)
                shortcut = self._shortcut(channels, out, 2 if halves else 1, averaged=hybrid) if j == 0 else None
                rate = drop_path_rate * number / max(total - 1, 1)
                blocks.append(Bottleneck(channels, inner, out, middle, before, after, shortcut, rate))
                channels, number = out, number + 1
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
            self.feature_info.append({"num_chs": out, "reduction": 4 * 2**i, "module": f"layer{i + 1}"})
        self.num_features = channels
        if not features_only:
            self.reset_classifier(num_classes)
        self._init_weights()

    @staticmethod
    def _shortcut(channels: int, out: int, stride: int, averaged: bool) -> nn.Sequential:
        if not averaged:
            return nn.Sequential(*conv_norm(channels, out, stride=stride))
        pool = nn.AvgPool2d(2, stride=2, ceil_mode=True, count_include_pad=False) if stride == 2 else nn.Identity()
        return nn.Sequential(pool, *conv_norm(channels, out))

    def _init_weights(self) -> None:
        """He-normal (fan-out) convolutions. The last norm of each block is zero: the block begins as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a newly initialised one for another number of classes (0: no head)."""
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters of two or more dimensions without weight decay: none."""
        return set()

    def layer_of(self, name: str) -> int:
        """Layer of a parameter, for layer-wise learning rates: 0 stem, one per block, the last for the head."""
        before = [0, *itertools.accumulate(len(getattr(self, f"layer{i + 1}")) for i in range(self.stages))]
        block = re.match(r"layer(\d+)\.(\d+)", name)
        if block:
            return before[int(block[1]) - 1] + int(block[2]) + 1
        return before[-1] + 1 if name.startswith("fc.") else 0

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass, with the same random draws: same gradients."""
        self.grad_checkpointing = enable

    def set_kernels(self, enable: bool = True) -> None:
        """Use the Triton kernels if device and dtype allow it (the default), or PyTorch's operators only."""
        for module in self.modules():
            if isinstance(module, ContextualAttention):
                module.kernels = enable

    def stem_and_stages(self) -> list[list[nn.Module | nn.Parameter]]:
        """The modules and parameters of the stem, then those of each stage."""
        return [[self.conv1, self.bn1], *([getattr(self, f"layer{i + 1}")] for i in range(self.stages))]

    def maps(self, image: Tensor) -> list[Tensor]:
        """[B, in_chans, H, W] -> the map [B, C_i, ceil(H/stride_i), ceil(W/stride_i)] of each stage i."""
        x_BCHW = self.pool(F.relu(self.bn1(self.conv1(image)), inplace=True))
        recompute = self.grad_checkpointing and torch.is_grad_enabled()
        maps = []
        for i in range(self.stages):
            blocks = getattr(self, f"layer{i + 1}")
            for block, scale in zip(blocks, draw_scales([block.add for block in blocks], x_BCHW), strict=True):
                x_BCHW = recomputed(block, x_BCHW, scale) if recompute else block(x_BCHW, scale)
            maps.append(x_BCHW)
        return maps

    def forward_features(self, image: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> the last stage's map [B, C, ceil(H/32), ceil(W/32)]."""
        return self.maps(image)[-1]

    def forward_head(self, x_BCHW: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map [B, C, H, W] -> logits [B, num_classes], or with pre_logits the mean over the map [B, C]."""
        x_BC = F.dropout(x_BCHW.mean((2, 3)), self.drop_rate, self.training)
        return x_BC if pre_logits else self.fc(x_BC)

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Images [B, in_chans, H, W] -> logits [B, num_classes], or with features_only the maps of out_indices."""
        if self.features_only:
            maps = self.maps(image)
            return [maps[i] for i in self.out_indices]
        return self.forward_head(self.forward_features(image))


# ------------------------------------------------------------------------------------------------------------- variants

NEXT = dict(width=1.5, key_groups=8, groups=2)  # CoTNeXt's 2x48d


def cotnet50(**overrides: Any) -> CoTNet:
    """CoTNet-50: 22,222,416 parameters, 3.23 GMACs at 224 x 224 without aggregation and norms (paper, Table 1)."""
    return build(CoTNet, overrides)


def cotnet101(**overrides: Any) -> CoTNet:
    """CoTNet-101: 38,272,048 parameters, 6.03 GMACs."""
    return build(CoTNet, overrides, depths=(3, 4, 23, 3))


def cotnext50(**overrides: Any) -> CoTNet:
    """CoTNeXt-50 (2x48d): 30,046,276 parameters, 4.24 GMACs."""
    return build(CoTNet, overrides, **NEXT)


def cotnext101(**overrides: Any) -> CoTNet:
    """CoTNeXt-101 (2x48d): 53,346,068 parameters, 8.04 GMACs."""
    return build(CoTNet, overrides, depths=(3, 4, 23, 3), **NEXT)


def se_cotnetd50(**overrides: Any) -> CoTNet:
    """SE-CoTNetD-50: 23,107,784 parameters, 4.05 GMACs."""
    return build(CoTNet, overrides, hybrid=True)


def se_cotnetd101(**overrides: Any) -> CoTNet:
    """SE-CoTNetD-101: 40,912,392 parameters, 8.43 GMACs."""
    return build(CoTNet, overrides, depths=(3, 4, 23, 3), hybrid=True, stem_width=64)


def se_cotnetd152(**overrides: Any) -> CoTNet:
    """SE-CoTNetD-152: 55,783,688 parameters, 12.89 GMACs at 224 x 224, 26.30 at 320 x 320, the paper's test size."""
    return build(CoTNet, overrides, depths=(3, 8, 36, 3), hybrid=True, stem_width=64, blur=True)
