"""Counts of networks for dense tasks, as their papers have them; and their training step with a classifier's."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import interleave, summary

# The operators of convolutions and linear layers. Attention multiplies batches of matrices: bmm, which the papers' tool
# does not count.
COUNTED = ("convolution", "mm", "addmm")


def count(create: Callable[[], nn.Module], size: tuple[int, int]) -> dict[str, Any]:
    """Parameters, and "GFLOPs" as in the papers: multiply-adds of convolutions and linear layers, in 10^9, for one
    image of `size` (height, width); and those of attention's products, which most of them leave out.
    """
    with torch.device("meta"):
        model = create().eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, 3, *size))
    found = {
        str(operator).split(".")[-1]: flops / 2e9 for operator, flops in counter.get_flop_counts()["Global"].items()
    }
    parameters = sum(parameter.numel() for parameter in model.parameters())
    gflops = sum(found.get(operator, 0.0) for operator in COUNTED)
    return {"parameters": parameters, "gflops": gflops, "attention": sum(found.values()) - gflops}


def compare_with_classifier(ways: dict[str, Callable[[], None]], batch: int, rounds: int) -> dict[str, dict]:
    """Way -> `summary` of images/s relative to the way "classifier", and "megabytes" that autograd keeps for an image,
    weights included. ways: see `training_step`.
    """
    kept = {way: kept_megabytes(run) / batch for way, run in ways.items()}
    rates = summary(interleave(ways, batch, rounds, time.perf_counter), "classifier")
    return {way: {**row, "megabytes": kept[way]} for way, row in rates.items()}


def training_step(model: nn.Module, batch: int, loss: Callable[[Any], Tensor], size: int = 224) -> Callable[[], None]:
    """A function that runs one training step on random images of `size` x `size` pixels, on the CPU in fp32: forward,
    backward and SGD. loss: of what the model gives.
    """
    model.train()
    images = torch.randn(batch, 3, size, size)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, fused=True)

    def run() -> None:
        loss(model(images)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def kept_megabytes(run: Callable[[], None]) -> float:
    """Size of all tensors that autograd keeps in a step, in 10^6 bytes, parameters included once."""
    storages = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # holds it: no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in storages.values()) / 1e6
