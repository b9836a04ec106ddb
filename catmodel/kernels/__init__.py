"""The Triton kernels, and the conditions under which they replace PyTorch's operators. Does not import Triton.

The kernels are custom operators, `torch.ops.catmodel.*`. torch.compile sees the launches inside them, and activation
checkpointing repeats them. Eager code calls them by `ops`, past PyTorch's dispatcher. Their gradients are
deterministic: there are no atomic additions, and block sizes follow from the shapes rather than from timings.
"""

import functools
import hashlib
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from catmodel.patches import Patches

ops = SimpleNamespace()  # the operators by name (`launch.operator`), once `usable` or `register` has defined them

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# The most patches of which cross-patch attention reads the tokens as they are stored. Its tiles have 64 rows: of 4
# patches in 16 channels, which are 32 bytes, a sector of the memory. More patches are packed first.
IN_PLACE = 4


@torch.compiler.assume_constant_result
def usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels run: on NVIDIA GPUs since Ampere, in tests in Triton's interpreter (TRITON_INTERPRET=1)."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return _fall_back("torch.func's transforms do not support PyTorch's custom operators")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return _fall_back(f"{torch.cuda.get_device_name(device)} is older than Ampere")
    if dtype not in DTYPES:
        return _fall_back(f"they do not support {dtype}")
    try:
        register()
    except ModuleNotFoundError as error:
        return _fall_back(f"{error.name} is not installed")
    return True


def register() -> None:
    """Define the operators torch.ops.catmodel.*. Raises ModuleNotFoundError if Triton is not installed."""
    from catmodel.kernels import aggregate, cross_patch, flash, inner_patch, mlp, norm, pack  # noqa: F401

    _name_version()


@functools.cache
def _name_version() -> None:
    """Make torch.compile's caches depend on the kernels' code: they know an operator by its name only."""
    code = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    torch.compiler.config.cache_key_tag += f"catmodel-{hashlib.sha256(code).hexdigest()[:16]}"


@functools.cache
def _fall_back(reason: str) -> bool:
    """Log once why the PyTorch path is used. Returns False."""
    logging.getLogger(__name__).warning("PyTorch's operators are used instead of the Triton kernels: %s", reason)
    return False


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast tensors of one device to autocast's dtype, if torch.autocast is enabled there, as for a matrix product."""
    device = tensors[0].device.type
    # Not torch.amp.is_autocast_available: in PyTorch 2.11, torch.compile cannot trace it and breaks the graph.
    if device not in ("cuda", "cpu") or not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


def inner_patch_fits(size: int, head_dim: int) -> bool:
    """Whether the kernel of inner-patch attention supports patches of size x size tokens and this size of a head."""
    return (
        size <= 12
        and head_dim <= 64
        or _fall_back(
            "inner-patch attention supports patches of up to 12 x 12 tokens and heads of up to 64 channels, "
            f"not {size} x {size} and {head_dim}"
        )
    )


def cross_patch_fits(size: int) -> bool:
    """Whether the kernels of cross-patch attention support patches of size x size tokens."""
    return size <= 12 or _fall_back(
        f"cross-patch attention supports patches of up to 12 x 12 tokens, not {size} x {size}"
    )


def cross_patch_alone(patches: "Patches", num_heads: int, dtype: torch.dtype) -> bool:
    """Whether a single kernel computes cross-patch attention.

    More patches, several heads, and float32 take flash attention between two linear layers: in float32, without tensor
    cores, the single kernel needs minutes to compile and far too many registers.
    """
    return num_heads == 1 and patches.count <= 64 and patches.size <= 7 and dtype != torch.float32


def cross_attention_fits(head_dim: int) -> bool:
    """Whether the kernel of attention to other tokens supports this size of a head."""
    return head_dim <= 256 or _fall_back(f"attention supports heads of up to 256 channels, not {head_dim}")


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
    scale: Tensor | None = None,
) -> Tensor:
    """`catmodel.attention.CrossPatchAttention` with kernels, for tokens stored row by row: [B, N, C] -> [B, N, C].

    scale: factors of the images' results [B], if `cross_patch_alone`.
    """
    x_BNC, qkv_weight, qkv_bias, proj_weight, proj_bias = autocast(x_BNC, qkv_weight, qkv_bias, proj_weight, proj_bias)
    weights = qkv_weight, qkv_bias, proj_weight, proj_bias
    place = patches.height, patches.width, patches.size
    alone = cross_patch_alone(patches, num_heads, x_BNC.dtype)
    if alone and patches.count <= IN_PLACE:
        return ops.cross_patch_attention(x_BNC, *weights, *place[:2], rate, seed, scale)
    if alone:
        x_BCPn = ops.pack(x_BNC, *place, True)
        y_BCPn = ops.cross_patch_attention(x_BCPn, *weights, *place[:2], rate, seed, scale)
        return ops.unpack(y_BCPn, *place, True)
    x_BCnP = ops.pack(x_BNC, *place, False)
    B, C, n, P = x_BCnP.shape
    qkv_Tn3hd = F.linear(x_BCnP, qkv_weight, qkv_bias).view(B * C, n, 3, num_heads, P // num_heads)
    y_Tnhd, _ = ops.flash_attention(qkv_Tn3hd, rate, seed)
    return ops.unpack(F.linear(y_Tnhd.view(B, C, n, P), proj_weight, proj_bias), *place, False)


def mlp_pays(channels: int, dtype: torch.dtype = torch.bfloat16, device: torch.device | None = None) -> bool:
    """Whether the MLP's kernels are faster (than cuBLAS with compiled passes, on an H200, at the widths of CAT-B).

    They need Hopper's tensor memory accelerator, which needs rows of a multiple of 16 bytes; in float32, without
    tensor cores, wide products are left to cuBLAS.
    """
    return channels % 8 == 0 and (dtype != torch.float32 or channels <= 192) and _has_tma(device)


@torch.compiler.assume_constant_result
def _has_tma(device: torch.device | None) -> bool:
    """Whether a GPU (None: the one at hand) has a tensor memory accelerator; the interpreter emulates it."""
    if device is not None and device.type != "cuda":
        return True
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (9, 0)
