"""Training under torch.autocast: models of all families give the same results with kernels and without."""

import contextlib

import pytest
import torch
import torch._inductor.config
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import catmodel
from catmodel.attention import CrossPatchAttention
from catmodel.layers import Mlp
from catmodel.patches import Patches
from tests.catmodel.small import jitter

# Small enough for the interpreter: CAT with four patches, then one; PVT and CoTNet with two stages.
MODELS = {
    "cat_tiny": (
        56,
        dict(img_size=56, embed_dim=16, depths=(1, 1), num_heads=(1, 2), num_classes=5, shifted_windows=True),
    ),
    "pvt_tiny": (
        32,
        dict(
            img_size=32,
            embed_dims=(8, 16),
            depths=(1, 1),
            num_heads=(1, 2),
            mlp_ratios=(4, 4),
            sr_ratios=(2, 1),
            num_classes=5,
        ),
    ),
    "cotnet50": (32, dict(depths=(1, 1), width=0.25, num_classes=5)),
}
TYPES = [torch.bfloat16, torch.float16]
every_model = pytest.mark.parametrize("name", MODELS)


def build(name: str, device: torch.device) -> tuple[nn.Module, Tensor]:
    """A model with dropout and drop-path, and two images. CoTNet is in evaluation mode: its norms magnify rounding."""
    size, settings = MODELS[name]
    torch.manual_seed(0)
    if name.startswith("cat"):
        settings = dict(settings, cpsa_drop=0.1)
    model = jitter(catmodel.create_model(name, drop_path_rate=0.1, **settings))
    model.train(not name.startswith("cotnet"))
    return model.to(device), torch.randn(2, 3, size, size, device=device)


