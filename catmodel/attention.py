"""The two attentions of CAT (arXiv 2106.05786, section 3.1), in PyTorch or with the Triton kernels.

A stage's tokens form an H x W map, which is divided into n patches of size x size tokens.

- Inner-patch self-attention (IPSA): the tokens of a patch attend to each other, over all channels.
- Cross-patch self-attention (CPSA): within each channel, the n patches attend to each other. A patch's features are its
  size * size values in that channel.

Shape letters: B images, H W map, N tokens, n patches, P tokens per patch (size * size), C channels, h heads, d channels
per head.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from catmodel import kernels
from catmodel.dropout import draw_seed, dropout
from catmodel.patches import Patches

# PyTorch's fused attention fails for larger batches on a GPU ("invalid argument", seen with 128,000 on an H200).
LARGEST_BATCH = 65_535


class InnerPatchAttention(nn.Module):
    """IPSA: multi-head self-attention among the tokens of a patch, with a learned relative position bias.

    channels: C, a multiple of num_heads. patch_size: side of a patch, in tokens.
    shifted: use patches shifted by half a patch (an ablation of the paper; not in the published models).
    dropout: rate for the attention weights, in training.
    """

    def __init__(self, channels: int, num_heads: int, patch_size: int, shifted: bool = False, dropout: float = 0.0):
        super().__init__()
        if channels % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide the {channels} channels of its stage")
        self.num_heads = num_heads
        self.shift = patch_size // 2 if shifted else 0
        self.dropout = dropout
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * patch_size - 1) ** 2, num_heads))
        self.register_buffer("relative_position_index", relative_position_index(patch_size))
        self.register_buffer("pairs_of_offset", pairs_of_offset(patch_size), persistent=False)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def late_bias(self) -> Tensor:
        """The bias that `forward` leaves to the caller without `last_bias`."""
        return self.proj.bias

    def can_scale(self, patches: Patches, *_: object) -> bool:
        """Whether `forward` takes drop-path's factors: the kernel multiplies by them."""
        return patches.kernels and kernels.inner_patch_fits(patches.size, self.proj.in_features // self.num_heads)

    def forward(
        self,
        x_BNC: Tensor,
        patches: Patches,
        seed: Tensor | None = None,
        last_bias: bool = True,
        scale: Tensor | None = None,
    ) -> Tensor:
        """[B, N, C] -> [B, N, C].

        seed: of the dropout (`seed_for`); None: it is drawn here. last_bias: add the last layer's bias; otherwise the
        caller does. scale: factors of the images' results [B], but for that bias, if `can_scale`.
        """
        shift = self.shift if self.shift and patches.can_shift else 0
        seed = seed_for(self, x_BNC.device) if seed is None else seed
        rate = 0.0 if seed is None else self.dropout
        bias = self.position_bias()
        if self.can_scale(patches):
            whole, x_BNC = patches.pad(x_BNC)
            # The kernel also sums the gradient of the layer's bias, for which autograd would read that of qkv again.
            qkv_BNF = F.linear(x_BNC, self.qkv.weight, self.qkv.bias.detach())
            place = whole.height, whole.width, whole.size, shift
            y_BNC = kernels.ops.inner_patch_attention(qkv_BNF, self.qkv.bias, bias, *place, rate, seed, scale)
            return self._project(patches.crop(y_BNC), last_bias)
        x_BnPC = patches.split(x_BNC, shift)
        B = x_BnPC.shape[0]
        q, k, v = rearrange(self.qkv(x_BnPC), "B n P (three h d) -> three (B n) h P d", three=3, h=self.num_heads)
        if shift:
            allowed_n1PP = patches.shift_mask(shift, x_BNC.device).unsqueeze(1)
            bias = bias.masked_fill(~allowed_n1PP, float("-inf")).repeat(B, 1, 1, 1)
        y = attend(q, k, v, bias, rate, seed)
        y_BnPC = self._project(rearrange(y, "(B n) h P d -> B n P (h d)", B=B), last_bias)
        return patches.join(y_BnPC, shift)

    def _project(self, y: Tensor, last_bias: bool) -> Tensor:
        return self.proj(y) if last_bias else F.linear(y, self.proj.weight)

    def position_bias(self) -> Tensor:
        """[h, P, P], added to the attention logits of each pair of tokens."""
        return _PositionBias.apply(
            self.relative_position_bias_table, self.relative_position_index, self.pairs_of_offset
        )


class _PositionBias(torch.autograd.Function):
    """The rows of a bias table [T, h] at index [P, P] -> [h, P, P], with a gradient that is summed in a fixed order.

    Autograd would scatter the gradient with atomic additions on a GPU, in an order that varies. Here each row of the
    table gathers the gradients of its pairs of tokens [T, P] (`pairs_of_offset`) and adds them in their order.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(table_Th: Tensor, index_PP: Tensor, pairs_TP: Tensor) -> Tensor:
        bias_PPh = table_Th[index_PP.flatten()].unflatten(0, index_PP.shape)
        # A copy even with one head: contiguous() would return its input, and in PyTorch 2.11 a compiled Function loses
        # the gradient of an output that is also one of its intermediate results.
        return bias_PPh.permute(2, 0, 1).clone(memory_format=torch.contiguous_format)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx, dbias_hPP: Tensor) -> tuple[Tensor, None, None]:
        (pairs_TP,) = ctx.saved_tensors
        dbias_ph = F.pad(dbias_hPP.flatten(1), (0, 1)).T  # the last row is zero, for places without a pair
        return dbias_ph[pairs_TP].sum(1), None, None


class CrossPatchAttention(nn.Module):
    """CPSA: self-attention among the n patches of the map, in each channel separately, with shared weights.

    A patch's features are its P values in the channel, so the weights depend on patch_size only and any number of
    patches works.

    num_heads: 1 in the paper; more heads split the P features. dropout: rate for the attention weights, in training
    (0.2 in the paper, Table 6).
    """

    def __init__(self, patch_size: int, num_heads: int = 1, dropout: float = 0.0):
        super().__init__()
        features = patch_size**2
        if features % num_heads:
            raise ValueError(
                f"cpsa_num_heads {num_heads} does not divide the {features} values of a {patch_size}x{patch_size} patch"
            )
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv = nn.Linear(features, 3 * features)
        self.proj = nn.Linear(features, features)

    def late_bias(self) -> None:
        """Its last bias belongs to the tokens of a patch, not to channels: `forward` adds it."""

    def can_scale(self, patches: Patches, *_: object) -> bool:
        """Whether `forward` takes drop-path's factors: the kernel multiplies by them."""
        return patches.kernels and kernels.cross_patch_alone(patches, self.num_heads, self.proj.weight.dtype)

    def forward(
        self, x_BNC: Tensor, patches: Patches, seed: Tensor | None = None, scale: Tensor | None = None
    ) -> Tensor:
        """[B, N, C] -> [B, N, C].

        seed: of the dropout (`seed_for`); None: it is drawn here. scale: factors of the images' results [B], if
        `can_scale`.
        """
        # No shortcut for a single patch (stage 4): its softmax is 1, but dropout may still zero a channel's v.
        seed = seed_for(self, x_BNC.device) if seed is None else seed
        rate = 0.0 if seed is None else self.dropout
        if patches.kernels and kernels.cross_patch_fits(patches.size):
            weights = self.qkv.weight, self.qkv.bias, self.proj.weight, self.proj.bias
            return kernels.cross_patch_attention(x_BNC, *weights, patches, self.num_heads, rate, seed, scale)
        x_BnPC = patches.split(x_BNC)
        B = x_BnPC.shape[0]
        x_BCnP = rearrange(x_BnPC, "B n P C -> B C n P")
        q, k, v = rearrange(self.qkv(x_BCnP), "B C n (three h d) -> three (B C) h n d", three=3, h=self.num_heads)
        y = attend(q, k, v, None, rate, seed)
        y_BCnP = self.proj(rearrange(y, "(B C) h n d -> B C n (h d)", B=B))
        return patches.join(rearrange(y_BCnP, "B C n P -> B n P C"))


def seed_for(attention: InnerPatchAttention | CrossPatchAttention, device: torch.device) -> Tensor | None:
    """A new seed for the dropout of `attention`; None if it drops nothing."""
    return draw_seed(device) if attention.training and attention.dropout else None


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, rate: float = 0.0, seed: Tensor | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v, for q, k and v [batch, h, tokens, d].

    bias: broadcasts to [batch, h, tokens, tokens]. rate: dropout of the softmax. seed: determines the dropout's mask
    (`catmodel.dropout`).

    Without dropout this calls PyTorch's fused attention, which stores no tokens x tokens matrix: a dense 800 x 1280
    image has 1,334 patches in each of 96 channels. On a CPU, explicit products are faster for few tokens, and for a
    trainable bias, which prevents fusion (together 4 % of a training step of cat_tiny, 12 % of one of cat_nano).
    """
    tokens, d = q.shape[-2:]
    if rate or (q.device.type == "cpu" and (bias is not None or (isinstance(tokens, int) and tokens <= 8))):
        weights = (q * d**-0.5) @ k.transpose(-2, -1)
        weights = (weights if bias is None else weights + bias).softmax(dim=-1)
        return (dropout(weights, rate, seed) if rate else weights) @ v
    if q.device.type == "cuda" and bias is None and len(q) > LARGEST_BATCH:
        parts = zip(*(x.split(LARGEST_BATCH) for x in (q, k, v)), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*part) for part in parts])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias if bias is None else bias.to(q.dtype))


def relative_position_index(size: int) -> Tensor:
    """[P, P] int64: the row of the bias table for each pair of tokens of a size x size patch.

    For an offset (dy, dx) from the second token to the first, the row is
    (dy + size - 1) * (2 * size - 1) + (dx + size - 1).
    """
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    y, x = y.flatten(), x.flatten()
    dy, dx = y[:, None] - y[None, :], x[:, None] - x[None, :]
    return (dy + size - 1) * (2 * size - 1) + (dx + size - 1)


def pairs_of_offset(size: int) -> Tensor:
    """[T, P] int64, the inverse of `relative_position_index`: for each of its T = (2 * size - 1)^2 rows, the pairs.

    Element (t, p) is the pair of tokens with the offset of row t whose second token is p, as a position in the
    flattened [P, P], or P * P if the first token would lie outside of the patch.
    """
    side, P = 2 * size - 1, size**2
    index_PP = relative_position_index(size)
    pairs_TP = torch.full((side**2, P), P * P)
    pairs_TP[index_PP, torch.arange(P)] = torch.arange(P * P).view(P, P)
    return pairs_TP
