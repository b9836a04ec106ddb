"""Anchors and points, compared with loops over levels, rows, columns, ratios and sizes."""

import numpy as np
import pytest
import torch

from catmodel.detection.grid import make_grid
from catmodel.detection.kinds import KINDS
from tests.catmodel.detection.small_detector import small_detector

PUBLISHED = {"retinanet": (4, 3, (0.5, 1.0, 2.0)), "atss": (8, 1, (1.0,)), "fcos": None}


def plain(kind: str, height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
    """Points, strides, anchors and first places in double precision."""
    points, strides, anchors, starts = [], [], [], []
    for stride in (8, 16, 32, 64, 128):
        starts.append(len(points))
        for row in range((height + stride - 1) // stride):
            for column in range((width + stride - 1) // stride):
                if PUBLISHED[kind] is None:
                    points.append((column * stride + stride // 2, row * stride + stride // 2))
                    strides.append(stride)
                    continue
                scale, octaves, ratios = PUBLISHED[kind]
                for ratio in ratios:
                    for octave in range(octaves):
                        area = (stride * scale * 2 ** (octave / octaves)) ** 2
                        w, h = (area / ratio) ** 0.5, (area * ratio) ** 0.5
                        x, y = column * stride, row * stride
                        points.append((x, y))
                        strides.append(stride)
                        anchors.append((x - w / 2, y - h / 2, x + w / 2, y + h / 2))
    return np.array(points), np.array(strides), np.array(anchors), [*starts, len(points)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(160, 256), (97, 131), (32, 32)])
def test_places(kind, size):
    grid = small_detector(kind).grid(*size)
    points, strides, anchors, starts = plain(kind, *size)
    assert grid.starts == tuple(starts) and len(grid) == starts[-1]
    assert grid.points.dtype == grid.strides.dtype == torch.float32
    np.testing.assert_array_equal(grid.points, points)
    np.testing.assert_array_equal(grid.strides, strides)
    if kind == "fcos":
        assert grid.anchors is None
    else:
        np.testing.assert_allclose(grid.anchors, anchors, rtol=3e-7, atol=2e-5)
        assert (anchors % 1).any() == (kind == "retinanet"), "sides are not rounded"


def test_a_grid_is_kept():
    model, other = small_detector("retinanet"), small_detector("retinanet", "cotnet50")
    assert model.grid(64, 96) is other.grid(64, 96) is not model.new_grid(64, 96)
    assert model.grid(64, 96) is not model.grid(96, 64)
    assert torch.equal(model.new_grid(64, 96).anchors, model.grid(64, 96).anchors)
    assert make_grid(64, 96, (8,), None).starts == (0, 96)
