"""Correctness of the kernels: each module that uses one, on random numbers, against PyTorch and a float64 reference."""

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from catmodel import kernels
from catmodel.aggregation import aggregate
from catmodel.attention import CrossPatchAttention, InnerPatchAttention
from catmodel.cotnet import SHARE
from catmodel.layers import Mlp, Pending
from catmodel.patches import Patches
from catmodel.pvt import SpatialReductionAttention


@dataclass(frozen=True)
class Case:
    """A module and its input [batch, height * width, channels].

    size: side of a patch, or the reduction of keys and values in cross-attention. rate: attention dropout.
    channels_last: memory format of the aggregated map. drop_path: which kernel multiplies by its factors of the images.
    biased: whether the norm's kernel adds a bias.
    """

    module: Literal["inner_patch", "cross_patch", "cross_attention", "residual_norm", "mlp", "aggregate"]
    batch: int
    height: int
    width: int
    channels: int
    dtype: str = "float32"
    size: int = 7
    heads: int = 1
    shifted: bool = False
    rate: float = 0.0
    channels_last: bool = False
    drop_path: Literal["", "attention", "norm"] = ""
    biased: bool = True

    def build(self) -> nn.Module:
        """The module in training mode, with weights from torch's default generator."""
        if self.module == "mlp":
            return Mlp(self.channels, 4 * self.channels)
        if self.module == "aggregate":
            return Aggregation(self.channels, self.channels_last)
        if self.module == "residual_norm":
            return ResidualNorm(self.channels, self.biased, scaled=self.drop_path == "attention")
        if self.module == "cross_attention":
            return SpatialReductionAttention(self.channels, self.heads, self.size)
        if self.module == "cross_patch":
            return CrossPatchAttention(self.size, self.heads, self.rate)
        attention = InnerPatchAttention(self.channels, self.heads, self.size, self.shifted, self.rate)
        nn.init.normal_(attention.relative_position_bias_table, std=0.5)
        return attention


class ResidualNorm(nn.Module):
    """A linear layer's residual sum and its norm, both added, as the norm's kernel makes them after attention.

    scaled: the branch is multiplied by drop-path's factors before the kernel.
    """

    def __init__(self, channels: int, biased: bool, scaled: bool):
        super().__init__()
        self.scaled = scaled
        self.branch, self.norm = nn.Linear(channels, channels, bias=biased), nn.LayerNorm(channels)
        for weight in self.norm.parameters():
            nn.init.normal_(weight)

    def forward(self, x_BNC: Tensor, scale: Tensor | None, fused: bool) -> Tensor:
        branch = F.linear(x_BNC, self.branch.weight)
        if fused:
            branch = branch * scale.view(-1, 1, 1) if self.scaled else branch
            total, y_BNC = Pending(x_BNC, branch, self.branch.bias, scale).normed(self.norm, self.scaled)
        else:
            total = Pending(x_BNC, branch, self.branch.bias, scale).total()
            y_BNC = self.norm(total)
        return y_BNC + total.flip(1)  # the order of tokens is reversed, so that the gradients of the two differ


