import math

import pytest
import torch

from data_pipeline import augment as module
from data_pipeline.augment import augment, normalise, sample_keys
from data_pipeline.config import AugmentConfig
from data_pipeline.randomness import Stream, fold, normal, uniform

PLAIN = AugmentConfig(flip=0)


def images_of(count: int, size: int = 32, width: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, size, width or size), generator=generator, dtype=torch.uint8)


def keys_of(count: int, epoch: int = 0) -> torch.Tensor:
    return sample_keys(0, epoch, torch.arange(count))


def test_normalise():
    images = images_of(4)
    mean, std = torch.tensor(PLAIN.mean).view(3, 1, 1), torch.tensor(PLAIN.std).view(3, 1, 1)
    found = normalise(images, PLAIN)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, (images / 255 - mean) / std, rtol=1e-5, atol=1e-5)
    assert torch.equal(augment(images, keys_of(4), PLAIN), found)


def test_input_is_left_alone():
    images = images_of(8)
    before = images.clone()
    augment(images, keys_of(8), AugmentConfig(flip=1, erasing=1))
    assert torch.equal(images, before)


def test_flip_is_per_sample_and_horizontal():
    images = images_of(2000, 4)
    plain, found = normalise(images, PLAIN), augment(images, keys_of(2000), AugmentConfig(flip=0.3))
    flipped = 0
    for before, after in zip(plain, found, strict=False):
        mirrored = torch.equal(after, before.flip(-1))
        assert mirrored or torch.equal(after, before)
        flipped += mirrored
    assert 520 < flipped < 680
    assert torch.equal(augment(images, keys_of(2000), AugmentConfig(flip=1)), plain.flip(-1))


def erase_one(image: torch.Tensor, key: torch.Tensor, probability: float) -> torch.Tensor:
    """timm's RandomErasing for one image, written as a loop, with the draws that the module documents."""
    _, image_height, image_width = image.shape
    draws = uniform(fold(key[None], Stream.ERASE), 23)[0].double().tolist()
    image = image.clone()
    if draws[22] >= probability:
        return image
    for attempt in range(10):
        area = (0.02 + (1 / 3 - 0.02) * draws[attempt]) * image_height * image_width
        aspect = math.exp(math.log(0.3) + (math.log(1 / 0.3) - math.log(0.3)) * draws[10 + attempt])
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height < image_height and width < image_width:
            top, left = int(draws[20] * (image_height - height + 1)), int(draws[21] * (image_width - width + 1))
            noise = normal(fold(key[None], Stream.ERASE_NOISE), torch.arange(image.numel())).view(image.shape)
            image[:, top : top + height, left : left + width] = noise[:, top : top + height, left : left + width]
            break
    return image


@pytest.mark.parametrize(("size", "width"), [(32, 32), (16, 40), (40, 9)])
@pytest.mark.parametrize("probability", [0.25, 1.0])
def test_erasing_matches_the_loop(size, width, probability):
    images, keys = images_of(200, size, width), keys_of(200)
    found = augment(images, keys, AugmentConfig(flip=0, erasing=probability))
    for before, key, after in zip(normalise(images, PLAIN), keys, found, strict=False):
        torch.testing.assert_close(after, erase_one(before, key, probability), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("probability", [0.25, 1.0])
def test_erasing_on_the_gpu_path_is_the_same(probability):
    """The path without indexing, which GPUs take, run on the CPU."""
    images, keys = normalise(images_of(100), PLAIN), keys_of(100)
    chosen, top, left, height, width = module._boxes(keys, probability, 32, 32)
    found = module._fill_boxes(images.clone(), keys, top, left, torch.where(chosen, height, 0), width)
    assert torch.equal(found, module._erase(images.clone(), keys, probability))


def test_erased_boxes():
    images = torch.zeros(4000, 3, 32, 32, dtype=torch.uint8)
    config = AugmentConfig(flip=0, erasing=0.25, mean=(0, 0, 0), std=(1, 1, 1))
    erased = augment(images, keys_of(4000), config) != 0
    counts = erased[:, 0].sum((1, 2))
    assert abs((counts > 0).float().mean() - 0.25) < 0.03
    areas = counts[counts > 0] / 32**2
    assert areas.min() > 0.01
    assert areas.max() < 0.36
    assert abs(areas.mean() - 0.17) < 0.02
    values = augment(images, keys_of(4000), config)[erased]
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01


@pytest.mark.parametrize("config", [AugmentConfig(erasing=0.5), AugmentConfig(flip=0.5)])
def test_a_sample_does_not_depend_on_its_neighbours_or_memory_layout(config):
    images, keys = images_of(50), keys_of(50)
    whole = augment(images, keys, config)
    order = torch.randperm(50)
    assert torch.equal(augment(images[order], keys[order], config), whole[order])
    assert torch.equal(augment(images[7:8], keys[7:8], config), whole[7:8])
    assert torch.equal(augment(images.contiguous(memory_format=torch.channels_last), keys, config), whole)
    assert not torch.equal(augment(images, keys_of(50, epoch=1), config), whole)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_agrees_and_does_not_wait():
    images, keys = images_of(64), keys_of(64)
    config = AugmentConfig(erasing=0.5)
    on_device = images.cuda(), keys.cuda()
    augment(*on_device, config)  # fills the cache of constants
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = augment(*on_device, config)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found.cpu(), augment(images, keys, config), rtol=1e-4, atol=1e-5)
