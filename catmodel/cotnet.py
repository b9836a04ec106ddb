"""CoTNet: Contextual Transformer Networks (arXiv 2107.12292). Read from top to bottom: CoT, other layers, blocks, the model, variants.

Parameter names are those of the released checkpoints. Shape letters: B images, C channels, H W map.
"""

import itertools
import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from catmodel import kernels
from catmodel.layers import DropPathAdd
from catmodel.variants import Staged, build, stages_asked_for

SHARE = 8  # channels that share their aggregation weights


def aggregate(values_BCHW: Tensor, weights_BGKHW: Tensor, fused: bool = False) -> Tensor:
    """Local aggregation: every pixel's own 3 x 3 kernel over its neighbours, zeros outside (section 3.2, equation 5). [B, C, H, W].

    weights [B, G, 9, H, W], G dividing C: channel c uses kernel c mod G. Sums are in float32 (or float64), the result is in the values'
    dtype. For the way back the values and the weights are kept, and nothing else: no copies of the nine neighbours.
    fused: by a Triton kernel, where device and dtype allow.
    """
    if fused and kernels.usable(values_BCHW.device, values_BCHW.dtype):
        return torch.ops.catmodel.aggregate(values_BCHW, weights_BGKHW)
    # Converted out here: in there torch.compile of PyTorch 2.11 loses the gradients where there is nothing to convert.
    return _Aggregate.apply(values_BCHW, weights_BGKHW).to(values_BCHW.dtype)


class _Aggregate(torch.autograd.Function):
    """The plain way: nine shifted products. Their derivative as PyTorch takes it makes a map of zeros for each: up to three times the time
    on a CPU. In bfloat16, too, sums in float32 are the faster ones there.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(values_BCHW: Tensor, weights_BGKHW: Tensor) -> Tensor:
        padded, weights = _prepare(values_BCHW, weights_BGKHW)
        y = _neighbours(padded, 0) * weights[:, :, :, 0]
        for k in range(1, 9):
            y.addcmul_(_neighbours(padded, k), weights[:, :, :, k])
        return y.reshape_as(values_BCHW)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, dy_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        values_BCHW, weights_BGKHW = ctx.saved_tensors
        padded, weights = _prepare(values_BCHW, weights_BGKHW)
        dy = dy_BCHW.unflatten(1, padded.shape[1:3])
        dpadded, dweights = F.pad(dy * weights[:, :, :, 0], (0, 2, 0, 2)), [(dy * _neighbours(padded, 0)).sum(1)]
        for k in range(1, 9):
            _neighbours(dpadded, k).addcmul_(dy, weights[:, :, :, k])
            dweights.append((dy * _neighbours(padded, k)).sum(1))
        dvalues_BCHW = dpadded[..., 1:-1, 1:-1].reshape_as(values_BCHW)
        return dvalues_BCHW.to(values_BCHW.dtype), torch.stack(dweights, 2).to(weights_BGKHW.dtype)


def _prepare(values_BCHW: Tensor, weights_BGKHW: Tensor) -> tuple[Tensor, Tensor]:
    """Values padded with zeros [B, C/G, G, H + 2, W + 2] and weights [B, 1, G, 9, H, W], in the dtype of the sums."""
    dtype = torch.promote_types(values_BCHW.dtype, torch.float32)
    padded = F.pad(values_BCHW.to(dtype), (1, 1, 1, 1))
    return padded.unflatten(1, (-1, weights_BGKHW.shape[1])), weights_BGKHW.to(dtype)[:, None]


def _neighbours(padded: Tensor, k: int) -> Tensor:
    """Every pixel's neighbour number k, row by row from the upper left: a view [..., H, W]."""
    row, column = divmod(k, 3)
    return padded[..., row : row + padded.shape[-2] - 2, column : column + padded.shape[-1] - 2]