class Aggregation(nn.Module):
    """Local aggregation of the outputs of two linear layers, as in CoT, but from tokens to tokens [B, N, C]."""

    def __init__(self, channels: int, channels_last: bool):
        super().__init__()
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.values, self.weights = nn.Linear(channels, channels), nn.Linear(channels, 9 * channels // SHARE)

    def forward(self, x_BNC: Tensor, patches: Patches) -> Tensor:
        values, weights = (
            rearrange(layer(x_BNC), "B (H W) C -> B C H W", H=patches.height).contiguous(
                memory_format=self.memory_format
            )
            for layer in (self.values, self.weights)
        )
        return rearrange(aggregate(values, weights.unflatten(1, (-1, 9)), patches.kernels), "B C H W -> B (H W) C")


def check(device: torch.device, seed: int, cases: Sequence[Case] | None = None) -> list[dict]:
    """Compare kernels with PyTorch. Returns for each case its settings, `errors` and `passed`.

    cases: by default few on a CPU and many on a GPU.

    errors: for the output and for each gradient, |out - reference| / |reference| of PyTorch in the case's dtype
    ("plain") and of the kernels ("kernel"). A case passes if all errors of the kernels are finite and at most twice
    PyTorch's + 1e-6.

    Raises RuntimeError if the kernels do not run. The states of torch's default generators are restored.
    """
    found = []
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for case in (many() if device.type == "cuda" else FEW) if cases is None else cases:
            torch.manual_seed(seed)
            plain = case.build().to(device, getattr(torch, case.dtype))
            found.append(asdict(case) | compare(case, plain, copy.deepcopy(plain), seed))
    return found


def compare(case: Case, plain: nn.Module, fused: nn.Module, seed: int) -> dict:
    """`errors` and `passed` of a case, for two modules with the same weights, of which `fused` uses the kernels."""
    weight = next(plain.parameters())
    if not kernels.usable(weight.device, weight.dtype):
        raise RuntimeError(f"the kernels do not run on {weight.device} in {case.dtype}: there is nothing to check")
    torch.manual_seed(seed)
    x, dy = torch.randn(2, case.batch, case.height * case.width, case.channels).to(weight).unbind()
    reference = _run(case, copy.deepcopy(plain).double(), x.double(), dy.double(), False, seed)
    found = {"plain": _run(case, plain, x, dy, False, seed), "kernel": _run(case, fused, x, dy, True, seed)}
    errors = {name: {way: _error(found[way][name], value) for way in found} for name, value in reference.items()}
    passed = all(
        math.isfinite(error["kernel"]) and error["kernel"] <= 2 * error["plain"] + 1e-6 for error in errors.values()
    )
    return dict(errors=errors, passed=passed)


def _run(case: Case, module: nn.Module, x_BNC: Tensor, dy_BNC: Tensor, fused: bool, seed: int) -> dict[str, Tensor]:
    """The output and all gradients. The seed determines the dropout mask, which is the same for every dtype."""
    x_BNC = x_BNC.detach().requires_grad_()
    torch.manual_seed(seed)
    y_BNC = _forward(case, module, x_BNC, fused)
    y_BNC.backward(dy_BNC)
    return {"output": y_BNC.detach(), "input": x_BNC.grad} | {
        name: weight.grad for name, weight in module.named_parameters()
    }


def _forward(case: Case, module: nn.Module, x_BNC: Tensor, fused: bool) -> Tensor:
    # Every second image is dropped. All dtypes represent the factor of the others.
    scale = 1.25 * (1 - torch.arange(case.batch) % 2).to(x_BNC) if case.drop_path else None
    if case.module == "mlp":
        return module(x_BNC, fused)
    if case.module == "residual_norm":
        return module(x_BNC, scale, fused)
    if case.module == "cross_attention":
        return module(x_BNC, case.height, case.width, fused)
    patches = Patches(case.height, case.width, case.size, by_row=True, kernels=fused)
    if scale is None:
        return module(x_BNC, patches)
    if fused:
        return module(x_BNC, patches, scale=scale)
    scale, bias = scale.view(-1, 1, 1), module.late_bias()
    if bias is None:
        return module(x_BNC, patches) * scale
    return module(x_BNC, patches, last_bias=False) * scale + bias  # a later kernel multiplies the bias


def _error(value: Tensor, reference: Tensor) -> float:
    return ((value.double() - reference).norm() / reference.norm()).item()


# Cases that take Triton's interpreter seconds. None is in bfloat16, whose bits its `tl.dot` multiplies as integers.
FEW = (
    Case("inner_patch", 2, 8, 4, 8, size=4, heads=2),
    Case("inner_patch", 1, 9, 14, 8, heads=1, shifted=True, rate=0.2),
    Case("inner_patch", 1, 8, 8, 8, "float16", size=4, heads=2, shifted=True, rate=0.2),
    Case("inner_patch", 2, 8, 8, 8, "float16", size=4, drop_path="attention"),
    Case("cross_patch", 1, 14, 14, 8, rate=0.2),
    Case("cross_patch", 2, 9, 8, 8, "float16", size=4),
    Case("cross_patch", 1, 9, 8, 8, "float16", size=4, heads=2, rate=0.2),
    Case("cross_patch", 2, 8, 12, 8, "float16", size=4, drop_path="attention"),
    Case("cross_attention", 2, 6, 9, 16, size=2, heads=2),
    Case("cross_attention", 1, 9, 8, 8, "float16", size=1),
    Case("residual_norm", 3, 5, 7, 24, drop_path="norm"),
    Case("residual_norm", 2, 5, 7, 16, "float16", drop_path="attention"),
    Case("residual_norm", 2, 5, 7, 16, "float16", biased=False),
    Case("mlp", 1, 14, 7, 16),
    Case("mlp", 2, 5, 3, 16, "float16"),
    Case("aggregate", 2, 5, 7, 16),
    Case("aggregate", 1, 6, 5, 16, "float16", channels_last=True),
)


def many() -> Iterable[Case]:
    """Cases for a GPU: stages of CAT-B and PVT at 224 pixels, a dense 800 x 1280 image, all patch sizes, padding;
    CoTNet."""
    stages = ((56, 96, 3), (28, 192, 6), (14, 384, 12), (7, 768, 24))
    for (side, channels, heads), dtype in product(stages, ("bfloat16", "float16", "float32")):
        yield Case("inner_patch", 8, side, side, channels, dtype, heads=heads)
        yield Case("cross_patch", 8, side, side, channels, dtype, rate=0.2)
    for side, channels, heads in stages:
        yield Case("inner_patch", 8, side, side, channels, "bfloat16", heads=heads, shifted=True, rate=0.2)
        yield Case("cross_patch", 8, side, side, channels, "bfloat16")
    for size in range(4, 13):
        yield Case("inner_patch", 2, 2 * size, 3 * size - 1, 64, "bfloat16", size, heads=2, shifted=True, rate=0.1)
        yield Case("cross_patch", 2, 2 * size, 3 * size - 1, 64, "bfloat16", size, rate=0.1)
    yield Case("inner_patch", 1, 200, 320, 96, "bfloat16", heads=3)
    yield Case("cross_patch", 1, 200, 320, 96, "bfloat16")
    yield Case("cross_patch", 1, 200, 320, 96, "bfloat16", rate=0.2)
    yield Case("cross_patch", 1, 200, 320, 96, "float32")
    for dtype in ("bfloat16", "float16", "float32"):
        yield Case("cross_patch", 2, 27, 31, 48, dtype, heads=7, rate=0.2)
        yield Case("inner_patch", 4, 27, 31, 48, dtype, heads=3, rate=0.1, drop_path="attention")
        yield Case("residual_norm", 4, 27, 31, 48, dtype)
        yield Case("residual_norm", 4, 27, 31, 48, dtype, drop_path="norm", biased=False)
        yield Case("cross_attention", 2, 27, 31, 48, dtype, size=2, heads=3)
        for side, channels, _ in stages:
            yield Case("residual_norm", 8, side, side, channels, dtype, drop_path="attention")
        for side, channels, heads, reduction in ((56, 64, 1, 8), (28, 128, 2, 4), (14, 320, 5, 2), (7, 512, 8, 1)):
            yield Case("cross_attention", 8, side, side, channels, dtype, reduction, heads)
    for side, channels, _ in stages:
        yield Case("cross_patch", 8, side, side, channels, "bfloat16", rate=0.2, drop_path="attention")
        yield Case("residual_norm", 8, side, side, channels, "bfloat16", drop_path="norm")
    yield Case("cross_patch", 4, 27, 31, 48, "float16", drop_path="attention")
    yield Case("cross_attention", 1, 200, 320, 64, "bfloat16", size=8)
    for channels, dtype in product((64, 96, 128, 192, 384, 768), ("bfloat16", "float16", "float32")):
        yield Case("mlp", 8, 55, 57, channels, dtype)
    maps = ((56, 64), (14, 256), (7, 512))
    for (side, channels), dtype, last in product(maps, ("bfloat16", "float16", "float32"), (False, True)):
        yield Case("aggregate", 8, side, side, channels, dtype, channels_last=last)
    yield Case("aggregate", 6, 27, 31, 48, "bfloat16")  # half of CoTNeXt's first stage
    yield Case("aggregate", 1, 200, 320, 64, "bfloat16")
