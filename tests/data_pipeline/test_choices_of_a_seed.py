"""What a seed and a position choose never changes: a run that goes on with a newer version depends on it.

The order of samples and the keys have such tests of their own (test_order.py, test_grouped_order.py,
test_randomness.py).
"""

import numpy as np
import pytest
import torch

from data_pipeline.augment import sample_keys
from data_pipeline.augment_choices import choose_color_jitter, choose_rand_augment, erasing_boxes, parse_rand_augment
from data_pipeline.config import AugmentConfig
from data_pipeline.crop import training_windows
from data_pipeline.distortion import choose_distortions
from data_pipeline.mix import draw_mixing
from data_pipeline.randomness import Stream, fold, make_key, normals
from data_pipeline.scaled_boxes import ScaledBoxes
from data_pipeline.views import ScaledCrops

CROP_KEYS = fold(make_key(0, Stream.CROP, 0), np.arange(4))
WIDTHS, HEIGHTS = np.array([500, 333, 64, 3000]), np.array([375, 500, 64, 120])
KEYS = sample_keys(0, 0, np.arange(6))


def test_purposes():
    assert {stream.name: stream.value for stream in Stream} == {
        **{"ORDER": 1, "CROP": 2, "AUGMENT": 3, "FLIP": 4, "ERASE": 5, "ERASE_NOISE": 6, "MIX": 7, "MODEL": 8},
        **{"INIT": 9, "REPLACEMENT": 10, "RAND_AUGMENT": 11, "COLOR_JITTER": 12, "DISTORTION": 13},
    }


@pytest.mark.parametrize(
    ("crop", "expected"),
    [
        ("resized", [[183, 133, 247, 240, 1], [60, 189, 236, 230, 1], [14, 5, 46, 44, 0], [1420, 0, 160, 120, 0]]),
        ("padded", [[4, -2, 500, 375, 1], [-2, -2, 333, 500, 1], [0, -4, 64, 64, 0], [0, 0, 3000, 120, 0]]),
    ],
)
def test_crops_of_classification(crop, expected):
    assert training_windows(CROP_KEYS, WIDTHS, HEIGHTS, AugmentConfig(crop=crop)).tolist() == expected


def test_crops_of_images_of_one_to_three_pixels():
    keys = fold(make_key(0, Stream.CROP, 0), np.arange(12))
    x, y, width, height, _ = training_windows(
        keys, np.array([1, 2, 3] * 4), np.array([1, 1, 2, 2] * 3), AugmentConfig()
    ).T
    assert x.tolist() == [0, 1, 1, 0, 0, 2, 0, 1, 1, 0, 0, 1] and y.tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]
    assert width.tolist() == [1, 1, 2, 1, 1, 1, 1, 1, 1, 1, 2, 2] and height.tolist() == [
        1,
        1,
        2,
        1,
        1,
        1,
        1,
        1,
        1,
        1,
        1,
        2,
    ]


def test_crops_of_segmentation():
    views = ScaledCrops((256, 512), (2048, 512), (0.5, 2.0), cat_max_ratio=0.75, flip=0.5, test_scale=(2048, 512))
    shapes = views.shapes(CROP_KEYS, WIDTHS, HEIGHTS)
    assert views.training(CROP_KEYS, WIDTHS, HEIGHTS, shapes)[:2, :3].tolist() == [
        [[78, 153, 196, 98, 1], [294, 59, 196, 98, 1], [185, 116, 196, 98, 1]],
        [[-37, 53, 370, 185, 1], [-37, 66, 370, 185, 1], [-37, 210, 370, 185, 1]],
    ]


@pytest.mark.parametrize(
    ("crop_scales", "expected", "windows"),
    [
        ((), [[832, 736], [480, 1344]], [[-7, 0, 507, 574, 1], [-118, 0, 451, 509, 1], [0, 0, 179, 64, 0]]),
        (
            ((4200, 400), (4200, 600)),
            [[544, 736], [576, 1344]],
            [[-7, 0, 507, 375, 1], [-16, 4, 349, 258, 1], [0, 2, 123, 53, 0]],
        ),
    ],
)
def test_views_of_detection(crop_scales, expected, windows):
    views = ScaledBoxes(tuple((1333, short) for short in range(480, 801, 32)), (1333, 800), crop_scales=crop_scales)
    shapes = views.shapes(*(values.reshape(2, 2) for values in (CROP_KEYS, WIDTHS, HEIGHTS)))
    assert shapes.tolist() == expected
    assert views.training(CROP_KEYS, WIDTHS, HEIGHTS, shapes.repeat(2, axis=0))[:3, -1].tolist() == windows


