"""CoT's local aggregation, in PyTorch and with the Triton kernels, against its definition; CoTNet with the kernels."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

from catmodel.aggregation import aggregate
from catmodel.cotnet import CoTNet
from tests.catmodel.small import images, small

# Images, channels, kernels per pixel, height, width.
SHAPES = [
    (1, 8, 1, 1, 1),
    (2, 6, 3, 4, 5),
    (1, 6, 3, 6, 1),
    (1, 48, 6, 1, 5),  # as in CoTNeXt: the number of kernels is not a power of two
    (1, 64, 8, 9, 11),  # more than one block of kernels
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def unfolded(values: Tensor, weights: Tensor) -> Tensor:
    """The definition, with copies of all nine neighbours of each pixel."""
    B, C, H, W = values.shape
    neighbours = F.unfold(values, 3, padding=1).view(B, C, 9, H, W)
    kernels = weights[:, torch.arange(C, device=values.device) % weights.shape[1]]
    return (neighbours * kernels).sum(2)


def plain(values: Tensor, weights: Tensor) -> Tensor:
    return aggregate(values, weights)


def fused(values: Tensor, weights: Tensor) -> Tensor:
    return aggregate(values, weights, fused=True)


def draw(
    shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, weights and the gradient of the result, with numbers that every dtype represents exactly."""
    B, C, G, H, W = shape
    g = torch.Generator().manual_seed(sum(shape))
    sizes = (B, C, H, W), (B, G, 9, H, W), (B, C, H, W)
    return tuple(torch.randn(size, generator=g).bfloat16().to(device, dtype) for size in sizes)


def outcome(function, values: Tensor, weights: Tensor, dy: Tensor) -> list[Tensor]:
    """The result and the two gradients."""
    values, weights = values.detach().requires_grad_(), weights.detach().requires_grad_()
    y = function(values, weights)
    return [y.detach(), *torch.autograd.grad(y, (values, weights), dy)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", [plain, fused])
def test_value_and_gradients(function, dtype, shape, device):
    """In every dtype within one rounding of the definition in float64."""
    drawn = draw(shape, device, dtype)
    exact = outcome(unfolded, *(x.double() for x in drawn))
    for found, expected in zip(outcome(function, *drawn), exact, strict=True):
        assert found.dtype == dtype and found.shape == expected.shape
        torch.testing.assert_close(
            found.double(), expected, rtol=torch.finfo(dtype).eps, atol=2e-6 * expected.abs().max().item()
        )


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_gradients_of_the_pytorch_path(shape):
    values, weights, _ = draw(shape, torch.device("cpu"), torch.float64)
    torch.testing.assert_close(plain(values, weights), unfolded(values, weights))
    assert torch.autograd.gradcheck(plain, (values.requires_grad_(), weights.requires_grad_()))


TRANSFORMS = {
    "vjp": lambda function, v, w: torch.func.vjp(function, v, w)[1](v + 1),
    "jacrev": lambda function, v, w: torch.func.jacrev(function, (0, 1))(v, w),
    "vmap": lambda function, v, w: torch.vmap(function)(v[:, None], w[:, None]),
    "per sample": lambda function, v, w: torch.vmap(torch.func.grad(lambda v: function(v, w[:1]).square().sum()))(
        v[:, None]
    ),
    "hessian": lambda function, v, w: torch.func.jacrev(torch.func.grad(lambda w: function(v, w).square().sum()))(w),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_torch_func_transforms_agree_with_the_definition(name):
    values, weights, _ = draw(SHAPES[1], torch.device("cpu"), torch.float64)
    torch.testing.assert_close(TRANSFORMS[name](plain, values, weights), TRANSFORMS[name](unfolded, values, weights))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", ["cat_nano", "pvt_tiny", "cotnet50"])
def test_models_under_torch_func(name, device):
    """Per-sample gradients. The model avoids its kernels, because custom operators do not support these transforms."""
    model = small(name, stages=2, drop_path_rate=0.0).to(device).eval()
    parameters = dict(model.named_parameters())
    x = images(name).to(device)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x[None],)).square().sum()

    found = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    model.set_kernels(False)
    for number in range(len(x)):
        expected = torch.autograd.grad(loss(parameters, x[number]), list(parameters.values()))
        largest = max(value.abs().max().item() for value in expected)
        for value, reference in zip(found.values(), expected, strict=True):
            torch.testing.assert_close(value[number], reference, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("function", [plain, fused])
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_keeps_its_two_inputs_only(function, dtype, device):
    """Neither the nine neighbours nor padded or converted copies."""
    values, weights, _ = draw(SHAPES[1], device, dtype)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.update({x.data_ptr(): x.untyped_storage().nbytes()}) or x, lambda x: x
    ):
        function(values.requires_grad_(), weights.requires_grad_())
    assert sum(kept.values()) == values.nbytes + weights.nbytes


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_layouts(shape, device):
    """All layouts give the results of contiguous tensors, bit for bit. Channels-last values stay channels-last."""
    values, weights, dy = draw(shape, device)
    expected = outcome(fused, values, weights, dy)
    last = dict(memory_format=torch.channels_last)
    of_embed = weights.flatten(1, 2).contiguous(**last).unflatten(1, (-1, 9))
    for inputs in (
        (values.contiguous(**last), of_embed, dy.contiguous(**last)),
        (values.contiguous(**last), weights, dy),
        (values, of_embed, dy[:1, :1, :1, :1].expand_as(dy)),
        (values.transpose(2, 3).contiguous().transpose(2, 3), weights[:, :, torch.arange(9, device=device)], dy),
    ):
        found = outcome(fused, *inputs)
        wanted = expected if inputs[2].stride(1) else outcome(fused, values, weights, inputs[2].contiguous())
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert outcome(fused, values.contiguous(**last), of_embed, dy)[0].is_contiguous(**last)


