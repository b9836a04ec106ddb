"""Scales, crops, padding and shapes of detection's views, against mmdetection's rules written out one by one."""

from dataclasses import replace

import numpy as np
import pytest

from data_pipeline.randomness import Stream, fold, make_key
from data_pipeline.scaled_boxes import ScaledBoxes
from data_pipeline.views import CANDIDATES, evaluation_slices

ONE = ScaledBoxes(((1333, 800),), (1333, 800))
CHOICE = ScaledBoxes(tuple((1333, short) for short in range(480, 801, 32)), (1333, 800))
CROPS = replace(CHOICE, crop_scales=((4200, 400), (4200, 500), (4200, 600)))
RANGE = ScaledBoxes(((1333, 640), (1333, 800)), (1333, 800), mode="range", divisor=128)
KINDS = {"one": ONE, "choice": CHOICE, "crops": CROPS, "range": RANGE, "mixed": replace(ONE, grouped=False)}


def keys_of(count: int, epoch: int = 0) -> np.ndarray:
    return fold(make_key(0, Stream.CROP, epoch), np.arange(count, dtype=np.int64))


def sizes(rows: int, columns: int, *, grouped: bool = True) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    long, short = random.integers(300, 900, (rows, columns)), random.integers(200, 700, (rows, columns))
    long, short = np.maximum(long, short), np.minimum(long, short)
    portrait = random.random((rows, 1) if grouped else (rows, columns)) < 0.3
    return np.where(portrait, short, long), np.where(portrait, long, short)


def resized(width: int, height: int, scale: tuple[int, int]) -> tuple[int, int]:
    """The (height, width) of mmcv.imrescale."""
    factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
    return int(height * factor + 0.5), int(width * factor + 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_windows_are_functions_of_keys_and_sizes(kind):
    views = KINDS[kind]
    keys, (widths, heights) = keys_of(240).reshape(60, 4), sizes(60, 4, grouped=views.grouped)
    shapes = views.shapes(keys, widths, heights)
    assert shapes.shape == (60, 2) and shapes.dtype == np.int64
    each = shapes.repeat(4, axis=0)
    windows = views.training(keys.ravel(), widths.ravel(), heights.ravel(), each)
    assert windows.dtype == np.int32 and windows.shape == (240, CANDIDATES if views.crop_scales else 1, 5)
    for row in range(0, 60, 7):
        part = slice(row, row + 1)
        assert np.array_equal(views.shapes(keys[part], widths[part], heights[part]), shapes[part])
        one = views.training(keys[row, 1:3], widths[row, 1:3], heights[row, 1:3], each[4 * row + 1 : 4 * row + 3])
        assert np.array_equal(one, windows[4 * row + 1 : 4 * row + 3])
    other = keys_of(240, epoch=1).reshape(60, 4)
    assert kind in ("one", "mixed") or not np.array_equal(views.shapes(other, widths, heights), shapes)
    assert len(np.unique(windows[:, 0, 4])) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_micro_batch_has_the_smallest_shape_for_its_images(kind):
    """That of each image alone, padded, and then the larger of both sides; within what is announced."""
    views = KINDS[kind]
    keys, (widths, heights) = keys_of(1200).reshape(300, 4), sizes(300, 4, grouped=views.grouped)
    shapes = views.shapes(keys, widths, heights)
    alone = views.shapes(keys.reshape(-1, 1), widths.reshape(-1, 1), heights.reshape(-1, 1)).reshape(300, 4, 2)
    assert np.array_equal(shapes, alone.max(axis=1))
    assert (shapes % views.divisor == 0).all() and len(np.unique(shapes, axis=0)) <= views.most_shapes
    height, width = views.shape
    low, high = shapes.min(axis=1), shapes.max(axis=1)
    if views.grouped and not views.crop_scales:
        assert height < width and low.max() <= height
    assert high.max() <= width


def test_scales_are_the_published_ones():
    """One of the scales by chance, or for "range" every short side between two: the sizes of mmcv.imrescale."""
    keys, (widths, heights) = keys_of(4000), sizes(4000, 1)
    shorts = np.zeros(4000, int)
    for views, choices in ((CHOICE, CHOICE.scales), (RANGE, [(1333, short) for short in range(640, 801)])):
        views = replace(views, divisor=1)
        shapes = views.shapes(keys[:, None], widths, heights)
        for row, (shape, width, height) in enumerate(zip(shapes, widths[:, 0], heights[:, 0], strict=True)):
            fits = [short for long, short in choices if resized(width, height, (long, short)) == tuple(shape)]
            assert fits  # several where the long side limits
            shorts[row] = fits[0]
        free = np.maximum(widths, heights)[:, 0] < 1.6 * np.minimum(widths, heights)[:, 0]
        counts = np.bincount(shorts[free])[[short for _, short in choices]]
        expected = free.sum() / len(choices)
        assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)


