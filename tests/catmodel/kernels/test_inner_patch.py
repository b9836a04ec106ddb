"""Inner-patch attention with the Triton kernels against PyTorch, and the gradients of the PyTorch path."""

import copy

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from catmodel import kernels
from catmodel.attention import InnerPatchAttention
from catmodel.patches import Patches

# Patch size, height and width (padded if not a multiple), heads, channels per head, shifted, dropout, dtype.
CASES = [
    (7, 14, 7, 3, 8, False, 0.0, torch.float32),
    (7, 13, 6, 1, 32, False, 0.2, torch.bfloat16),
    (7, 14, 14, 1, 8, True, 0.2, torch.float16),
    (4, 8, 12, 2, 8, True, 0.0, torch.bfloat16),
    (4, 6, 7, 1, 32, True, 0.3, torch.float32),
    (5, 10, 10, 1, 8, True, 0.3, torch.float32),
    (9, 18, 10, 1, 8, True, 0.2, torch.float32),
    (9, 9, 9, 2, 32, False, 0.0, torch.float16),
    (12, 12, 12, 1, 8, False, 0.2, torch.bfloat16),
]


def attention(
    size: int, heads: int, d: int, shifted: bool = False, dropout: float = 0.0, dtype=torch.float32, device="cpu"
):
    torch.manual_seed(0)
    module = InnerPatchAttention(heads * d, heads, size, shifted, dropout)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module.to(device, dtype)


def outcome(
    module, height: int, width: int, size: int, kernels: bool, dtype, device, wrap=lambda module: module
) -> list[Tensor]:
    """The outputs for two images, scaled, and the gradients of the images and of the parameters.

    The numbers and the seed of dropout do not depend on dtype.
    """
    module = copy.deepcopy(module).to(dtype)
    channels = module.proj.in_features
    g = torch.Generator().manual_seed(1)
    # Every dtype represents these numbers exactly, so that only the arithmetic differs.
    x, dy = (torch.randn(2, height * width, channels, generator=g).bfloat16().to(device, dtype) for _ in range(2))
    x.requires_grad_()
    scale = torch.tensor([1.25, 0.5], device=device, dtype=dtype)
    patches = Patches(height, width, size, by_row=True, kernels=kernels)
    torch.manual_seed(2)
    if kernels:
        y = wrap(module)(x, patches, None, False, scale)
    else:
        y = module(x, patches, last_bias=False) * scale[:, None, None]
    (y + module.proj.bias).backward(dy)
    return [y.detach(), x.grad, *(parameter.grad for parameter in module.parameters())]


@pytest.mark.parametrize("size, height, width, heads, d, shifted, rate, dtype", CASES)
def test_agrees_with_pytorch_in_float64(size, height, width, heads, d, shifted, rate, dtype, device):
    module = attention(size, heads, d, shifted, rate, dtype, device)
    exact = outcome(module, height, width, size, False, torch.float64, device)
    plain = outcome(module, height, width, size, False, dtype, device)
    fused = outcome(module, height, width, size, True, dtype, device)
    for e, p, f in zip(exact, plain, fused, strict=True):
        assert f.dtype == dtype
        # At least three roundings of the largest number, because PyTorch's result may be exact by chance.
        allowed = 3 * max((p - e).abs().max(), torch.finfo(dtype).eps * e.abs().max())
        assert (f - e).abs().max() <= allowed


def test_the_seed_decides_what_is_dropped(device):
    module = attention(4, 2, 8, dropout=0.5, device=device)
    x = torch.randn(1, 64, 16, device=device)
    patches = Patches(8, 8, 4, by_row=True, kernels=True)
    first, other = module(x, patches), module(x, patches)
    assert not torch.equal(first, other)
    module.eval()
    assert torch.equal(module(x, patches), module(x, patches))


