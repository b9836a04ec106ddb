"""CoT's local aggregation (arXiv 2107.12292, section 3.2), in PyTorch or with the Triton kernels.

Shape letters: B images, C channels, G kernels per pixel, K = 9 weights of a kernel, H W map.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from catmodel import kernels


def aggregate(values_BCHW: Tensor, weights_BGKHW: Tensor, fused: bool = False) -> Tensor:
    """Apply to each pixel's 3 x 3 neighbourhood a kernel of its own, with zeros outside the map (equation 5).

    Values [B, C, H, W], weights [B, G, 9, H, W] -> [B, C, H, W] in the dtype of the values. G divides C: channel c uses
    kernel c mod G. Sums are in float32 (or float64). The backward pass saves values and weights only, without copies of
    the nine neighbours.

    fused: use the Triton kernel if device and dtype allow it.
    """
    if fused and kernels.usable(values_BCHW.device, values_BCHW.dtype):
        return kernels.ops.aggregate(values_BCHW, weights_BGKHW)
    # Converted here because in PyTorch 2.11, torch.compile loses the gradients if the conversion inside has no effect.
    return _Aggregate.apply(values_BCHW, weights_BGKHW).to(values_BCHW.dtype)


class _Aggregate(torch.autograd.Function):
    """Nine shifted products in PyTorch, with a derivative written by hand.

    Autograd would create a map of zeros for each product, which takes up to three times as long on a CPU. Sums in
    float32 are faster there for bfloat16 inputs, too.
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
    """Padded values [B, C/G, G, H + 2, W + 2] and weights [B, 1, G, 9, H, W], in the dtype of the sums."""
    dtype = torch.promote_types(values_BCHW.dtype, torch.float32)
    padded = F.pad(values_BCHW.to(dtype), (1, 1, 1, 1))
    return padded.unflatten(1, (-1, weights_BGKHW.shape[1])), weights_BGKHW.to(dtype)[:, None]


def _neighbours(padded: Tensor, k: int) -> Tensor:
    """Neighbour k of each pixel, counted row by row from the upper left: a view [..., H, W]."""
    row, column = divmod(k, 3)
    return padded[..., row : row + padded.shape[-2] - 2, column : column + padded.shape[-1] - 2]
