"""Memory for this config and ZeRO stage: estimated without taking any, and measured by one real step of the engine."""

import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from train.checkpoint.saver import snapshot
from train.config import Config
from train.engine.deepspeed_engine import DTYPES, Engine
from train.engine.ema import Ema
from train.engine.estimate import activations, held, meta_model
from train.engine.flops import finish
from train.engine.memory import at_most, free_memory
from train.engine.runtime import Runtime
from train.tasks.base import build_task


def take(config: Config, classes: int, runtime: Runtime) -> dict:
    """The estimate, the memory that is free, and, where it fits on all ranks, one step of the engine; all ranks call this.

    gradient: bytes that are summed over the ranks in a step, in fp32. taken: it was tried. compute: seconds of a micro-batch's forward and
    backward, without other ranks. peak: bytes that the step took.
    """
    model = meta_model(config, classes)
    needed = {**held(model, config, runtime), "activations": activations(model, config)}
    total, free = sum(needed.values()), free_memory(runtime.device)
    gradient = 4 * sum(parameter.numel() for parameter in model.parameters())
    found = {"needed": needed, "estimated": total, "gradient": gradient, "free": free, "taken": False, "device": runtime.device.type}
    everywhere = torch.tensor(float(total <= free), device=runtime.device)
    dist.all_reduce(everywhere, op=dist.ReduceOp.MIN)
    if not everywhere:
        return found
    try:
        with at_most(free, runtime.device):  # the system would rather kill a process than refuse it memory
            return {**found, "taken": True, **_measure(config, classes, runtime)}
    except (torch.OutOfMemoryError, MemoryError) as error:
        return {**found, "taken": True, "failed": str(error).splitlines()[0]}
    except RuntimeError as error:
        if "memory" not in str(error):  # a CPU's allocator has no error type of its own
            raise
        return {**found, "taken": True, "failed": str(error).splitlines()[0]}


def _measure(config: Config, classes: int, runtime: Runtime) -> dict:
    device, side, batch = runtime.device, config.data.image_size, config.train.micro_batch
    before = _begin_peak(device)
    model = build_task(config, [""] * classes).build_model()
    images = torch.randn(batch, 3, side, side, device=device)
    labels = torch.randint(classes, (batch,), device=device)
    model.to(device, DTYPES[config.train.precision])
    for _ in range(2):  # the first one compiles kernels, starts threads and fills caches
        finish(device)
        began = time.perf_counter()
        nn.functional.cross_entropy(model(images.to(next(model.parameters()).dtype)).float(), labels).backward()
        finish(device)
        compute = time.perf_counter() - began
    del model
    engine = Engine(build_task(config, [""] * classes).build_model(), config, accumulation=1, device=device)
    for _ in range(2):
        finish(device)
        began = time.perf_counter()
        engine.backward(nn.functional.cross_entropy(engine(images).float(), labels))
        result = engine.step(0.0)
        finish(device)
        step = time.perf_counter() - began
    snapshot(engine, Ema(engine, config.ema.decay) if config.ema.decay else None)  # of a save
    overflow = bool(result.skipped) and config.train.precision != "fp16"  # whose first loss scales are too large on purpose
    return {"compute": compute, "step": step, "peak": _peak(device) - before, "skipped": overflow}


def _begin_peak(device: torch.device) -> int:
    """Bytes in use now; the peak is counted anew from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")
    return _peak(device)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024
