"""Definition of the kernels' operators, number of programs of a launch, and sizes of tiles."""

import functools
from collections.abc import Callable

import torch
import triton
from torch import Tensor

from catmodel.kernels import ops

# Programs run one after another in Triton's interpreter; a few suffice to test that their partial sums are combined.
INTERPRETED = 4


@functools.cache
def programs(device: torch.device) -> int:
    """The unit of a persistent grid: the number of the device's multiprocessors."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else INTERPRETED


def padded(n: int) -> int:
    """The side of a tile for n elements: the next power of two, at least 16, the minimum of `tl.dot`."""
    return max(16, 1 << (n - 1).bit_length())


def blocks(n: int, size: int) -> int:
    """Number of blocks of `size` elements that hold n."""
    return -(-n // size)


def dispatches() -> bool:
    """Whether PyTorch's dispatcher must see the next call: it is traced, or a mode records or replaces it."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


class Operator:
    """The operator torch.ops.catmodel.NAME, which the dispatcher sees only where it must.

    A call through the dispatcher costs the host 17-22 us, and 40-55 us if gradients are recorded; a direct one 5 and
    10-13 us (measured without the launch, with PyTorch 2.11 on one core).

    Autocast is disabled inside: an operator computes in the dtypes of its arguments, which its fake implementation and
    its gradient rely on. Callers cast the arguments first (`kernels.autocast`).
    """

    def __init__(self, name: str, function: Callable, visible: bool):
        @functools.wraps(function)
        def without_autocast(x: Tensor, *arguments: object) -> object:
            if not torch.is_autocast_enabled(x.device.type):  # saves the context's microseconds
                return function(x, *arguments)
            with torch.autocast(x.device.type, enabled=False):
                return function(x, *arguments)

        # Triton's interpreter cannot be traced.
        define = torch.library.triton_op if visible and not triton.knobs.runtime.interpret else torch.library.custom_op
        self.name, self._run, self._function = name, without_autocast, None
        self._definition = define(f"catmodel::{name}", mutates_args=())(without_autocast)
        self._operator = getattr(torch.ops.catmodel, name).default

    def __call__(self, x: Tensor, *arguments: object) -> object:
        if dispatches() or type(x) not in (Tensor, torch.nn.Parameter):
            return self._operator(x, *arguments)
        if self._function is not None and torch.is_grad_enabled():
            return self._function.apply(x, *arguments)
        return self._run(x, *arguments)

    def register_fake(self, function: Callable) -> Callable:
        """As `torch.library.CustomOpDef.register_fake`."""
        return self._definition.register_fake(function)

    def register_autograd(self, backward: Callable, *, setup_context: Callable) -> None:
        """As `torch.library.CustomOpDef.register_autograd`; `setup_context` has no keyword arguments."""
        self._definition.register_autograd(backward, setup_context=setup_context)

        def forward(ctx: torch.autograd.function.FunctionCtx, *arguments: object) -> object:
            output = self._run(*arguments)
            setup_context(ctx, arguments, output)
            return output

        # With a `setup_context` of its own, a Function would inspect forward's signature at each call.
        methods = dict(forward=forward, backward=torch.autograd.function.once_differentiable(backward))
        self._function = type(
            self.name, (torch.autograd.Function,), {name: staticmethod(method) for name, method in methods.items()}
        )


def operator(name: str, visible: bool = False) -> Callable[[Callable], Operator]:
    """Decorator that defines the operator torch.ops.catmodel.NAME, and `kernels.ops.NAME`, which is faster to call.

    The function's first argument is a tensor. visible: torch.compile sees what the function does, and launches its
    kernels itself; the function calls them by `launch`, and writes to no view of a tensor.
    """

    def define(function: Callable) -> Operator:
        made = Operator(name, function, visible)
        setattr(ops, name, made)
        return made

    return define


def launch(kernel: Callable, grid: tuple[int, ...], *arguments: object, **options: object) -> None:
    """kernel[grid](*arguments, **options), in a form that torch.compile sees inside a visible operator."""
    if dispatches() and isinstance(kernel, triton.runtime.JITFunction):
        kernel = torch.library.wrap_triton(kernel)
    kernel[grid](*arguments, **options)
