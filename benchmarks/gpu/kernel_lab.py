"""Tiles of the MLP's and the norm's kernels beside cuBLAS and what Inductor makes, on CAT-B's shapes: part `lab`.

The tables in `mlp._plan` and `norm` were filled from its results (docs/results/h200-2026-11-27/kernel-lab.json, where
more candidates were compared, which lost). Workers compile every way first and compare it with PyTorch in float32; then
one process times them as CUDA graphs of many launches, so that the host's time is not in a figure.
"""

import multiprocessing
import os
import queue
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.gpu.record import Record, Session

# Tokens of an image, and channels, in each stage of CAT-B at 224 x 224.
STAGES = {1: (3136, 96), 2: (784, 192), 3: (196, 384), 4: (49, 768)}
CHECKED = 16  # images of the comparison with float32
BANDWIDTH = 4.25e12  # bytes per second that an H200 copies
PLAIN = "Inductor", "cuBLAS alone"


@dataclass(frozen=True)
class Case:
    """What one way computes: `run` of the inputs with these names (see `_inputs`); `exact` does it in float32."""

    group: str
    stage: int
    way: str
    names: str
    run: Callable
    exact: Callable
    units: float  # elements moved at least, in units of M * C
    flops: float = 0.0  # in units of M * C * 4C


