"""Memory for this config and ZeRO stage: estimated without taking any, and measured by one real step of the engine."""

import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from train.config import Config
from train.ema import Ema
from train.engine import DTYPES, Engine, zero_stage
from train.memory import at_most, free_memory
from train.micro_batch import kept_beside
from train.roofline import finish
from train.runtime import Runtime
from train.saver import snapshot
from train.tasks.classification import build_model


def estimate(config: Config, classes: int, runtime: Runtime) -> dict[str, int]:
    """Bytes that a rank needs: model and gradients, what is kept beside them, and what a micro-batch's forward pass keeps for backward.

    Counted on the meta device, of the plain path: kernels and compilation keep less.
    """
    with torch.device("meta"):
        model = build_model(config, classes).to(DTYPES[config.train.precision])
    weights = sum(parameter.nbytes for parameter in model.parameters())
    stage, world = zero_stage(config, runtime.world), runtime.world
    own = weights // (world if stage == 3 else 1) + weights // (world if stage >= 2 else 1)
    return {
        "model": own,
        "beside": kept_beside(model, config, runtime),
        "activations": activations(model, config),
        "weights": weights,
        "elements": sum(parameter.numel() for parameter in model.parameters()),
    }


def activations(model: nn.Module, config: Config) -> int:
    """Bytes that the forward pass of a micro-batch keeps for the backward pass, every storage once."""
    side, weight = config.data.image_size, next(model.parameters())
    kept: dict[int, torch.UntypedStorage] = {}
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # held, so that no other gets its place
        return tensor

    images = torch.empty(config.train.micro_batch, 3, side, side, device="meta", dtype=weight.dtype)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(images)
    return sum(storage.nbytes() for storage in kept.values())


def take(config: Config, classes: int, runtime: Runtime) -> dict:
    """The estimate, the memory that is free, and, where it fits on all ranks, one step of the engine; all ranks call this.

    compute: seconds of a micro-batch's forward and backward, without other ranks. peak: bytes that the step took. taken: it was tried.
    """
    needed = estimate(config, classes, runtime)
    free = free_memory(runtime.device)
    total = needed["model"] + needed["beside"] + needed["activations"]
    found = {"needed": needed, "estimated": total, "free": free, "taken": False, "device": runtime.device.type}
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
    model = build_model(config, classes)
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
    engine = Engine(build_model(config, classes), config, accumulation=1, device=device)
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
