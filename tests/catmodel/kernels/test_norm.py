"""The residual sum with drop-path and the LayerNorm after it, in one kernel, against PyTorch in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

EPS = 1e-5


def draw(device, dtype, *shape, dropped=True, biased=True) -> tuple[list, list]:
    """x, branch, bias, scale, gamma, beta; and the gradients of both results."""
    x, branch, dsum, dy = (torch.randn(4, *shape) + 0.5).to(device, dtype)
    bias, gamma, beta = torch.randn(3, shape[-1]).to(device, dtype)
    scale = torch.tensor([1.25, 0.0, 1.25], device=device)[: shape[0]] if dropped else None
    return [x, branch, bias if biased else None, scale, gamma + 1, beta], [dsum, dy]


def plain(x, branch, bias, scale, gamma, beta, eps, scaled):
    scale = 1.0 if scale is None else scale.to(x.dtype).view(-1, *(1,) * (x.ndim - 1))
    bias = 0.0 if bias is None else bias
    total = x + (branch + bias * scale if scaled else (branch + bias) * scale)
    return total, F.layer_norm(total, (x.shape[-1],), gamma, beta, eps)


def fused(*inputs):
    return torch.ops.catmodel.residual_norm(*inputs)


def results(function, inputs, gradients, scaled=False) -> list[torch.Tensor]:
    """Both results, and the gradients of all inputs but the scale."""
    inputs = [None if z is None else z.detach().clone().requires_grad_(i != 3) for i, z in enumerate(inputs)]
    found = function(*inputs, EPS, scaled)
    trained = [z for i, z in enumerate(inputs) if z is not None and i != 3]
    return [*(z.detach() for z in found), *torch.autograd.grad(found, trained, gradients)]


def error(value, reference):
    return ((value.double() - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "shape, scaled",
    [((3, 7, 5, 24), False), ((3, 50, 96), True), ((3, 50, 96), False), ((2, 128), True), ((1, 3, 192), False)],
)
def test_values_and_gradients(device, shape, scaled, dtype):
    """At most 1.5 times PyTorch's distance from float64, also for incomplete tiles and widths of no power of 2."""
    torch.manual_seed(0)
    inputs, gradients = draw(device, dtype, *shape)
    exact = results(plain, [z.double() for z in inputs], [z.double() for z in gradients], scaled)
    ours, theirs = (results(way, inputs, gradients, scaled) for way in (fused, plain))
    names = "sum", "norm", "x", "branch", "bias", "gamma", "beta"
    for name, value, plain_value, reference in zip(names, ours, theirs, exact, strict=True):
        assert value.dtype == dtype and value.shape == reference.shape
        assert error(value, reference) <= 1.5 * error(plain_value, reference) + 1e-6, name


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("dropped", "biased"), [(False, True), (True, False), (False, False)])
def test_without_drop_path_or_bias(device, dropped, biased, scaled):
    torch.manual_seed(1)
    inputs, gradients = draw(device, torch.float32, 3, 9, 40, dropped=dropped, biased=biased)
    ours, theirs = (results(way, inputs, gradients, scaled) for way in (fused, plain))
    for value, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(value, expected, rtol=2e-5, atol=2e-5)


def test_gradients_are_the_same_to_the_last_bit_each_time(device):
    torch.manual_seed(2)
    inputs, gradients = draw(device, torch.float32, 3, 333, 96)
    for first, second in zip(results(fused, inputs, gradients), results(fused, inputs, gradients), strict=True):
        assert torch.equal(first, second)


def test_non_contiguous_inputs(device):
    """A transposed input, and a gradient that is one expanded number."""
    torch.manual_seed(3)
    inputs, (dsum, dy) = draw(device, torch.float32, 3, 9, 16)
    turned = [inputs[0].transpose(0, 1).contiguous().transpose(0, 1), *inputs[1:]]
    one = dy[0, 0, 0].expand_as(dy)
    for value, expected in zip(
        results(fused, turned, [dsum, one]), results(fused, inputs, [dsum, one.contiguous()]), strict=True
    ):
        assert torch.equal(value, expected)


@pytest.mark.parametrize(("dropped", "scaled"), [(True, False), (True, True), (False, False)])
def test_operators_pass_opcheck(device, dropped, scaled):
    torch.manual_seed(4)
    inputs, (dsum, dy) = draw(device, torch.float32, 2, 9, 16, dropped=dropped)
    trained = [None if z is None else z.clone().requires_grad_(i != 3) for i, z in enumerate(inputs)]
    opcheck(torch.ops.catmodel.residual_norm, (*trained, EPS, scaled))
    total, _ = fused(*inputs, EPS, scaled)
    opcheck(torch.ops.catmodel.residual_norm_backward, (dy, dsum, total, inputs[3], inputs[4], EPS, scaled))
