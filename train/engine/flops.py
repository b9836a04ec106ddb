"""What a device can do, measured on it: bytes and FLOPs per second; and what a model asks of it: bytes and FLOPs per image."""

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

# --- the device --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Roofline:
    """bandwidth: bytes read and written per second by a large copy. flops: per second of a large matrix product in one precision."""

    bandwidth: float
    flops: float

    def floor(self, flops: float, moved: float) -> float:
        """The most images per second where one takes `flops` and `moved` bytes, arithmetic and memory each working without a pause."""
        return 1 / max(flops / self.flops, moved / self.bandwidth)


# As measured before by hand on one: a copy of 8.6 GB, and bf16 products of 8192 x 8192 matrices of random numbers.
H200 = Roofline(4.3e12, 790e12)


# Dense FLOPs per second in half precision with sums in fp32, in 10^12, as NVIDIA's data sheets state them: in bf16, or in
# fp16 on cards without it; half of what is stated with sparsity. By the whole names that drivers report: an L40S is no
# L40. What is not here, a part of a card (MIG) too, has no known peak.
PEAK_TFLOPS = {
    "NVIDIA B200": 2250,
    **dict.fromkeys(("NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA H800", "NVIDIA GH200 480GB", "NVIDIA GH200 120GB"), 989),
    **dict.fromkeys(("NVIDIA H200 NVL", "NVIDIA H100 NVL"), 835),
    "NVIDIA H100 PCIe": 756,
    **dict.fromkeys(("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB", "NVIDIA A100 80GB PCIe"), 312),
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
    """The FLOPs per second that MFU is a share of, of a device by its `torch.cuda.get_device_name`; None: not known."""
    peak = PEAK_TFLOPS.get(name) or PEAK_TFLOPS.get(f"NVIDIA {name}")  # drivers before 2021 leave the maker out
    return peak and peak * 1e12


def finish(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_roofline(device: torch.device, dtype: torch.dtype, rounds: int = 9) -> Roofline:
    """Medians of `rounds`, of random data: a processor that multiplies zeros needs less power, and is faster than it can be."""
    elements, side = (2**31, 8192) if device.type == "cuda" else (2**25, 1024)
    source = torch.empty(elements, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)
    copying = seconds(lambda: target.copy_(source), device, rounds)
    multiplying = seconds(lambda: torch.mm(a, b, out=product), device, rounds)
    return Roofline(2 * elements / copying, 2 * side**3 / multiplying)


def seconds(work: Callable[[], object], device: torch.device, rounds: int = 9, repeats: int = 10) -> float:
    """Median time of one call of `work` over `rounds`, after one that warms up. On a GPU a round is `repeats` calls without a pause."""
    times, repeats = [], repeats if device.type == "cuda" else 1
    for _ in range(rounds + 1):
        finish(device)
        began = time.perf_counter()
        for _ in range(repeats):
            work()
        finish(device)
        times.append((time.perf_counter() - began) / repeats)
    return statistics.median(times[1:])


# --- the model ---------------------------------------------------------------------------------------------------------------------------


def flops_per_image(model: nn.Module, size: int, *, training: bool) -> float:
    """FLOPs of one image, a backward pass counted as two forward passes. The model lies on the meta device, and uses plain operators; it is
    left in evaluation, as batch norm cannot train on one image."""
    image = torch.empty(1, 3, size, size, device="meta", dtype=next(model.parameters()).dtype)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(image)
    return counter.get_total_flops() * (3 if training else 1)


def training_flops(
    model: nn.Module, example: Callable[[int, torch.device, torch.dtype], Tensor], device: torch.device
) -> tuple[float, float] | None:
    """FLOPs of a sample, forward and backward, and FLOPs a second of `device` at its peak; None if the peak is not known.

    example: (count, device, dtype) → the model's input for so many samples.
    """
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if peak is None:
        return None
    model = copy.deepcopy(model).to("meta").eval()  # batch norm cannot train on one image
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(example(1, torch.device("meta"), next(model.parameters()).dtype))
    return 3.0 * counter.get_total_flops(), peak


def bytes_per_image(run: Callable[[int], object], batch: int, fused: bool = True) -> Counter:
    """Bytes by operator that `run(n)`, which handles n images, moves per image where n = `batch`: its own and its share of the weights'.

    Counted for 2 and 3 images: an operator's traffic is a constant and a part in proportion to the batch.
    """
    two, three = (count_bytes(lambda n=n: run(n), fused) for n in (2, 3))
    return Counter({name: three[name] - two[name] + (3 * two[name] - 2 * three[name]) / batch for name in three})


def count_bytes(run: Callable[[], object], fused: bool = True) -> Counter:
    """Bytes that the operators called by `run` read and write, by operator: the sum of their inputs and outputs.

    An analytic count of tensors on the meta device. PyTorch's fused attention is one operator, which keeps no weights in memory; with
    `fused`, as on a GPU, the Triton kernels are used where the model wants them, and are one operator each, too. Views are free. Caches are
    ignored: what one operator leaves in a GPU's L2 the next need not fetch again, so an operator can be faster than its bytes say.
    """
    from catmodel import kernels

    if fused:
        kernels.register()

    with _Traffic() as traffic:

        def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
            return _FusedAttention.apply(traffic, q, k, v, attn_mask)

        with replaced(kernels, "usable", lambda device, dtype: fused), replaced(F, "scaled_dot_product_attention", attention):
            run()
    return traffic.bytes


@contextlib.contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """`owner.name` is `value` for as long as this lasts."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class _Traffic(TorchDispatchMode):
    """Sums up the bytes of what operators read and write."""

    def __init__(self):
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        results = function(*arguments, **(options or {}))
        if not _moves_nothing(function):
            self.add(function.name(), arguments, options, results)
        return results

    def add(self, name: str, *tensors: object) -> None:
        # An expanded tensor has more elements than memory.
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                self.bytes[name] += min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


def _moves_nothing(function) -> bool:
    """Views, and memory that is allocated but not written."""
    name = function.name().split("::")[1].split(".")[0]
    if name in ("_unsafe_view", "detach", "lift_fresh") or name.startswith(("empty", "new_empty")):
        return True
    return any(value.alias_info is not None and not value.alias_info.is_write for value in function._schema.returns)


class _FusedAttention(torch.autograd.Function):
    """Tensors of the shapes that fused attention reads and writes."""

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
        ctx.traffic.add("fused attention, backward", q, k, v, bias, q, gradient, gradients)  # q once more: of the size of the result
        return (None, *gradients)
