"""The two attentions of CAT (arXiv 2106.05786, section 3.1) and the patches they work on: in plain PyTorch, or by the Triton kernels.

A stage's tokens lie on an H x W map which is cut into n patches of P x P tokens.

- Inner-patch self-attention (IPSA): inside each patch, its P*P tokens attend to each other over all channels.
- Cross-patch self-attention (CPSA): inside each channel, the n patches attend to each other; a patch's features are its P*P values there.

Shape letters: B images, H W map, N tokens, n patches, P tokens per patch (size * size), C channels, h heads, d channels per head.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from catmodel import kernels
from catmodel.dropout import draw_seed, dropout
from catmodel.layers import may_be_nonzero, missing


@dataclass(frozen=True)
class Patches:
    """How the tokens of one stage are stored and grouped into patches.

    Where the patches tile the map exactly, tokens are kept **patch by patch**: `split` and `join` are then views, and what works on
    single tokens (norm, MLP, residual) does not care. Otherwise tokens are kept row by row, and `split` pads the map with zeros on the
    right and at the bottom: so padding comes after the norm, as published, and costs the MLP nothing.

    height, width: of the map, in tokens. size: a patch's side, in tokens. by_row: keep tokens row by row in any case.
    kernels: let the Triton kernels do the work, where they fit; they find a patch's tokens in the rows by themselves.
    """

    height: int
    width: int
    size: int
    by_row: bool = False
    kernels: bool = False

    @property
    def padding(self) -> tuple[int, int]:
        """Rows and columns that are missing for whole patches."""
        return missing(self.height, self.size), missing(self.width, self.size)

    @property
    def by_patch(self) -> bool:
        return not may_be_nonzero(*self.padding) and not self.by_row

    @property
    def can_shift(self) -> bool:
        """Shifting by half a patch regroups tokens only where both sides hold more than one patch."""
        return min(self.height, self.width) > self.size

    def tokens_from_map(self, x_BHWC: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, N, C] in this stage's order."""
        return self._cut(x_BHWC).flatten(1, 2) if self.by_patch else x_BHWC.flatten(1, 2)

    def map_from_tokens(self, x_BNC: Tensor) -> Tensor:
        """[B, N, C] in this stage's order -> [B, H, W, C]."""
        if self.by_patch:
            return self._paste(x_BNC.unflatten(1, (-1, self.size**2)))
        return x_BNC.unflatten(1, (self.height, self.width))

    def split(self, x_BNC: Tensor, shift: int = 0) -> Tensor:
        """[B, N, C] -> patches [B, n, P, C]; with a shift, of the map rolled up and to the left by that many tokens."""
        if self.by_patch and not shift:
            return x_BNC.unflatten(1, (-1, self.size**2))
        x_BHWC = self.map_from_tokens(x_BNC)
        rows, columns = self.padding
        if may_be_nonzero(rows, columns):
            x_BHWC = F.pad(x_BHWC, (0, 0, 0, columns, 0, rows))
        return self._cut(x_BHWC.roll((-shift, -shift), dims=(1, 2)) if shift else x_BHWC)

    def join(self, x_BnPC: Tensor, shift: int = 0) -> Tensor:
        """The inverse of `split`: [B, n, P, C] -> [B, N, C]."""
        if self.by_patch and not shift:
            return x_BnPC.flatten(1, 2)
        x_BHWC = self._paste(x_BnPC)
        if shift:
            x_BHWC = x_BHWC.roll((shift, shift), dims=(1, 2))
        return self.tokens_from_map(x_BHWC[:, : self.height, : self.width])

    def pad(self, x_BNC: Tensor) -> tuple["Patches", Tensor]:
        """Row by row: the map padded on the right and at the bottom to whole patches, and its tokens."""
        rows, columns = self.padding
        if not rows and not columns:
            return self, x_BNC
        padded = replace(self, height=self.height + rows, width=self.width + columns)
        return padded, F.pad(self.map_from_tokens(x_BNC), (0, 0, 0, columns, 0, rows)).flatten(1, 2)

    def crop(self, x_BNC: Tensor) -> Tensor:
        """The tokens of this map from those of the padded one."""
        rows, columns = self.padding
        if not rows and not columns:
            return x_BNC
        return x_BNC.unflatten(1, (self.height + rows, -1))[:, : self.height, : self.width].flatten(1, 2)

    def shift_mask(self, shift: int, device: torch.device) -> Tensor:
        """[n, P, P], True where two tokens of a shifted patch lay together before the roll too, and so may attend.

        (Swin, arXiv 2103.14030, section 3.2.)
        """

        def region(length: int) -> Tensor:
            # After the roll the last patch of a side holds two pieces: its own end, and the start that came round.
            position = torch.arange(length, device=device)
            return (position >= length - self.size).long() + (position >= length - shift).long()

        rows, columns = self.padding
        region_HW = 3 * region(self.height + rows)[:, None] + region(self.width + columns)
        region_nP = self._cut(region_HW[None, :, :, None])[0, :, :, 0]
        return region_nP[:, :, None] == region_nP[:, None, :]

    def _cut(self, x_BHWC: Tensor) -> Tensor:
        return rearrange(x_BHWC, "B (rows p) (columns q) C -> B (rows columns) (p q) C", p=self.size, q=self.size)

    def _paste(self, x_BnPC: Tensor) -> Tensor:
        columns = -(-self.width // self.size)
        return rearrange(x_BnPC, "B (rows columns) (p q) C -> B (rows p) (columns q) C", columns=columns, p=self.size)


class InnerPatchAttention(nn.Module):
    """IPSA: multi-head self-attention among the P*P tokens of a patch, with a learned relative position bias.

    channels: C. num_heads must divide it. patch_size: a patch's side, in tokens.
    shifted: group the tokens into patches that are shifted by half a patch (the paper's ablation; not the published models).
    dropout: of the attention weights, in training.
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
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x_BNC: Tensor, patches: Patches) -> Tensor:
        """[B, N, C] -> [B, N, C]"""
        shift = self.shift if self.shift and patches.can_shift else 0
        rate = self.dropout if self.training else 0.0
        seed = draw_seed(x_BNC.device) if rate else None
        bias = self.position_bias()
        if patches.kernels and kernels.inner_patch_fits(patches.size, x_BNC.shape[-1] // self.num_heads):
            whole, x_BNC = patches.pad(x_BNC)
            y_BNC = torch.ops.catmodel.inner_patch_attention(
                self.qkv(x_BNC), bias, whole.height, whole.width, whole.size, shift, rate, seed
            )
            return self.proj(patches.crop(y_BNC))
        x_BnPC = patches.split(x_BNC, shift)
        B = x_BnPC.shape[0]
        q, k, v = rearrange(self.qkv(x_BnPC), "B n P (three h d) -> three (B n) h P d", three=3, h=self.num_heads)
        if shift:
            allowed_n1PP = patches.shift_mask(shift, x_BNC.device).unsqueeze(1)
            bias = bias.masked_fill(~allowed_n1PP, float("-inf")).repeat(B, 1, 1, 1)
        y = attend(q, k, v, bias, rate, seed)
        y_BnPC = self.proj(rearrange(y, "(B n) h P d -> B n P (h d)", B=B))
        return patches.join(y_BnPC, shift)

    def position_bias(self) -> Tensor:
        """[h, P, P]: what is added to the attention logits of each pair of tokens."""
        bias_PPh = self.relative_position_bias_table[self.relative_position_index.flatten()]
        return bias_PPh.unflatten(0, self.relative_position_index.shape).permute(2, 0, 1).contiguous()


class CrossPatchAttention(nn.Module):
    """CPSA: self-attention among the n patches of the map, in every channel on its own with the same weights.

    A patch's features are the P*P values of the channel, so the weights depend on patch_size alone and any number of patches works.
    num_heads: 1 in the paper; more split the P*P features. dropout: of the attention weights, in training (0.2 in the paper, Table 6).
    """

    def __init__(self, patch_size: int, num_heads: int = 1, dropout: float = 0.0):
        super().__init__()
        features = patch_size**2
        if features % num_heads:
            raise ValueError(f"cpsa_num_heads {num_heads} does not divide the {features} values of a {patch_size}x{patch_size} patch")
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv = nn.Linear(features, 3 * features)
        self.proj = nn.Linear(features, features)

    def forward(self, x_BNC: Tensor, patches: Patches) -> Tensor:
        """[B, N, C] -> [B, N, C]"""
        # With a single patch (stage 4) the softmax is 1, yet dropout still silences a channel's whole v: so no shortcut.
        rate = self.dropout if self.training else 0.0
        seed = draw_seed(x_BNC.device) if rate else None
        if patches.kernels and kernels.cross_patch_fits(patches.size):
            weights = self.qkv.weight, self.qkv.bias, self.proj.weight, self.proj.bias
            return kernels.cross_patch_attention(x_BNC, *weights, patches, self.num_heads, rate, seed)
        x_BnPC = patches.split(x_BNC)
        B = x_BnPC.shape[0]
        x_BCnP = rearrange(x_BnPC, "B n P C -> B C n P")
        q, k, v = rearrange(self.qkv(x_BCnP), "B C n (three h d) -> three (B C) h n d", three=3, h=self.num_heads)
        y = attend(q, k, v, None, rate, seed)
        y_BCnP = self.proj(rearrange(y, "(B C) h n d -> B C n (h d)", B=B))
        return patches.join(rearrange(y_BCnP, "B C n P -> B n P C"))


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, rate: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v, all [batch, h, tokens, d]; the bias broadcasts to [batch, h, tokens, tokens].

    rate: of dropout, of the softmax; seed: what its mask is a function of (`catmodel.dropout`).

    Without dropout by PyTorch's fused attention, which never holds tokens x tokens in memory: a dense 800x1280 image has 1,334 patches in
    each of 96 channels. On a CPU, though, the plain products are faster where tokens are few, or where a trainable bias keeps PyTorch from
    fusing (together 4 % of a training step of cat_tiny, 12 % of one of cat_nano).
    """
    tokens, d = q.shape[-2:]
    if rate or (q.device.type == "cpu" and (bias is not None or (isinstance(tokens, int) and tokens <= 8))):
        weights = (q * d**-0.5) @ k.transpose(-2, -1)
        weights = (weights if bias is None else weights + bias).softmax(dim=-1)
        return (dropout(weights, rate, seed) if rate else weights) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias if bias is None else bias.to(q.dtype))


def relative_position_index(size: int) -> Tensor:
    """[P, P] int64: for a pair of tokens of a size x size patch, the row of the bias table that belongs to their offset.

    Row (dy + size - 1) * (2 size - 1) + (dx + size - 1) for the offset (dy, dx) from the second token to the first.
    """
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    y, x = y.flatten(), x.flatten()
    dy, dx = y[:, None] - y[None, :], x[:, None] - x[None, :]
    return (dy + size - 1) * (2 * size - 1) + (dx + size - 1)