def step(model: nn.Module, images: Tensor, autocast, backward_inside: bool = False, run=None) -> list[Tensor]:
    """Logits and the gradients of all parameters."""
    model.zero_grad()
    torch.manual_seed(1)
    with autocast:
        logits = (model if run is None else run)(images)
        loss = (logits.float() * torch.linspace(-1, 1, logits.numel(), device=logits.device).view_as(logits)).sum()
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    return [logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def far(found: list[Tensor], reference: list[Tensor]) -> float:
    """|found - reference| / |reference| over all tensors together."""
    squares = [
        ((a.double() - b.double()).square().sum(), b.double().square().sum())
        for a, b in zip(found, reference, strict=True)
    ]
    return (sum(a for a, _ in squares) / sum(b for _, b in squares)).sqrt().item()


def assert_as_accurate(found: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> None:
    """The dtypes equal PyTorch's, and the distance from float32 is at most twice PyTorch's."""
    assert [x.dtype for x in found] == [x.dtype for x in plain]
    for part in (slice(0, 1), slice(1, None)):
        assert far(found[part], exact[part]) <= 2 * far(plain[part], exact[part])


class Operators(TorchDispatchMode):
    """Records the names of our operators that are called."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.namespace == "catmodel":
            self.names.add(function.name().removeprefix("catmodel::"))
        return function(*arguments, **(options or {}))


OPERATORS = {
    "cat_tiny": {"inner_patch_attention", "cross_patch_attention", "mlp"},
    "pvt_tiny": {"mlp", "cross_attention"},
    "cotnet50": {"aggregate"},
}


@pytest.mark.parametrize("name", [pytest.param("cat_tiny", marks=pytest.mark.slow), "pvt_tiny", "cotnet50"])
@pytest.mark.parametrize("dtype", TYPES)
def test_gradients_are_as_accurate_as_without_kernels(name, dtype, device):
    """With the backward pass inside or outside of autocast, without its cache, and with activation checkpointing."""
    model, images = build(name, device)
    model.set_kernels(False)
    exact = step(model, images, contextlib.nullcontext())
    plain = step(model, images, torch.autocast(device.type, dtype))
    model.set_kernels(True)
    with Operators() as used:
        fused = step(model, images, torch.autocast(device.type, dtype))
    assert_as_accurate(fused, plain, exact)
    assert used.names == OPERATORS[name] | {f"{operator}_backward" for operator in OPERATORS[name]}
    inside = step(model, images, torch.autocast(device.type, dtype), backward_inside=True)
    uncached = step(model, images, torch.autocast(device.type, dtype, cache_enabled=False))
    model.set_grad_checkpointing()
    checkpointed = step(model, images, torch.autocast(device.type, dtype))
    for again in (inside, uncached, checkpointed):
        assert all(torch.equal(a, b) for a, b in zip(fused, again, strict=True))


@pytest.mark.slow
@every_model
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_models_compute_the_same(name, recompute, device):
    """As a single graph, with and without activation checkpointing, and with the dtypes of eager execution."""
    model, images = build(name, device)
    model.set_grad_checkpointing(recompute)
    eager = step(model, images, torch.autocast(device.type, torch.bfloat16))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = step(model, images, torch.autocast(device.type, torch.bfloat16), run=compiled)
    assert [x.dtype for x in found] == [x.dtype for x in eager]
    assert far(found, eager) <= torch.finfo(torch.bfloat16).eps


@pytest.mark.long
@every_model
@pytest.mark.parametrize("recompute", [False, True])
def test_inductor_computes_the_same(name, recompute, device):
    """With the random numbers of eager execution; Inductor's own would differ."""
    model, images = build(name, device)
    model.set_kernels(False)
    exact = step(model, images, contextlib.nullcontext())
    plain = step(model, images, torch.autocast(device.type, torch.bfloat16))
    model.set_kernels(True)
    model.set_grad_checkpointing(recompute)
    compiled = torch.compile(model, fullgraph=True)
    with torch._inductor.config.patch(fallback_random=True):
        found = step(model, images, torch.autocast(device.type, torch.bfloat16), run=compiled)
    assert_as_accurate(found, plain, exact)


@pytest.mark.parametrize("name", ["pvt_tiny", "cotnet50"])  # CAT in float32 takes the interpreter many seconds
def test_nothing_is_cast_if_autocast_is_disabled(name, device):
    """A disabled region inside an enabled one gives the same bits as no autocast."""
    model, images = build(name, device)
    expected = step(model, images, contextlib.nullcontext())

    def disabled(images: Tensor) -> Tensor:
        with torch.autocast(device.type, enabled=False):
            return model(images)

    found = step(model, images, torch.autocast(device.type, torch.bfloat16), run=disabled)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("heads", [1, 7])
def test_cross_patch_attention_by_flash_attention(heads, device):
    """For more patches than the single kernel supports, and for several heads."""
    torch.manual_seed(0)
    size, side = (7, 14) if heads == 7 else (2, 18)
    module = jitter(CrossPatchAttention(size, heads, dropout=0.1)).to(device)
    x = torch.randn(1, side * side, 3, device=device, requires_grad=True)

    def outcome(kernels: bool, autocast) -> list[Tensor]:
        torch.manual_seed(1)
        with autocast:
            y = module(x, Patches(side, side, size, by_row=True, kernels=kernels))
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *module.parameters()])]

    autocast = torch.autocast(device.type, torch.bfloat16)
    with Operators() as used:
        fused = outcome(True, autocast)
    assert "flash_attention_backward" in used.names
    assert_as_accurate(fused, outcome(False, autocast), outcome(False, contextlib.nullcontext()))


def test_operators_compute_in_the_types_they_are_given(device):
    """Operators called directly under autocast cast nothing, forward and backward."""
    torch.manual_seed(0)
    mlp, attention = Mlp(16, 64).to(device), jitter(CrossPatchAttention(2)).to(device)
    weights = [mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias, *attention.parameters()]
    x = torch.randn(1, 4, 16, device=device)

    def outcome() -> list[Tensor]:
        y = torch.ops.catmodel.mlp(x, *weights[:4])[0]
        z = torch.ops.catmodel.cross_patch_attention(x.view(1, 4, 4, 4), *weights[4:], 4, 4, 0.0, None, None)
        return [y.detach(), z.detach(), *torch.autograd.grad(y.square().sum() + z.square().sum(), weights)]

    expected = outcome()
    with torch.autocast(device.type, torch.bfloat16):
        found = outcome()
    for value, reference in zip(found, expected, strict=True):
        assert value.dtype == torch.float32 and torch.equal(value, reference)