class ContextualAttention(nn.Module):
    """CoT, the Contextual Transformer block (section 3.2, figure 2): [B, C, H, W] -> [B, C, H, W].

    The static context, a 3 x 3 grouped convolution, is the keys; with the queries it gives every pixel a kernel, by which the values
    around it are summed: the dynamic context. A softmax gate for each channel mixes the two.

    key_groups: of the static context's convolution. groups: of the other convolutions, with the channels of query and key interleaved
    where there is more than one (CoTNeXt).
    """

    def __init__(self, channels: int, key_groups: int, groups: int):
        super().__init__()
        self.groups, self.kernels, per_pixel = groups, True, channels // SHARE
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
            nn.Conv2d(channels, hidden, 1), nn.BatchNorm2d(hidden), nn.ReLU(inplace=True), nn.Conv2d(hidden, 2 * channels, 1)
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
    """ResNeSt's split attention with a radix of 1 (arXiv 2004.08955): a 3 x 3 convolution whose channels are gated by their means."""

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
    """Halves a map after a 3 x 3 binomial filter, reflected at the border (arXiv 1904.11486).

    [B, C, H, W] -> [B, C, ceil(H/2), ceil(W/2)]. Where a side is a single pixel, which has no reflection, the border's pixels are repeated.
    """

    def __init__(self, channels: int):
        super().__init__()
        line = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("filter", torch.outer(line, line).expand(channels, 1, 3, 3).contiguous(), persistent=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        mode = "reflect" if min(x_BCHW.shape[2:]) > 1 else "replicate"
        return F.conv2d(F.pad(x_BCHW, (1, 1, 1, 1), mode=mode), self.filter, stride=2, groups=x_BCHW.shape[1])


def conv_norm(channels: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """A convolution without bias, padded to keep the map's size (divided by the stride, rounded up), and its batch norm."""
    return nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(out)


# ---------------------------------------------------------------------------------------------------------------------- blocks


class Bottleneck(nn.Module):
    """1 x 1 convolution, `middle`, 1 x 1 convolution to `out` channels; with a residual around them.

    before, after: what halves the map on that side of `middle`, if anything there does. shortcut: of the residual; None: the input itself.
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

    def forward(self, x_BCHW: Tensor) -> Tensor:
        branch = F.relu(self.bn1(self.conv1(x_BCHW)), inplace=True)
        branch = self.bn3(self.conv3(self.after(self.conv2(self.before(branch)))))
        shortcut = x_BCHW if self.downsample is None else self.downsample(x_BCHW)
        return F.relu(self.add(shortcut, branch), inplace=True)


# ---------------------------------------------------------------------------------------------------------------------- model


class CoTNet(Staged):
    """CoTNet for classification, or with `features_only` as a backbone; images of any size. A ResNet whose 3 x 3 convolutions are CoT.

    img_size: taken for the sake of callers that tell every model its images' size; any works.
    in_chans, num_classes: input channels; outputs of the head (0: no head, pooled features).
    depths: blocks per stage. width: channels of the CoT / those of a ResNet. key_groups, groups: of its convolutions.
    hybrid: SE-CoTNetD's design: a stem of three convolutions with stem_width channels and no max-pooling; split attention in place of CoT
        in the first two stages and in the odd blocks of the third; shortcuts that average before they project.
    blur: in the blocks that halve the map, do so by BlurPool after the CoT or the split attention.
    drop_rate: dropout before the head. drop_path_rate: drop-path of the last block, growing linearly from 0.
    features_only: `forward` returns the maps of the stages in out_indices (default all); stages after the last are not built.
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
        self.out_indices = stages_asked_for(out_indices, stages, features_only)
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
        self.pool = nn.Identity() if hybrid else nn.MaxPool2d(3, stride=2, padding=1)

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
                middle = (
                    ContextualAttention(inner, key_groups, groups) if cot else SplitAttention(inner, stride=2 if halves and not blur else 1)
                )
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
        """As ResNets usually start: convolutions He-normal by their outputs, every block's last norm zero: it begins as identity."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the head by a new one, freshly initialised, for another number of classes (0: none)."""
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters of two or more dimensions that are not decayed: none."""
        return set()

    def layer_of(self, name: str) -> int:
        """The layer of a parameter, for layer-wise learning rates: 0 the stem, one for every block, the last the head."""
        before = [0, *itertools.accumulate(len(getattr(self, f"layer{i + 1}")) for i in range(self.stages))]
        block = re.match(r"layer(\d+)\.(\d+)", name)
        if block:
            return before[int(block[1]) - 1] + int(block[2]) + 1
        return before[-1] + 1 if name.startswith("fc.") else 0

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass instead of storing them. Replays random draws: same gradients."""
        self.grad_checkpointing = enable

    def set_kernels(self, enable: bool = True) -> None:
        """Use the Triton kernels where device and dtype allow (the default), or plain PyTorch everywhere."""
        for module in self.modules():
            if isinstance(module, ContextualAttention):
                module.kernels = enable

    def stem_and_stages(self) -> list[list[nn.Module | nn.Parameter]]:
        """What belongs to the stem, then to each stage."""
        return [[self.conv1, self.bn1], *([getattr(self, f"layer{i + 1}")] for i in range(self.stages))]

    def maps(self, image: Tensor) -> list[Tensor]:
        """[B, in_chans, H, W] -> the map [B, C_i, ceil(H/stride_i), ceil(W/stride_i)] of every stage i."""
        x_BCHW = self.pool(F.relu(self.bn1(self.conv1(image)), inplace=True))
        recompute = self.grad_checkpointing and torch.is_grad_enabled()
        maps = []
        for i in range(self.stages):
            for block in getattr(self, f"layer{i + 1}"):
                x_BCHW = checkpoint(block, x_BCHW, use_reentrant=False) if recompute else block(x_BCHW)
            maps.append(x_BCHW)
        return maps

    def forward_features(self, image: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> the last stage's map [B, C, ceil(H/32), ceil(W/32)]."""
        return self.maps(image)[-1]

    def forward_head(self, x_BCHW: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map [B, C, H, W] -> logits [B, num_classes]; with pre_logits the mean over the map [B, C]."""
        x_BC = F.dropout(x_BCHW.mean((2, 3)), self.drop_rate, self.training)
        return x_BC if pre_logits else self.fc(x_BC)

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Images [B, in_chans, H, W] -> logits [B, num_classes]; with features_only the maps of out_indices."""
        if self.features_only:
            maps = self.maps(image)
            return [maps[i] for i in self.out_indices]
        return self.forward_head(self.forward_features(image))


# ---------------------------------------------------------------------------------------------------------------------- variants

NEXT = dict(width=1.5, key_groups=8, groups=2)  # the 2x48d of CoTNeXt


def cotnet50(**overrides: Any) -> CoTNet:
    """CoTNet-50: 22,222,416 parameters, 3.23 GMACs at 224 x 224, which count neither the aggregation nor norms (paper, Table 1)."""
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
    """SE-CoTNetD-152: 55,783,688 parameters; 12.89 GMACs at 224 x 224, 26.30 at 320 x 320, where the paper evaluates it."""
    return build(CoTNet, overrides, depths=(3, 8, 36, 3), hybrid=True, stem_width=64, blur=True)