def _inputs(stage: int, images: int, names: str, tokens: int = 0, channels: int = 0) -> list:
    """Random tensors in bfloat16 by their names; tokens and channels replace those of the stage."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    T, C = (tokens, channels) if tokens else STAGES[stage]
    token, hidden = (images, T, C), (images, T, 4 * C)
    shapes = dict(x=token, branch=token, dy=token, dx=token, hidden=hidden, w1=(4 * C, C), w2=(C, 4 * C), b1=(4 * C,))
    shapes |= dict(b2=(C,), gamma=(C,), beta=(C,), scale=(images,))
    generator = torch.Generator(device).manual_seed(0)
    made = []
    for name in names.split():
        value = torch.randn(shapes[name], generator=generator, device=device)
        if name in ("w1", "w2"):
            value *= 1.5 * value.shape[1] ** -0.5  # the hidden layer then has a spread of 1.5
        elif name == "scale":  # drop-path: most samples are scaled, some dropped
            value = (value < 0.8).float() / 0.8
        made.append(value.bfloat16())
    return made


# ---------------------------------------------------------------------------------------------- what Inductor compiles


def _mlp_forward(x, w1, b1):
    import torch.nn.functional as F

    h = F.linear(x, w1, b1)
    return h, F.gelu(h)


def _mlp_backward(dy, w2, h):
    import torch

    dh = torch.ops.aten.gelu_backward(dy @ w2, h)
    return dh, dh.sum((0, 1))


def _norm_forward(x, branch, bias, scale, gamma, beta):
    import torch
    import torch.nn.functional as F

    total = torch.addcmul(x, branch + bias, scale[:, None, None])
    return total, F.layer_norm(total, (x.shape[-1],), gamma, beta)


def _norm_backward(dy, dx, x, scale, gamma):
    import torch

    C = x.shape[-1]
    mean = x.float().mean(-1, keepdim=True)
    rstd = (x.float().var(-1, correction=0, keepdim=True) + 1e-5).rsqrt()
    into, dgamma, dbeta = torch.ops.aten.native_layer_norm_backward(dy, x, [C], mean, rstd, gamma, gamma, [True] * 3)
    into = into + dx
    branch = into * scale[:, None, None]
    return into, branch, torch.stack([dgamma, dbeta, branch.sum((0, 1))])


def _compiled(function: Callable) -> Callable:
    """`function`, compiled for the shapes of its first call."""
    made = []

    def run(*inputs):
        import torch

        if not made:
            made.append(torch.compile(function, dynamic=False))
        return made[0](*inputs)

    return run


# ------------------------------------------------------------------------------------------------ what the kernels do


def _flat(x):
    return x.reshape(-1, x.shape[-1])


def _slope_forward(x, w1, b1):
    import torch
    import torch.nn.functional as F

    h = F.linear(x, w1, b1)
    return torch.ops.aten.gelu_backward(torch.ones_like(h), h), F.gelu(h)


def _slope_backward(dy, w2, slope):
    dh = (dy @ w2) * slope
    return dh, dh.sum((0, 1))


def _forward_kernel(plan: tuple | None) -> Callable:
    def run(x, w1, b1):
        from catmodel.kernels import mlp

        x = _flat(x)
        slope, out = x.new_empty(len(x), len(w1)), x.new_empty(len(x), len(w1))
        mlp.hidden(x, w1, b1, slope, out, plan)
        return slope, out

    return run


def _backward_kernel(plan: tuple | None) -> Callable:
    def run(dy, w2, slope):
        from catmodel.kernels import mlp

        out, sums = mlp.hidden_gradient(_flat(dy), w2, _flat(slope), plan)
        return out, sums.sum(0)

    return run


def _norm_kernel(backward: bool, **sizes: int) -> Callable:
    def run(*inputs):
        from catmodel.kernels import norm

        return (norm.backward if backward else norm.forward)(*inputs, **sizes)

    return run


# Rows, columns and inner columns of a tile, warps, stages; and the kernel's DELAY, if any.
FORWARD = [
    *((128, 128, 64, 8, 3, delay) for delay in (250, 500, 1000)),
    *((128, 128, 64, 8, 2), (128, 128, 32, 8, 4), (128, 128, 64, 4, 2), (128, 64, 64, 4, 3)),
]
BACKWARD = [(128, 128, 64, 8, 3), (128, 128, 64, 4, 2), (128, 128, 32, 4, 4), (64, 128, 64, 4, 3)]


def cases() -> Iterator[Case]:
    """By importance: a time limit cuts the end off."""
    for stage in (3, 1, 2, 4):
        yield from _mlp_cases(stage)
        yield from _norm_cases(stage)


def _mlp_cases(stage: int) -> Iterator[Case]:
    import torch.nn.functional as F

    def case(backward: bool, way: str, run: Callable, exact: Callable) -> Case:
        names = "dy w2 hidden" if backward else "x w1 b1"
        return Case(f"mlp {'backward' if backward else 'forward'}", stage, way, names, run, exact, 9, 2)

    yield case(False, "cuBLAS alone", F.linear, F.linear)
    yield case(True, "cuBLAS alone", lambda dy, w2, h: dy @ w2, lambda dy, w2, h: dy @ w2)
    yield case(False, "Inductor", _compiled(_mlp_forward), _mlp_forward)
    yield case(True, "Inductor", _compiled(_mlp_backward), _mlp_backward)
    for plan in (None, *FORWARD):
        yield case(False, _words(plan), _forward_kernel(_plan(plan)), _slope_forward)
    for plan in (None, *BACKWARD):
        yield case(True, _words(plan), _backward_kernel(_plan(plan)), _slope_backward)


def _words(plan: tuple | None) -> str:
    if plan is None:
        return "kernel"
    return "{}x{}x{} w{} s{}".format(*plan[:5]) + "".join(f" delay {delay}" for delay in plan[5:])


def _plan(plan: tuple | None) -> tuple[dict, dict] | None:
    if plan is None:
        return None
    rows, columns, inner, warps, stages, *delay = plan
    options = dict(num_warps=warps, num_stages=stages) | (dict(DELAY=delay[0]) if delay else {})
    return dict(ROWS=rows, COLUMNS=columns, INNER=inner), options


def _norm_cases(stage: int) -> Iterator[Case]:
    forward, backward = ("norm forward", stage), ("norm backward", stage)
    names = "x branch b2 scale gamma beta", "dy dx x scale gamma"
    yield Case(*forward, "Inductor", names[0], _compiled(_norm_forward), _norm_forward, 4)
    yield Case(*backward, "Inductor", names[1], _compiled(_norm_backward), _norm_backward, 5)
    yield Case(*forward, "kernel", names[0], _norm_kernel(False), _norm_forward, 4)
    yield Case(*backward, "kernel", names[1], _norm_kernel(True), _norm_backward, 5)
    for elements, each, warps, stages in ((2048, 3, 4, 4), (2048, 3, 4, 2), (4096, 2, 8, 3), (1024, 6, 2, 3)):
        sizes = dict(elements=elements, each=each, warps=warps, stages=stages)
        way = f"{elements} elements p{each} w{warps} s{stages}"
        yield Case(*backward, way, names[1], _norm_kernel(True, **sizes), _norm_backward, 5)


# -------------------------------------------------------------------------------------------------- check, and time


def _tensors(value) -> list:
    return [value] if not isinstance(value, tuple | list) else [t for t in value if t is not None]


def error(case: Case, images: int, **shape: int) -> float:
    """The largest distance, over the results, from those of PyTorch in float32, relative to their norm."""
    inputs = _inputs(case.stage, images, case.names, **shape)
    found, exact = _tensors(case.run(*inputs)), _tensors(case.exact(*(z.float() for z in inputs)))
    pairs = [(a.double().flatten(), b.double().flatten()) for a, b in zip(found, exact, strict=True)]
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


def _check(share: list[int], batch: int, rehearsal: bool, results) -> None:
    """In a worker: compile and compare the cases of these numbers."""
    if rehearsal:
        import tests.catmodel.kernels.interpreter  # noqa: F401

        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    everything = list(cases())
    for number in share:
        case = everything[number]
        try:
            found = error(case, 2, tokens=75, channels=96) if rehearsal else error(case, CHECKED)
            if case.way == "Inductor":  # it compiles for the shape, into its cache
                torch._dynamo.reset()
                list(cases())[number].run(*_inputs(case.stage, batch, case.names))
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            results.put((number, found, None))
        except Exception as problem:
            results.put((number, None, f"{type(problem).__name__}: {problem}"[:300]))


def microseconds(case: Case, batch: int) -> float:
    """Median time of one launch, of graphs of many, over two sets of inputs in turn (their caches are then cold)."""
    import torch

    sets = [_inputs(case.stage, batch, case.names) for _ in range(2)]
    stream = torch.cuda.Stream()
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(stream):
        for inputs in sets:
            case.run(*inputs)
        began.record()
        for inputs in sets:
            case.run(*inputs)
        ended.record()
        ended.synchronize()
        repeats = 2 * max(2, min(20, int(4 / began.elapsed_time(ended))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for repeat in range(repeats):
            case.run(*sets[repeat % 2])
    times = []
    for _ in range(8):
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.append(1e3 * began.elapsed_time(ended) / repeats)
    del graph, sets
    torch.cuda.empty_cache()
    return statistics.median(times[1:])


def row(case: Case, batch: int, time_us: float, distance: float | None) -> dict:
    """What is written of a case; floor: microseconds in which the memory moves the bytes."""
    tokens, C = STAGES[case.stage]
    moved, flops = 2 * batch * tokens * C * case.units, batch * tokens * C * 4 * C * case.flops
    times = dict(microseconds=round(time_us, 1), floor=round(1e6 * moved / BANDWIDTH, 1))
    rates = dict(gb_per_s=round(moved / time_us / 1e3), tflop_per_s=round(flops / time_us / 1e6))
    return dict(**times, **rates, error=distance)


def _checked(numbers: list[int], count: int, batch: int, rehearsal: bool, limit: float) -> dict[int, tuple]:
    """Compile and compare in `count` processes, for `limit` seconds: number -> (error, problem)."""
    start, found = time.monotonic(), {}
    context = multiprocessing.get_context("spawn")  # a process that has touched the GPU cannot be forked
    results = context.Queue()
    shares = [numbers[k::count] for k in range(count)]
    workers = [context.Process(target=_check, args=(share, batch, rehearsal, results)) for share in shares]
    for worker in workers:
        worker.start()
    while len(found) < len(numbers) and time.monotonic() - start < limit:
        alive = any(worker.is_alive() for worker in workers)
        try:
            number, distance, problem = results.get(timeout=1)
            found[number] = distance, problem
        except queue.Empty:
            if not alive:
                break
    for worker in workers:
        worker.terminate()
        worker.join()
    return found


def lab(session: Session, record: Record) -> None:
    """The job of part `lab`: every way is compiled and checked beside other jobs, and then timed in this job's turn."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # the workers are many already
    everything, batch = list(cases()), session.size(256, 2)
    numbers = [n for n, c in enumerate(everything) if not session.rehearsal or (c.stage == 1 and c.way not in PLAIN)]
    found = _checked(numbers, session.size(6, 1), batch, session.rehearsal, session.size(150, 600))
    session.turn()
    for number in numbers:
        case, (distance, problem) = everything[number], found.get(number, (None, "not compiled in time"))

        def measure(case: Case = case, distance: float | None = distance, problem: str | None = problem) -> dict:
            if problem:
                raise RuntimeError(problem)
            return {"error": distance} if session.rehearsal else row(case, batch, microseconds(case, batch), distance)

        name = f"{case.group} {case.stage}, {case.way}"
        record.measure(name, measure, group=case.group, stage=case.stage, way=case.way)


def judge(rows: list[dict]) -> tuple[bool, str]:
    """Where another way than the kernel's own is the fastest, by how much."""
    said, wrong = [], [row["name"] for row in rows if row["error"] is not None and row["error"] > 0.01]
    timed = [row for row in rows if "microseconds" in row]
    for group, stage in dict.fromkeys((row["group"], row["stage"]) for row in timed):
        times = {row["way"]: row["microseconds"] for row in timed if (row["group"], row["stage"]) == (group, stage)}
        ours, (way, best) = times.get("kernel"), min(times.items(), key=lambda item: item[1])
        if ours and best < 0.97 * ours and way != "cuBLAS alone":
            said.append(f"{group} {stage}: {way} {best:.0f} µs, the kernel {ours:.0f}")
    said += [f"WRONG: {', '.join(wrong)}"] * bool(wrong)
    return bool(rows) and not wrong, "; ".join(said) or f"{len(rows)} ways, none faster than the kernels"
