"""CAT: Cross Attention in Vision Transformer (arXiv 2106.05786).

In this order: layers, stages, the model, its variants. Parameter names are those of the released checkpoints.
For the shape letters see `attention.py`.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from catmodel import kernels
from catmodel.attention import CrossPatchAttention, InnerPatchAttention, seed_for
from catmodel.fixed_order import resize
from catmodel.layers import Block, PatchConv, Pending, draw_block_scales
from catmodel.patches import Patches, may_be_nonzero, padding_to
from catmodel.variants import Staged, build, select_stages

# --------------------------------------------------------------------------------------------------------------- layers


class PatchSlice(nn.Linear):
    """The same linear map of p x p pixels, with its weights in the order of `PatchProjection`'s: (dx, dy, channel)."""

    def __init__(self, in_chans: int, embed_dim: int, patch_size: int):
        super().__init__(in_chans * patch_size**2, embed_dim)
        self.patch_size = patch_size

    def forward(self, image: Tensor) -> Tensor:
        p = self.patch_size
        return super().forward(rearrange(image, "B c (H dy) (W dx) -> B H W (dx dy c)", dy=p, dx=p))


class PatchEmbed(nn.Module):
    """Image [B, 3, H, W] -> tokens [B, H/p, W/p, C]: one token per p x p pixels, then LayerNorm.

    Images are padded with zeros on the right and at the bottom to a multiple of p.

    method: "conv" as in the published models, or "slice", an ablation of the paper that differs in the order of the
    weights and in their initialisation.
    """

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int, method: Literal["conv", "slice"] = "conv"):
        super().__init__()
        self.patch_size = patch_size
        if method == "conv":
            self.proj = PatchConv(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)
        elif method == "slice":
            self.proj = PatchSlice(in_chans, embed_dim, patch_size)
        else:
            raise ValueError(f"patch_embed {method!r}: must be 'conv' or 'slice'")
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, image: Tensor) -> Tensor:
        rows, columns = padding_to(image.shape[2], self.patch_size), padding_to(image.shape[3], self.patch_size)
        if may_be_nonzero(rows, columns):
            image = F.pad(image, (0, columns, 0, rows))
        return self.norm(self.proj(image))


class PatchProjection(nn.Module):
    """Merges 2 x 2 tokens into one between stages: [B, H, W, C] -> [B, ceil(H/2), ceil(W/2), 2C]."""

    def __init__(self, channels: int):
        super().__init__()
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)
        self.norm = nn.LayerNorm(4 * channels)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        rows, columns = padding_to(x_BHWC.shape[1], 2), padding_to(x_BHWC.shape[2], 2)
        if may_be_nonzero(rows, columns):
            x_BHWC = F.pad(x_BHWC, (0, 0, 0, columns, 0, rows))
        return self.reduction(self.norm(rearrange(x_BHWC, "B (H dy) (W dx) C -> B H W (dx dy C)", dy=2, dx=2)))


# --------------------------------------------------------------------------------------------------------------- stages


