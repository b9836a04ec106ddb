"""Layers that several model families share."""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from catmodel import kernels


class PatchConv(nn.Conv2d):
    """A convolution whose stride is its kernel size p: [B, c, H, W] -> [B, H/p, W/p, C], with channels last.

    It is computed as a matrix product, because the norm that follows needs channels last.
    """

    def forward(self, image: Tensor) -> Tensor:
        pixels = rearrange(
            image, "B c (H dy) (W dx) -> B H W (c dy dx)", dy=self.kernel_size[0], dx=self.kernel_size[1]
        )
        return F.linear(pixels, self.weight.flatten(1), self.bias)


class Mlp(nn.Module):
    """Two linear layers on the last dimension, with an exact GELU between them."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor, fused: bool = False, last_bias: bool = True) -> Tensor:
        """[..., channels] -> [..., channels]. fused: use the Triton kernels for widths at which they are faster.

        last_bias: add the second layer's bias; otherwise the caller does.
        """
        if fused and kernels.mlp_pays(self.fc1.in_features, self.fc1.weight.dtype, x.device):
            inputs = x, self.fc1.weight, self.fc1.bias, self.fc2.weight
            inputs = kernels.autocast(*inputs, self.fc2.bias) if last_bias else (*inputs, None)
            return kernels.ops.mlp(*inputs, torch.is_grad_enabled())[0]
        a = F.gelu(self.fc1(x))
        return self.fc2(a) if last_bias else F.linear(a, self.fc2.weight)


class DropPathAdd(nn.Module):
    """Residual sum x + branch with drop-path (stochastic depth, arXiv 1603.09382).

    In training, the branch of each sample is dropped with probability `rate`; otherwise it is scaled by 1 / (1 - rate).
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
        """x, branch [B, ...] -> [B, ...]. scale: the factor of each sample's branch [B]; None: all are 1."""
        return Pending(x, branch, None, scale).total()

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"


def draw_scales(sums: Sequence[DropPathAdd], x: Tensor) -> list[Tensor | None]:
    """The factors of the samples' branches for each of `sums`, for x [B, ...]: [B] of its dtype; None: all are 1.

    They take one draw from torch's default generator of the device, because on a GPU a draw for each sum would be a
    tenth of a step's launches.
    """
    rates = [add.rate if add.training else 0.0 for add in sums]
    dropping = [rate for rate in rates if rate]
    if not dropping:
        return [None] * len(rates)
    runs = ((1 - rate, len(list(same))) for rate, same in groupby(dropping))
    keep = torch.cat([x.new_full((count, 1), chance, dtype=torch.float32) for chance, count in runs])
    kept = torch.rand(len(dropping), len(x), device=x.device) < keep
    factors = iter((kept / keep).to(x.dtype))
    return [next(factors) if rate else None for rate in rates]


class Pending(NamedTuple):
    """A residual sum x + scale * (branch + bias) that has not been made yet.

    The norm after it makes it on its way (`normed`): in one pass over memory, and in another the gradients of both
    with those of the norm's weights and the bias, each of which would take a pass of its own.
    """

    x: Tensor  # [B, ..., channels]
    branch: Tensor | None = None  # of x's shape; None: the sum is x
    bias: Tensor | None = None  # [channels]; None: the branch includes it
    scale: Tensor | None = None  # [B], of drop-path

    def total(self) -> Tensor:
        """The sum."""
        if self.branch is None:
            return self.x
        branch = self.branch if self.bias is None else self.branch + self.bias
        if self.scale is None:
            return self.x + branch
        # One pass over memory instead of two.
        return torch.addcmul(self.x, branch, self.scale.view(-1, *(1,) * (branch.ndim - 1)))

    def normed(self, norm: nn.LayerNorm, scaled: bool = False) -> tuple[Tensor, Tensor]:
        """The sum, and its norm: in one kernel, if there is a branch. scaled: the branch is, but not the bias."""
        if self.branch is None:
            return self.x, norm(self.x)
        return kernels.ops.residual_norm(*self, norm.weight, norm.bias, norm.eps, scaled)


