"""The recipe on a GPU, as PyTorch's operators and as kernels: launches, times, and whether the results are equal.

    python -m benchmarks.gpu.recipe [--json FILE]

Every row is printed, and written to FILE as a line of JSON, as soon as it is measured.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from data_pipeline.augment import apply, augment, sample_keys
from data_pipeline.augment_choices import OPERATIONS, ChosenOperations, argument
from data_pipeline.config import AugmentConfig
from data_pipeline.mix import mix
from data_pipeline.recipe.program import program_of, program_of_rounds

RECIPE = AugmentConfig(rand_augment="rand-m9-mstd0.5-inc1", erasing=0.25, mixup=0.8, cutmix=1.0, label_smoothing=0.1)
RECIPES = {"default": RECIPE, "with jitter": RECIPE.model_copy(update={"color_jitter": 0.4})}
SIZES = ((128, 224, 1000), (1024, 32, 10))  # images, side, classes
BLOCKS = (128, 256, 512)  # pixels of a program
ROUNDS = 20

Inputs = tuple[Tensor, Tensor]


def gpu_recipe(device: torch.device) -> Iterator[dict]:
    """A row for each measurement; the images are noise, channels-last, as from the loader."""
    yield from differences(device)
    for count, size, classes in SIZES:
        images, labels = batch_of(count, size, classes, device)
        for name, config in RECIPES.items():
            ways = {
                "plain": plain(images, labels, classes, config),
                "kernels": kernels(images, labels, classes, config),
            }
            where = dict(images=count, size=size, recipe=name)
            yield dict(where, kind="equal", **largest_difference(ways["plain"], ways["kernels"]))
            for way, call in ways.items():
                yield dict(where, kind="time", way=way, **costs(call, device))
        yield from block_times(images, labels, classes)


def batch_of(count: int, size: int, classes: int, device: torch.device) -> Inputs:
    """Images uint8 [count, 3, size, size], channels-last in memory, and labels int64 [count]."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, classes, (count,), generator=generator)
    return images.to(device).permute(0, 3, 1, 2), labels.to(device)


def plain(images: Tensor, labels: Tensor, classes: int, config: AugmentConfig) -> Callable[[int], Inputs]:
    """A function of the micro-batch's number."""

    def call(number: int) -> Inputs:
        keys = sample_keys(0, number, np.arange(len(images)))
        return mix(augment(images, keys, config), labels, number, classes, config)

    return call


def kernels(images: Tensor, labels: Tensor, classes: int, config: AugmentConfig) -> Callable[[int], Inputs]:
    """A function of the micro-batch's number."""
    from data_pipeline.recipe.launch import run_program

    def call(number: int) -> Inputs:
        program = program_of(sample_keys(0, number, np.arange(len(images))), number, images.shape[3], config)
        return run_program(images, labels, program, classes, config)

    return call


def costs(call: Callable[[int], Inputs], device: torch.device) -> dict:
    """launches and copies to the device of a call; kernel_ms: the sum of its kernels' times; host_ms: until it returns.

    together_ms: a call's time when many are queued. Means over ROUNDS micro-batches; host_ms is a median.
    """
    for number in range(3):
        call(number)
    torch.cuda.synchronize(device)
    host = []
    for number in range(ROUNDS):
        began = time.perf_counter()
        call(number)
        host.append(1e3 * (time.perf_counter() - began))
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    for number in range(ROUNDS):
        call(number)
    torch.cuda.synchronize(device)
    together = 1e3 * (time.perf_counter() - began) / ROUNDS
    events = device_events(call, device)
    copies = [event for event in events if event[0].startswith(("Memcpy", "Memset"))]
    by_name: dict[str, float] = {}
    for name, milliseconds in events:
        by_name[name.split("(")[0][:60]] = by_name.get(name.split("(")[0][:60], 0.0) + milliseconds / ROUNDS
    top = dict(sorted(by_name.items(), key=lambda item: -item[1])[:6])
    return dict(
        launches=round((len(events) - len(copies)) / ROUNDS, 1),
        copies=round(len(copies) / ROUNDS, 1),
        kernel_ms=round(sum(milliseconds for _, milliseconds in events) / ROUNDS, 4),
        host_ms=round(statistics.median(host), 3),
        together_ms=round(together, 3),
        top={name: round(milliseconds, 4) for name, milliseconds in top.items()},
    )


