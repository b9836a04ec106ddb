"""FLOPs and memory traffic: what a device achieves per second, and what a model needs per image."""

import contextlib
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from catmodel import kernels
from train.engine.flops import finish

# --- the device ---


@dataclass(frozen=True)
class Roofline:
    """A device's measured limits: bytes per second (read and written) and FLOPs per second (in one precision)."""

    bandwidth: float
    flops: float

    def floor(self, flops: float, moved: float) -> float:
        """Upper bound of images per second if one image takes `flops` and moves `moved` bytes, perfectly overlapped."""
        return 1 / max(flops / self.flops, moved / self.bandwidth)


# Measured on one H200: a copy of 8.6 GB, and bf16 products of 8192 x 8192 matrices of random numbers.
H200 = Roofline(4.3e12, 790e12)


def measure_roofline(device: torch.device, dtype: torch.dtype, rounds: int = 9) -> Roofline:
    """Measure the device: medians of `rounds` copies and matrix products.

    The data is random, because multiplying zeros takes less power and would be unrealistically fast.
    """
    elements, side = (2**31, 8192) if device.type == "cuda" else (2**25, 1024)
    source = torch.empty(elements, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)
    copying = seconds(lambda: target.copy_(source), device, rounds)
    multiplying = seconds(lambda: torch.mm(a, b, out=product), device, rounds)
    return Roofline(2 * elements / copying, 2 * side**3 / multiplying)


def seconds(work: Callable[[], object], device: torch.device, rounds: int = 9, repeats: int = 10) -> float:
    """Median seconds of one call of `work` over `rounds`, after a warm-up round.

    On a GPU a round is `repeats` calls without synchronisation in between.
    """
    times, repeats = [], repeats if device.type == "cuda" else 1
    for _ in range(rounds + 1):
        finish(device)
        began = time.perf_counter()
        for _ in range(repeats):
            work()
        finish(device)
        times.append((time.perf_counter() - began) / repeats)
    return statistics.median(times[1:])


# --- the model ---


def flops_per_image(model: nn.Module, size: int, *, training: bool) -> float:
    """FLOPs of one image of `size` x `size` pixels; with `training`, including the backward pass as two forward passes.

    `model` is on the meta device and uses plain operators. It is left in evaluation mode, because batch norm cannot
    train on one image.
    """
    image = torch.empty(1, 3, size, size, device="meta", dtype=next(model.parameters()).dtype)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(image)
    return counter.get_total_flops() * (3 if training else 1)


def bytes_per_image(run: Callable[[int], object], batch: int, fused: bool = True) -> Counter:
    """Bytes moved per image by operator in a batch of `batch` images, an equal share of the weights' traffic included.

    `run(n)` processes n images. It is counted for n = 2 and 3, because an operator's traffic is a constant plus a part
    proportional to n.
    """
    two, three = (count_bytes(lambda n=n: run(n), fused) for n in (2, 3))
    return Counter({name: three[name] - two[name] + (3 * two[name] - 2 * three[name]) / batch for name in three})


def count_bytes(run: Callable[[], object], fused: bool = True) -> Counter:
    """Bytes read and written by the operators that `run` calls, by operator: the sum of their inputs and outputs.

    The count is analytic, of tensors on the meta device. Views are free. PyTorch's fused attention counts as one
    operator, which stores no attention weights. With `fused`, as on a GPU, the model's Triton kernels also count as one
    operator each; of the MLP, what its kernel and the products after it hand to each other is added. Caches are
    ignored: data that one operator leaves in a GPU's L2 need not be read again by the next, so an operator can be
    faster than its bytes suggest.
    """
    if fused:
        kernels.register()

    with _Traffic() as traffic:

        def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
            return _FusedAttention.apply(traffic, q, k, v, attn_mask)

        with (
            replaced(kernels, "usable", lambda device, dtype: fused),
            replaced(F, "scaled_dot_product_attention", attention),
        ):
            run()
    return traffic.bytes


@contextlib.contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """Context manager: set `owner.name` to `value`, and restore it afterwards."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class _Traffic(TorchDispatchMode):
    """Sums the bytes of the tensors that operators read and write."""

    def __init__(self):
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        results = function(*arguments, **(options or {}))
        if not _moves_nothing(function):
            self.add(function.name(), arguments, options, results)
            self.bytes[function.name()] += _between_products(function.name(), arguments)
        return results

    def add(self, name: str, *tensors: object) -> None:
        # The storage is the limit, because an expanded tensor has more elements than memory.
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                self.bytes[name] += min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


def _between_products(name: str, arguments: tuple) -> int:
    """Bytes inside an operator of the MLP, beside its inputs and outputs: the table of catmodel/kernels/mlp.py."""
    if name == "catmodel::mlp":  # (x, w1, b1, w2, b2, train=True): the hidden layer is written, and read again
        x, w1, *_, train = arguments if len(arguments) == 6 else (*arguments, True)
        return _hidden_bytes(x, w1) * (1 if train else 2)  # in training it is an output, and counted already
    if name == "catmodel::mlp_backward":  # (dy, x, w1, ...): so is its gradient, twice; two products read dy
        dy, x, w1, *_ = arguments
        return _hidden_bytes(x, w1) * 3 + dy.nbytes
    return 0


def _hidden_bytes(x: Tensor, w1: Tensor) -> int:
    return x.nbytes // x.shape[-1] * len(w1)


def _moves_nothing(function) -> bool:
    """Whether `function` is a view, or allocates memory without writing it."""
    name = function.name().split("::")[1].split(".")[0]
    if name in ("_unsafe_view", "detach", "lift_fresh") or name.startswith(("empty", "new_empty")):
        return True
    return any(value.alias_info is not None and not value.alias_info.is_write for value in function._schema.returns)


class _FusedAttention(torch.autograd.Function):
    """Stands in for fused attention: tensors of the same shapes, and their traffic."""

    @staticmethod
    def forward(ctx, traffic: _Traffic, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        ctx.traffic = traffic
        ctx.save_for_backward(q, k, v, bias)
        result = torch.empty_like(q)
        traffic.add("fused attention", q, k, v, bias, result)
        return result

    @staticmethod
    def backward(ctx, gradient: Tensor):
        q, k, v, bias = ctx.saved_tensors
        gradients = [torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)]
        gradients += [torch.empty_like(bias)] if ctx.needs_input_grad[4] else [None]
        # The second q stands for the result, which has its size.
        ctx.traffic.add("fused attention, backward", q, k, v, bias, q, gradient, gradients)
        return (None, *gradients)
