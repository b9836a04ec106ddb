import math

import numpy as np
import pytest

from data_pipeline.config import AugmentConfig
from data_pipeline.crop import evaluation_windows, training_windows
from data_pipeline.randomness import Stream, fold, make_key


def keys_of(count: int, epoch: int = 0) -> np.ndarray:
    return fold(make_key(0, Stream.CROP, epoch), np.arange(count))


def sizes(count: int, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full(count, width, np.uint16), np.full(count, height, np.uint16)


def test_resized_windows_lie_inside_images_of_all_sizes():
    generator = np.random.default_rng(0)
    small, usual = generator.integers(1, 4, (2, 1000)), generator.integers(1, 700, (2, 20_000))
    extreme = np.array([[1, 1, 65535, 65535], [1, 65535, 1, 65535]])
    widths, heights = np.concatenate([extreme, small, usual], axis=1).astype(np.uint16)
    windows = training_windows(keys_of(len(widths)), widths, heights, AugmentConfig())
    assert windows.dtype == np.int32
    x, y, width, height, _ = windows.T
    assert (width > 0).all()
    assert (height > 0).all()
    assert (x >= 0).all()
    assert (y >= 0).all()
    assert (x + width <= widths).all()
    assert (y + height <= heights).all()


def test_resized_areas_ratios_and_places_are_distributed_as_documented():
    # In a square image with areas of at most one half, every first attempt fits, so area and log ratio stay uniform.
    count = 50_000
    config = AugmentConfig(crop_scale=(0.08, 0.5))
    x, y, width, height, _ = training_windows(keys_of(count), *sizes(count, 1000, 1000), config).T.astype(float)
    area = width * height / 1e6
    assert 0.079 < area.min() < 0.085
    assert 0.495 < area.max() < 0.501
    assert abs(area.mean() - 0.29) < 0.002
    logs = np.log(width / height)
    assert abs(logs.mean()) < 0.003
    assert np.abs(logs).max() < math.log(4 / 3) + 0.01
    assert abs(logs.std() - 2 * math.log(4 / 3) / math.sqrt(12)) < 0.002
    for place in (x / (1000 - width), y / (1000 - height)):
        assert place.min() < 0.01
        assert place.max() > 0.99
        assert abs(place.mean() - 0.5) < 0.005
    assert abs(np.corrcoef(x / (1000 - width), y / (1000 - height))[0, 1]) < 0.02


def test_resized_agrees_with_timm_in_distribution():
    timm = pytest.importorskip("timm.data.transforms")
    torch = pytest.importorskip("torch")
    from PIL import Image

    crop = timm.RandomResizedCropAndInterpolation(224, scale=(0.08, 1.0))
    image = Image.new("RGB", (500, 375))
    torch.manual_seed(0)
    count = 10_000
    # timm returns top, left, height, width.
    theirs = np.array([crop.get_params(image, crop.scale, crop.ratio) for _ in range(count)], float)
    ours = training_windows(keys_of(count), *sizes(count, 500, 375), AugmentConfig()).astype(float)
    for column, their_column in ((0, 1), (1, 0), (2, 3), (3, 2)):
        for share in (5, 25, 50, 75, 95):
            difference = np.percentile(ours[:, column], share) - np.percentile(theirs[:, their_column], share)
            assert abs(difference) < 9


def test_resized_falls_back_to_the_centre():
    config = AugmentConfig(crop_scale=(1.0, 1.0), flip=0)
    windows = training_windows(keys_of(3), np.array([1000, 100, 400]), np.array([100, 1000, 399]), config)
    assert windows[0].tolist() == [433, 0, 133, 100, 0]  # a wide image: its height and 4/3 of that, centred
    assert windows[1].tolist() == [0, 433, 100, 133, 0]  # a high image: its width and 4/3 of that, centred
    assert (windows[2, 2:4] >= 390).all()


def test_resized_is_a_function_of_epoch_and_id_alone():
    config = AugmentConfig()
    whole = training_windows(keys_of(100), *sizes(100, 500, 375), config)
    for number in (0, 57, 99):
        alone = training_windows(keys_of(100)[number : number + 1], *sizes(1, 500, 375), config)
        assert np.array_equal(alone[0], whole[number])
    assert not np.array_equal(whole, training_windows(keys_of(100, epoch=1), *sizes(100, 500, 375), config))


def test_padded_windows_are_every_shift_equally_often():
    windows = training_windows(keys_of(81_000), *sizes(81_000, 32, 32), AugmentConfig(crop="padded", crop_padding=4))
    assert (windows[:, 2:4] == 32).all()
    shifts, counts = np.unique(windows[:, :2], axis=0, return_counts=True)
    assert shifts.tolist() == [[x, y] for x in range(-4, 5) for y in range(-4, 5)]
    assert np.abs(counts - 1000).max() < 160


def test_padding_of_zero_is_the_full_image():
    windows = training_windows(keys_of(5), *sizes(5, 40, 30), AugmentConfig(crop="padded", crop_padding=0, flip=1))
    assert (windows == [0, 0, 40, 30, 1]).all()


@pytest.mark.parametrize("crop", ["resized", "padded", "none"])
def test_flips_have_the_given_probability_and_do_not_change_the_window(crop):
    count = 20_000
    never, sometimes, always = (
        training_windows(keys_of(count), *sizes(count, 500, 375), AugmentConfig(crop=crop, flip=flip))
        for flip in (0, 0.3, 1)
    )
    assert (never[:, 4] == 0).all()
    assert (always[:, 4] == 1).all()
    assert set(sometimes[:, 4].tolist()) == {0, 1}
    assert abs(sometimes[:, 4].mean() - 0.3) < 0.013
    assert np.array_equal(never[:, :4], sometimes[:, :4])
    if crop == "resized":  # flips and windows are independent
        assert all(abs(np.corrcoef(sometimes[:, 4], sometimes[:, column])[0, 1]) < 0.03 for column in range(4))


def test_evaluation_windows():
    windows = evaluation_windows(np.array([500, 375, 256, 1, 32]), np.array([375, 500, 256, 1, 32]), 0.875)
    expected = [[86, 23, 328, 328], [23, 86, 328, 328], [16, 16, 224, 224], [0, 0, 1, 1], [2, 2, 28, 28]]
    assert windows[:, :4].tolist() == expected
    assert (windows[:, 4] == 0).all()
    assert evaluation_windows(np.array([500]), np.array([375]), 1.0).tolist() == [[62, 0, 375, 375, 0]]


def test_none_is_evaluations_crop():
    widths, heights = sizes(4, 500, 375)
    windows = training_windows(keys_of(4), widths, heights, AugmentConfig(crop="none", flip=0), 0.875)
    assert np.array_equal(windows, evaluation_windows(widths, heights, 0.875))


@pytest.mark.parametrize(
    "bad",
    [{"crop_scale": (0.5, 0.1)}, {"crop_ratio": (0.0, 1.0)}, {"crop_ratio": (2.0, 1.0)}, {"std": (0.0, 1.0, 1.0)}],
)
def test_invalid_ranges_are_refused(bad):
    with pytest.raises(ValueError, match="must be"):
        AugmentConfig(**bad)