def test_crops_are_the_published_ones():
    """Half of the images whole; of the others a crop of the image at 400, 500 or 600, enlarged to one of the scales."""
    views = replace(CROPS, divisor=1, scales=((1333, 600),), crop_range=(200, 300))
    keys, count = keys_of(6000), 6000
    widths, heights = np.full((count, 1), 640), np.full((count, 1), 480)
    shapes = views.shapes(keys[:, None], widths, heights)
    windows = views.training(keys, widths[:, 0], heights[:, 0], shapes)
    whole = (windows[:, 0, 2:4] == (640, 480)).all(axis=1)
    assert abs(whole.mean() - 0.5) < 0.02 and (shapes[whole] == (600, 800)).all() and shapes.min() == 600
    assert (windows[whole][:, :, :2] == 0).all()
    # A crop of 200 to 300 pixels at 400/480, 500/480 or 600/480.
    sides = windows[~whole][:, 0, 2:4]
    assert np.abs(sides.min() - 200 * 480 / 600) <= 1 and np.abs(sides.max() - 300 * 480 / 400) <= 1
    ratio = np.sort(sides / shapes[~whole][:, ::-1], axis=1)
    assert (ratio[:, 1] / ratio[:, 0] < 1.01).all()  # the aspect is kept
    # All places inside the image, uniform.
    x, y, width, height, _ = windows[~whole].reshape(-1, 5).T
    assert x.min() == 0 and y.min() == 0 and (x + width).max() == 640 and (y + height).max() == 480
    share = x / (640 - width)
    assert np.abs(np.histogram(share, 10, (0, 1.0001))[0] / len(share) - 0.1).max() < 0.01
    assert (windows[:, :, 2:] == windows[:, :1, 2:]).all()  # candidates differ only in place


def test_whole_images_are_shown_with_padding_right_and_below():
    keys, (widths, heights) = keys_of(800).reshape(200, 4), sizes(200, 4)
    shapes = CHOICE.shapes(keys, widths, heights)
    windows = CHOICE.training(keys.ravel(), widths.ravel(), heights.ravel(), shapes.repeat(4, axis=0))[:, 0]
    x, y, width, height, flip = windows.T.astype(np.int64)
    assert (y == 0).all() and (x[flip == 0] == 0).all() and (x + width == widths.ravel())[flip == 1].all()
    assert (width >= widths.ravel()).all() and (height >= heights.ravel()).all()
    # The same factor in both directions, up to the rounding of the window to whole pixels: that of the scale.
    factor = shapes.repeat(4, axis=0)[:, ::-1] / windows[:, 2:4]
    alone = replace(CHOICE, divisor=1).shapes(keys.reshape(-1, 1), widths.reshape(-1, 1), heights.reshape(-1, 1))
    published = alone[:, ::-1] / np.stack([widths.ravel(), heights.ravel()], axis=1)
    slack = 0.5 / windows[:, 2:4] + 0.5 / np.stack([widths.ravel(), heights.ravel()], axis=1)
    assert (np.abs(factor / published - 1) < slack + 1e-6).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_replacement_fits_into_the_shape_that_it_finds(kind):
    views, keys = KINDS[kind], keys_of(500)
    widths, heights = (side[:, 0] for side in sizes(500, 1))
    own = views.shapes(keys[:, None], widths[:, None], heights[:, None])
    small = np.tile((256, 384), (500, 1))
    windows = views.training(keys, widths, heights, small)
    whole = (windows[:, 0, 2] >= widths) & (windows[:, 0, 3] >= heights)
    assert whole.all() if not views.crop_scales else 0.4 < whole.mean() < 0.6
    x, y, width, height, flip = windows[whole, 0].T
    assert (x <= 0).all() and (x + width >= widths[whole]).all() and (y == 0).all()
    large = np.maximum(own, 2000)  # the factor stays
    enlarged, before = views.training(keys, widths, heights, large), views.training(keys, widths, heights, own)
    factors = [side / window[:, 0, 2:4] for side, window in ((large[:, ::-1], enlarged), (own[:, ::-1], before))]
    assert (np.abs(factors[0] / factors[1] - 1) < 0.02).all()


@pytest.mark.parametrize(
    ("divisor", "size", "shape", "window"),
    [
        (32, (640, 480), (800, 1088), (0, 0, 653, 480, 0)),  # 800 x 1067
        (32, (480, 640), (1088, 800), (0, 0, 480, 653, 0)),
        (1, (500, 375), (800, 1067), (0, 0, 500, 375, 0)),
        (128, (640, 360), (768, 1408), (0, 0, 676, 369, 0)),  # 750 x 1333: the long side limits
    ],
)
def test_evaluation_sees_whole_images_with_padding(divisor, size, shape, window):
    views = replace(ONE, divisor=divisor)
    windows, shapes = views.evaluation(np.array([size[0]], np.uint16), np.array([size[1]], np.uint16))
    assert windows.dtype == np.int32 and windows.tolist() == [list(window)] and shapes.tolist() == [list(shape)]


def test_images_of_equal_shapes_are_evaluated_together():
    widths = np.array([640, 640, 1280, 480, 480, 639, 640], np.uint16)
    heights = np.array([480, 478, 960, 640, 640, 480, 480], np.uint16)
    slices = evaluation_slices(replace(ONE, divisor=128), widths, heights, 4)
    assert slices == [range(3), range(3, 5), range(5, 7)]


def test_the_number_of_shapes():
    """Landscape: 7 heights up to 896 by 7 widths from 640 to 1408; as many portraits, 9 of them the same."""
    assert RANGE.most_shapes == 49 + 49 - 9 and RANGE.shape == (896, 1408)
    mixed = replace(RANGE, grouped=False)  # any of 11 x 11 sides, but not both below 640
    assert mixed.most_shapes == 121 - 16 and mixed.shape == (1408, 1408)
