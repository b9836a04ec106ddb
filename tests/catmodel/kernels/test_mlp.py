"""The MLP's kernel, with the GELU in the products' epilogues, against PyTorch in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from catmodel import kernels
from catmodel.layers import Mlp

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def draw(device: torch.device, dtype: torch.dtype, *rows: int, channels: int = 16) -> list[torch.Tensor]:
    """x, w1, b1, w2, b2 and the gradient of y."""
    x, dy = torch.randn(2, *rows, channels)
    mlp = Mlp(channels, 4 * channels)
    weights = mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias
    return [z.detach().to(device, dtype) for z in (x, *weights, dy)]


def plain(x, w1, b1, w2, b2):
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


def fused(*inputs):
    return torch.ops.catmodel.mlp(*inputs)[0]


def gradients(function, x, w1, b1, w2, b2, dy) -> list[torch.Tensor]:
    """y and the gradients of all inputs."""
    inputs = [z.detach().requires_grad_() for z in (x, w1, b1, w2, b2)]
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


def error(value, reference):
    return ((value.double() - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "channels"), [((2, 67), 16), ((1,), 96), ((2, 3, 11), 40)])
def test_value_and_gradients(device, rows, channels, dtype):
    """At most twice PyTorch's distance from float64, also for incomplete tiles and channels that are no power of 2."""
    torch.manual_seed(0)
    drawn = draw(device, dtype, *rows, channels=channels)
    reference = gradients(plain, *(z.double() for z in drawn))
    ours, theirs = gradients(fused, *drawn), gradients(plain, *drawn)
    for name, value, plain_value, exact in zip(
        ("y", "x", "w1", "b1", "w2", "b2"), ours, theirs, reference, strict=True
    ):
        assert value.dtype == dtype and value.shape == exact.shape
        assert error(value, exact) <= 2 * error(plain_value, exact) + 1e-6, name


def test_gelu_is_exact_at_both_ends(device):
    """For large inputs the GELU is 0 or the identity, its derivative 0 or 1, and nothing overflows."""
    x = torch.tensor([-200.0, -8.0, -1e-6, 0.0, 1e-6, 8.0, 200.0], device=device)[:, None].repeat(1, 16)
    eye, zero = torch.eye(16, device=device), torch.zeros(16, device=device)
    y, dx = gradients(fused, x, eye, zero, eye, zero, torch.ones_like(x))[:2]
    expected_y, expected_dx = gradients(plain, x, eye, zero, eye, zero, torch.ones_like(x))[:2]
    torch.testing.assert_close(y, expected_y, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(dx, expected_dx, rtol=1e-6, atol=1e-7)


def test_gradients_are_the_same_to_the_last_bit_each_time(device):
    torch.manual_seed(1)
    drawn = draw(device, torch.float32, 300)
    for first, second in zip(gradients(fused, *drawn), gradients(fused, *drawn), strict=True):
        assert torch.equal(first, second)


def test_non_contiguous_inputs(device):
    """A transposed input, and a gradient that is one expanded number."""
    torch.manual_seed(2)
    x, *weights, dy = draw(device, torch.float32, 4, 9)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    one = dy[0, 0, 0].expand_as(dy)
    for value, expected in zip(
        gradients(fused, turned, *weights, one), gradients(fused, x, *weights, one.contiguous()), strict=True
    ):
        assert torch.equal(value, expected)


def test_weights_that_begin_anywhere(device):
    """In a flat buffer a parameter may begin at any element; tensor descriptors need a multiple of 16 bytes."""
    torch.manual_seed(6)
    x, w1, *others = draw(device, torch.bfloat16, 2, 9)
    placed = torch.cat([w1.new_zeros(1), w1.flatten()])[1:].view(w1.shape)
    for value, expected in zip(gradients(fused, x, placed, *others), gradients(fused, x, w1, *others), strict=True):
        assert torch.equal(value, expected)


def test_second_bias_is_optional(device):
    torch.manual_seed(7)
    x, w1, b1, w2, b2, dy = draw(device, torch.float32, 2, 9)
    inputs = [z.requires_grad_() for z in (x, w1, b1, w2)]
    y = fused(*inputs, None)
    torch.testing.assert_close(y + b2, fused(*inputs, b2), rtol=1e-5, atol=1e-6)
    for value, expected in zip(
        torch.autograd.grad(y, inputs, dy), torch.autograd.grad(fused(*inputs, b2), inputs, dy), strict=True
    ):
        assert torch.equal(value, expected)


def test_inference_keeps_no_hidden_layer(device):
    torch.manual_seed(3)
    *inputs, _ = draw(device, torch.float32, 2, 33)
    y, a, slope = torch.ops.catmodel.mlp(*inputs, False)
    assert a.numel() == slope.numel() == 0
    assert torch.equal(y, fused(*inputs))


def test_operators_pass_opcheck(device):
    """Schema, fake and autograd registration, eagerly and in a traced graph of any size."""
    torch.manual_seed(4)
    *inputs, dy = draw(device, torch.float32, 2, 9)
    opcheck(torch.ops.catmodel.mlp, tuple(z.requires_grad_() for z in inputs))
    x, w1, _, w2, _ = (z.detach() for z in inputs)
    opcheck(torch.ops.catmodel.mlp, (*(z.detach() for z in inputs), False))
    _, a, slope = torch.ops.catmodel.mlp(*(z.detach() for z in inputs))
    opcheck(torch.ops.catmodel.mlp_backward, (dy, x, w1, w2, a, slope))


def test_module_compiles_whole(device):
    """As a single graph, in training and inference, with the values and gradients of the PyTorch path."""
    torch.manual_seed(5)
    mlp = Mlp(16, 64).to(device)
    x = torch.randn(2, 21, 16, device=device)
    compiled = torch.compile(mlp, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, True), mlp(x), rtol=1e-5, atol=1e-6)
    expected = torch.autograd.grad(mlp(x).square().sum(), list(mlp.parameters()))
    found = torch.autograd.grad(compiled(x, True).square().sum(), list(mlp.parameters()))
    for value, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-4, atol=1e-5)


def test_widths_that_use_the_kernels():
    """All stages of CAT-B do; in float32, wide ones and rows that TMA does not support use cuBLAS."""
    assert all(kernels.mlp_pays(channels) for channels in (96, 192, 384, 768))
    assert kernels.mlp_pays(96, torch.float32) and not kernels.mlp_pays(384, torch.float32)
    assert not kernels.mlp_pays(20)
