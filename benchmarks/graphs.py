"""CUDA graphs for measurements: a function's kernels recorded once, and replayed without the host's time."""

import statistics
import time
from collections.abc import Callable
from typing import TypeVar

import torch

from train.engine.flops import finish

T = TypeVar("T")


def record(work: Callable[[], T], device: torch.device, warm_up: int = 2) -> tuple[T, Callable[[], object]]:
    """Record a call of `work`. Returns its result, which every replay writes anew, and the function that replays it.

    warm_up: calls before, in which what is compiled or allocated at the first use is so. Random numbers of torch's
    generators follow torch.manual_seed in replays, too. Without a GPU a replay is a call, and the result is the first
    call's.
    """
    if device.type != "cuda":
        return work(), work
    # As in a run (train/engine/runtime.py): all on one stream, which is not the default one.
    stream = current = torch.cuda.current_stream(device)
    if current == torch.cuda.default_stream(device):
        stream = torch.cuda.Stream(device)
        stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            work()
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        result = work()
    return result, graph.replay


def rounds_of(step: Callable[[], object], device: torch.device, steps: int, rounds: int) -> list[float]:
    """Seconds of one step, one figure per round of `steps` steps, after a round that warms up.

    On a GPU by events around the round, between which the host queues the steps without waiting.
    """
    found = []
    for _ in range(rounds + 1):
        finish(device)
        if device.type == "cuda":
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            for _ in range(steps):
                step()
            ended.record()
            finish(device)
            found.append(began.elapsed_time(ended) / 1000 / steps)
        else:
            start = time.perf_counter()
            for _ in range(steps):
                step()
            found.append((time.perf_counter() - start) / steps)
    return found[1:]


def host_seconds(call: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Seconds that the host is busy with a call when it does not wait for the device: the median of 5 rounds."""
    found = []
    for _ in range(5):
        finish(device)
        began = time.perf_counter()
        for _ in range(repeats):
            call()
        found.append((time.perf_counter() - began) / repeats)
    finish(device)
    return statistics.median(found)


def device_seconds(work: Callable[[], object], device: torch.device, repeats: int = 10, rounds: int = 7) -> float:
    """Median seconds that one call of `work` takes on the device: `repeats` calls in one graph, replayed.

    Inputs that fit into the device's cache are still there from the call before.
    """
    if device.type != "cuda":
        return statistics.median(rounds_of(work, device, 1, rounds))

    def many() -> None:
        for _ in range(repeats):
            work()

    _, replay = record(many, device, warm_up=1)
    return statistics.median(rounds_of(replay, device, 1, rounds)) / repeats
