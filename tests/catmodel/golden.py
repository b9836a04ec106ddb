"""The weights and inputs for which tests/golden holds the outputs of the published models (tests/golden/README.md)."""

import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).parents[1] / "golden"


def released_shapes(name: str) -> dict[str, str]:
    """Names and shapes, as written by str(tuple), in the released state dict `name`."""
    lines = (GOLDEN / "keys" / f"{name}.txt").read_text().splitlines()
    return dict(line.split(" ", 1) for line in lines if line)


def load(name: str) -> dict[str, np.ndarray]:
    """The arrays of a .npz file of tests/golden, by name."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def golden_images(seed: int = 1234, shape: tuple[int, ...] = (2, 3, 224, 224)) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def filled(model: nn.Module) -> nn.Module:
    """The model, in evaluation mode, with the weights of tests/golden/README.md."""
    model.load_state_dict({key: _value(key, value) for key, value in model.state_dict().items()}, assign=True)
    return model.eval()


def _value(key: str, tensor: Tensor) -> Tensor:
    if key.endswith("relative_position_index"):
        return tensor
    if key.endswith("num_batches_tracked"):
        return torch.tensor(0)
    shape = tuple(tensor.shape)
    as_map = key == "ape" and len(shape) == 4  # a backbone's position: the classifier's values, as a map
    if as_map:
        shape = (1, shape[2] * shape[3], shape[1])
    z = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
    if key.endswith("relative_position_bias_table"):
        z = 0.5 * z
    elif key.startswith("pos_embed") or key in ("ape", "cls_token"):
        z = 0.2 * z
    elif key.endswith("running_mean"):
        z = 0.1 * z
    elif key.endswith("running_var"):
        z = 1 + 0.5 * abs(z)
    elif key.endswith(".bias"):
        z = 0.05 * z
    elif z.ndim == 1:
        z = 1 + 0.1 * z
    else:
        z = z / math.sqrt(np.prod(shape[1:]))
    value = torch.from_numpy(z.astype(np.float32))
    return value.transpose(1, 2).reshape(tensor.shape) if as_map else value
