"""PVT, version 1: Pyramid Vision Transformer (arXiv 2102.12122).

In this order: attention, blocks, the model, its variants. Parameter names are those of the released checkpoints. Shape
letters: B images, H W map, N tokens, C channels, h heads, d channels per head.
"""

import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from catmodel import kernels
from catmodel.fixed_order import resize
from catmodel.layers import Block, PatchConv, Pending, draw_block_scales
from catmodel.patches import may_be_nonzero, padding_to
from catmodel.variants import Staged, build, select_stages

BLOCK_EPS = 1e-6  # for the blocks' norms and the final one; the others use PyTorch's default, 1e-5


class SpatialReductionAttention(nn.Module):
    """Multi-head attention in which a convolution reduces keys and values R x R-fold (section 3.3).

    [B, N, C] -> [B, N, C]. reduction: R; 1 for none. The map is padded with zeros on the right and at the bottom to a
    multiple of R.
    """

    def __init__(self, channels: int, num_heads: int, reduction: int):
        super().__init__()
        if channels % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide the {channels} channels of its stage")
        self.num_heads, self.reduction = num_heads, reduction
        self.q = nn.Linear(channels, channels)
        self.kv = nn.Linear(channels, 2 * channels)
        self.proj = nn.Linear(channels, channels)
        if reduction > 1:
            self.sr = PatchConv(channels, channels, kernel_size=reduction, stride=reduction)
            self.norm = nn.LayerNorm(channels)

    def late_bias(self) -> Tensor:
        """The bias that `forward` leaves to the caller without `last_bias`."""
        return self.proj.bias

    def can_scale(self, *_: object) -> bool:
        """Whether `forward` scales its result by drop-path's factors."""
        return False

    def forward(self, x_BNC: Tensor, height: int, width: int, fused: bool, last_bias: bool = True) -> Tensor:
        """fused: use the Triton kernels, whose gradients are repeatable on a GPU (those of PyTorch's are not)."""
        q_BNC = self.q(x_BNC)
        if self.reduction > 1:
            rows, columns = padding_to(height, self.reduction), padding_to(width, self.reduction)
            x_BCHW = rearrange(x_BNC, "B (H W) C -> B C H W", H=height)
            x_BCHW = F.pad(x_BCHW, (0, columns, 0, rows)) if may_be_nonzero(rows, columns) else x_BCHW
            x_BNC = self.norm(self.sr(x_BCHW).flatten(1, 2))
        kv_BNF = self.kv(x_BNC)
        if fused and kernels.cross_attention_fits(q_BNC.shape[-1] // self.num_heads):
            q, kv = q_BNC.unflatten(2, (self.num_heads, -1)), kv_BNF.unflatten(2, (2, self.num_heads, -1))
            return self._project(kernels.ops.cross_attention(q, kv)[0].flatten(2), last_bias)
        q = rearrange(q_BNC, "B N (h d) -> B h N d", h=self.num_heads)
        k, v = rearrange(kv_BNF, "B N (two h d) -> two B h N d", two=2, h=self.num_heads)
        y = F.scaled_dot_product_attention(q, k, v)
        return self._project(rearrange(y, "B h N d -> B N (h d)"), last_bias)

    def _project(self, y: Tensor, last_bias: bool) -> Tensor:
        return self.proj(y) if last_bias else F.linear(y, self.proj.weight)


class PatchEmbed(nn.Module):
    """Map [B, c, H, W] -> tokens [B, ceil(H/p), ceil(W/p), C], then LayerNorm. Pads with zeros, right and bottom."""

    def __init__(self, patch_size: int, in_chans: int, channels: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = PatchConv(in_chans, channels, kernel_size=patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        rows, columns = padding_to(x_BCHW.shape[2], self.patch_size), padding_to(x_BCHW.shape[3], self.patch_size)
        x_BCHW = F.pad(x_BCHW, (0, columns, 0, rows)) if may_be_nonzero(rows, columns) else x_BCHW
        return self.norm(self.proj(x_BCHW))


class PVT(Staged):
    """PVT for classification or, with `features_only`, as a backbone.

    img_size: pixels, one number or (height, width), multiples of 32. A classifier takes images of exactly this size.
        With features_only it sets only the grids of the position tables, which are resized (bilinearly) to each image.
    in_chans, num_classes: input channels; outputs of the head (0: no head, pooled features).
    embed_dims, depths, num_heads, mlp_ratios, sr_ratios: per stage. sr_ratios is the reduction R of keys and values.
    drop_path_rate: rate of the last block; rates grow linearly from 0.
    features_only: `forward` returns the maps of the stages in out_indices (default: all) for images of any size, as in
        the released detectors: without the class token and the final norm.

    Raises ValueError for settings that do not fit together.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        drop_path_rate: float = 0.0,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
    ):
        super().__init__()
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        stages = len(depths)
        if not stages == len(embed_dims) == len(num_heads) == len(mlp_ratios) == len(sr_ratios):
            raise ValueError(
                "embed_dims, depths, num_heads, mlp_ratios and sr_ratios must have one number per stage each"
            )
        if sr_ratios[-1] != 1 and not features_only:
            raise ValueError(
                f"sr_ratios {list(sr_ratios)}: the last must be 1, because the class token is not on the reduced map"
            )
        if any(side % 2 ** (stages + 1) for side in self.img_size):
            raise ValueError(f"img_size {self.img_size}: both sides must be multiples of {2 ** (stages + 1)}")
        if not 0.0 <= drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate {drop_path_rate} must be in [0, 1)")
        self.features_only = features_only
        self.out_indices = select_stages(out_indices, stages, features_only)
        self.stages = self.out_indices[-1] + 1 if features_only else stages
        self.grad_checkpointing, self.kernels = False, True
        total = sum(depths)
        rates = [drop_path_rate * i / max(total - 1, 1) for i in range(total)]
        self.grids = []
        for i in range(self.stages):
            channels, stride = embed_dims[i], 2 ** (i + 2)
            self.grids.append((self.img_size[0] // stride, self.img_size[1] // stride))
            classifies = i == stages - 1 and not features_only
            embed = PatchEmbed(4 if i == 0 else 2, embed_dims[i - 1] if i else in_chans, channels)
            self.add_module(f"patch_embed{i + 1}", embed)
            position = nn.Parameter(torch.empty(1, math.prod(self.grids[i]) + classifies, channels))
            self.register_parameter(f"pos_embed{i + 1}", position)
            rates_here = rates[sum(depths[:i]) : sum(depths[: i + 1])]
            blocks = nn.ModuleList()
            for rate in rates_here:
                attn = SpatialReductionAttention(channels, num_heads[i], sr_ratios[i])
                blocks.append(Block(channels, attn, mlp_ratios[i], rate, BLOCK_EPS))
            self.add_module(f"block{i + 1}", blocks)
        self.num_features = embed_dims[self.stages - 1]
        self.feature_info = [
            {"num_chs": embed_dims[i], "reduction": 2 ** (i + 2), "module": f"block{i + 1}"} for i in range(self.stages)
        ]
        if not features_only:
            self.cls_token = nn.Parameter(torch.empty(1, 1, self.num_features))
            self.norm = nn.LayerNorm(self.num_features, eps=BLOCK_EPS)
            self.reset_classifier(num_classes)
        self._init_weights()

    def _init_weights(self) -> None:
        """Truncated normals for linear weights, positions and class token, zeros for biases; else PyTorch's default."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                _init_linear(module)
        for parameter in self.parameters(recurse=False):
            nn.init.trunc_normal_(parameter, std=0.02)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a newly initialised one for another number of classes (0: no head)."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        if num_classes:
            _init_linear(self.head)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters of two or more dimensions without weight decay: as released, not the positions."""
        return {"cls_token"}

    def layer_of(self, name: str) -> int:
        """Layer of a parameter, for layer-wise learning rates: 0 embedding, one per block, the last for norm and head.

        Later embeddings and the class token belong to the block that follows them.
        """
        before = [0, *itertools.accumulate(len(getattr(self, f"block{i + 1}")) for i in range(self.stages))]
        embedding = re.match(r"(?:patch|pos)_embed(\d+)", name)
        block = re.match(r"block(\d+)\.(\d+)", name)
        if block:
            return before[int(block[1]) - 1] + int(block[2]) + 1
        if embedding:
            return before[int(embedding[1]) - 1] + (embedding[1] != "1")
        return before[-2] + 1 if name == "cls_token" else before[-1] + 1

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass, with the same random draws: same gradients."""
        self.grad_checkpointing = enable

    def set_kernels(self, enable: bool = True) -> None:
        """Use the Triton kernels if device, dtype and shapes allow it (the default), or only PyTorch's."""
        self.kernels = enable

    def stem_and_stages(self) -> list[list[nn.Module | nn.Parameter]]:
        """The modules and parameters of the stem, then those of each stage; the class token is part of the last."""
        stages = [
            [getattr(self, f"{part}{i + 1}") for part in ("patch_embed", "pos_embed", "block")]
            for i in range(self.stages)
        ]
        stem, stages[0] = stages[0][:2], stages[0][2:]
        if not self.features_only:
            stages[-1].append(self.cls_token)
        return [stem, *stages]

    def stage(self, index: int, x_BCHW: Tensor) -> tuple[Tensor, int, int]:
        """Stage `index`, from 0: map [B, c, H, W] -> tokens [B, N, C], height and width of their map.

        In the classifier's last stage the class token is the first of 1 + N tokens.
        """
        x_BHWC = getattr(self, f"patch_embed{index + 1}")(x_BCHW)
        height, width = x_BHWC.shape[1:3]
        x_BNC, position = x_BHWC.flatten(1, 2), getattr(self, f"pos_embed{index + 1}")
        if not self.features_only and index == self.stages - 1:
            x_BNC = torch.cat([self.cls_token.expand(x_BNC.shape[0], -1, -1), x_BNC], dim=1)
        elif may_be_nonzero(height - self.grids[index][0], width - self.grids[index][1]):
            grid_1CHW = position.transpose(1, 2).unflatten(2, self.grids[index])
            position = resize(grid_1CHW, (height, width), "bilinear").flatten(2).transpose(1, 2)
        x_BNC = x_BNC + position
        recompute = self.grad_checkpointing and torch.is_grad_enabled()
        fused = self.kernels and kernels.usable(x_BNC.device, x_BNC.dtype)
        tokens = Pending(x_BNC)
        blocks = getattr(self, f"block{index + 1}")
        for block, scales in zip(blocks, draw_block_scales(blocks, x_BNC), strict=True):
            tokens = block.chain(tokens, scales, height, width, fused, fused=fused, recompute=recompute)
        return tokens.total(), height, width

    def forward_features(self, image: Tensor) -> Tensor:
        """[B, in_chans, H, W] of img_size -> normed tokens of the last stage [B, 1 + N, C], class token first."""
        self.check_images(image)
        x_BCHW = image
        for index in range(self.stages - 1):
            x_BCHW = _as_map(*self.stage(index, x_BCHW))
        return self.norm(self.stage(self.stages - 1, x_BCHW)[0])

    def forward_head(self, x_BNC: Tensor, pre_logits: bool = False) -> Tensor:
        """Normed tokens [B, 1 + N, C] -> logits [B, num_classes], or with pre_logits the class token [B, C]."""
        return x_BNC[:, 0] if pre_logits else self.head(x_BNC[:, 0])

    def forward_maps(self, image: Tensor) -> list[Tensor]:
        """[B, in_chans, H, W] -> maps [B, C_i, ceil(H/stride_i), ceil(W/stride_i)] for i in out_indices."""
        maps, x_BCHW = [], image
        for index in range(self.stages):
            x_BCHW = _as_map(*self.stage(index, x_BCHW))
            if index in self.out_indices:
                maps.append(x_BCHW)
        return maps

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Images [B, in_chans, H, W] -> logits [B, num_classes], or with features_only the list of `forward_maps`."""
        return self.forward_maps(image) if self.features_only else self.forward_head(self.forward_features(image))


def _as_map(x_BNC: Tensor, height: int, width: int) -> Tensor:
    return rearrange(x_BNC, "B (H W) C -> B C H W", H=height, W=width)


def _init_linear(linear: nn.Linear) -> None:
    nn.init.trunc_normal_(linear.weight, std=0.02)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


# ------------------------------------------------------------------------------------------------------------- variants


def pvt_tiny(**overrides: Any) -> PVT:
    """PVT-Tiny: 13,229,288 parameters, 1.93 GMACs at 224 x 224 (paper, Table 1)."""
    return build(PVT, overrides, depths=(2, 2, 2, 2), drop_path_rate=0.1)


def pvt_small(**overrides: Any) -> PVT:
    """PVT-Small: 24,485,864 parameters, 3.82 GMACs. Four blocks in stage 2, as released; the paper's table has 3."""
    return build(PVT, overrides, depths=(3, 4, 6, 3), drop_path_rate=0.1)


def pvt_medium(**overrides: Any) -> PVT:
    """PVT-Medium: 44,208,104 parameters, 6.66 GMACs. Four blocks in stage 2, as released; the paper's table has 3."""
    return build(PVT, overrides, depths=(3, 4, 18, 3), drop_path_rate=0.3)


def pvt_large(**overrides: Any) -> PVT:
    """PVT-Large: 61,369,320 parameters, 9.81 GMACs."""
    return build(PVT, overrides, depths=(3, 8, 27, 3), drop_path_rate=0.3)
