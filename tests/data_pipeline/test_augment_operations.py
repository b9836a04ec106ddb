"""Compare every operation with timm's (Pillow) and torchvision's, on the same pixels at the same level."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from data_pipeline.augment import GEOMETRIC, apply
from data_pipeline.augment_choices import (
    OPERATIONS,
    ChosenOperations,
    argument,
    choose_color_jitter,
    choose_rand_augment,
    parse_rand_augment,
)
from tests.data_pipeline.shards import picture

timm = pytest.importorskip("timm.data.auto_augment")

MEAN = (0.485, 0.456, 0.406)
FILL = (124, 116, 104)  # timm's conversion of MEAN
# timm's names for variants that compute the same pixels from other arguments. We use one name for them.
INCREASING = {
    name: f"{name}Increasing" for name in ("Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness")
}
RELATIVE = {"TranslateX": "TranslateXRel", "TranslateY": "TranslateYRel"}
LEVELS = (0.0, 0.6, 3.0, 7.77, 9.0, 9.4, 10.0)


def images_of(size: int) -> np.ndarray:
    """Smooth, noisy, dark, bright and flat pictures, and some with few levels: uint8 [n, size, size, 3]."""
    generator = np.random.default_rng(size)
    smooth = [picture(number, size, size) for number in range(3)]
    noise = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
    grainy = np.clip(smooth[0].astype(int) + generator.integers(-40, 40, (size, size, 3)), 0, 255)
    one_channel = np.stack([smooth[1][..., 0], np.full((size, size), 77), noise[..., 0] // 128], -1)
    flat = [np.full((size, size, 3), value) for value in (0, 128, 255)]
    dark, bright, few_levels = smooth[1] // 3, 255 - smooth[2] // 4, noise // 128 * 255
    return np.stack([*smooth, noise, grainy, dark, bright, few_levels, one_channel, *flat]).astype(np.uint8)


def tensor_of(images: np.ndarray) -> torch.Tensor:
    """[n, 3, S, S] in channels-last memory, as from the loader."""
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def array_of(images: torch.Tensor) -> np.ndarray:
    return images.permute(0, 2, 3, 1).numpy()


def with_pillow(name: str, image: np.ndarray, value: float) -> np.ndarray:
    """timm's operation on one image, with one of our arguments."""
    function = timm.NAME_TO_OP[RELATIVE.get(name, name)]
    values = () if timm.LEVEL_TO_ARG[RELATIVE.get(name, name)] is None else (value,)
    if name in ("Posterize", "Solarize", "SolarizeAdd"):
        values = (int(value),)
    return np.asarray(function(Image.fromarray(image), *values, fillcolor=FILL, resample=Image.Resampling.BICUBIC))


@pytest.mark.parametrize("increasing", [False, True])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("name", OPERATIONS)
def test_arguments_are_timms(monkeypatch, name, sign, increasing):
    monkeypatch.setattr(timm, "_randomly_negate", lambda value: sign * value)
    rule = timm.LEVEL_TO_ARG[INCREASING.get(name, name) if increasing else RELATIVE.get(name, name)]
    if name in RELATIVE:
        rule = timm.LEVEL_TO_ARG[RELATIVE[name]]
    levels = np.linspace(0, 10, 401)
    found = argument(name, levels, np.full(401, sign), increasing)
    if rule is None:
        assert not found.any()
        return
    expected = np.array([rule(level, {})[0] for level in levels.tolist()])
    if name == "Posterize":  # new releases of Pillow refuse 0 bits, so we keep one bit
        assert (expected == 0).any()
        expected = np.maximum(expected, 1)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("size", [64, 37])
