"""Multi-scale, mirrored and sliding evaluation against a slow version, written pixel by pixel where it matters."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from train.config import load_config
from train.tasks.segmentation.inference import Inference, _best, _windows

CLASSES = 5


class Network(nn.Module):
    """Logits of a quarter of the image's sides, which depend on a neighbourhood and on what is left and right."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 5, 4, 2), nn.ReLU(), nn.Conv2d(8, CLASSES, 3, 1, 1))
        self.shapes = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(images.shape))
        return self.layers(images)


def slow_interpolate(logits: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear between pixels' centres, [C, h, w] → [C, *size], in float64."""
    for axis, count in ((1, size[0]), (2, size[1])):
        length = logits.shape[axis]
        places = np.clip((np.arange(count) + 0.5) * length / count - 0.5, 0, length - 1)
        low = np.floor(places).astype(int)
        high, part = np.minimum(low + 1, length - 1), places - low
        part = part.reshape([-1 if at == axis else 1 for at in range(3)])
        logits = logits.take(low, axis) * (1 - part) + logits.take(high, axis) * part
    return logits


def slow_sliding(network: nn.Module, image: torch.Tensor, window: tuple[int, int], stride: tuple[int, int]):
    """Logits [C, H, W]: a window after the other; each pixel is divided by the number of windows that it is in."""
    height, width = image.shape[1:]
    total, count = np.zeros((CLASSES, height, width)), np.zeros((height, width))
    tops = sorted({min(y, max(height - window[0], 0)) for y in range(0, height + stride[0], stride[0])})
    lefts = sorted({min(x, max(width - window[1], 0)) for x in range(0, width + stride[1], stride[1])})
    for top in tops:
        for left in lefts:
            part = image[:, top : top + window[0], left : left + window[1]]
            logits = network(part[None])[0].double().numpy()
            found = slow_interpolate(logits, tuple(part.shape[1:]))
            total[:, top : top + window[0], left : left + window[1]] += found
            count[top : top + window[0], left : left + window[1]] += 1
    return total / count


def slow(network, config, images: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    """Probabilities [m, C, h, w]."""
    settings, results = config.task, []
    for image in images:
        sums = np.zeros((CLASSES, *size))
        for ratio in settings.test_ratios:
            factor = ratio * min(
                settings.test_scale[0] / max(size), settings.test_scale[1] / min(size)
            )  # as the image's own size is resized
            shape = [-(-int(side * factor + 0.5) // settings.divisor) * settings.divisor for side in size]
            scaled = F.interpolate(image[None].float(), size=shape, mode="bilinear", antialias=True)[0]
            mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.augment.mean, config.augment.std))
            scaled = (scaled / 255 - mean) / std
            for mirrored in (False, True)[: 1 + settings.test_flip]:
                seen = scaled.flip(2) if mirrored else scaled
                if settings.test == "slide":
                    logits = slow_sliding(network, seen, settings.window_sides, settings.strides)
                else:
                    logits = network(seen[None])[0].double().numpy()
                logits = slow_interpolate(logits, size)
                exponents = np.exp(logits - logits.max(0))
                probabilities = exponents / exponents.sum(0)
                sums += probabilities[:, :, ::-1] if mirrored else probabilities
        results.append(sums)
    return np.stack(results)


SETTINGS = {
    "whole": [],
    "flip": ["task.test_flip=true"],
    "scales": ["task.test_ratios=[0.5,1.0,1.75]", "task.divisor=8"],
    "slide": ["task.test=slide", "task.window=[40,32]", "task.stride=[24,32]"],
    "slide, scales, flip": ["task.test=slide", "task.window=[64,64]", "task.test_ratios=[0.5,1.5]", "task.test_flip=1"],
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_it_finds_what_the_slow_version_finds(segment_config, settings):
    config = load_config(segment_config, ["task.test_scale=[96,64]", *settings])
    network, size = Network(), (70, 93)
    inference = Inference(config)
    random = torch.Generator().manual_seed(1)
    largest = max(config.task.test_ratios)
    rows = [-(-int(side * largest * min(96 / 93, 64 / 70) + 0.5) // config.task.divisor) for side in size]
    shape = [side * config.task.divisor for side in rows]
    coarse = torch.randint(0, 256, (2, 3, 9, 11), generator=random).float()
    images = F.interpolate(coarse, size=shape, mode="bicubic").clamp(0, 255).byte()
    with torch.no_grad():
        found = inference(network, images, size).numpy()
        expected = slow(network, config, images, size)
    assert found.shape == (2, *size) and len(np.unique(found)) > 2
    order = np.sort(expected, axis=1)
    clear = order[:, -1] - order[:, -2] > 1e-5  # where rounding cannot decide
    assert clear.mean() > 0.99
    assert np.array_equal(found[clear], expected.argmax(1)[clear])


def test_the_network_is_called_once_a_pass_with_whole_images(segment_config):
    """As often for every image: at ZeRO 3 all ranks must call it equally often."""
    config = load_config(segment_config, ["task.test_scale=[96,64]", "task.test_ratios=[0.5,1.0]", "task.test_flip=1"])
    network = Network()
    Inference(config)(network, torch.zeros(3, 3, 64, 96, dtype=torch.uint8), (64, 96))
    assert network.shapes == [(3, 3, 32, 48)] * 2 + [(3, 3, 64, 96)] * 2


@pytest.mark.parametrize(
    ("size", "side", "stride"), [(96, 32, 21), (96, 96, 64), (40, 64, 42), (97, 32, 32), (33, 32, 1)]
)
def test_windows_cover_a_side_and_end_at_its_border(size, side, stride):
    places = [rows for rows, _ in _windows((size, 8), (side, 8), (stride, 8))]
    covered = np.zeros(size, int)
    for place in places:
        covered[place] += 1
        assert place.stop - place.start == min(side, size)
    assert covered.min() >= 1 and places[0].start == 0 and places[-1].stop == size


def test_many_classes_are_compared_in_parts():
    torch.manual_seed(0)
    logits = torch.randn(1, 100, 5, 6)
    logits[0, 3] += 3
    logits[0, 70] = logits[0, 3]  # equal ones: the first
    whole, found = F.interpolate(logits, size=(13, 17), mode="bilinear"), _best(logits, (13, 17))
    assert torch.equal(found, whole.argmax(1)) and (found == 3).any()
