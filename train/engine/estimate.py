"""Bytes that a run takes, counted on the meta device, without taking any."""

import torch
from torch import nn

from train.config import Config
from train.engine.deepspeed_config import BUCKET_ELEMENTS, zero_stage
from train.engine.deepspeed_engine import DTYPES
from train.engine.runtime import Runtime


def meta_model(config: Config, classes: int) -> nn.Module:
    """The model in the precision that it is computed in, without memory."""
    with torch.device("meta"):
        from train.tasks.base import build_task

        return build_task(config, [""] * classes).build_model().to(DTYPES[config.train.precision])


def held(model: nn.Module, config: Config, runtime: Runtime) -> dict[str, int]:
    """What a rank holds all the time: its weights, their gradients, and under "optimizer" what it keeps beside them."""
    weights = sum(parameter.nbytes for parameter in model.parameters())
    stage, world = zero_stage(config, runtime.world), runtime.world
    return {
        "weights": weights // (world if stage == 3 else 1),
        "gradients": weights // (world if stage >= 2 else 1),
        "optimizer": kept_beside(model, config, runtime),
    }


def kept_beside(model: nn.Module, config: Config, runtime: Runtime) -> int:
    """What a rank keeps beyond the model, its gradients and activations: see Engine, Ema and Saver."""
    weights, element = sum(parameter.numel() for parameter in model.parameters()), next(model.parameters()).element_size()
    stage, world = zero_stage(config, runtime.world), runtime.world
    moments, averages = _moments(config), _averages(config)
    master = 0 if stage == 0 and config.train.precision == "fp32" else 4
    share = world if stage else 1
    on_host = runtime.device.type == "cpu"
    kept = 0 if config.zero.offload and not on_host else weights * (master + moments + 4) // share + weights * averages // world
    # In half precision the fp32 sum of gradients is whole at ZeRO 1, and there beside this rank's share of it; at ZeRO 3 it is a share.
    sums = (4 - element) * weights // (world if stage == 3 else 1) if stage in (1, 3) else 0
    if config.zero.offload and not on_host and element < 4:
        sums += 4 * weights // world
    # Gradients on their way: at ZeRO 2 a bucket of them as they are, and an fp32 copy of it.
    buckets = 0 if stage == 0 else BUCKET_ELEMENTS * (4 + element if stage == 2 and element < 4 else 4)
    snapshot = weights * (4 + moments + averages) // world if on_host else 0
    return kept + sums + buckets + snapshot


def activations(model: nn.Module, config: Config) -> int:
    """What the forward pass of a micro-batch keeps for the backward pass, every storage once, weights left out.

    Of the plain path: kernels and compilation keep less.
    """
    side, weight = config.data.image_size, next(model.parameters())
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that no other gets its place
        return tensor

    images = torch.empty(config.train.micro_batch, 3, side, side, device="meta", dtype=weight.dtype)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(images)
    return sum(storage.nbytes() for storage in kept.values())


def checkpoint_bytes(config: Config, classes: int) -> int:
    """Of a whole checkpoint: fp32 weights, moments and averages of all parameters."""
    each = 4 + _moments(config) + _averages(config)
    return each * sum(parameter.numel() for parameter in meta_model(config, classes).parameters())


def _moments(config: Config) -> int:
    """Bytes of a weight's."""
    return 4 if config.optimizer.name == "sgd" else 8


def _averages(config: Config) -> int:
    return 4 if config.ema.decay else 0
