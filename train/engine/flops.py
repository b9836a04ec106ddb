"""FLOPs and memory traffic: what a device achieves per second, and what a model needs per image."""

import contextlib
import copy
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


# Dense half-precision FLOPs per second with fp32 accumulation, in 10^12, from NVIDIA's data sheets (half of the figures
# with sparsity): bf16, or fp16 on cards without bf16. Keys are the complete names that drivers report, so that an L40S
# is not taken for an L40. Devices that are not listed, and parts of a card (MIG), have no known peak.
PEAK_TFLOPS = {
    "NVIDIA B200": 2250,
    **dict.fromkeys(
        ("NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA H800", "NVIDIA GH200 480GB", "NVIDIA GH200 120GB"), 989
    ),
    **dict.fromkeys(("NVIDIA H200 NVL", "NVIDIA H100 NVL"), 835),
    "NVIDIA H100 PCIe": 756,
    **dict.fromkeys(
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB", "NVIDIA A100 80GB PCIe"), 312
    ),
    **dict.fromkeys(("NVIDIA A800-SXM4-80GB", "NVIDIA A800 80GB PCIe"), 312),
    "NVIDIA A40": 149.7,
    "NVIDIA A30": 165,
    "NVIDIA A10": 125,
    "NVIDIA A10G": 70,
    "NVIDIA L40S": 362,
    "NVIDIA L40": 181,
    "NVIDIA L4": 121,
    **dict.fromkeys(("Tesla V100-SXM2-16GB", "Tesla V100-SXM2-32GB", "Tesla V100-SXM3-32GB"), 125),
    **dict.fromkeys(("Tesla V100-PCIE-16GB", "Tesla V100-PCIE-32GB"), 112),
    "Tesla V100S-PCIE-32GB": 130,
    "Tesla T4": 65,
    "NVIDIA RTX 6000 Ada Generation": 364,
    "NVIDIA RTX A6000": 154.8,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 3090": 71,
}


def peak_flops(name: str) -> float | None:
    """Peak FLOPs per second, the denominator of MFU, by `torch.cuda.get_device_name`; None if it is not known."""
    peak = PEAK_TFLOPS.get(name) or PEAK_TFLOPS.get(f"NVIDIA {name}")  # drivers before 2021 omit "NVIDIA"
    return peak and peak * 1e12


def finish(device: torch.device) -> None:
    """Synchronise with the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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


def training_flops(
    model: nn.Module, example: Callable[[int, torch.device, torch.dtype], Tensor], device: torch.device
) -> tuple[float, float] | None:
    """FLOPs of one sample, forward and backward, and the peak FLOPs per second of `device`.

    None if the peak is not known. example: a function of (count, device, dtype) that returns a model's input of `count`
    samples.
    """
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if peak is None:
        return None
    model = copy.deepcopy(model).to("meta").eval()  # batch norm cannot train on one image
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(example(1, torch.device("meta"), next(model.parameters()).dtype))
    return 3.0 * counter.get_total_flops(), peak


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
    operator each. Caches are ignored: data that one operator leaves in a GPU's L2 need not be read again by the next,
    so an operator can be faster than its bytes suggest.
    """
    from catmodel import kernels

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
        return results

    def add(self, name: str, *tensors: object) -> None:
        # The storage is the limit, because an expanded tensor has more elements than memory.
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                self.bytes[name] += min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


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
