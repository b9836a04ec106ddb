"""Cross-patch attention with the Triton kernels against PyTorch, and the gradients of the PyTorch path."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from catmodel.attention import CrossPatchAttention
from catmodel.kernels import cross_patch
from catmodel.patches import Patches

# Patch size, height and width (padded if not a multiple), heads, channels, dropout, dtype; as a comment, the number of
# patches. The single kernel takes one head and up to 64 patches of at most 7 x 7 in bfloat16 or float16, more than four
# of them packed; otherwise flash attention is used.
CASES = [
    (7, 7, 7, 1, 850, 0.3, torch.float16),  # 1 patch; more tiles than programs, and an incomplete last tile
    (7, 6, 5, 1, 65, 0.2, torch.bfloat16),  # 1
    (6, 12, 6, 1, 40, 0.2, torch.bfloat16),  # 2
    (7, 7, 20, 1, 3, 0.0, torch.bfloat16),  # 3
    (7, 14, 13, 1, 20, 0.2, torch.bfloat16),  # 4
    (4, 5, 20, 1, 9, 0.2, torch.float16),  # 10
    (5, 18, 20, 1, 2, 0.2, torch.float16),  # 16
    (4, 32, 31, 1, 2, 0.2, torch.bfloat16),  # 64
    (4, 28, 39, 1, 1, 0.2, torch.bfloat16),  # 70
    (7, 14, 13, 7, 1, 0.2, torch.float16),  # 4, each in 7 heads
    (9, 27, 8, 1, 2, 0.2, torch.bfloat16),  # 3
    (7, 7, 20, 1, 2, 0.2, torch.float32),  # 3
    (9, 9, 18, 1, 2, 0.0, torch.float32),  # 2
]


def attention(
    size: int, heads: int = 1, dropout: float = 0.0, dtype=torch.float32, device="cpu"
) -> CrossPatchAttention:
    torch.manual_seed(0)
    module = CrossPatchAttention(size, heads, dropout)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=1 / size)  # logits of about one
    return module.to(device, dtype)


def outcome(
    module, height: int, width: int, size: int, channels: int, kernels: bool, dtype, device, wrap=lambda f: f
) -> list[Tensor]:
    """The output for two images, scaled if a single kernel computes it, and the gradients.

    Numbers and the seed of dropout do not depend on dtype.
    """
    patches = Patches(height, width, size, by_row=True, kernels=kernels)
    scaled = module.can_scale(replace(patches, kernels=True))
    module = copy.deepcopy(module).to(dtype)
    g = torch.Generator().manual_seed(1)
    # Every dtype represents these numbers exactly, so that only the arithmetic differs.
    x, dy = (torch.randn(2, height * width, channels, generator=g).bfloat16().to(device, dtype) for _ in range(2))
    x.requires_grad_()
    scale = torch.tensor([1.25, 0.5], device=device, dtype=dtype)
    torch.manual_seed(2)
    if kernels:
        y = wrap(module)(x, patches, None, scale if scaled else None)
    else:
        y = module(x, patches) * (scale[:, None, None] if scaled else 1.0)
    y.backward(dy)
    return [y.detach(), x.grad, *(parameter.grad for parameter in module.parameters())]


@pytest.mark.parametrize("size, height, width, heads, channels, rate, dtype", CASES)
def test_agrees_with_pytorch_in_float64(size, height, width, heads, channels, rate, dtype, device):
    module = attention(size, heads, rate, dtype, device)
    exact = outcome(module, height, width, size, channels, False, torch.float64, device)
    plain = outcome(module, height, width, size, channels, False, dtype, device)
    fused = outcome(module, height, width, size, channels, True, dtype, device)
    for e, p, f in zip(exact, plain, fused, strict=True):
        assert f.dtype == dtype
        # At least two roundings of the largest number, because PyTorch's result may be exact by chance.
        allowed = 2 * max((p - e).abs().max(), torch.finfo(dtype).eps * e.abs().max())
        assert (f - e).abs().max() <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("height, width", [(14, 21), (9, 15), (30, 27)])
def test_tokens_are_packed_as_patches_are_split(height, width, dtype, device):
    x_BNC = torch.randn(2, height * width, 70, device=device, dtype=dtype)
    split_BnPC = Patches(height, width, 7, by_row=True).split(x_BNC)
    packed_BCnP = torch.ops.catmodel.pack(x_BNC, height, width, 7, False)
    assert torch.equal(packed_BCnP, split_BnPC.permute(0, 3, 1, 2))
    assert torch.equal(torch.ops.catmodel.unpack(packed_BCnP, height, width, 7, False), x_BNC)
    places_BCPn = torch.ops.catmodel.pack(x_BNC, height, width, 7, True)
    assert torch.equal(places_BCPn, packed_BCnP.transpose(2, 3))
    assert torch.equal(torch.ops.catmodel.unpack(places_BCPn, height, width, 7, True), x_BNC)


@pytest.mark.parametrize("heads, dtype", [(1, torch.bfloat16), (2, torch.float32)])
def test_the_seed_decides_what_is_dropped(heads, dtype, device):
    module = attention(4, heads, 0.5, dtype, device)
    x = torch.randn(1, 32, 4, device=device, dtype=dtype)
    patches = Patches(4, 8, 4, by_row=True, kernels=True)
    first, other = module(x, patches), module(x, patches)
    assert not torch.equal(first, other)
    module.eval()
    assert torch.equal(module(x, patches), module(x, patches))


@pytest.mark.parametrize("heads, channels, dtype", [(1, 70, torch.bfloat16), (2, 2, torch.float32)])
def test_gradients_are_bitwise_the_same_each_time(heads, channels, dtype, device):
    module = attention(4, heads, 0.3, dtype, device)
    first, second = (outcome(module, 8, 12, 4, channels, True, dtype, device) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("heads, dtype", [(1, torch.bfloat16), (2, torch.float32)])
def test_compiled_and_checkpointed_results_are_the_same(heads, dtype, device):
    module = attention(4, heads, 0.3, dtype, device)
    eager, compiled, checkpointed = (
        outcome(module, 7, 8, 4, 2, True, dtype, device, wrap)
        for wrap in (
            lambda module: module,
            lambda module: torch.compile(module, backend="aot_eager", fullgraph=True),
            lambda module: lambda *inputs: checkpoint(module, *inputs, use_reentrant=False),
        )
    )
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(eager, checkpointed, strict=True))


@pytest.mark.parametrize("shape, maps", [((2, 96, 49, 24), [(25, 42), (28, 36)]), ((2, 182, 96), [(14, 13), (9, 12)])])
def test_maps_of_many_sizes_share_a_kernel(shape, maps):
    """As far as they have as many patches: dense images have many sizes, and a kernel takes seconds to compile."""
    first, second = (cross_patch._plan(torch.Size(shape), 49, *sides, 0.2) for sides in maps)
    assert first == second


@pytest.mark.parametrize("height, width", [(7, 14), (12, 9)])
def test_packed_or_in_place_the_result_is_the_same(height, width, device):
    module = attention(7, dropout=0.3, dtype=torch.bfloat16, device=device)
    weights = [weight for layer in (module.qkv, module.proj) for weight in (layer.weight, layer.bias)]
    x, dy = torch.randn(2, 2, height * width, 36, device=device, dtype=torch.bfloat16).unbind()
    seed, scale = torch.tensor(5, dtype=torch.int32, device=device), torch.tensor([0.0, 1.5], device=device)
    rest, ops = (*weights, height, width, 0.3, seed, scale), torch.ops.catmodel
    in_place = ops.cross_patch_attention(x, *rest)
    dx, *gradients = ops.cross_patch_attention_backward(dy, x, *rest)
    x, dy = (ops.pack(value, height, width, 7, True) for value in (x, dy))
    packed = ops.cross_patch_attention(x, *rest)
    dx_packed, *others = ops.cross_patch_attention_backward(dy, x, *rest)
    packed, dx_packed = (ops.unpack(value, height, width, 7, True) for value in (packed, dx_packed))
    # A tile's rows have another order, and so do the terms of its sums.
    for a, b in zip((in_place, dx, *gradients), (packed, dx_packed, *others), strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02 * b.abs().max().item())


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_operators_pass_opcheck(rate, device):
    def number(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)

    ops = torch.ops.catmodel
    seed = torch.tensor(5, dtype=torch.int32, device=device) if rate else None
    scale = torch.tensor([0.5], device=device) if rate else None
    parameters = number(48, 16), number(48), number(16, 16), number(16)
    rest = 4, 12, rate, seed, scale
    torch.library.opcheck(ops.cross_patch_attention.default, (number(1, 2, 16, 3), *parameters, *rest))
    torch.library.opcheck(ops.cross_patch_attention.default, (number(1, 48, 2), *parameters, *rest))
    torch.library.opcheck(ops.flash_attention.default, (number(1, 5, 3, 2, 8), rate, seed))
    torch.library.opcheck(ops.pack.default, (number(1, 12, 3), 3, 4, 3, False))
    torch.library.opcheck(ops.unpack.default, (number(1, 3, 2, 9), 3, 4, 3, False))
    torch.library.opcheck(ops.pack.default, (number(1, 12, 3), 3, 4, 3, True))
    torch.library.opcheck(ops.unpack.default, (number(1, 3, 9, 2), 3, 4, 3, True))
    x, dy, qkv, *weights = (
        tensor.detach() for tensor in (number(1, 2, 16, 3), number(1, 2, 16, 3), number(1, 5, 3, 2, 8), *parameters)
    )
    torch.library.opcheck(ops.cross_patch_attention_backward.default, (dy, x, *weights, *rest))
    y, lse = ops.flash_attention(qkv, rate, seed)
    torch.library.opcheck(ops.flash_attention_backward.default, (torch.ones_like(y), qkv, y, lse, rate, seed))


def test_gradients_of_the_pytorch_path():
    module = attention(2, dropout=0.3, dtype=torch.float64)
    patches = Patches(3, 4, 2)
    names, parameters = zip(*module.named_parameters(), strict=True)
    x = torch.randn(1, 12, 3, dtype=torch.float64, requires_grad=True)

    def f(x, *parameters):
        torch.manual_seed(3)
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x, patches))

    assert torch.autograd.gradcheck(f, (x, *parameters))
