"""Cost of the augmentation recipe, per image and operation; `launch/bench.py data` prints it."""

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from data_pipeline.augment import augment, normalise, operate, sample_keys
from data_pipeline.augment_choices import OPERATIONS, argument, parse_rand_augment
from data_pipeline.config import AugmentConfig
from train.engine.flops import finish

RECIPE = AugmentConfig(rand_augment="rand-m9-mstd0.5-inc1", erasing=0.25)
BATCH = 64
GROUP = 2  # average number of images in a batch that share an operation in one of RandAugment's two steps


def operation_costs(
    size: int = 224, config: AugmentConfig = RECIPE, device: str = "cpu", rounds: int = 15
) -> dict[str, float]:
    """Milliseconds per image of size x size pixels: medians over `rounds`, in each of which all operations run in turn.

    Keys: RandAugment's operations, at the config's magnitude; "normalise"; "erasing", of an image that is erased; and
    "recipe", all of `augment`. The images are noise, because the cost hardly depends on the content. The caller sets
    the number of threads.
    """
    generator = torch.Generator().manual_seed(0)
    # Channels-last, as from the loader.
    images = (
        torch.randint(0, 256, (BATCH, size, size, 3), dtype=torch.uint8, generator=generator)
        .to(device)
        .permute(0, 3, 1, 2)
    )
    plain = AugmentConfig()
    calls = {name: (_operation(name, images[:GROUP].contiguous(), config), GROUP) for name in OPERATIONS}
    calls["normalise"] = (lambda number: normalise(images, plain), BATCH)
    calls["erasing"] = (_recipe(images, AugmentConfig(erasing=1, erasing_mode=config.erasing_mode)), BATCH)
    calls["recipe"] = (_recipe(images, config), BATCH)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, (call, count) in calls.items():
            times[name].append(_milliseconds(call, number, images.device) / count)
    costs = {name: statistics.median(values[1:]) for name, values in times.items()}  # the first round warmed up
    costs["erasing"] -= costs["normalise"]
    return costs


def _operation(name: str, images: Tensor, config: AugmentConfig) -> Callable[[int], Tensor]:
    """A function that applies an operation; its direction alternates with the argument."""
    settings = parse_rand_augment(config.rand_augment)
    level = np.full(len(images), min(float(settings.magnitude), 10.0))
    arguments = [argument(name, level, np.full(len(images), sign), settings.increasing) for sign in (1.0, -1.0)]
    arguments = [torch.from_numpy(values).to(images.device) for values in arguments]
    fill = torch.full((3,), 128.0, device=images.device)
    return lambda number: operate(name, images, arguments[number % 2], fill)


def _recipe(images: Tensor, config: AugmentConfig) -> Callable[[int], Tensor]:
    """A function that applies the whole recipe; its argument is the epoch."""
    return lambda number: augment(images, sample_keys(0, number, np.arange(len(images))), config)


def _milliseconds(call: Callable[[int], Tensor], number: int, device: torch.device) -> float:
    finish(device)
    start = time.perf_counter()
    call(number)
    finish(device)
    return 1e3 * (time.perf_counter() - start)
