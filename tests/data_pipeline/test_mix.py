import numpy as np
import pytest
import torch

from data_pipeline.config import AugmentConfig
from data_pipeline.mix import cutmix_box, mix, smoothed
from data_pipeline.randomness import Stream, make_key

CLASSES = 7


def batch(count: int = 6, height: int = 24, width: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, height, width, generator=generator), torch.randint(
        0, CLASSES, (count,), generator=generator
    )


def key_of(step: int) -> int:
    return make_key(0, Stream.MIX, step, 0)


def one_hot(labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.one_hot(labels, CLASSES).float()


def test_without_mixing_targets_are_one_hot_or_smoothed():
    images, labels = batch()
    found, targets = mix(images, labels, key_of(0), CLASSES, AugmentConfig())
    assert found is images
    assert torch.equal(targets, one_hot(labels))
    targets = mix(images, labels, key_of(0), CLASSES, AugmentConfig(label_smoothing=0.1))[1]
    torch.testing.assert_close(targets, one_hot(labels) * 0.9 + 0.1 / CLASSES)
    torch.testing.assert_close(targets.sum(1), torch.ones(6))


@pytest.mark.parametrize("count", [6, 5, 1])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixup_matches_the_formula(count, smoothing):
    images, labels = batch(count)
    before = images.clone()
    for step in range(20):
        found, targets = mix(images, labels, key_of(step), CLASSES, AugmentConfig(mixup=0.8, label_smoothing=smoothing))
        generator = np.random.Generator(np.random.Philox(key=key_of(step) & (2**64 - 1)))
        generator.random(4)
        share = generator.beta(0.8, 0.8)
        plain = smoothed(labels, CLASSES, smoothing)
        for i in range(count):
            j = count - 1 - i
            torch.testing.assert_close(found[i], share * images[i] + (1 - share) * images[j], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(targets[i], share * plain[i] + (1 - share) * plain[j], rtol=1e-4, atol=1e-6)
    assert torch.equal(images, before)


def test_cutmix_replaces_a_box_and_weights_targets_by_its_area():
    images, labels = batch()
    before = images.clone()
    for step in range(50):
        found, targets = mix(images, labels, key_of(step), CLASSES, AugmentConfig(cutmix=1.0))
        other = images.flip(0)
        replaced = (found != images).all(1)  # [m, H, W]; random floats never coincide
        assert torch.equal(found, torch.where(replaced[:, None], other, images))
        rows, columns = replaced[0].any(1).nonzero()[:, 0], replaced[0].any(0).nonzero()[:, 0]
        area = len(rows) * len(columns)
        assert replaced[0].sum() == area  # a box
        assert (replaced == replaced[0]).all()  # the same for the whole micro-batch
        share = 1 - area / (24 * 32)
        expected = share * one_hot(labels) + (1 - share) * one_hot(labels).flip(0)
        torch.testing.assert_close(targets, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(images, before)


def test_cutmix_box_is_timms(monkeypatch):
    timm = pytest.importorskip("timm.data.mixup")
    generator = np.random.default_rng(0)
    for _ in range(300):
        height, width = generator.integers(8, 300, 2).tolist()
        share, row, column = generator.random(3)
        *box, remaining = cutmix_box(height, width, share, row, column)
        centre = iter((int(row * height), int(column * width)))
        with monkeypatch.context() as patch:
            patch.setattr(timm.np.random, "randint", lambda *_, centre=centre, **__: next(centre))
            expected = timm.rand_bbox((1, 3, height, width), share)
        assert box == [int(value) for value in expected]
        assert remaining == pytest.approx(1 - (box[1] - box[0]) * (box[3] - box[2]) / (height * width))


def test_targets_match_timm():
    timm = pytest.importorskip("timm.data.mixup")
    labels = torch.tensor([0, 3, 6, 2])
    for share in (0.0, 0.3, 1.0):
        plain = smoothed(labels, CLASSES, 0.1)
        expected = timm.mixup_target(labels, CLASSES, share, 0.1)
        torch.testing.assert_close(torch.lerp(plain.flip(0), plain, share), expected)


def kind_of(step: int, config: AugmentConfig) -> str:
    images = torch.stack([torch.zeros(3, 16, 16), torch.ones(3, 16, 16)])
    found, targets = mix(images, torch.tensor([0, 1]), step, 2, config)
    if torch.equal(targets, torch.eye(2)):
        return "none"
    return "cutmix" if ((found == 0) | (found == 1)).all() else "mixup"


def test_probabilities():
    keys = [key_of(step) for step in range(3000)]
    both = AugmentConfig(mixup=0.8, cutmix=1.0, mix_probability=0.5, switch_probability=0.25)
    kinds = [kind_of(key, both) for key in keys]
    assert abs(kinds.count("mixup") / 3000 - 0.375) < 0.04
    assert abs(kinds.count("cutmix") / 3000 - 0.125) < 0.03  # a few of its boxes are empty
    assert {kind_of(key, AugmentConfig(mixup=0.8)) for key in keys[:200]} == {"mixup"}
    only_cutmix = [kind_of(key, AugmentConfig(cutmix=1.0)) for key in keys[:200]]
    assert only_cutmix.count("mixup") == 0 and only_cutmix.count("cutmix") > 150  # the others have empty boxes
    assert {kind_of(key, AugmentConfig(mixup=0.8, cutmix=1.0, mix_probability=0)) for key in keys[:50]} == {"none"}


def test_mixing_is_a_function_of_the_key():
    images, labels = batch()
    config = AugmentConfig(mixup=0.8, cutmix=1.0)
    one, other = mix(images, labels, -5, CLASSES, config), mix(images, labels, -5, CLASSES, config)
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])
    assert not torch.equal(one[0], mix(images, labels, -6, CLASSES, config)[0])
