"""Where the host's time of an eager step goes: part `host` of `make gpu`.

Three kinds of rows: "call", what one call of an operator costs the host; "step", the forward and the backward pass of
CAT-B, with the kernels and without, and the time of their kernels on the device; "function", the functions in which the
forward pass with the kernels spends its time.
"""

import cProfile
import pstats
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F

from benchmarks.gpu.model import Bench, kernels_of
from benchmarks.gpu.parts import OURS
from benchmarks.gpu.record import ROOT, Record, Session
from benchmarks.graphs import host_seconds
from train.engine.flops import finish
from train.engine.runtime import start_runtime, stop_runtime

FUNCTIONS = 30  # rows of the profile
PASSES = 10  # forward passes that are profiled


def host(session: Session, record: Record) -> None:
    """The job: calls, steps, functions."""
    runtime = start_runtime()
    bench = Bench(session, record, runtime, batch=128)
    found = calls(bench.device, bench.dtype)
    for call in found.values():
        call()  # compiles it
    ways = {way: Way(bench, plain=way == "plain") for way in ("kernels", "plain")}
    session.turn()
    for name, call in found.items():
        record.add(kind="call", name=name, us=1e6 * host_seconds(call, bench.device, session.size(200, 2)))
    for name, way in ways.items():
        times = [way.host_seconds() for _ in range(session.size(9, 1))]
        forward, backward = (1e3 * median(column) for column in zip(*times, strict=True))
        total, _ = kernels_of(way.step, bench.device, session.size(3, 1))
        record.add(
            kind="step",
            name=f"{OURS}, {name}, batch {bench.batch}",
            forward_ms=forward,
            backward_ms=backward,
            device_ms=total["ms"],
            launches=total["calls"],
        )
    for row in functions(ways["kernels"].forward, session.size(PASSES, 1)):
        record.add(kind="function", **row)
    stop_runtime()


def calls(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Operators on tensors so small that the device is never waited for."""
    from catmodel import kernels
    from catmodel.kernels import mlp

    kernels.register()
    B, C, side, heads = 2, 32, 14, 2
    x, other, dy = torch.randn(3, B, side**2, C, device=device, dtype=dtype)
    weight, bias = torch.randn(2, C, device=device, dtype=dtype)
    qkv, qkv_bias = (torch.randn(*shape, 3 * C, device=device, dtype=dtype) for shape in ((B, side**2), ()))
    position = torch.randn(heads, 49, 49, device=device, dtype=dtype)
    w1, b1 = torch.randn(4 * C, C, device=device, dtype=dtype), torch.randn(4 * C, device=device, dtype=dtype)
    rows = x.flatten(0, 1)
    w2, (hidden, slope) = w1.T.contiguous(), rows.new_empty(2, len(rows), 4 * C)
    scale = torch.ones(B, device=device, dtype=dtype)
    tracked = x.clone().requires_grad_()
    norm = (other, bias, scale, weight, bias, 1e-5, False)
    return {
        "PyTorch: x + y": lambda: x + other,
        "PyTorch: empty_like": lambda: torch.empty_like(x),
        "PyTorch: linear": lambda: F.linear(x, w1, b1),
        "PyTorch: layer_norm": lambda: F.layer_norm(x, (C,), weight, bias),
        "pack, 1 launch": lambda: kernels.ops.pack(x, side, side, 7, True),
        "inner_patch_attention, 1 launch": lambda: kernels.ops.inner_patch_attention(
            qkv, qkv_bias, position, side, side, 7, 0, 0.0, None, None
        ),
        "residual_norm, 1 launch": lambda: kernels.ops.residual_norm(x, *norm),
        "residual_norm, recorded by autograd": lambda: kernels.ops.residual_norm(tracked, *norm),
        "a tensor descriptor": lambda: mlp._tiles(rows, 16, 32),
        "hidden layer of the MLP, 1 launch with 4 descriptors": lambda: mlp.hidden(rows, w1, b1, slope, hidden),
        "its gradient, 1 launch with 4 descriptors": lambda: mlp.hidden_gradient(dy.flatten(0, 1), w2, slope),
    }


class Way:
    """The forward pass of CAT-B to the loss, and its backward pass, eager. plain: without the kernels."""

    def __init__(self, bench: Bench, plain: bool):
        self.bench = bench
        self.network = bench.build(OURS, plain or bench.session.rehearsal).train()  # the interpreter takes minutes
        self.parameters, self.images = list(self.network.parameters()), bench.images.to(bench.dtype)
        self.step()

    def forward(self) -> torch.Tensor:
        return F.cross_entropy(self.network(self.images).float(), self.bench.targets)

    def backward(self, loss: torch.Tensor) -> None:
        torch.autograd.grad(loss, self.parameters)

    def step(self) -> None:
        self.backward(self.forward())

    def host_seconds(self) -> tuple[float, float]:
        """The host's seconds for the forward and the backward pass; the device is idle before each."""
        finish(self.bench.device)
        began = time.perf_counter()
        loss = self.forward()
        ended = time.perf_counter()
        finish(self.bench.device)
        resumed = time.perf_counter()
        self.backward(loss)
        return ended - began, time.perf_counter() - resumed


def functions(work: Callable[[], object], repeats: int) -> list[dict]:
    """The functions with the most time of their own: microseconds and calls per call of `work`, as profiled."""
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(repeats):
        work()
    profiler.disable()
    rows = [
        {
            "name": f"{shortened(file)}:{line} {name}",
            "us": 1e6 * own / repeats,
            "with_callees_us": 1e6 * total / repeats,
            "calls": count / repeats,
        }
        for (file, line, name), (_, count, own, total, _) in pstats.Stats(profiler).stats.items()
    ]
    return sorted(rows, key=lambda row: -row["us"])[:FUNCTIONS]


def shortened(file: str) -> str:
    """A path without the folder of this project or of the installed packages."""
    return file.rpartition("site-packages/")[2].removeprefix(f"{ROOT}/")


def judge(rows: list[dict]) -> tuple[bool, str]:
    steps = [row for row in rows if row["kind"] == "step"]
    said = [
        f"{row['name']}: host {row['forward_ms']:.1f} + {row['backward_ms']:.1f} ms, device {row['device_ms']:.1f} ms"
        for row in steps
    ]
    return len(steps) == 2, "; ".join(said)