Scales = tuple[Tensor | None, Tensor | None]  # drop-path's factors of a block's two branches


class Block(nn.Module):
    """Attention (`attn`), then an MLP, each with a norm before it and a residual around it.

    The attention says by `late_bias` and `can_scale` what `chain` may leave to it and what it leaves to `chain`.

    It is a function of its inputs: whatever is random is drawn before it, drop-path by `draw_block_scales`.
    """

    def __init__(self, channels: int, attn: nn.Module, mlp_ratio: float, drop_path: float, eps: float = 1e-5):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps)
        self.attn = attn
        self.norm2 = nn.LayerNorm(channels, eps)
        if channels * mlp_ratio < 1:
            raise ValueError(f"mlp_ratio {mlp_ratio} of {channels} channels gives no hidden ones: give a larger one")
        self.mlp = Mlp(channels, int(channels * mlp_ratio))
        self.add = DropPathAdd(drop_path)

    def forward(self, x_BNC: Tensor, scales: Scales, *place: object, fused: bool = False) -> Tensor:
        """Tokens [B, N, C] -> [B, N, C].

        scales: drop-path's. place: further inputs of the attention. fused: use the MLP's kernels.
        """
        x_BNC = self.add(x_BNC, self.attn(self.norm1(x_BNC), *place), scales[0])
        return self.add(x_BNC, self.mlp(self.norm2(x_BNC), fused), scales[1])

    def chain(
        self, pending: Pending, scales: Scales, *place: object, fused: bool = False, recompute: bool = False
    ) -> Pending:
        """The same, for blocks in a row: with kernels, the last sum of one is made by the first norm of the next.

        recompute: compute the block's activations again in the backward pass instead of keeping them.
        """
        run = recomputed if recompute else _called
        if not fused or not _one_dtype(pending.x, self.norm1.weight):
            return Pending(run(self, pending.total(), scales, *place, fused=fused))
        x, branch = run(self._chained, pending, scales[0], *place)
        return Pending(x, branch, self.mlp.fc2.bias, scales[1])

    def _chained(self, pending: Pending, scale: Tensor | None, *place: object) -> tuple[Tensor, Tensor]:
        x, y = pending.normed(self.norm1)
        # Biases of the channels are added, and their gradients summed, by the kernel of the next norm.
        bias = self.attn.late_bias()
        late = {} if bias is None else dict(last_bias=False)
        # If the attention scales its result, the gradients of x and of the branch are one tensor.
        scaled = scale is not None and self.attn.can_scale(*place)
        branch = self.attn(y, *place, **late, **(dict(scale=scale) if scaled else {}))
        x, y = Pending(x, branch, bias, scale).normed(self.norm2, scaled)
        return x, self.mlp(y, fused=True, last_bias=False)


def draw_block_scales(blocks: Sequence[Block], x: Tensor) -> list[Scales]:
    """Drop-path's factors for the two branches of each block, for tokens x [B, ...], by one draw."""
    drawn = iter(draw_scales([block.add for block in blocks for _ in range(2)], x))
    return list(zip(drawn, drawn, strict=True))


def recomputed(function: Callable, *inputs: object, **named: object) -> Any:
    """The result of function(*inputs, **named), whose activations the backward pass computes again.

    The function must not draw random numbers. The state of torch's generator is therefore not kept, which could not be
    read while a CUDA graph is recorded.
    """
    return checkpoint(function, *inputs, **named, use_reentrant=False, preserve_rng_state=False)


def _called(function: Callable, *inputs: object, **named: object) -> Any:
    return function(*inputs, **named)


def _one_dtype(x: Tensor, weight: Tensor) -> bool:
    """Whether a norm computes in the tokens' dtype; under autocast it computes in float32."""
    device = x.device.type
    # As `kernels.autocast` says, torch.amp.is_autocast_available cannot be traced.
    autocast = device in ("cuda", "cpu") and torch.is_autocast_enabled(device)
    return x.dtype == weight.dtype and not autocast