class Stage(nn.Module):
    """Cross Attention Blocks (CABs; section 3.2, figure 3) at one resolution: [B, H, W, C] -> [B, H, W, C].

    A CAB is an IPSA block, a CPSA block and another IPSA block. They are stored as element i of three lists, which
    gives the names of the released checkpoints.

    drop_path: one rate per CAB, shared by its three blocks. downsample: build the projection to the next stage. The
    model calls it, because dense features are taken before it.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        patch_size: int,
        mlp_ratio: float,
        drop_path: Sequence[float],
        ipsa_drop: float,
        cpsa_drop: float,
        cpsa_num_heads: int,
        shifted_windows: bool,
        downsample: bool,
    ):
        super().__init__()
        self.patch_size = patch_size
        self.grad_checkpointing = False
        self.kernels = True

        def ipsa(rate: float, shifted: bool) -> Block:
            return Block(
                channels, InnerPatchAttention(channels, num_heads, patch_size, shifted, ipsa_drop), mlp_ratio, rate
            )

        def cpsa(rate: float) -> Block:
            return Block(channels, CrossPatchAttention(patch_size, cpsa_num_heads, cpsa_drop), mlp_ratio, rate)

        self.pre_ipsa_blocks = nn.ModuleList(ipsa(rate, shifted=False) for rate in drop_path)
        self.cpsa_blocks = nn.ModuleList(cpsa(rate) for rate in drop_path)
        self.post_ipsa_blocks = nn.ModuleList(ipsa(rate, shifted=shifted_windows) for rate in drop_path)
        self.downsample = PatchProjection(channels) if downsample else None

    def patches(self, x_BHWC: Tensor) -> Patches:
        """The layout of the map's tokens, and whether the kernels process them."""
        fused = self.kernels and kernels.usable(x_BHWC.device, x_BHWC.dtype)
        return Patches(x_BHWC.shape[1], x_BHWC.shape[2], self.patch_size, by_row=fused, kernels=fused)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        patches = self.patches(x_BHWC)
        tokens, fused = Pending(patches.tokens_from_map(x_BHWC)), patches.kernels
        recompute = self.grad_checkpointing and torch.is_grad_enabled()
        cabs = zip(self.pre_ipsa_blocks, self.cpsa_blocks, self.post_ipsa_blocks, strict=True)
        blocks = list(itertools.chain.from_iterable(cabs))
        for block, scales in zip(blocks, draw_block_scales(blocks, x_BHWC), strict=True):
            seed = seed_for(block.attn, x_BHWC.device)
            tokens = block.chain(tokens, scales, patches, seed, fused=fused, recompute=recompute)
        return patches.map_from_tokens(tokens.total())


# ---------------------------------------------------------------------------------------------------------------- model


