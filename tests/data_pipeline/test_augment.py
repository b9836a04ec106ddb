import math

import numpy as np
import pytest
import torch

from benchmarks import augment as benchmark
from data_pipeline import augment as module
from data_pipeline.augment import augment, normalise, operate, sample_keys
from data_pipeline.augment_choices import OPERATIONS, erasing_boxes
from data_pipeline.config import AugmentConfig
from data_pipeline.randomness import Stream, fold, normals, uniform

PLAIN = AugmentConfig()
EVERYTHING = AugmentConfig(rand_augment="rand-m9-n3-mstd0.5-p0.7-inc1", color_jitter=0.4, erasing=0.5)


def images_of(count: int, size: int = 32, width: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, size, width or size), generator=generator, dtype=torch.uint8)


def keys_of(count: int, epoch: int = 0) -> np.ndarray:
    return sample_keys(0, epoch, np.arange(count))


def test_normalise():
    images = images_of(4)
    mean, std = torch.tensor(PLAIN.mean).view(3, 1, 1), torch.tensor(PLAIN.std).view(3, 1, 1)
    found = normalise(images, PLAIN)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, (images / 255 - mean) / std, rtol=1e-5, atol=1e-5)
    assert torch.equal(augment(images, keys_of(4), PLAIN), found)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_input_is_not_modified(memory_format):
    images = images_of(40).contiguous(memory_format=memory_format)
    before = images.clone()
    found = augment(images, keys_of(40), EVERYTHING)
    assert torch.equal(images, before)
    assert found.is_contiguous()


def erase_one(image: torch.Tensor, key: np.int64, probability: float, mode: str) -> torch.Tensor:
    """A reference: timm's RandomErasing for one image, written as a loop over attempts."""
    _, image_height, image_width = image.shape
    draws = uniform(fold(np.array([key]), Stream.ERASE), 23)[0].tolist()
    image = image.clone()
    if draws[22] >= probability:
        return image
    for attempt in range(10):
        area = (0.02 + (1 / 3 - 0.02) * draws[attempt]) * image_height * image_width
        aspect = math.exp(math.log(0.3) + (math.log(1 / 0.3) - math.log(0.3)) * draws[10 + attempt])
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height < image_height and width < image_width:
            top, left = int(draws[20] * (image_height - height + 1)), int(draws[21] * (image_width - width + 1))
            noise_key = torch.from_numpy(fold(np.array([key]), Stream.ERASE_NOISE))
            noise = normals(noise_key, torch.arange(image_height * image_width))[:3].view(image.shape)
            if mode == "const":
                noise = torch.zeros_like(noise)
            image[:, top : top + height, left : left + width] = noise[:, top : top + height, left : left + width]
            break
    return image


@pytest.mark.parametrize(("size", "width"), [(32, 32), (16, 40), (40, 9)])
@pytest.mark.parametrize("probability", [0.25, 1.0])
@pytest.mark.parametrize("mode", ["pixel", "const"])
def test_erasing_matches_the_loop(size, width, probability, mode):
    images, keys = images_of(100, size, width), keys_of(100)
    found = augment(images, keys, AugmentConfig(erasing=probability, erasing_mode=mode))
    for before, key, after in zip(normalise(images, PLAIN), keys, found, strict=True):
        torch.testing.assert_close(after, erase_one(before, key, probability, mode), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["pixel", "const"])
def test_erasing_all_boxes_together_gives_the_same_result(mode):
    """Runs the implementation for GPUs on the CPU."""
    images, keys = normalise(images_of(100, 32, 40), PLAIN), keys_of(100)
    boxes = erasing_boxes(keys, 0.5, 32, 40)
    noise_keys = fold(keys[boxes.rows], Stream.ERASE_NOISE)
    one, other = images.clone(), images.clone()
    module._erase_one_by_one(one, noise_keys, boxes, mode)
    module._erase_together(other, noise_keys, boxes, mode)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert not torch.equal(one, images)


def test_erased_boxes():
    images = torch.zeros(4000, 3, 32, 32, dtype=torch.uint8)
    erased = augment(images, keys_of(4000), AugmentConfig(erasing=0.25, mean=(0, 0, 0), std=(1, 1, 1)))
    inside = erased != 0
    counts = inside[:, 0].sum((1, 2))
    assert abs((counts > 0).float().mean() - 0.25) < 0.03
    areas = counts[counts > 0] / 32**2
    assert areas.min() > 0.01
    assert areas.max() < 0.36
    assert abs(areas.mean() - 0.17) < 0.02
    values = erased[inside]
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01


def test_erasing_is_last_and_its_boxes_do_not_depend_on_the_other_operations():
    images, keys = images_of(60), keys_of(60)
    whole = augment(images, keys, EVERYTHING)
    unerased = augment(images, keys, EVERYTHING.model_copy(update={"erasing": 0.0}))
    only_erased = augment(images, keys, AugmentConfig(erasing=0.5))
    changed = only_erased != normalise(images, PLAIN)
    assert torch.equal(torch.where(changed, only_erased, unerased), whole)


@pytest.mark.parametrize(
    "config",
    [
        AugmentConfig(rand_augment="rand-m9-mstd0.5-inc1"),
        AugmentConfig(color_jitter=0.4),
        AugmentConfig(erasing=0.5),
        EVERYTHING,
    ],
)
def test_a_sample_does_not_depend_on_its_neighbours_or_memory_layout(config):
    images, keys = images_of(60, 35), keys_of(60)
    whole = augment(images, keys, config)
    order = np.random.default_rng(0).permutation(60)
    assert torch.equal(augment(images[order], keys[order], config), whole[order])
    for row in range(5):
        assert torch.equal(augment(images[row : row + 1], keys[row : row + 1], config), whole[row : row + 1])
    assert torch.equal(augment(images.contiguous(memory_format=torch.channels_last), keys, config), whole)
    assert not torch.equal(augment(images, keys_of(60, epoch=1), config), whole)


def test_the_usual_recipe_leaves_a_quarter_of_the_images_unchanged():
    images, config = images_of(400, 16), AugmentConfig(rand_augment="rand-m9-mstd0.5-inc1")
    unchanged = (augment(images, keys_of(400), config) == normalise(images, config)).flatten(1).all(1)
    assert 0.18 < unchanged.float().mean() < 0.34  # neither of two operations, each with probability 1/2


def test_the_host_reads_no_value_from_the_device():
    """Tensors on the meta device have no values, so operations that make the host wait for a GPU raise there."""
    found = augment(images_of(64).to("meta"), keys_of(64), EVERYTHING)
    assert found.shape == (64, 3, 32, 32)
    assert found.device.type == "meta"


def test_the_benchmark_runs_every_operation_in_every_round(monkeypatch):
    calls = []

    def counted(name: str, images: torch.Tensor, *arguments: torch.Tensor) -> torch.Tensor:
        calls.append((name, len(images)))
        return operate(name, images, *arguments)

    monkeypatch.setattr(benchmark, "operate", counted)
    costs = benchmark.operation_costs(size=16, rounds=2)
    assert list(costs) == [*OPERATIONS, "normalise", "erasing", "recipe"]
    assert calls == 3 * [(name, benchmark.GROUP) for name in OPERATIONS]  # a warm-up and two rounds


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_agrees_and_does_not_wait():
    images, keys = images_of(64), keys_of(64)
    on_device = images.cuda()
    augment(on_device, keys, EVERYTHING)  # fill the caches of constants
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = augment(on_device, keys, EVERYTHING)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = augment(images, keys, EVERYTHING)
    assert ((found.cpu() - expected).abs() > 0.05).float().mean() < 0.02
