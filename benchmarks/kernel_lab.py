"""Times candidates for kernels beside cuBLAS and what Inductor makes, on the shapes of CAT-B's stages, on one GPU.

    python -m benchmarks.kernel_lab --json lab.json [--seconds 100] [--batch 256]
    python -m benchmarks.kernel_lab --rehearse          # without a GPU: every candidate once, tiny, in the interpreter

Workers compile every candidate first and compare it with PyTorch in float32; then one process times them as CUDA
graphs of many launches, so that the host's time is not in a figure. Each row is written as soon as it is measured.
"""

import argparse
import json
import multiprocessing
import os
import queue
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Tokens of an image, and channels, in each stage of CAT-B at 224 x 224.
STAGES = {1: (3136, 96), 2: (784, 192), 3: (196, 384), 4: (49, 768)}
CHECKED = 16  # images of the comparison with float32


@dataclass(frozen=True)
class Case:
    """What one way computes: `inputs` by name (see `_inputs`), `run` of them, `exact` in float32; bytes and FLOPs."""

    group: str
    stage: int
    way: str
    names: str
    run: Callable
    exact: Callable
    units: float  # elements moved at least, in units of M * C
    flops: float = 0.0  # in units of M * C * 4C


def _inputs(stage: int, images: int, names: str, tokens: int = 0, channels: int = 0) -> list:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    T, C = (tokens, channels) if tokens else STAGES[stage]
    shapes = dict(x=(images, T, C), r=(images, T, C), dy=(images, T, C), dx=(images, T, C), h=(images, T, 4 * C))
    shapes |= dict(dh=(images, T, 4 * C), q=(images, T, 3 * C), w1=(4 * C, C), w2=(C, 4 * C), b1=(4 * C,), b2=(C,))
    shapes |= dict(g=(C,))
    generator = torch.Generator(device).manual_seed(0)
    made = []
    for name in names.split():
        if name == "s":  # drop-path: most samples are scaled, some dropped
            scale = (torch.rand(images, generator=generator, device=device) < 0.8).float() / 0.8
            made.append(scale)
            continue
        value = torch.randn(shapes[name], generator=generator, device=device, dtype=torch.float32)
        if name in ("w1", "w2"):
            value *= 1.5 * value.shape[1] ** -0.5  # the hidden layer then has a spread of 1.5
        made.append((value + 1 if name == "g" else value).bfloat16())
    return made


# ----------------------------------------------------------------------------------------------- what is to be computed


def _mlp_forward(x, w1, b1):
    import torch.nn.functional as F

    h = F.linear(x, w1, b1)
    return h, F.gelu(h)


def _mlp_backward(dy, w2, h):
    import torch

    dh = torch.ops.aten.gelu_backward(dy @ w2, h)
    return dh, dh.sum((0, 1))


def _gelu_backward(dh, h):
    import torch

    dh = torch.ops.aten.gelu_backward(dh, h)
    return dh, dh.sum((0, 1))


def _whole(x, w1, b1, w2, b2):
    import torch.nn.functional as F

    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


def _whole_backward(dy, x, w1, b1, w2):
    import torch
    import torch.nn.functional as F

    h = F.linear(x, w1, b1)
    dh = torch.ops.aten.gelu_backward(dy @ w2, h)
    return F.gelu(h), dh, dh @ w1, dh.sum((0, 1))


def _norm_forward(x, r, b2, s, g, b):
    import torch
    import torch.nn.functional as F

    total = torch.addcmul(x, r + b2, s.to(x.dtype)[:, None, None])
    return total, F.layer_norm(total, (x.shape[-1],), g, b)


def _norm_backward(dy, dx, x, s, g):
    import torch

    C = x.shape[-1]
    mean = x.float().mean(-1, keepdim=True)
    rstd = (x.float().var(-1, correction=0, keepdim=True) + 1e-5).rsqrt()
    into, dg, db = torch.ops.aten.native_layer_norm_backward(dy, x, [C], mean, rstd, g, g, [True, True, True])
    into = into + dx
    branch = into * s.to(x.dtype)[:, None, None]
    return into, branch, torch.stack([dg, db, branch.sum((0, 1))])