def device_events(call: Callable[[int], Inputs], device: torch.device) -> list[tuple[str, float]]:
    """Name and milliseconds of what the device did in ROUNDS calls."""
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for number in range(ROUNDS):
            call(number)
        torch.cuda.synchronize(device)
    events = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    return [(event.name, event.time_range.elapsed_us() / 1e3) for event in events]


def block_times(images: Tensor, labels: Tensor, classes: int) -> Iterator[dict]:
    """The kernels' times with other numbers of pixels per program."""
    from data_pipeline.recipe import launch

    usual, call = launch.BLOCK, kernels(images, labels, classes, RECIPE)
    for block in BLOCKS:
        launch.BLOCK = block
        call(0)
        events = device_events(call, images.device)
        times = {name: sum(ms for other, ms in events if other == name) / ROUNDS for name, _ in events}
        found = {name: round(ms, 4) for name, ms in times.items() if name in ("apply_round", "finish_images")}
        yield dict(kind="block", images=len(images), size=images.shape[3], block=block, **found)
    launch.BLOCK = usual


def largest_difference(one: Callable[[int], Inputs], other: Callable[[int], Inputs]) -> dict:
    """Over ROUNDS micro-batches: the largest difference, and the share of values that differ at all and by > 1e-5."""
    largest = different = far = target = 0.0
    for number in range(ROUNDS):
        (images, targets), (others, other_targets) = one(number), other(number)
        difference = (images - others).abs()
        largest, target = (
            max(largest, difference.max().item()),
            max(target, (targets - other_targets).abs().max().item()),
        )
        different += (difference > 0).float().mean().item() / ROUNDS
        far += (difference > 1e-5).float().mean().item() / ROUNDS
    return dict(largest=largest, different=different, far=far, targets=target)


def differences(device: torch.device) -> Iterator[dict]:
    """For each operation, at 64 levels: how far the kernels are from the operators on the device and on the CPU."""
    images, _ = batch_of(64, 96, 10, device)
    # Smooth images, too: noise alone would hide errors of interpolation.
    smooth = torch.nn.functional.avg_pool2d(images[::2].float(), 9, 1, 4).to(torch.uint8)
    images = torch.cat([images[::2], smooth])
    levels, signs = np.linspace(0, 10, 64), np.where(np.arange(64) % 2, 1.0, -1.0)
    for place, name in enumerate(OPERATIONS):
        chosen = ChosenOperations(np.full(64, place), argument(name, levels, signs, True))
        row = dict(kind="operation", operation=name)
        found = apply_one(images, chosen).int()
        for where, expected in (
            ("device", apply(images, [chosen], RECIPE.mean)),
            ("cpu", apply(images.cpu(), [chosen], RECIPE.mean).to(device)),
        ):
            difference = (found - expected.int()).abs()
            row |= {f"{where}_max": difference.max().item(), f"{where}_share": (difference > 0).float().mean().item()}
        yield row


def apply_one(images: Tensor, chosen: ChosenOperations) -> Tensor:
    """One round of operations by the kernels: uint8 [m, 3, S, S] → the same."""
    from data_pipeline.recipe.launch import apply_rounds, to_device

    program = program_of_rounds([chosen], len(images))
    return apply_rounds(images, to_device(program, images.device), program, RECIPE)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The recipe on a GPU: launches, times, equality.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write each row as a line of JSON, too")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("there is no GPU")
    device = torch.device("cuda", torch.cuda.current_device())
    for row in gpu_recipe(device):
        line = json.dumps(row)
        print(line, flush=True)
        if arguments.json:
            with arguments.json.open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
