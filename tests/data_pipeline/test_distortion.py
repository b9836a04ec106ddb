"""Photometric distortion: against HSV arithmetic of the standard library, and a function of each sample's key alone."""

import colorsys

import numpy as np
import pytest
import torch

from data_pipeline.distortion import BRIGHTNESS, HUE, NEUTRAL, choose_distortions, distort
from data_pipeline.randomness import fold, make_key


def keys(count: int) -> np.ndarray:
    return fold(make_key(0, 2), np.arange(count))


def by_hand(pixel: np.ndarray, row: np.ndarray) -> np.ndarray:
    """One pixel, float64 [3] in 0 … 255, through the steps in the published order."""
    shift, before, saturation, turn, after = row.astype(np.float64)
    values = np.clip((np.clip(pixel + shift, 0, 255)) * before, 0, 255)
    hue, purity, value = colorsys.rgb_to_hsv(*(values / 255))
    values = np.array(colorsys.hsv_to_rgb((hue + turn / 360) % 1, min(1, purity * saturation), value)) * 255
    return np.clip(values * after, 0, 255)


def test_equals_hsv_arithmetic():
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (64, 3, 4, 5), np.uint8))
    images[0] = 128  # gray: no hue
    images[1] = 0
    images[2, 0], images[2, 1:] = 255, 0  # saturated already
    rows = choose_distortions(keys(64))
    found = distort(images, keys(64))
    assert found.dtype == torch.float32 and found.is_contiguous()
    for image, row, result in zip(images.numpy(), rows, found.numpy(), strict=True):
        for y in range(4):
            for x in range(5):
                wanted = by_hand(image[:, y, x].astype(np.float64), row)
                np.testing.assert_allclose(result[:, y, x], wanted, atol=2e-3)


def test_choices_have_the_published_distributions():
    rows = choose_distortions(keys(20_000))
    on = rows != np.float32(NEUTRAL)
    np.testing.assert_allclose(on.mean(axis=0), [0.5, 0.25, 0.5, 0.5, 0.25], atol=0.015)
    assert not (on[:, 1] & on[:, 4]).any(), "the contrast changes once"
    assert abs(rows[:, 0]).max() == pytest.approx(BRIGHTNESS, abs=0.1)
    assert abs(rows[:, 3]).max() == pytest.approx(HUE, abs=0.1)
    assert 0.5 <= rows[:, [1, 2, 4]].min() < 0.51 and 1.49 < rows[:, [1, 2, 4]].max() <= 1.5


def test_depends_on_the_samples_key_alone():
    images = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (6, 3, 8, 8), np.uint8))
    before = images.clone()
    together = distort(images.to(memory_format=torch.channels_last), keys(6))
    assert torch.equal(images, before)
    order = [4, 0, 3]
    assert torch.equal(distort(images[order], keys(6)[order]), together[order])


def test_without_any_operation_an_image_stays():
    images = torch.from_numpy(np.random.default_rng(2).integers(0, 256, (400, 3, 2, 2), np.uint8))
    plain = (choose_distortions(keys(400)) == np.float32(NEUTRAL)).all(axis=1)
    assert plain.sum() > 10
    assert torch.equal(distort(images, keys(400))[plain], images[plain].float())