@pytest.mark.parametrize("name", OPERATIONS)
def test_pixels_are_timms(name, size):
    images = images_of(size)
    before = tensor_of(images.copy())
    different = total = 0
    arguments = {
        argument(name, np.array([level]), np.array([sign]), True)[0] for level in LEVELS for sign in (1.0, -1.0)
    }
    for value in sorted(arguments):
        chosen = ChosenOperations(np.full(len(images), OPERATIONS.index(name)), np.full(len(images), value))
        found = array_of(apply(before, [chosen], MEAN)).astype(int)
        expected = np.stack([with_pillow(name, source, value) for source in images])
        difference = np.abs(found - expected)
        if name in GEOMETRIC:
            assert difference.max() <= 1
            assert not difference[-3:].any()  # the flat ones
            different, total = different + (difference > 0).sum(), total + difference.size
        else:
            assert not difference.any(), value
    if name in GEOMETRIC:
        assert different < 0.005 * total
    assert np.array_equal(array_of(before), images)


def test_geometric_operations_are_exact_at_zero_and_at_whole_pixels():
    images = images_of(64)
    for name in GEOMETRIC:
        chosen = ChosenOperations(np.full(len(images), OPERATIONS.index(name)), np.zeros(len(images)))
        assert np.array_equal(array_of(apply(tensor_of(images), [chosen], MEAN)), images), name
    for name, axis in (("TranslateX", 2), ("TranslateY", 1)):
        chosen = ChosenOperations(np.full(len(images), OPERATIONS.index(name)), np.full(len(images), 0.25))
        found = array_of(apply(tensor_of(images), [chosen], MEAN))
        kept, new = (slice(None),) * axis + (slice(48),), (slice(None),) * axis + (slice(48, None),)
        assert np.array_equal(found[kept], images[(slice(None),) * axis + (slice(16, None),)])
        assert (found[new] == FILL).all()


def test_operations_of_a_batch_are_applied_in_sequence_as_in_timm():
    """Compare RandAugment on a batch with Pillow, image by image; bit-identical without geometric operations."""
    count = 300
    images = np.concatenate([images_of(32)] * 25)
    rounds = choose_rand_augment(np.arange(count), parse_rand_augment("rand-m9-n3-mstd0.5-p0.7-inc1"))
    found = array_of(apply(tensor_of(images), rounds, MEAN))
    exact = 0
    for i in range(count):
        names = [OPERATIONS[chosen.operations[i]] for chosen in rounds if chosen.operations[i] >= 0]
        image = images[i]
        for chosen in rounds:
            if chosen.operations[i] >= 0:
                image = with_pillow(OPERATIONS[chosen.operations[i]], image, chosen.arguments[i])
        if any(name in GEOMETRIC for name in names):
            assert (np.abs(found[i].astype(int) - image) > 1).mean() < 0.02, names
        else:
            assert np.array_equal(found[i], image), names
            exact += 1
    assert exact > 80


def test_color_jitter_is_torchvisions():
    functional = pytest.importorskip("torchvision.transforms.functional")
    adjust = {
        "Brightness": functional.adjust_brightness,
        "Contrast": functional.adjust_contrast,
        "Color": functional.adjust_saturation,
    }
    images = np.concatenate([images_of(32)] * 5)
    rounds = choose_color_jitter(np.arange(len(images)), 0.4)
    found = array_of(apply(tensor_of(images), rounds, MEAN))
    for i, source in enumerate(images):
        image = Image.fromarray(source)
        for chosen in rounds:
            image = adjust[OPERATIONS[chosen.operations[i]]](image, chosen.arguments[i])
        assert np.array_equal(found[i], np.asarray(image))


@pytest.mark.parametrize("name", ["Brightness", "Contrast", "Color", "Sharpness"])
def test_enhancements_with_unusual_factors(name):
    images = images_of(40)
    for factor in (0.0, 1.0, 2.0, 7.5):
        chosen = ChosenOperations(np.full(len(images), OPERATIONS.index(name)), np.full(len(images), factor))
        found = array_of(apply(tensor_of(images), [chosen], MEAN))
        for image, source in zip(found, images, strict=True):
            assert np.array_equal(
                image, np.asarray(getattr(ImageEnhance, name)(Image.fromarray(source)).enhance(factor))
            )