@pytest.mark.parametrize("size, rate", [(4, 0.3), (9, 0.0)])
def test_gradients_are_bitwise_the_same_each_time(size, rate, device):
    module = attention(size, 2, 8, True, rate, device=device)
    first, second = (outcome(module, size, 2 * size, size, True, torch.float32, device) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("size, shift, rate", [(4, 0, 0.3), (9, 0, 0.0)])
def test_operators_pass_opcheck(size, shift, rate, device):
    N, P = 2 * size**2, size**2
    qkv = torch.randn(1, N, 3 * 16, device=device, requires_grad=True)
    of_qkv = torch.randn(3 * 16, device=device, requires_grad=True) if rate else None
    bias = torch.randn(2, P, P, device=device, requires_grad=True)
    seed = torch.tensor(5, dtype=torch.int32, device=device) if rate else None
    scale = torch.tensor([0.5], device=device) if rate else None
    rest = size, 2 * size, size, shift, rate, seed, scale
    torch.library.opcheck(torch.ops.catmodel.inner_patch_attention.default, (qkv, of_qkv, bias, *rest))
    dy = torch.randn(1, N, 16, device=device)
    inputs = dy, *(z if z is None else z.detach() for z in (qkv, of_qkv, bias))
    torch.library.opcheck(torch.ops.catmodel.inner_patch_attention_backward.default, (*inputs, *rest))


def test_compiled_and_checkpointed_results_are_the_same(device):
    module = attention(4, 1, 8, True, 0.3, device=device)
    eager, compiled, checkpointed = (
        outcome(module, 8, 8, 4, True, torch.float32, device, wrap)
        for wrap in (
            lambda module: module,
            lambda module: torch.compile(module, backend="aot_eager", fullgraph=True),
            lambda module: lambda *inputs: checkpoint(module, *inputs, use_reentrant=False),
        )
    )
    for e, c, r in zip(eager, compiled, checkpointed, strict=True):
        assert torch.equal(e, r)
        torch.testing.assert_close(c, e)


@pytest.mark.parametrize("size", [4, 9])
def test_without_the_bias_of_queries_keys_and_values_the_other_gradients_are_the_same(size, device):
    torch.manual_seed(4)
    qkv = torch.randn(2, 2 * size**2, 3 * 16, device=device, requires_grad=True)
    of_qkv = torch.randn(3 * 16, device=device, requires_grad=True)
    bias = torch.randn(2, size**2, size**2, device=device, requires_grad=True)
    place = size, 2 * size, size, 0, 0.0, None, None
    y, without = (kernels.ops.inner_patch_attention(qkv, given, bias, *place) for given in (of_qkv, None))
    assert torch.equal(y, without)
    dqkv, summed, dbias = torch.autograd.grad(y.square().sum(), (qkv, of_qkv, bias))
    others = torch.autograd.grad(without.square().sum(), (qkv, bias))
    assert all(torch.equal(a, b) for a, b in zip((dqkv, dbias), others, strict=True))
    torch.testing.assert_close(summed, dqkv.sum((0, 1)), rtol=1e-4, atol=1e-4)


def test_the_bias_may_be_of_another_type(device):
    """As under autocast, with products in bfloat16 and parameters and their gradients in float32."""
    module = attention(4, 2, 8, device=device)
    x = torch.randn(1, 64, 16, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        module(x, Patches(8, 8, 4, by_row=True, kernels=True)).sum().backward()
    assert module.relative_position_bias_table.grad.dtype == torch.float32


@pytest.mark.parametrize("shifted, rate", [(True, 0.3), (False, 0.0)])
def test_gradients_of_the_pytorch_path(shifted, rate):
    module = attention(2, 2, 1, shifted, rate, torch.float64)
    x = torch.randn(1, 16, 2, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        torch.manual_seed(3)  # for dropout
        named = dict(zip(dict(module.named_parameters()), parameters, strict=True))
        return torch.func.functional_call(module, named, (x, Patches(4, 4, 2)))

    assert torch.autograd.gradcheck(run, (x, *module.parameters()))
