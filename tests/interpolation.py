"""A reference implementation of interpolation in float64, with which resized position tables are compared."""

import math

import numpy as np


def resized(grid_HWC: np.ndarray, height: int, width: int, mode: str) -> np.ndarray:
    """[H, W, C] -> [height, width, C], mode "bilinear" or "bicubic", with half-pixel centres and repeated borders."""
    rows, columns = _weights(grid_HWC.shape[0], height, mode), _weights(grid_HWC.shape[1], width, mode)
    return np.einsum("yh,xw,hwc->yxc", rows, columns, grid_HWC.astype(np.float64))


def _weights(inputs: int, outputs: int, mode: str) -> np.ndarray:
    """[outputs, inputs]: the weight of each input in each output."""
    weights = np.zeros((outputs, inputs))
    for output in range(outputs):
        place = (output + 0.5) * inputs / outputs - 0.5
        for tap in range(math.floor(place) - 1, math.floor(place) + 3):
            weights[output, min(max(tap, 0), inputs - 1)] += {"bilinear": _linear, "bicubic": _cubic}[mode](
                abs(place - tap)
            )
    return weights


def _linear(distance: float) -> float:
    return max(0.0, 1 - distance)


def _cubic(distance: float) -> float:
    """Keys' kernel (1981) with a = -0.75, as in PyTorch and OpenCV."""
    a = -0.75
    if distance <= 1:
        return (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    return a * (distance**3 - 5 * distance**2 + 8 * distance - 4) if distance < 2 else 0.0
