"""How many programs a kernel is started with, and the sizes of its tiles."""

import functools

import torch

# In Triton's interpreter programs run one after another: a few show that their partial sums are put together rightly.
INTERPRETED = 4


@functools.cache
def programs(device: torch.device) -> int:
    """What a persistent grid counts in: the device's multiprocessors."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else INTERPRETED


def padded(n: int) -> int:
    """The side of a tile that holds n: a power of two, at least 16, the least that `tl.dot` takes."""
    return max(16, 1 << (n - 1).bit_length())
