"""Speed of each Triton kernel, forward and backward, compared with plain PyTorch, on the shapes of CAT-B's stages."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch._functorch.config
from einops import rearrange
from torch import Tensor, nn

from benchmarks.graphs import device_seconds
from benchmarks.roofline import Roofline
from catmodel import kernels
from catmodel.attention import CrossPatchAttention, attend
from catmodel.dropout import draw_seed
from catmodel.layers import Mlp, Pending
from catmodel.patches import Patches
from train.config import ConfigError
from train.telemetry.formatting import table

# Side of the map in tokens, channels, heads (cat_base at 224 x 224), and whether plain PyTorch is also compiled, which
# is slow.
STAGES = ((56, 96, 3, True), (28, 192, 6, False), (14, 384, 12, True), (7, 768, 24, False))
SIZE = 7


@dataclass(frozen=True)
class Workload:
    """The inputs of a kernel and the ways to compute it.

    forward, backward: the fewest bytes that must be moved, those of inputs and outputs. trained: the tensors whose
    gradients the backward pass computes. ways: functions of `tensors`. Besides "kernel" and "plain":

    kernel, drop-path    the kernel multiplies by drop-path's factors: in a model either attention's or the next norm's
    kernel, bias apart   PyTorch sums the gradient of the bias of q, k and v
    kernel, packed       the map is packed, although it has few patches
    """

    name: str
    stage: int
    forward: int
    backward: int
    ways: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]]
    tensors: tuple[Tensor, ...]
    trained: tuple[Tensor, ...]


def workloads(
    device: torch.device, dtype: torch.dtype, batch: int, compiled: bool, stages: tuple = STAGES
) -> Iterator[Workload]:
    """The workloads of one batch. Plain PyTorch uses its own order of tokens. compiled: also compile it."""
    for number, (side, C, h, compile_too) in enumerate(stages, 1):
        rows, whole = Patches(side, side, SIZE, by_row=True, kernels=True), Patches(side, side, SIZE)
        x = torch.randn(batch, side * side, C, device=device, dtype=dtype, requires_grad=True)
        qkv = torch.randn(batch, side * side, 3 * C, device=device, dtype=dtype, requires_grad=True)
        of_qkv, last = (torch.randn(n * C, device=device, dtype=dtype, requires_grad=True) for n in (3, 1))
        bias = torch.randn(h, SIZE**2, SIZE**2, device=device, dtype=dtype, requires_grad=True)
        scale = torch.ones(batch, device=device, dtype=dtype)  # drop-path's factors

        def inner_plain(qkv: Tensor, of_qkv: Tensor, bias: Tensor, h: int = h) -> Tensor:
            qkv_BnPF = _BiasApart.apply(qkv, of_qkv).unflatten(1, (-1, SIZE**2))
            q, k, v = rearrange(qkv_BnPF, "B n P (three h d) -> three (B n) h P d", three=3, h=h)
            return rearrange(attend(q, k, v, bias), "(B n) h P d -> B (n P) (h d)", B=len(qkv))

        def ways(
            kernel: Callable, plain: Callable, compile_too: bool = compile_too
        ) -> dict[str, Callable[..., Tensor]]:
            more = {"plain, compiled": torch.compile(plain, dynamic=False)} if compiled and compile_too else {}
            return {"kernel": kernel, "plain": plain, **more}

        bytes_of_x = x.nbytes
        work = ways(partial(_inner, side, None), inner_plain)
        work |= {"kernel, bias apart": partial(_inner_apart, side), "kernel, drop-path": partial(_inner, side, scale)}
        inputs = qkv, of_qkv, bias
        # Inner-patch: q, k, v and the result; in the backward pass those and both gradients.
        yield Workload("inner-patch attention", number, 4 * bytes_of_x, 7 * bytes_of_x, work, inputs, inputs)
        cross = CrossPatchAttention(SIZE, dropout=0.2).to(device, dtype)
        work = ways(lambda x, m=cross, p=rows: m(x, p), lambda x, m=cross, p=whole: m(x, p))
        if cross.can_scale(rows):
            work["kernel, drop-path"] = partial(cross, patches=rows, scale=scale)
            if whole.count <= kernels.IN_PLACE:
                work["kernel, packed"] = partial(_packed, cross, side)
        yield Workload(
            "cross-patch attention", number, 2 * bytes_of_x, 3 * bytes_of_x, work, (x,), (x, *cross.parameters())
        )
        norm = nn.LayerNorm(C, device=device, dtype=dtype)
        inputs = x, torch.randn_like(x, requires_grad=True), last
        work = ways(partial(_norm, norm, scale, True), lambda *z, n=norm, f=scale: _norm_plain(n, f, *z))
        work["kernel, drop-path"] = partial(_norm, norm, scale, False)
        # Both inputs and both results; in the backward pass their gradients, of which two are the same, and the sum.
        yield Workload(
            "residual and norm", number, 4 * bytes_of_x, 4 * bytes_of_x, work, inputs, (*inputs, *norm.parameters())
        )
        if kernels.mlp_pays(C):
            mlp = Mlp(C, 4 * C).to(device, dtype)
            work = ways(lambda x, m=mlp: m(x, True), lambda x, m=mlp: m(x))
            weights = sum(weight.nbytes for weight in mlp.parameters())
            yield Workload(
                "MLP",
                number,
                2 * bytes_of_x + weights,
                3 * bytes_of_x + 2 * weights,
                work,
                (x,),
                (x, *mlp.parameters()),
            )


class _BiasApart(torch.autograd.Function):
    """qkv [B, N, 3C], which includes its bias already, whose gradient the backward pass sums on its own."""

    @staticmethod
    def forward(ctx, qkv: Tensor, of_qkv: Tensor) -> Tensor:
        return qkv.view_as(qkv)

    @staticmethod
    def backward(ctx, dqkv: Tensor) -> tuple[Tensor, Tensor]:
        return dqkv, dqkv.sum((0, 1))


def _inner(side: int, scale: Tensor | None, qkv: Tensor, of_qkv: Tensor | None, bias: Tensor) -> Tensor:
    """The kernel of inner-patch attention, which sums the gradient of the layer's bias too, and multiplies by scale."""
    return kernels.ops.inner_patch_attention(qkv, of_qkv, bias, side, side, SIZE, 0, 0.0, None, scale)