class CAT(Staged):
    """CAT for classification or, with `features_only`, as a backbone.

    img_size: pixels, one number or (height, width). A classifier takes images of exactly this size. With features_only
        it sets only the grid of the absolute position, which is resized to each image.
    patch_size: side of an attention patch, in tokens. embed_patch_size: side of a token, in pixels.
    in_chans, num_classes: input channels; outputs of the head (0: no head, pooled features).
    embed_dim: channels of the first stage; they double at each stage.
    depths: CABs per stage. num_heads: heads of IPSA, per stage.
    mlp_ratio: hidden channels of the MLP / its channels.
    drop_path_rate: rate of the last CAB; rates grow linearly from 0.
    ipsa_drop, cpsa_drop: attention dropout. The paper has 0.2 in CPSA (Table 6), the released configs 0 in both.
    init_std: standard deviation of the initial linear weights; the published models use 0.02. None: inputs ** -0.5 of
        each layer (LeCun), for narrow networks, in which 0.02 would start every branch near zero.
    patch_embed ("conv" or "slice"), cpsa_num_heads, shifted_windows (in the second IPSA of each CAB), ape (absolute
        position): the paper's ablations.
    features_only: `forward` returns the maps of the stages in out_indices (default: all) for images of any size, each
        with its own LayerNorm. Stages after the last of these are not built.

    Raises ValueError for settings that do not fit together.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 7,
        embed_patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 96,
        depths: Sequence[int] = (1, 1, 3, 1),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        ipsa_drop: float = 0.0,
        cpsa_drop: float = 0.2,
        init_std: float | None = 0.02,
        patch_embed: Literal["conv", "slice"] = "conv",
        cpsa_num_heads: int = 1,
        shifted_windows: bool = False,
        ape: bool = True,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
    ):
        super().__init__()
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        stages = len(depths)
        if len(num_heads) != stages:
            raise ValueError(
                f"depths {list(depths)} and num_heads {list(num_heads)} must have one number per stage each"
            )
        for name, rate in (("drop_path_rate", drop_path_rate), ("ipsa_drop", ipsa_drop), ("cpsa_drop", cpsa_drop)):
            if not 0.0 <= rate < 1.0:
                raise ValueError(f"{name} {rate} must be in [0, 1)")
        if not features_only:
            check_img_size(self.img_size, embed_patch_size * patch_size, stages)
        self.features_only, self.init_std = features_only, init_std
        self.out_indices = select_stages(out_indices, stages, features_only)
        built = self.out_indices[-1] + 1 if features_only else stages
        self.patch_embed = PatchEmbed(embed_patch_size, in_chans, embed_dim, patch_embed)
        self.grid_size = tuple(-(-side // embed_patch_size) for side in self.img_size)
        if not ape:
            self.ape = None
        elif features_only:
            self.ape = nn.Parameter(torch.empty(1, embed_dim, *self.grid_size))  # as a map: it is resized to each image
        else:
            self.ape = nn.Parameter(torch.empty(1, math.prod(self.grid_size), embed_dim))

        total = sum(depths)
        rates = [drop_path_rate * i / max(total - 1, 1) for i in range(total)]
        channels = [embed_dim * 2**i for i in range(built)]
        self.layers = nn.ModuleList(
            Stage(
                channels=channels[i],
                num_heads=num_heads[i],
                patch_size=patch_size,
                mlp_ratio=mlp_ratio,
                drop_path=rates[sum(depths[:i]) : sum(depths[: i + 1])],
                ipsa_drop=ipsa_drop,
                cpsa_drop=cpsa_drop,
                cpsa_num_heads=cpsa_num_heads,
                shifted_windows=shifted_windows,
                downsample=i + 1 < built,
            )
            for i in range(built)
        )
        self.num_features = channels[-1]
        self.feature_info = [
            {"num_chs": c, "reduction": embed_patch_size * 2**i, "module": f"layers.{i}"}
            for i, c in enumerate(channels)
        ]
        if features_only:
            for i in self.out_indices:
                self.add_module(f"norm{i}", nn.LayerNorm(channels[i]))
        else:
            self.norm = nn.LayerNorm(self.num_features)
            self.reset_classifier(num_classes)
        self._init_weights()

    def _init_weights(self) -> None:
        """Truncated normals for linear weights and positions, zeros for their biases, else PyTorch's defaults."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                self._init_linear(module)
        if self.ape is not None:
            nn.init.trunc_normal_(self.ape, std=0.02)

    def _init_linear(self, linear: nn.Linear) -> None:
        nn.init.trunc_normal_(linear.weight, std=self.init_std or linear.in_features**-0.5)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a newly initialised one for another number of classes (0: no head)."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        if num_classes:
            self._init_linear(self.head)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters of two or more dimensions to which the paper applies no weight decay."""
        return {
            name
            for name, _ in self.named_parameters()
            if name == "ape" or name.endswith("relative_position_bias_table")
        }

    def layer_of(self, name: str) -> int:
        """Layer of a parameter, for layer-wise learning rates: 0 embedding, one per CAB, the last for norm and head."""
        before = [0, *itertools.accumulate(len(stage.cpsa_blocks) for stage in self.layers)]
        parts = name.split(".")
        if parts[0] in ("ape", "patch_embed"):
            return 0
        if parts[0] != "layers":
            return before[-1] + 1
        stage = int(parts[1])
        return before[stage + 1] + 1 if parts[2] == "downsample" else before[stage] + int(parts[3]) + 1

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass, with the same random draws: same gradients."""
        for stage in self.layers:
            stage.grad_checkpointing = enable

    def set_kernels(self, enable: bool = True) -> None:
        """Use the Triton kernels if device, dtype and shapes allow it (the default), or PyTorch's operators only."""
        for stage in self.layers:
            stage.kernels = enable

    def stem_and_stages(self) -> list[list[nn.Module | nn.Parameter]]:
        """The modules and parameters of the stem, then those of each stage.

        The norms of a backbone's maps belong to neither, because no classifier's checkpoint has them.
        """
        stem = [self.patch_embed] if self.ape is None else [self.patch_embed, self.ape]
        return [stem, *([stage] for stage in self.layers)]

    def embed(self, image: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> the first stage's input [B, H/p, W/p, C], including the absolute position."""
        x_BHWC = self.patch_embed(image)
        if self.ape is None:
            return x_BHWC
        if not self.features_only:
            return x_BHWC + self.ape.unflatten(1, self.grid_size)
        ape, size = self.ape, x_BHWC.shape[1:3]
        if may_be_nonzero(size[0] - self.grid_size[0], size[1] - self.grid_size[1]):
            ape = resize(ape, size, "bicubic")
        return x_BHWC + ape.permute(0, 2, 3, 1)

    def forward_features(self, image: Tensor) -> Tensor:
        """[B, in_chans, H, W] of img_size -> normed map of the last stage, [B, H/32, W/32, 8C] by default."""
        self.check_images(image)
        x_BHWC = self.embed(image)
        for stage in self.layers:
            x_BHWC = stage(x_BHWC)
            if stage.downsample is not None:
                x_BHWC = stage.downsample(x_BHWC)
        return self.norm(x_BHWC)

    def forward_head(self, x_BHWC: Tensor, pre_logits: bool = False) -> Tensor:
        """Normed map [B, H, W, C] -> logits [B, num_classes], or with pre_logits the mean over tokens [B, C]."""
        x_BC = x_BHWC.mean(dim=(1, 2))
        return x_BC if pre_logits else self.head(x_BC)

    def forward_maps(self, image: Tensor) -> list[Tensor]:
        """[B, in_chans, H, W] -> normed maps [B, C_i, ceil(H/stride_i), ceil(W/stride_i)] for i in out_indices."""
        maps = []
        x_BHWC = self.embed(image)
        for i, stage in enumerate(self.layers):
            x_BHWC = stage(x_BHWC)
            if i in self.out_indices:
                maps.append(getattr(self, f"norm{i}")(x_BHWC).permute(0, 3, 1, 2))
            if stage.downsample is not None:
                x_BHWC = stage.downsample(x_BHWC)
        return maps

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Images [B, in_chans, H, W] -> logits [B, num_classes], or with features_only the list of `forward_maps`."""
        return self.forward_maps(image) if self.features_only else self.forward_head(self.forward_features(image))


def check_img_size(img_size: tuple[int, int], patch_pixels: int, stages: int) -> None:
    """Raise ValueError unless attention patches tile every stage's map. patch_pixels: their side in the first stage."""
    unit = patch_pixels * 2 ** (stages - 1)
    if any(side <= 0 or side % unit for side in img_size):
        nearest = tuple(max(round(side / unit), 1) * unit for side in img_size)
        raise ValueError(
            f"img_size {img_size} cannot be cut into whole patches: with {stages} stages both sides must be multiples "
            f"of {unit} (embed_patch_size * patch_size, doubled for each further stage). Nearest: {nearest}; or change "
            "patch_size, embed_patch_size or the number of stages; or use features_only=True, which pads any size"
        )


# ------------------------------------------------------------------------------------------------------------- variants


def cat_tiny(**overrides: Any) -> CAT:
    """CAT-T: 16,870,996 parameters, 2.77 GMACs at 224 x 224 (paper, Table 1)."""
    return build(CAT, overrides, embed_dim=64, depths=(1, 1, 3, 1), num_heads=(2, 4, 8, 16), drop_path_rate=0.1)


def cat_small(**overrides: Any) -> CAT:
    """CAT-S: 37,294,258 parameters, 6.06 GMACs at 224 x 224."""
    return build(CAT, overrides, embed_dim=96, depths=(1, 1, 3, 1), num_heads=(3, 6, 12, 24), drop_path_rate=0.2)


def cat_base(**overrides: Any) -> CAT:
    """CAT-B: 51,531,922 parameters, 8.93 GMACs at 224 x 224."""
    return build(CAT, overrides, embed_dim=96, depths=(1, 1, 6, 1), num_heads=(3, 6, 12, 24), drop_path_rate=0.3)


def cat_nano(**overrides: Any) -> CAT:
    """Not in the paper: three stages for 32 x 32 (or 64 x 64) images, to train on a CPU. 1,283,190 parameters."""
    sizes = dict(img_size=32, patch_size=4, embed_patch_size=2, num_classes=10)
    widths = dict(embed_dim=32, depths=(1, 1, 2), num_heads=(2, 4, 8), init_std=None)
    return build(CAT, overrides, **sizes, **widths, drop_path_rate=0.0, cpsa_drop=0.0)
