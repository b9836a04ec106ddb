"""Where a detector predicts: anchors and points as functions of the input's size."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """The A places of an input: levels finest first, in a level rows, in a row columns, at a pixel its anchors.

    In pixels of the input: points [A, 2] (x, y), the anchors' centres if there are anchors; strides [A]; anchors [A, 4]
    (x1, y1, x2, y2), or None. float32.

    starts: the first place of each level, and A.
    """

    points: Tensor
    strides: Tensor
    anchors: Tensor | None
    starts: tuple[int, ...]

    def __len__(self) -> int:
        return self.starts[-1]


def anchor_sides(scale: float, octaves: int, ratios: Sequence[float]) -> tuple[tuple[float, float], ...]:
    """Width and height, in strides, of the anchors at a pixel, in mmdetection's order: by ratio, then by size."""
    sizes = [scale * 2 ** (i / octaves) for i in range(octaves)]
    return tuple((size / math.sqrt(ratio), size * math.sqrt(ratio)) for ratio in ratios for size in sizes)


def make_grid(
    height: int,
    width: int,
    strides: Sequence[int],
    sides: Sequence[tuple[float, float]] | None,
    device: torch.device | str = "cpu",
) -> Grid:
    """The grid of inputs of height x width pixels. sides: of the anchors at a pixel, in strides; None: no anchors.

    Anchors are centred on multiples of the stride and not rounded; points without anchors lie half a stride further.
    """
    points, anchors, counts = [], [], []
    for stride in strides:
        y, x = (torch.arange(-(-side // stride), dtype=torch.float32, device=device) for side in (height, width))
        points_n2 = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=2).flatten(0, 1) * stride
        if sides is None:
            points_n2 = points_n2 + stride // 2
        else:
            half = [(stride * side_x / 2, stride * side_y / 2) for side_x, side_y in sides]
            offsets_k4 = torch.tensor([(-x, -y, x, y) for x, y in half], dtype=torch.float32, device=device)
            anchors.append((points_n2.repeat(1, 2)[:, None] + offsets_k4).flatten(0, 1))
            points_n2 = points_n2.repeat_interleave(len(sides), dim=0)
        points.append(points_n2)
        counts.append(points_n2.shape[0])
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    strides_A = torch.cat([torch.full_like(level[:, 0], stride) for level, stride in zip(points, strides, strict=True)])
    return Grid(torch.cat(points), strides_A, torch.cat(anchors) if anchors else None, tuple(starts))


@functools.lru_cache(maxsize=64)  # a few megabytes each for inputs of 800 x 1333 pixels
def cached_grid(
    height: int,
    width: int,
    strides: Sequence[int],
    sides: Sequence[tuple[float, float]] | None,
    device: torch.device,
) -> Grid:
    """As `make_grid`; made on the CPU, because the copy is complete when it is returned: any stream may use it."""
    grid = make_grid(height, width, strides, sides)
    parts = {name: getattr(grid, name) for name in ("points", "strides", "anchors")}
    return replace(grid, **{name: part if part is None else part.to(device) for name, part in parts.items()})
