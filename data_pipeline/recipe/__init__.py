"""The augmentation recipe of a micro-batch: on GPUs in a few launches of Triton kernels, elsewhere in plain PyTorch.

The plain path (augment.py, mix.py) defines the results. Does not import Triton where it is not used.
"""

import functools
import importlib.util
import logging

import numpy as np
import torch
from torch import Tensor

from data_pipeline.augment import augment
from data_pipeline.config import AugmentConfig
from data_pipeline.mix import mix


def prepare(
    images: Tensor, labels: Tensor, keys: np.ndarray, mix_key: int, num_classes: int, config: AugmentConfig
) -> tuple[Tensor, Tensor]:
    """Augment, normalise and mix a micro-batch: `augment` and then `mix`, where the arguments are described.

    images: uint8 [m, 3, S, S], and labels: int64 [m], on the same device; not modified. keys: int64 [m] on the host.
    Returns float32 [m, 3, S, S], contiguous, and targets, float32 [m, num_classes]. The host waits for nothing.
    """
    if has_kernels(images.device):
        from .launch import run_program
        from .program import program_of

        program = program_of(keys, mix_key, images.shape[3], config)
        return run_program(images, labels, program, num_classes, config)
    return mix(augment(images, keys, config), labels, mix_key, num_classes, config)


@functools.cache
def has_kernels(device: torch.device) -> bool:
    """Whether the kernels run on this device: on NVIDIA GPUs since Ampere, if Triton is installed.

    Logs once why a GPU goes without them.
    """
    if device.type != "cuda":
        return False
    reason = None
    if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        reason = f"{torch.cuda.get_device_name(device)} is not an NVIDIA GPU since Ampere"
    elif importlib.util.find_spec("triton") is None:
        reason = "Triton is not installed"
    if reason:
        logging.getLogger(__name__).warning("the recipe runs as PyTorch's operators, not as kernels: %s", reason)
    return reason is None
