"""Bytes that a run takes, computed from a model on the meta device: no memory is allocated."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from train.config import Config
from train.engine.deepspeed_config import BUCKET_ELEMENTS, gradients_here, zero_stage
from train.engine.graphs import graphs_wanted
from train.engine.runtime import Runtime


def resident_bytes(model: nn.Module, config: Config, runtime: Runtime, shapes: int = 1) -> dict[str, int]:
    """Bytes that a rank holds during the whole run: "weights", "gradients" and "optimizer" (see `optimizer_bytes`).

    shapes: how many shapes the inputs of training may have.
    """
    weights = sum(parameter.nbytes for parameter in model.parameters())
    stage, world = zero_stage(config, runtime.world), runtime.world
    return {
        "weights": weights // (world if stage == 3 else 1),
        "gradients": gradient_bytes(model, config, runtime, shapes),
        "optimizer": optimizer_bytes(model, config, runtime),
    }


def gradient_bytes(model: nn.Module, config: Config, runtime: Runtime, shapes: int) -> int:
    """Bytes of a micro-batch's gradients, in the precision of the weights, and of their copies."""
    weights = sum(parameter.nbytes for parameter in model.parameters())
    here = gradients_here(config, runtime.world)
    if not here:
        return weights // (runtime.world if zero_stage(config, runtime.world) >= 2 else 1)
    # Each parameter's, and all of them in flat tensors, which in fp32 are the sums. The results of a graph are copied,
    # and there is one for each shape.
    flat = 0 if config.train.precision == "fp32" else weights
    on_gpu = runtime.device.type == "cuda"
    graphs = shapes if on_gpu and graphs_wanted(config, runtime.device, here, shapes)[0] else 0
    return weights + flat + weights * graphs


def optimizer_bytes(model: nn.Module, config: Config, runtime: Runtime) -> int:
    """Bytes that a rank holds beyond weights, gradients and activations.

    These are the optimizer's states, master weights, EMA, the fp32 sums of gradients, communication buffers and, on a
    CPU, a checkpoint's snapshot.
    """
    weights = sum(parameter.numel() for parameter in model.parameters())
    half = next(model.parameters()).element_size() < 4
    stage, world = zero_stage(config, runtime.world), runtime.world
    moments, average = _moment_bytes(config), _average_bytes(config)
    on_host = runtime.device.type == "cpu"
    snapshot = weights * (4 + moments + average) // world if on_host else 0
    if config.zero.offload and not on_host:
        sums = 4 * weights // world if half else 0
        return sums + _bucket_bytes(stage, half) + snapshot
    master = 4 if half or stage else 0
    states = weights * (master + moments) // (world if stage else 1) + weights * average // world
    return states + _sum_bytes(weights, half, stage, world, gradients_here(config, world)) + snapshot


def _sum_bytes(weights: int, half: bool, stage: int, world: int, here: bool) -> int:
    """Bytes of the fp32 sums of gradients and of the buffers in which gradients are communicated.

    here: whether Engine, and not DeepSpeed, sums (`gradients_here`).
    """
    own = 4 * weights // (world if stage else 1)
    if here:
        # ZeRO 1 holds the whole sum, and at the end of a step this rank's partition of it. ZeRO 2 converts each
        # micro-batch's gradient to fp32.
        return own + (4 * weights if stage == 1 or (stage == 2 and half) else 0)
    # In half precision ZeRO 1 holds the whole sum beside its partition of it, ZeRO 3 a partition.
    beside = 2 * weights // (world if stage == 3 else 1) if half and stage != 2 else 0
    return own + beside + _bucket_bytes(stage, half)


def _bucket_bytes(stage: int, half: bool) -> int:
    """Bytes of gradients being communicated: at ZeRO 2 a bucket in their own precision, and an fp32 copy of it."""
    return BUCKET_ELEMENTS * (6 if stage == 2 and half else 4)


def activation_bytes(model: nn.Module, example: Any, loss: Callable[[Any], Any] = lambda output: output) -> int:
    """Bytes that autograd saves in `loss(model(example))` for the backward pass, without the model's own tensors.

    model, example: on the meta device. The plain PyTorch path is counted: the kernels and compilation save less.
    """
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage  # the reference keeps the address from being used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        loss(model(example))
    return sum(storage.nbytes() for storage in saved.values())


def checkpoint_bytes(model: nn.Module, config: Config) -> int:
    """Bytes of a checkpoint: fp32 weights, moments and EMA of all parameters."""
    each = 4 + _moment_bytes(config) + _average_bytes(config)
    return each * sum(parameter.numel() for parameter in model.parameters())


def _moment_bytes(config: Config) -> int:
    """Bytes of the optimizer's moments per parameter."""
    return 4 if config.optimizer.name == "sgd" else 8


def _average_bytes(config: Config) -> int:
    """Bytes of the EMA per parameter."""
    return 4 if config.ema.decay else 0
