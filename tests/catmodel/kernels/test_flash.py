"""Attention to other tokens with the Triton kernels: PVT's spatial-reduction attention, against PyTorch."""

import copy

import pytest
import torch
from torch import Tensor

from catmodel.pvt import SpatialReductionAttention

# Channels, heads, reduction, height, width, dtype. With a reduction of 1, queries and keys are the same tokens.
CASES = [
    (16, 2, 2, 6, 9, torch.float32),
    (32, 1, 4, 12, 16, torch.bfloat16),  # more than one block of queries
    (24, 3, 1, 3, 5, torch.float16),
    (16, 1, 1, 9, 10, torch.bfloat16),  # more than one block of keys
]


def outcome(module, fused: bool, dtype: torch.dtype, height: int, width: int, device: torch.device) -> list[Tensor]:
    """The output for two images, and the gradients of the images and of the parameters."""
    module = copy.deepcopy(module).to(device, dtype)
    g = torch.Generator().manual_seed(1)
    shape = 2, height * width, module.q.in_features
    # Every dtype represents these numbers exactly, so that only the arithmetic differs.
    x, dy = (torch.randn(shape, generator=g).bfloat16().to(device, dtype) for _ in range(2))
    y = module(x.requires_grad_(), height, width, fused)
    y.backward(dy)
    return [y.detach(), x.grad, *(parameter.grad for parameter in module.parameters())]


def attention(channels: int, heads: int, reduction: int) -> SpatialReductionAttention:
    torch.manual_seed(0)
    module = SpatialReductionAttention(channels, heads, reduction)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape).mul(0.3).bfloat16())
    return module


@pytest.mark.parametrize("channels, heads, reduction, height, width, dtype", CASES)
def test_agrees_with_pytorch_in_float64(channels, heads, reduction, height, width, dtype, device):
    module = attention(channels, heads, reduction)
    exact = outcome(module, False, torch.float64, height, width, device)
    plain = outcome(module, False, dtype, height, width, device)
    fused = outcome(module, True, dtype, height, width, device)
    for e, p, f in zip(exact, plain, fused, strict=True):
        assert f.dtype == dtype
        # At least three roundings of the largest number, because PyTorch's result may be exact by chance.
        allowed = 3 * max((p - e).abs().max(), torch.finfo(dtype).eps * e.abs().max())
        assert (f - e).abs().max() <= allowed


def test_gradients_are_bitwise_the_same_each_time(device):
    module = attention(16, 2, 2)
    first, second = (outcome(module, True, torch.bfloat16, 6, 9, device) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_operators_pass_opcheck(device):
    def number(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, requires_grad=True)

    q, kv = number(2, 5, 2, 8), number(2, 3, 2, 2, 8)
    torch.library.opcheck(torch.ops.catmodel.cross_attention.default, (q, kv))
    q, kv = q.detach(), kv.detach()
    y, lse = torch.ops.catmodel.cross_attention(q, kv)
    torch.library.opcheck(torch.ops.catmodel.cross_attention_backward.default, (torch.ones_like(y), q, kv, y, lse))
