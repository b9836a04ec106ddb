"""Speed of each Triton kernel, forward and backward, beside its plain twin, on the shapes of CAT-B's stages."""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch._functorch.config
from einops import rearrange
from torch import Tensor

from benchmarks.roofline import Roofline, seconds
from catmodel import kernels
from catmodel.attention import CrossPatchAttention, Patches, attend
from catmodel.layers import Mlp
from train.config import ConfigError

# Side of the map in tokens, channels, heads (cat_base at 224 x 224), and whether the twin is compiled, too, which takes its time.
STAGES = ((56, 96, 3, True), (28, 192, 6, False), (14, 384, 12, True), (7, 768, 24, False))
SIZE = 7


@dataclass(frozen=True)
class Case:
    """A kernel's work. forward, backward: the fewest bytes it can move, those of its inputs and outputs. ways: functions of `tensors`;
    trained: what the backward pass finds gradients of."""

    name: str
    stage: int
    forward: int
    backward: int
    ways: dict[str, Callable[..., Tensor]]
    tensors: tuple[Tensor, ...]
    trained: tuple[Tensor, ...]


def cases(device: torch.device, dtype: torch.dtype, batch: int, compiled: bool, stages: tuple = STAGES) -> Iterator[Case]:
    """Of one batch. The twin is what the plain path does, in its own order of tokens; `compiled`: beside it, compiled."""
    for number, (side, C, h, compile_too) in enumerate(stages, 1):
        rows, whole = Patches(side, side, SIZE, by_row=True, kernels=True), Patches(side, side, SIZE)
        x = torch.randn(batch, side * side, C, device=device, dtype=dtype, requires_grad=True)
        qkv = torch.randn(batch, side * side, 3 * C, device=device, dtype=dtype, requires_grad=True)
        bias = torch.randn(h, SIZE**2, SIZE**2, device=device, dtype=dtype, requires_grad=True)

        def inner(qkv: Tensor, bias: Tensor, side: int = side) -> Tensor:
            return torch.ops.catmodel.inner_patch_attention(qkv, bias, side, side, SIZE, 0, 0.0, None)

        def inner_twin(qkv: Tensor, bias: Tensor, h: int = h) -> Tensor:
            qkv_BnPF = qkv.unflatten(1, (-1, SIZE**2))
            q, k, v = rearrange(qkv_BnPF, "B n P (three h d) -> three (B n) h P d", three=3, h=h)
            return rearrange(attend(q, k, v, bias), "(B n) h P d -> B (n P) (h d)", B=len(qkv))

        def ways(kernel: Callable, twin: Callable, compile_too: bool = compile_too) -> dict[str, Callable[..., Tensor]]:
            more = {"plain, compiled": torch.compile(twin, dynamic=False)} if compiled and compile_too else {}
            return {"kernel": kernel, "plain": twin, **more}

        bytes_of_x = x.nbytes
        # inner-patch: q, k, v and the result; back: those and both gradients
        yield Case("inner-patch attention", number, 4 * bytes_of_x, 7 * bytes_of_x, ways(inner, inner_twin), (qkv, bias), (qkv, bias))
        cross = CrossPatchAttention(SIZE, dropout=0.2).to(device, dtype)
        work = ways(lambda x, m=cross, p=rows: m(x, p), lambda x, m=cross, p=whole: m(x, p))
        yield Case("cross-patch attention", number, 2 * bytes_of_x, 3 * bytes_of_x, work, (x,), (x, *cross.parameters()))
        if kernels.mlp_pays(C):
            mlp = Mlp(C, 4 * C).to(device, dtype)
            work = ways(lambda x, m=mlp: m(x, True), lambda x, m=mlp: m(x))
            weights = sum(weight.nbytes for weight in mlp.parameters())
            yield Case("MLP", number, 2 * bytes_of_x + weights, 3 * bytes_of_x + 2 * weights, work, (x,), (x, *mlp.parameters()))


def bench_kernels(
    device: torch.device, dtype: torch.dtype, batch: int, roofline: Roofline, rounds: int, compiled: bool = True, stages: tuple = STAGES
) -> list[dict]:
    """A row per kernel, stage, direction and way, interleaved: name, stage, direction, way, microseconds (median of the rounds), speedup
    over the plain twin; megabytes at the least, and bandwidth, the share of the measured one that it is to move those in that time.

    Raises ConfigError where the kernels do not run.
    """
    if not kernels.usable(device, dtype):
        raise ConfigError(f"the kernels do not run on this machine's {device}")
    rows = []
    with torch._functorch.config.patch(donated_buffer=False):  # or a compiled backward could run but once
        for case in cases(device, dtype, batch, compiled, stages):
            for direction, moved in (("forward", case.forward), ("backward", case.backward)):
                works = {way: _work(function, case, direction) for way, function in case.ways.items()}
                times: dict[str, list[float]] = {way: [] for way in works}
                for _ in range(rounds):
                    for way, work in works.items():
                        times[way].append(seconds(work, device, rounds=1))
                medians = {way: statistics.median(values) for way, values in times.items()}
                for way, median in medians.items():
                    place = {"name": case.name, "stage": case.stage, "direction": direction, "way": way}
                    speed = {"microseconds": 1e6 * median, "speedup": medians["plain"] / median}
                    rows.append({**place, **speed, "megabytes": moved / 1e6, "bandwidth": moved / median / roofline.bandwidth})
    return rows


def _work(function: Callable[..., Tensor], case: Case, direction: str) -> Callable[[], object]:
    if direction == "forward":
        return lambda: function(*case.tensors)
    result = function(*case.tensors)
    gradient = torch.randn_like(result)
    return lambda: torch.autograd.grad(result, case.trained, gradient, retain_graph=True)


def kernel_table(rows: list[dict]) -> str:
    """`bench_kernels`' result as text."""
    lines = [f"{'':24}{'stage':>6}{'':>10}{'':>17}{'µs':>10}{'speed-up':>10}{'MB':>10}{'bandwidth':>11}"]
    for row in rows:
        place = f"{row['name']:24}{row['stage']:>6}{row['direction']:>10}{row['way']:>17}"
        lines.append(f"{place}{row['microseconds']:10.1f}{row['speedup']:10.2f}{row['megabytes']:10.1f}{row['bandwidth']:10.0%}")
    return "\n".join(lines)
