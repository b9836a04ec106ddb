"""FLOPs: the peak of known devices, and what a model needs per sample."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

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
