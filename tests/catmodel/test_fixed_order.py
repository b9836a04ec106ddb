"""The operators with gradients in a fixed order against PyTorch's."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from catmodel.attention import InnerPatchAttention
from catmodel.fixed_order import MaxPool, pad_border, repeat, resize, upsample

SIDES = [(8, 8), (7, 10), (2, 3), (1, 5), (1, 1)]
TYPES = [torch.float32, torch.float64, torch.bfloat16]
OPERATORS: dict[str, tuple[Callable, Callable]] = {
    "max-pooling": (MaxPool(3, 2), lambda x: F.max_pool2d(x, 3, 2, 1)),
    "max-pooling, wide": (MaxPool(5, 3), lambda x: F.max_pool2d(x, 5, 3, 2)),
    "bilinear": (lambda x: resize(x, (5, 11), "bilinear"), lambda x: F.interpolate(x, (5, 11), mode="bilinear")),
    "bicubic": (lambda x: resize(x, (3, 9), "bicubic"), lambda x: F.interpolate(x, (3, 9), mode="bicubic")),
    "twice": (lambda x: upsample(x, 2), lambda x: F.interpolate(x, scale_factor=2, mode="bilinear")),
    "three times": (lambda x: upsample(x, 3), lambda x: F.interpolate(x, scale_factor=3, mode="bilinear")),
    "four times": (lambda x: upsample(x, 4), lambda x: F.interpolate(x, scale_factor=4, mode="bilinear")),
    "repeated": (lambda x: repeat(x, 2), lambda x: F.interpolate(x, scale_factor=2, mode="nearest")),
    "replicated": (lambda x: pad_border(x, False), lambda x: F.pad(x, (1, 1, 1, 1), "replicate")),
    "reflected": (lambda x: pad_border(x, True), lambda x: F.pad(x, (1, 1, 1, 1), "reflect")),
}

# A side of one pixel has nothing to reflect.
CASES = [(name, sides) for name in OPERATORS for sides in SIDES if name != "reflected" or min(sides) > 1]


def outcome(function: Callable, x: Tensor) -> tuple[Tensor, Tensor]:
    """The value, and the gradient for a random direction."""
    x = x.detach().requires_grad_()
    y = function(x)
    # Every dtype represents these numbers exactly.
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(y.dtype)
    return y.detach(), torch.autograd.grad(y, x, direction)[0]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("name", "sides"), CASES)
def test_value_is_pytorchs_and_so_is_the_gradient(name, dtype, sides):
    """Many numbers are equal, as after a ReLU: max-pooling must choose the same ones."""
    x = torch.randn(2, 3, *sides, generator=torch.Generator().manual_seed(0)).relu().to(dtype)
    ours, theirs = OPERATORS[name]
    (value, gradient), (expected, expected_gradient) = outcome(ours, x), outcome(theirs, x)
    assert torch.equal(value, expected)
    assert gradient.dtype == dtype
    exact = outcome(theirs, x.double())[1]
    # The weights of "bilinear" and "bicubic" are computed in the dtype, too; "three times" adds up 25 numbers.
    roundings = 64 if name in ("bilinear", "bicubic") else 8 if "times" in name else 2
    allowed = roundings * torch.finfo(dtype).eps * exact.abs().max().item()
    torch.testing.assert_close(gradient.double(), exact, rtol=0, atol=allowed)
    if "max" in name and dtype != torch.bfloat16:
        assert torch.equal(gradient, expected_gradient)
    with torch.no_grad():
        assert torch.equal(ours(x), expected)


@pytest.mark.parametrize("name", OPERATORS)
def test_gradients_per_sample(name):
    x = torch.randn(3, 1, 2, 4, 5, dtype=torch.float64)
    ours, theirs = OPERATORS[name]
    found, expected = (
        torch.vmap(torch.func.grad(lambda x, function=function: function(x).square().sum()))(x)
        for function in (ours, theirs)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("factor", [1, 2, 3, 4])
def test_derivatives_of_upsampling(factor, sides):
    x = torch.randn(1, 2, *sides, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: upsample(x, factor), x, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: upsample(x, factor), x, fast_mode=True)


# --------------------------------------------------------------------------------------------- relative position bias


def indexed(attention: InnerPatchAttention) -> Tensor:
    """The bias by PyTorch's indexing."""
    return attention.relative_position_bias_table[attention.relative_position_index].permute(2, 0, 1)


def table_gradient(attention: InnerPatchAttention, bias_hPP: Tensor) -> Tensor:
    direction = torch.randn(bias_hPP.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(bias_hPP.dtype)
    return torch.autograd.grad(bias_hPP, attention.relative_position_bias_table, direction)[0]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size, heads", [(1, 1), (2, 3), (7, 2), (5, 1)])
def test_position_bias(size, heads, dtype):
    attention = InnerPatchAttention(8 * heads, heads, size)
    exact = table_gradient(attention.double(), indexed(attention))
    attention.to(dtype)
    bias_hPP = attention.position_bias()
    assert torch.equal(bias_hPP, indexed(attention)) and bias_hPP.is_contiguous()
    gradient = table_gradient(attention, bias_hPP)
    assert gradient.dtype == dtype and gradient.is_contiguous()
    rounding = torch.finfo(dtype).eps * exact.abs().max().item()
    torch.testing.assert_close(gradient.double(), exact, rtol=0, atol=4 * rounding)


def test_position_bias_compiled():
    attention = InnerPatchAttention(16, 2, 4)
    eager = attention.position_bias()
    compiled = torch.compile(attention.position_bias, backend="aot_eager", fullgraph=True)()
    assert torch.equal(compiled, eager)
    assert torch.equal(table_gradient(attention, compiled), table_gradient(attention, eager))


def test_state_dict_has_the_released_names():
    names = {"relative_position_bias_table", "relative_position_index", "qkv.weight", "qkv.bias"}
    assert set(InnerPatchAttention(8, 1, 2).state_dict()) == names | {"proj.weight", "proj.bias"}
