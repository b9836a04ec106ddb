"""Each operation by the kernels against the plain path: in Triton's interpreter, or on a GPU."""

import numpy as np
import pytest
import torch

from data_pipeline.augment import GEOMETRIC, apply
from data_pipeline.augment_choices import NOTHING, OPERATIONS, ChosenOperations, argument
from data_pipeline.config import AugmentConfig
from data_pipeline.recipe.program import program_of_rounds
from tests.data_pipeline.recipe.interpreter import DEVICE
from tests.data_pipeline.test_augment_operations import images_of, tensor_of

CONFIG = AugmentConfig()
LEVELS = (0.0, 0.3, 2.6, 5.0, 7.77, 9.0, 9.4, 10.0)


def by_kernels(images: torch.Tensor, rounds: list[ChosenOperations]) -> torch.Tensor:
    from data_pipeline.recipe.launch import apply_rounds, to_device

    program = program_of_rounds(rounds, len(images))
    return apply_rounds(images.to(DEVICE), to_device(program, DEVICE), program, CONFIG).cpu()


def compare(images: torch.Tensor, rounds: list[ChosenOperations], exact: bool) -> None:
    """exact: bit for bit. Else one value in 1000 may differ by 1, because a GPU adds products without rounding them."""
    before = images.clone()
    found, expected = by_kernels(images, rounds), apply(images, rounds, CONFIG.mean)
    assert found.is_contiguous() and torch.equal(images, before)
    difference = (found.int() - expected.int()).abs()
    assert difference.max() <= (not exact)
    assert (difference > 0).float().mean() < 0.001


def all_arguments(name: str) -> np.ndarray:
    """The arguments of an operation at LEVELS, in both directions and on both scales."""
    levels = np.array(LEVELS)
    found = [argument(name, levels, np.full(len(levels), sign), up) for sign in (1.0, -1.0) for up in (False, True)]
    return np.unique(np.concatenate(found))


@pytest.mark.parametrize("size", [32, 33])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_at_every_magnitude(name, size):
    """Pictures in turn, each with another argument; sizes of whole blocks and not."""
    arguments, pictures = all_arguments(name), images_of(size)
    count = max(len(arguments), len(pictures))
    images = tensor_of(pictures[np.arange(count) % len(pictures)])
    chosen = ChosenOperations(np.full(count, OPERATIONS.index(name)), arguments[np.arange(count) * 7 % len(arguments)])
    compare(images, [chosen], exact=name not in GEOMETRIC)


@pytest.mark.parametrize("name", ["Brightness", "Contrast", "Color", "Sharpness"])
def test_enhancements_with_unusual_factors(name):
    pictures = images_of(9)
    factors = np.array([0.0, 1.0, 2.0, 7.5])[np.arange(len(pictures)) % 4]
    compare(tensor_of(pictures), [ChosenOperations(np.full(len(factors), OPERATIONS.index(name)), factors)], exact=True)


@pytest.mark.parametrize("name", GEOMETRIC)
def test_whole_pixels_and_shifts_beyond_the_image(name):
    pictures = images_of(16)
    arguments = np.array([0.0, 0.25, -0.25, 1.5, -1.5, 1e-9, -1e-9])[np.arange(len(pictures)) % 7]
    chosen = ChosenOperations(np.full(len(pictures), OPERATIONS.index(name)), arguments)
    compare(tensor_of(pictures), [chosen], exact=False)


def test_all_operations_at_once_in_several_rounds_of_planar_images():
    pictures, count = images_of(32), 2 * len(OPERATIONS) + 2
    images = tensor_of(pictures[np.arange(count) % len(pictures)]).contiguous()
    generator, rounds = np.random.default_rng(0), []
    for _ in range(3):
        operations = generator.permutation(np.arange(count) % (len(OPERATIONS) + 1) - 1)
        operations[5] = NOTHING
        arguments = np.zeros(count)
        for place, name in enumerate(OPERATIONS):
            arguments[operations == place] = generator.choice(all_arguments(name), (operations == place).sum())
        rounds.append(ChosenOperations(operations, arguments))
    compare(images, rounds, exact=False)
    assert torch.equal(by_kernels(images, rounds)[5], images[5])


@pytest.mark.slow
def test_images_of_224_pixels():
    """The counts of an image are summed over several chunks, of several blocks each."""
    names = ("AutoContrast", "Equalize", "Contrast", "Rotate", "ShearY", "Sharpness")
    arguments = np.array([all_arguments(name)[-1] for name in names])
    operations = np.array([OPERATIONS.index(name) for name in names])
    compare(tensor_of(images_of(224)[: len(names)]), [ChosenOperations(operations, arguments)], exact=False)