def _compiled(function: Callable) -> Callable:
    """`function`, compiled for the shapes of its first call."""
    made = []

    def run(*inputs):
        import torch

        if not made:
            made.append(torch.compile(function, dynamic=False))
        return made[0](*inputs)

    return run


def _flat(x):
    return x.reshape(-1, x.shape[-1])


# ----------------------------------------------------------------------------------------------------------- candidates


def _product(tile: tuple[int, ...], backward: bool) -> Callable:
    """tile: rows, columns, inner, warps, stages, how (0 pointers, 1 descriptors, 2 sums by dot, 3 persistent)."""
    M_tile, N_tile, K_tile, warps, stages, how, each = tile

    def run(x, w, third):
        import torch
        import triton

        from catmodel.kernels import product
        from catmodel.kernels.launch import programs

        x = _flat(x)
        (M, K), N = x.shape, w.shape[1 if backward else 0]
        out, bias, sums = x.new_empty(M, N), third, None
        slope = _flat(third) if backward else x.new_empty(M, N)
        if backward:
            bias, sums = None, torch.empty(triton.cdiv(M, M_tile), N, dtype=torch.float32, device=x.device)
        given = x, w, slope, out
        if how:
            from triton.tools.tensor_descriptor import TensorDescriptor

            last = [M_tile, N_tile // 2 if how == 3 else N_tile]
            tiles = [M_tile, K_tile], [K_tile, N_tile] if backward else [N_tile, K_tile], last, last
            given = [TensorDescriptor.from_tensor(t, n) for t, n in zip(given, tiles, strict=True)]
        x, w = given[:2]
        count = triton.cdiv(M, M_tile) * triton.cdiv(N, N_tile)
        sizes = dict(BLOCK_M=M_tile, BLOCK_N=N_tile, BLOCK_K=K_tile, STAGES=stages, BACKWARD=backward)
        sizes |= dict(DOT=backward and how > 1, num_warps=warps, num_stages=stages)
        arguments = x, w, bias, *given[2:], sums, M, N, K
        if how == 3:
            product.persistent[(min(count, each * programs(out.device)),)](*arguments, **sizes)
        else:
            product.product[(count,)](*arguments, KEEP=not backward, TMA=how > 0, **sizes)
        return (out, sums.sum(0)) if backward else (slope, out)

    return run


def _stationary(*sizes: int, backward: bool) -> Callable:
    def run(x, w, third):
        from catmodel.kernels.whole import stationary

        if backward:
            return stationary(_flat(x), w, None, _flat(third), *sizes)
        return stationary(_flat(x), w, third, None, *sizes)[::-1]

    return run


def _slope_backward(dy, w2, h):
    """The gradient as the kernels compute it: `h` is then GELU' itself."""
    dh = (dy @ w2) * h
    return dh, dh.sum((0, 1))


def _slope_forward(x, w1, b1):
    import torch
    import torch.nn.functional as F

    h = F.linear(x, w1, b1)
    return torch.ops.aten.gelu_backward(torch.ones_like(h), h), F.gelu(h)


def _whole_kernel(*sizes: int, backward: bool = False) -> Callable:
    def run(x, *others):
        from catmodel.kernels import whole

        if backward:
            return whole.backward(_flat(x), _flat(others[0]), *others[1:], *sizes)
        return whole.forward(_flat(x), *others, *sizes)

    return run


def _norm(backward: bool, **sizes: int) -> Callable:
    def run(*inputs):
        from catmodel.kernels import norm

        return (norm.backward if backward else norm.forward)(*inputs, **sizes)

    return run


def _gelu_kernel(**sizes: int) -> Callable:
    def run(dh, h):
        from catmodel.kernels.columns import gelu_backward

        return gelu_backward(_flat(dh), _flat(h), **sizes)

    return run


def _sums_kernel(**sizes: int) -> Callable:
    def run(q):
        from catmodel.kernels.columns import column_sums

        return column_sums(_flat(q), **sizes)

    return run


# Tiles of `product`: rows, columns, inner columns, warps, stages, how, and programs per multiprocessor if persistent.
WIDE = [(128, 128, 64, 8, 2, 3, 2), (128, 128, 32, 8, 4, 3, 2), (128, 128, 64, 8, 3, 3, 2), (128, 128, 64, 4, 2, 3, 2)]
WIDE += [
    (128, 128, 64, 4, 3, 2, 0),
    (128, 128, 64, 8, 2, 2, 0),
    (128, 128, 64, 4, 2, 2, 0),
    (256, 128, 64, 16, 3, 3, 1),
]
WIDE += [(128, 64, 64, 4, 3, 3, 2), (64, 128, 64, 4, 2, 3, 3), (128, 128, 64, 8, 2, 3, 1), (256, 128, 64, 8, 3, 3, 1)]
NARROW = [(128, 128, 32, 8, 2, 3, 2), (128, 128, 32, 8, 3, 3, 2), (128, 128, 32, 4, 2, 3, 2), (128, 64, 32, 4, 3, 3, 4)]
NARROW += [(128, 64, 32, 8, 3, 3, 3), (64, 128, 32, 4, 2, 3, 4), (128, 64, 32, 4, 2, 2, 0), (64, 128, 32, 4, 3, 2, 0)]
TILES = {1: NARROW, 2: WIDE, 3: WIDE, 4: WIDE}
HOW = "", " tma", " tma dot", " persistent"
# Of the kernel that keeps its weights: rows, columns, stages, warps, programs per multiprocessor.
KEPT = [(64, 128, 2, 4, 2), (128, 128, 2, 8, 1), (64, 128, 3, 4, 2), (64, 64, 3, 4, 4)]
# Of the whole MLP: rows, hidden columns, stages, warps.
WHOLE = {1: [(128, 64, 2, 8), (64, 64, 2, 4), (128, 64, 3, 8)], 2: [(128, 64, 2, 8), (64, 64, 2, 4)]}


def cases() -> Iterator[Case]:
    """By importance: a time limit cuts the end off."""
    for stage in (3, 1, 2, 4):
        yield from _norm_cases(stage)
        yield from _mlp_cases(stage)
    for stage in (1, 2):
        yield from _whole_cases(stage)
    for stage in (3, 1, 2, 4):
        yield from _other_cases(stage)


def _mlp_cases(stage: int) -> Iterator[Case]:
    import torch.nn.functional as F

    forward = ("mlp forward", stage), ("x w1 b1", 9, 2)
    backward = ("mlp backward", stage), ("dy w2 h", 9, 2)

    def case(direction, way, run, exact):
        names, units, flops = direction[1]
        return Case(*direction[0], way, names, run, exact, units, flops)

    yield case(forward, "cuBLAS alone", F.linear, lambda *i: F.linear(*i))
    yield case(backward, "cuBLAS alone", lambda dy, w2, h: dy @ w2, lambda dy, w2, h: dy @ w2)
    yield case(forward, "Inductor", _compiled(_mlp_forward), _mlp_forward)
    yield case(backward, "Inductor", _compiled(_mlp_backward), _mlp_backward)
    for tile in TILES[stage]:
        M_tile, N_tile, K_tile, warps, stages, how, each = tile
        name = f"{M_tile}x{N_tile}x{K_tile} w{warps} s{stages}{HOW[how]}{f' p{each}' * (how == 3)}"
        yield case(forward, name, _product(tile, backward=False), _slope_forward)
        yield case(backward, name, _product(tile, backward=True), _slope_backward)
    for sizes in KEPT if stage < 3 else ():
        name = "keeps weights {}x{} s{} w{} p{}".format(*sizes)
        yield case(forward, name, _stationary(*sizes, backward=False), _slope_forward)
        yield case(backward, name, _stationary(*sizes, backward=True), _slope_backward)


def _norm_cases(stage: int) -> Iterator[Case]:
    forward, backward = ("norm forward", stage), ("norm backward", stage)
    names = "x r b2 s g b2", "dy dx x s g"
    yield Case(*forward, "Inductor", names[0], _compiled(_norm_forward), _norm_forward, 4)
    yield Case(*backward, "Inductor", names[1], _compiled(_norm_backward), _norm_backward, 5)
    for elements in (1024, 2048, 4096):
        yield Case(*forward, f"{elements} elements", names[0], _norm(False, elements=elements), _norm_forward, 4)
    for elements, each, warps, stages in (
        (2048, 3, 4, 3),
        (2048, 3, 4, 4),
        (2048, 3, 4, 2),
        (2048, 2, 4, 4),
        (4096, 2, 8, 3),
        (4096, 1, 8, 4),
        (1024, 6, 2, 3),
        (1024, 5, 2, 4),
        (1024, 8, 2, 3),
    ):
        way = f"{elements} elements p{each} w{warps} s{stages}"
        run = _norm(True, elements=elements, each=each, warps=warps, stages=stages)
        yield Case(*backward, way, names[1], run, _norm_backward, 5)


def _whole_cases(stage: int) -> Iterator[Case]:
    forward, backward = ("whole forward", stage), ("whole backward", stage)
    names = "x w1 b1 w2 b2", "dy x w1 b1 w2"
    yield Case(*forward, "Inductor", names[0], _compiled(_whole), _whole, 2, 4)
    yield Case(*backward, "Inductor", names[1], _compiled(_whole_backward), _whole_backward, 11, 6)
    for sizes in WHOLE[stage]:
        way = "{}x{} s{} w{}".format(*sizes)
        yield Case(*forward, way, names[0], _whole_kernel(*sizes), _whole, 2, 4)
        yield Case(*backward, way, names[1], _whole_kernel(*sizes, backward=True), _whole_backward, 11, 6)


def _other_cases(stage: int) -> Iterator[Case]:
    import torch.nn.functional as F

    def total(q):
        return q.sum((0, 1))

    yield Case("gelu backward", stage, "Inductor", "dh h", _compiled(_gelu_backward), _gelu_backward, 12)
    for rows, columns, each in ((16, 128, 8), (8, 256, 8), (32, 128, 4)):
        run = _gelu_kernel(rows=rows, columns=columns, each=each)
        yield Case("gelu backward", stage, f"{rows}x{columns} p{each}", "dh h", run, _gelu_backward, 12)
    yield Case("bias gradient 3C", stage, "Inductor", "q", _compiled(total), total, 3)
    for rows, columns, each in ((32, 128, 8), (16, 256, 8)):
        run = _sums_kernel(rows=rows, columns=columns, each=each)
        yield Case("bias gradient 3C", stage, f"{rows}x{columns} p{each}", "q", run, total, 3)
    yield Case("fc2 forward", stage, "cuBLAS", "h w2 b2", F.linear, lambda *i: F.linear(*i), 5, 2)
    product = lambda dh, w1: dh @ w1  # noqa: E731
    yield Case("dx", stage, "cuBLAS", "dh w1", product, product, 5, 2)
    weights = lambda dh, x: _flat(dh).T @ _flat(x)  # noqa: E731
    yield Case("dw1", stage, "cuBLAS", "dh x", weights, weights, 5, 2)
    yield Case("dw2", stage, "cuBLAS", "dy h", weights, weights, 5, 2)


# ------------------------------------------------------------------------------------------------------ check, and time


def _tensors(value) -> list:
    return [value] if not isinstance(value, tuple | list) else [t for t in value if t is not None]


def error(case: Case, images: int, **shape: int) -> float:
    """The largest distance, over the results, from those of PyTorch in float32, relative to their norm."""
    inputs = _inputs(case.stage, images, case.names, **shape)
    found, exact = _tensors(case.run(*inputs)), _tensors(case.exact(*(z.float() for z in inputs)))
    if len(found) != len(exact):
        raise AssertionError(f"{len(found)} results instead of {len(exact)}")
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
            if rehearsal:
                channels = min(STAGES[case.stage][1], 192 if case.group.startswith("whole") else 96)
                results.put((number, error(case, 2, tokens=75, channels=channels), None))
                continue
            found = error(case, CHECKED)
            if case.way == "Inductor":  # it compiles for the shape, into its cache
                torch._dynamo.reset()
                fresh = list(cases())[number]
                fresh.run(*_inputs(case.stage, batch, case.names))
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
    tokens, C = STAGES[case.stage]
    moved, flops = 2 * batch * tokens * C * case.units, batch * tokens * C * 4 * C * case.flops
    rates = dict(gb_per_s=round(moved / time_us / 1e3), tflop_per_s=round(flops / time_us / 1e6))
    place = dict(group=case.group, stage=case.stage, way=case.way, microseconds=round(time_us, 1))
    return dict(**place, floor=round(moved / 4.25e6, 1), **rates, error=distance)


def _checked(numbers: list[int], count: int, batch: int, rehearsal: bool, limit: float) -> dict[int, tuple]:
    """Compile and compare in `count` processes, for `limit` seconds: number -> (error, problem)."""
    start, found = time.monotonic(), {}
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [
        context.Process(target=_check, args=(numbers[k::count], batch, rehearsal, results)) for k in range(count)
    ]
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


def measure(batch: int, limit: float, path: Path | None, only: str) -> None:
    """Check and time all cases within `limit` seconds."""
    start = time.monotonic()
    everything = list(cases())
    numbers = [number for number, case in enumerate(everything) if only in f"{case.group} {case.stage}"]
    count = max(1, min(os.cpu_count() - 1, 15))
    found, lines = _checked(numbers, count, batch, False, 0.7 * limit), []
    print(f"{len(found)} of {len(numbers)} cases compiled in {time.monotonic() - start:.0f} s", flush=True)
    for number in numbers:
        case, (distance, problem) = everything[number], found.get(number, (None, "not compiled in time"))
        if time.monotonic() - start > limit:
            problem = "no time left"
        try:
            line = None if problem else row(case, batch, microseconds(case, batch), distance)
        except Exception as failure:
            problem = f"{type(failure).__name__}: {failure}"[:300]
        if problem:
            line = dict(group=case.group, stage=case.stage, way=case.way, problem=problem)
        lines.append(line)
        print(json.dumps(line), flush=True)
        if path:
            path.write_text(json.dumps(lines, indent=0) + "\n")
    print(f"{time.monotonic() - start:.0f} s", flush=True)


def rehearse(only: str) -> None:
    """Every candidate once in Triton's interpreter, with 2 images of few tokens, in a worker as on a GPU."""
    everything = list(cases())
    plain = "Inductor", "cuBLAS", "cuBLAS alone"
    numbers = [n for n, c in enumerate(everything) if c.way not in plain and only in f"{c.group} {c.stage}"]
    for number, (distance, problem) in _checked(numbers, 1, 2, True, 600).items():
        case = everything[number]
        print(f"{case.group} {case.stage} {case.way}: {problem or f'{distance:.1e}'}", flush=True)
        if problem or distance > 0.01:
            raise SystemExit(f"{case.group} {case.way} is wrong")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, each as it is measured")
    parser.add_argument("--seconds", type=float, default=100, help="the most that it takes (default: 100)")
    parser.add_argument("--batch", type=int, default=256, help="images (default: 256)")
    parser.add_argument("--only", default="", metavar="TEXT", help='cases whose "group stage" contains this')
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, in the interpreter")
    arguments = parser.parse_args()
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # read at torch's import; the workers are many already
    if arguments.rehearse:
        rehearse(arguments.only)
    else:
        measure(arguments.batch, arguments.seconds, arguments.json, arguments.only)


if __name__ == "__main__":
    main()
