"""A run's memory, estimated on the meta device, and then one real step of the engine, measured."""

import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from operate.task_model import meta_model
from train.checkpoint.saver import snapshot
from train.engine.deepspeed_engine import DTYPES, Engine
from train.engine.ema import Ema
from train.engine.estimate import activation_bytes, resident_bytes
from train.engine.flops import finish
from train.engine.memory import at_most, free_memory, out_of_memory
from train.engine.runtime import Runtime
from train.tasks.base import Task, example_losses


def measure_step(task: Task, runtime: Runtime) -> dict:
    """Estimate the memory, compare it with what is free, and take a step of the engine if it fits on all ranks.

    Every rank calls this. Returns bytes under "needed" (by part), "estimated" (their sum), "free" and "gradient"
    (summed over the ranks in a step, in fp32); "taken", whether the step was tried; and of the step "compute" (seconds
    of a micro-batch's forward and backward pass without other ranks), "step" (seconds), "peak" (bytes) and "skipped",
    or "failed" with the reason.
    """
    model = meta_model(task)
    needed = needed_bytes(task, model, runtime)
    total, free = sum(needed.values()), free_memory(runtime.device)
    gradient = 4 * sum(parameter.numel() for parameter in model.parameters())
    found = {
        "needed": needed,
        "estimated": total,
        "gradient": gradient,
        "free": free,
        "taken": False,
        "device": runtime.device.type,
    }
    everywhere = torch.tensor(float(total <= free), device=runtime.device)
    dist.all_reduce(everywhere, op=dist.ReduceOp.MIN)
    if not everywhere:
        return found
    try:
        with at_most(free, runtime.device):  # Linux overcommits memory and would kill a process
            return {**found, "taken": True, **_measure(task, runtime.device)}
    except Exception as error:
        if not out_of_memory(error):
            raise
        return {**found, "taken": True, "failed": str(error).splitlines()[0]}


def needed_bytes(task: Task, model: nn.Module, runtime: Runtime) -> dict[str, int]:
    """Estimated bytes of a rank in the run, by part. model: the task's, on the meta device."""
    config = task.config
    example = task.example(config.train.micro_batch, torch.device("meta"), DTYPES[config.train.precision])
    return {
        **resident_bytes(model, config, runtime, task.views().most_shapes),
        "activations": activation_bytes(model, example, task.example_loss),
    }


def _measure(task: Task, device: torch.device) -> dict:
    """Take steps without compilation, which would take minutes."""
    config = task.config
    before = _begin_peak(device)
    model = task.build_model()
    example = _noise(task, device)
    model.to(device, DTYPES[config.train.precision])
    for _ in range(2):  # the first one compiles kernels, starts threads and fills caches
        finish(device)
        began = time.perf_counter()
        task.example_loss(model(example.to(DTYPES[config.train.precision]))).backward()
        finish(device)
        compute = time.perf_counter() - began
    del model
    eager = {"train": config.train.model_copy(update={"compile": False, "cuda_graphs": False})}
    engine = Engine(task.build_model(), example_losses(task), config.model_copy(update=eager), 1, device)
    for _ in range(2):
        finish(device)
        began = time.perf_counter()
        engine.accumulate(example)
        result = engine.step(0.0)
        finish(device)
        step = time.perf_counter() - began
    snapshot(engine, Ema(engine, config.ema.decay) if config.ema.decay else None)  # as a save would
    overflow = (
        bool(result.skipped) and config.train.precision != "fp16"
    )  # whose first loss scales are expected to overflow
    return {"compute": compute, "step": step, "peak": _peak(device) - before, "skipped": overflow}


def _noise(task: Task, device: torch.device) -> Tensor:
    """A micro-batch of noise in fp32: zeros would be faster to multiply, and give unusual gradients."""
    return torch.randn_like(task.example(task.config.train.micro_batch, device, torch.float32))


def _begin_peak(device: torch.device) -> int:
    """Reset the peak; returns the bytes in use."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")
    return _peak(device)


def _peak(device: torch.device) -> int:
    """Most bytes in use since `_begin_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024
