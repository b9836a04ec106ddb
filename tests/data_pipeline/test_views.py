"""Windows and shapes of crops at random scales, and the batches of an evaluation."""

from dataclasses import replace

import numpy as np
import pytest

from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.crop import evaluation_windows, training_windows
from data_pipeline.randomness import Stream, fold, make_key
from data_pipeline.views import CANDIDATES, Crops, ScaledCrops, evaluation_slices

ADE20K = ScaledCrops((512, 512), (2048, 512), (0.5, 2.0), 0.75, 0.5, (2048, 512))


def keys_of(count: int, epoch: int = 0) -> np.ndarray:
    return fold(make_key(0, Stream.CROP, epoch), np.arange(count, dtype=np.int64))


def sizes(count: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return random.integers(40, 2000, count), random.integers(40, 2000, count)


def windows_of(views, keys, widths, heights) -> np.ndarray:
    """Candidates of samples that are alone in their micro-batches."""
    shapes = views.shapes(keys[:, None], widths[:, None], heights[:, None])
    assert shapes.shape == (len(keys), 2) and (shapes == views.shape).all()
    return views.training(keys, widths, heights, shapes)


def test_windows_are_functions_of_key_and_size():
    keys, (widths, heights) = keys_of(200), sizes(200)
    together = windows_of(ADE20K, keys, widths, heights)
    assert together.dtype == np.int32 and together.shape == (200, CANDIDATES, 5)
    for row in range(0, 200, 7):
        part = slice(row, row + 1)
        assert np.array_equal(windows_of(ADE20K, keys[part], widths[part], heights[part]), together[part])
    assert not np.array_equal(windows_of(ADE20K, keys_of(200, epoch=1), widths, heights), together)


def test_windows_are_the_published_resize_and_crop():
    """mmsegmentation resizes to int(side · factor + 0.5), factor = min(long / max side, short / min side) · ratio."""
    keys, (widths, heights) = keys_of(20_000), sizes(20_000)
    views = ScaledCrops((384, 512), (2048, 512), (0.5, 2.0), 1.0, 0.5, (2048, 512))
    windows = windows_of(views, keys, widths, heights)
    assert windows.shape[1] == 1
    _, _, width, height, _ = windows[:, 0].T.astype(float)
    base = np.minimum(2048 / np.maximum(widths, heights), 512 / np.minimum(widths, heights))
    ratios = np.stack([512 / width, 384 / height], axis=1) / base[:, None]
    # The factor is the same in both directions up to the rounding of the window to whole pixels.
    assert np.abs(width / 512 - height / 384).max() <= 0.5 / 512 + 0.5 / 384 + 1e-9
    fine = width > 400
    assert 0.497 < ratios[fine].min() < 0.51 and 1.9 < ratios[fine].max() < 2.01
    large = (np.minimum(widths, heights) > 1200).nonzero()[0]
    shares = np.histogram(ratios[large, 0], bins=np.linspace(0.5, 2, 7))[0] / len(large)
    assert np.abs(shares - 1 / 6).max() < 0.02  # uniform


def test_places_are_uniform_and_inside():
    keys, count = keys_of(30_000), 30_000
    views = ScaledCrops((20, 30), (100, 100), (1.0, 1.0), 1.0, 0.5, (100, 100))  # the factor is 1
    x, y, width, height, flip = windows_of(views, keys, np.full(count, 100), np.full(count, 24))[:, 0].T
    assert set(width) == {30} and set(height) == {20}
    assert set(x) == set(range(71)) and set(y) == set(range(5))
    assert np.bincount(x).std() < 3 * np.sqrt(count / 71) and np.bincount(y).std() < 3 * np.sqrt(count / 5)
    assert abs(flip.mean() - 0.5) < 0.01
    assert not windows_of(replace(views, flip=0.0), keys, *sizes(count))[..., 4].any()


def test_padding_is_at_the_right_and_bottom_of_the_result():
    views = ScaledCrops((64, 64), (32, 32), (1.0, 1.0), 1.0, 0.5, (32, 32))
    windows = windows_of(views, keys_of(100), np.full(100, 320), np.full(100, 160))[:, 0]  # the factor is 0.1
    assert {tuple(window) for window in windows.tolist()} == {(0, 0, 640, 640, 0), (-320, 0, 640, 640, 1)}


def test_candidates_differ_only_in_place():
    windows = windows_of(ADE20K, keys_of(50), np.full(50, 2000), np.full(50, 1500))
    assert (windows[:, :, 2:] == windows[:, :1, 2:]).all()
    smaller = windows[windows[:, 0, 2] < 1000]
    assert len(smaller) > 9 and all(len(np.unique(some[:, :2], axis=0)) == CANDIDATES for some in smaller)


@pytest.mark.parametrize(
    ("views", "size", "shape"),
    [
        (ADE20K, (683, 512), (512, 683)),
        (ADE20K, (512, 683), (683, 512)),
        (ADE20K, (3000, 400), (273, 2048)),  # the long side limits
        (ScaledCrops((320, 320), (480, 360), (0.5, 2.0), 0.75, 0.5, (480, 360)), (480, 360), (360, 480)),
        (ScaledCrops((512, 512), (2048, 512), (0.5, 2.0), 0.75, 0.5, (2048, 512), 1.75), (683, 512), (896, 1195)),
        (ScaledCrops((512, 512), (2048, 512), (0.5, 2.0), 0.75, 0.5, (2048, 512), divisor=32), (683, 512), (512, 704)),
    ],
)
def test_evaluation_sees_the_whole_image(views, size, shape):
    windows, shapes = views.evaluation(np.array([size[0]]), np.array([size[1]]))
    assert windows.dtype == np.int32
    assert windows.tolist() == [[0, 0, *size, 0]] and tuple(shapes[0].tolist()) == shape


def test_batches_of_an_evaluation_have_one_size():
    random = np.random.default_rng(1)
    kinds = np.array([(480, 360), (360, 480), (640, 480)])[random.integers(0, 3, 40).repeat(random.integers(1, 9, 40))]
    widths, heights = kinds.T
    slices = evaluation_slices(ADE20K, widths, heights, 4)
    assert np.array_equal(np.concatenate([np.array(part) for part in slices]), np.arange(len(kinds)))
    assert all(1 <= len(part) <= 4 and len(np.unique(kinds[part], axis=0)) == 1 for part in slices)
    # Nor could fewer do: a batch is short only where the next image has another size.
    for part, after in zip(slices, slices[1:], strict=False):
        assert len(part) == 4 or tuple(kinds[part[0]]) != tuple(kinds[after[0]])


def test_crops_are_those_of_classification():
    data, augment = DataConfig(path="", image_size=32), AugmentConfig()
    views, keys, (widths, heights) = Crops(data, augment), keys_of(100), sizes(100)
    assert views.shape == (32, 32)
    expected = training_windows(keys, widths, heights, augment, data.eval_crop)
    assert np.array_equal(windows_of(views, keys, widths, heights), expected[:, None])
    windows, shapes = views.evaluation(widths, heights)
    assert np.array_equal(windows, evaluation_windows(widths, heights, data.eval_crop)) and (shapes == 32).all()
    assert evaluation_slices(views, widths, heights, 48) == [range(48), range(48, 96), range(96, 100)]
