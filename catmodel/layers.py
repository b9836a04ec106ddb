"""Layers that several model families share."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

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

    def forward(self, x: Tensor, fused: bool = False) -> Tensor:
        """[..., channels] -> [..., channels]. fused: use the Triton kernels for widths at which they are faster."""
        if fused and kernels.mlp_pays(self.fc1.in_features):
            weights = self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias
            return torch.ops.catmodel.mlp(*kernels.autocast(x, *weights), torch.is_grad_enabled())[0]
        return self.fc2(F.gelu(self.fc1(x)))


class DropPathAdd(nn.Module):
    """Residual sum x + branch with drop-path (stochastic depth, arXiv 1603.09382).

    In training, the branch of each sample is dropped with probability `rate`; otherwise it is scaled by 1 / (1 - rate).
    Draws from torch's default generator of the tensors' device.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        """x, branch [B, ...] -> [B, ...]."""
        if not self.training or self.rate == 0.0:
            return x + branch
        keep = 1.0 - self.rate
        mask = branch.new_empty(len(branch), *(1,) * (branch.ndim - 1)).bernoulli_(keep).div_(keep)
        return torch.addcmul(x, branch, mask)  # one pass over memory instead of two

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"
