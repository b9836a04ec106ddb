"""The Triton kernels, each beside its plain twin, and where they can be used. Importing this does not import Triton.

They are custom operators, `torch.ops.catmodel.*`: torch.compile keeps them whole, activation checkpointing replays them. Their gradients
are deterministic: no atomic additions, and block sizes are fixed by the shapes, not tuned by timing.
"""

import functools
import logging
import os
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from catmodel.patches import Patches

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@torch.compiler.assume_constant_result
def usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels run here: on NVIDIA GPUs from Ampere on, or in Triton's interpreter (TRITON_INTERPRET=1, for tests)."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return _fall_back("torch.func's transforms do not take PyTorch's custom operators")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return _fall_back(f"{torch.cuda.get_device_name(device)} is older than Ampere")
    if dtype not in DTYPES:
        return _fall_back(f"they do not know {dtype}")
    try:
        register()
    except ModuleNotFoundError as error:
        return _fall_back(f"{error.name} is not installed")
    return True


def register() -> None:
    """Make the operators, torch.ops.catmodel.*. Raises ModuleNotFoundError where there is no Triton."""
    from catmodel.kernels import aggregate, cross_patch, flash, inner_patch, mlp, pack  # noqa: F401


@functools.cache
def _fall_back(reason: str) -> bool:
    """Says once why plain PyTorch is used. Always False."""
    logging.getLogger(__name__).warning("plain PyTorch in place of the Triton kernels: %s", reason)
    return False


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors of one device as a matrix product there would take them: where torch.autocast is on, in its type."""
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


def inner_patch_fits(size: int, head_dim: int) -> bool:
    return (
        size <= 12
        and head_dim <= 64
        or _fall_back(f"inner-patch attention knows patches up to 12 x 12 and up to 64 channels a head, not {size} x {size} and {head_dim}")
    )


def cross_patch_fits(size: int) -> bool:
    return size <= 12 or _fall_back(f"cross-patch attention knows patches up to 12 x 12, not {size} x {size}")


def cross_patch_attention(
    x_BNC: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    patches: "Patches",
    num_heads: int,
    rate: float,
    seed: Tensor | None,
) -> Tensor:
    """`catmodel.attention.CrossPatchAttention` by kernels: tokens row by row, [B, N, C] -> [B, N, C].

    In one kernel for up to 64 patches, which the images have that classifiers are trained on; otherwise flash attention between the two
    linear layers. So too in float32: without tensor cores that one kernel takes minutes to compile, and has far too few registers.
    """
    x_BNC, qkv_weight, qkv_bias, proj_weight, proj_bias = autocast(x_BNC, qkv_weight, qkv_bias, proj_weight, proj_bias)
    place = patches.height, patches.width, patches.size
    x_BCnP = torch.ops.catmodel.pack(x_BNC, *place)
    B, C, n, P = x_BCnP.shape
    if num_heads == 1 and n <= 64 and P <= 49 and x_BNC.dtype != torch.float32:
        y_BCnP = torch.ops.catmodel.cross_patch_attention(x_BCnP, qkv_weight, qkv_bias, proj_weight, proj_bias, rate, seed)
    else:
        qkv_Tn3hd = F.linear(x_BCnP, qkv_weight, qkv_bias).view(B * C, n, 3, num_heads, P // num_heads)
        y_Tnhd, _ = torch.ops.catmodel.flash_attention(qkv_Tn3hd, rate, seed)
        y_BCnP = F.linear(y_Tnhd.view(B, C, n, P), proj_weight, proj_bias)
    return torch.ops.catmodel.unpack(y_BCnP, *place)


def mlp_pays(channels: int) -> bool:
    """Where the products are bound by memory, an epilogue saves a pass over the hidden layer; where by arithmetic, cuBLAS is faster."""
    return channels <= 192