@pytest.mark.parametrize("function", [plain, fused])
def test_weights_of_another_type(function, device):
    """As under autocast, in which the output of a group norm stays in float32."""
    values, weights, dy = draw(SHAPES[1], device)
    y, dvalues, dweights = outcome(function, values.bfloat16(), weights, dy.bfloat16())
    exact = outcome(unfolded, values.double(), weights.double(), dy.double())
    assert (y.dtype, dvalues.dtype, dweights.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    for found, expected in zip((y, dvalues, dweights), exact, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(found.dtype).eps, atol=1e-5)


def test_results_are_bitwise_reproducible(device):
    drawn = draw(SHAPES[-1], device)
    for first, second in zip(outcome(fused, *drawn), outcome(fused, *drawn), strict=True):
        assert torch.equal(first, second)


@pytest.mark.long
def test_operators_pass_opcheck(device):
    """Schema, fake and autograd registration, eagerly and in a traced graph of any size, for channels-last tensors."""
    values, weights, dy = draw(SHAPES[1], device)
    values = values.contiguous(memory_format=torch.channels_last)
    opcheck(torch.ops.catmodel.aggregate_backward, (dy, values, weights))
    opcheck(torch.ops.catmodel.aggregate, (values.requires_grad_(), weights.requires_grad_()))


@pytest.mark.parametrize(
    ("function", "dtype"), [(plain, torch.float32), (plain, torch.bfloat16), (fused, torch.float32)]
)
def test_compiles_whole(function, dtype, device):
    drawn = draw(SHAPES[1], device, dtype)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for found, expected in zip(outcome(compiled, *drawn), outcome(function, *drawn), strict=True):
        torch.testing.assert_close(found, expected)


# --------------------------------------------------------------------------------------------------------------- CoTNet


def test_model_gives_the_same_maps_and_gradients_without_kernels(device):
    """Maps and gradients of one block per stage.

    Batch norms use their running statistics, because statistics of so few pixels would magnify rounding errors.
    """
    torch.manual_seed(0)
    model = CoTNet(depths=(1, 1, 1, 1), features_only=True).to(device).eval()
    for stage in range(1, 5):
        torch.nn.init.ones_(model.get_submodule(f"layer{stage}.0.bn3").weight)  # initially zero, as would be the branch
    images = torch.randn(1, 3, 32, 33, device=device)

    def maps_and_gradients(kernels: bool) -> list[Tensor]:
        model.set_kernels(kernels)
        maps = model(images)
        return [*maps, *torch.autograd.grad(sum(x.square().mean() for x in maps), list(model.parameters()))]

    found, expected = maps_and_gradients(True), maps_and_gradients(False)
    # Some gradients are rounding errors of zero: those of a bias that the next norm removes.
    largest = max(x.abs().max().item() for x in expected)
    for value, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-4, atol=1e-6 * largest)


@pytest.mark.parametrize("kernels", [False, True])
def test_model_exports(kernels, device):
    """With kernels the exported graph contains their operators; without, it runs anywhere. For CoTNeXt's two groups."""
    torch.manual_seed(0)
    model = CoTNet(depths=(1,), width=1.5, key_groups=8, groups=2, num_classes=3).to(device).eval()
    torch.nn.init.ones_(model.layer1[0].bn3.weight)
    images = torch.randn(2, 3, 20, 24, device=device)
    with torch.no_grad():
        model.set_kernels(False)
        expected = model(images)
        model.set_kernels(kernels)
        program = torch.export.export(model, (images,))
        torch.testing.assert_close(program.module()(images), expected)
    assert ("catmodel" in {str(node.target).split(".")[0] for node in program.graph.nodes}) == kernels