def _inner_apart(side: int, qkv: Tensor, of_qkv: Tensor, bias: Tensor) -> Tensor:
    return _inner(side, None, _BiasApart.apply(qkv, of_qkv), None, bias)


def _norm(norm: nn.LayerNorm, scale: Tensor, scaled: bool, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The kernel of the residual sum and the norm after attention. scaled: attention has multiplied the branch."""
    return Pending(*inputs, scale).normed(norm, scaled)


def _norm_plain(norm: nn.LayerNorm, scale: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    total = Pending(*inputs, scale).total()
    return total, norm(total)


def _packed(attention: CrossPatchAttention, side: int, x_BNC: Tensor) -> Tensor:
    """The kernel's result as if there were too many patches to read them in place."""
    weights = [weight for layer in (attention.qkv, attention.proj) for weight in (layer.weight, layer.bias)]
    rate, seed = attention.dropout, draw_seed(x_BNC.device)
    x_BCPn = kernels.ops.pack(x_BNC, side, side, SIZE, True)
    y_BCPn = kernels.ops.cross_patch_attention(x_BCPn, *weights, side, side, rate, seed, None)
    return kernels.ops.unpack(y_BCPn, side, side, SIZE, True)


def bench_kernels(
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    roofline: Roofline,
    compiled: bool = True,
    stages: tuple = STAGES,
) -> Iterator[dict]:
    """A row per kernel, stage, direction and way, each as soon as it is measured; the way "plain" comes first.

    Times are the device's alone: of repeated calls in a CUDA graph, in which the host has no part.

    Keys: name, stage, direction, way; microseconds; speedup over plain PyTorch; megabytes, the fewest that must be
    moved; bandwidth, the rate of moving these as a share of the measured bandwidth (above 1 if the device's cache keeps
    them). Raises ConfigError if the kernels do not run on the device.
    """
    if not kernels.usable(device, dtype):
        raise ConfigError(f"the kernels do not run on this machine's {device}")
    with torch._functorch.config.patch(donated_buffer=False):  # otherwise a compiled backward can run only once
        for workload in workloads(device, dtype, batch, compiled, stages):
            alone: dict[str, float] = {}  # seconds of each way's forward pass
            for direction, moved in (("forward", workload.forward), ("backward", workload.backward)):
                plain = 0.0
                for way in sorted(workload.ways, key=lambda way: way != "plain"):
                    taken = _seconds(workload.ways[way], workload, direction, device) - alone.get(way, 0.0)
                    alone[way] = taken
                    plain = plain or taken
                    place = {"name": workload.name, "stage": workload.stage, "direction": direction, "way": way}
                    speed = {"microseconds": 1e6 * taken, "speedup": plain / taken}
                    yield {**place, **speed, "megabytes": moved / 1e6, "bandwidth": moved / taken / roofline.bandwidth}


def _seconds(function: Callable, workload: Workload, direction: str, device: torch.device) -> float:
    """The device's time of one call: of a forward pass, or ("backward") of both."""

    def forward() -> tuple[Tensor, ...]:
        results = function(*workload.tensors)
        return results if isinstance(results, tuple) else (results,)

    with torch.no_grad():  # a graph of autograd kept from here would tie the recording below to this stream
        gradients = [torch.randn_like(result) for result in forward()]

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(), workload.trained, gradients)

    return device_seconds(forward if direction == "forward" else both, device)


def kernel_table(rows: list[dict]) -> str:
    """`bench_kernels`' result as text."""
    cells = [
        [f"{row['name']}, stage {row['stage']}", row["direction"], row["way"]]
        + [f"{row[key]:{form}}" for key, form in (("microseconds", ".1f"), ("speedup", ".2f"), ("megabytes", ".1f"))]
        + [f"{row['bandwidth']:.0%}"]
        for row in rows
    ]
    return table([["", "direction", "way", "µs", "speed-up", "MB", "bandwidth"], *cells], align="<<<>")
