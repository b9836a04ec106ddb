"""How the kernels' operators are made, how many programs a kernel is started with, and the sizes of its tiles."""

import functools
from collections.abc import Callable

import torch

# In Triton's interpreter programs run one after another: a few show that their partial sums are put together rightly.
INTERPRETED = 4


@functools.cache
def programs(device: torch.device) -> int:
    """What a persistent grid counts in: the device's multiprocessors."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else INTERPRETED


def padded(n: int) -> int:
    """The side of a tile that holds n: a power of two, at least 16, the least that `tl.dot` takes."""
    return max(16, 1 << (n - 1).bit_length())


def operator(name: str) -> Callable[[Callable], torch.library.CustomOpDef]:
    """Makes a function the operator torch.ops.catmodel.NAME. Its first argument is a tensor.

    Autocast is off inside: an operator computes in the types of its arguments, as its fake promises and its gradient
    relies on. Who calls it casts them before (`kernels.autocast`).
    """

    def define(function: Callable) -> torch.library.CustomOpDef:
        @functools.wraps(function)
        def without_autocast(x: torch.Tensor, *arguments: object) -> object:
            if not torch.is_autocast_enabled(x.device.type):  # the usual case, in which the context would cost microseconds
                return function(x, *arguments)
            with torch.autocast(x.device.type, enabled=False):
                return function(x, *arguments)

        return torch.library.custom_op(f"catmodel::{name}", mutates_args=())(without_autocast)

    return define