@pytest.mark.parametrize(
    ("mode", "crop_scales", "shape", "shapes", "windows"),
    [
        ("value", (), (800, 1344), [111456, 112480], [-47221, 0, 312553, 307889, 186]),
        ("value", ((4200, 400), (4200, 600)), (1344, 1344), [101408, 100256], [-14254, 7542, 247077, 248679, 186]),
        ("range", (), (800, 1344), [115200, 115936], [-45006, 0, 307654, 304255, 186]),
        ("range", ((4200, 400), (4200, 600)), (1344, 1344), [103232, 100512], [-10864, 7587, 239854, 245054, 186]),
    ],
)
def test_views_of_detection_of_many_images(mode, crop_scales, shape, shapes, windows):
    """Sums over 100 micro-batches."""
    random = np.random.default_rng(0)
    keys = fold(make_key(0, Stream.CROP, 0), np.arange(400)).reshape(100, 4)
    widths, heights = random.integers(100, 900, (2, 100, 4))
    scales = ((1000, 480), (1333, 640), (1333, 800))
    views = ScaledBoxes(scales, (1333, 800), mode=mode, crop_scales=crop_scales)
    found = views.shapes(keys, widths, heights)
    places = views.training(keys.ravel(), widths.ravel(), heights.ravel(), found.repeat(4, axis=0))
    assert views.shape == shape
    assert found.sum(axis=0).tolist() == shapes and places[:, -1].sum(axis=0).tolist() == windows


def test_operations_of_randaugment():
    first, second = choose_rand_augment(KEYS, parse_rand_augment("rand-m9-mstd0.5-inc1-p0.8"))
    assert first.operations.tolist() == [-1, 7, 0, 10, 2, 10] and second.operations.tolist() == [-1, 1, 2, 1, 9, 13]
    assert first.arguments.tolist() == pytest.approx([-0.2443, 1.7958, 0.0, 1.7862, 0.0, 0.2252], abs=1e-4)
    assert second.arguments.tolist() == pytest.approx([0.2721, 0.0, 0.0, 0.0, 0.1998, 0.439], abs=1e-4)


def test_colour_jitter():
    chosen = choose_color_jitter(KEYS[:3], 0.4)
    assert [each.operations.tolist() for each in chosen] == [[8, 9, 7], [7, 7, 9], [9, 8, 8]]
    found = [each.arguments.tolist() for each in chosen]
    expected = [[1.337, 1.2378, 0.669], [1.3713, 1.1866, 0.8072], [0.8059, 0.99, 0.9273]]
    assert np.allclose(found, expected, atol=1e-4)


def test_erasing():
    boxes = erasing_boxes(KEYS, 0.5, 224, 224)
    assert boxes.rows.tolist() == [0, 2, 3, 5]
    assert boxes.tops.tolist() == [2, 117, 75, 5] and boxes.lefts.tolist() == [72, 97, 22, 31]
    assert boxes.heights.tolist() == [158, 36, 67, 81] and boxes.widths.tolist() == [78, 91, 89, 160]


def test_distortion():
    expected = [[24.3592, 1, 0.9384, 0, 1.0554], [7.2677, 1.3401, 1, 0, 1], [26.3081, 0.6572, 1, 0, 1]]
    assert np.allclose(choose_distortions(KEYS[:3]), expected, atol=1e-4)


def test_noise_of_erasing():
    assert np.allclose(
        normals(torch.from_numpy(KEYS[:3])),
        [
            [-0.583234, -0.009621, -0.868032],
            [1.171690, 0.748940, -0.399009],
            [-1.317459, 0.039058, 1.861552],
            [0.370819, 1.463351, 1.617918],
        ],
        atol=1e-5,
    )


def test_mixing():
    """Also of numpy's Philox and its Beta distribution, which it may change between versions."""
    config = AugmentConfig(mixup=0.8, cutmix=1.0)
    found = [draw_mixing(make_key(0, Stream.MIX, 3, index), 224, 224, config) for index in range(2, 5)]
    assert [each.box for each in found] == [None, (3, 161, 0, 119), (0, 135, 5, 174)]
    assert [each.share for each in found] == pytest.approx([0.247645, 0.625279, 0.545301], abs=1e-6)
