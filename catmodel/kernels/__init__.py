"""The Triton kernels, each beside its plain twin, and where they can be used. Importing this does not import Triton.

They are custom operators, `torch.ops.catmodel.*`: torch.compile keeps them whole, activation checkpointing replays them. Their gradients
are deterministic: no atomic additions, and block sizes are fixed by the shapes, not tuned by timing.
"""

import functools
import logging
import os

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@torch.compiler.assume_constant_result
def usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels run here: on NVIDIA GPUs from Ampere on, or in Triton's interpreter (TRITON_INTERPRET=1, for tests)."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return False
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return _plain(f"{torch.cuda.get_device_name(device)} is older than Ampere")
    if dtype not in DTYPES:
        return _plain(f"they do not know {dtype}")
    try:
        from catmodel.kernels import cross_patch, inner_patch, mlp  # noqa: F401 (registers the operators)
    except ModuleNotFoundError as error:
        return _plain(f"{error.name} is not installed")
    return True


@functools.cache
def _plain(reason: str) -> bool:
    """Says once why plain PyTorch is used. Always False."""
    logging.getLogger(__name__).warning("plain PyTorch in place of the Triton kernels: %s", reason)
    return False


def inner_patch_fits(size: int, head_dim: int) -> bool:
    return (
        size <= 12
        and head_dim <= 64
        or _plain(f"inner-patch attention knows patches up to 12 x 12 and up to 64 channels a head, not {size} x {size} and {head_dim}")
    )


def cross_patch_fits(size: int) -> bool:
    return size <= 12 or _plain(f"cross-patch attention knows patches up to 12 x 12, not {size} x {size}")


def mlp_pays(channels: int) -> bool:
    """Where the products are bound by memory, an epilogue saves a pass over the hidden layer; where by arithmetic, cuBLAS is faster."""
    return channels <= 192
