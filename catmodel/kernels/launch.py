"""Definition of the kernels' operators, number of programs of a launch, and sizes of tiles."""

import functools
from collections.abc import Callable

import torch

# Programs run one after another in Triton's interpreter; a few suffice to test that their partial sums are combined.
INTERPRETED = 4


@functools.cache
def programs(device: torch.device) -> int:
    """The unit of a persistent grid: the number of the device's multiprocessors."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else INTERPRETED


def padded(n: int) -> int:
    """The side of a tile for n elements: the next power of two, at least 16, the minimum of `tl.dot`."""
    return max(16, 1 << (n - 1).bit_length())


def operator(name: str) -> Callable[[Callable], torch.library.CustomOpDef]:
    """Decorator that defines the operator torch.ops.catmodel.NAME from a function whose first argument is a tensor.

    Autocast is disabled inside: an operator computes in the dtypes of its arguments, which its fake implementation and
    its gradient rely on. Callers cast the arguments first (`kernels.autocast`).
    """

    def define(function: Callable) -> torch.library.CustomOpDef:
        @functools.wraps(function)
        def without_autocast(x: torch.Tensor, *arguments: object) -> object:
            if not torch.is_autocast_enabled(x.device.type):  # saves the context's microseconds
                return function(x, *arguments)
            with torch.autocast(x.device.type, enabled=False):
                return function(x, *arguments)

        return torch.library.custom_op(f"catmodel::{name}", mutates_args=())(without_autocast)

    return define
