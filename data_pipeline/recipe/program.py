"""All random choices of a micro-batch's recipe as one array of int64, the kernels' program; floats are stored as bits.

First come six values for the micro-batch's mixing: 0, MIXUP or CUTMIX; a float64, the weight of the image itself; with
CutMix the box to replace: top, bottom, left, right. Then a row per sample: for each round of operations the operation,
an index of OPERATIONS or NOTHING, and two float64: the argument, or for Rotate the cosine and the sine; then the box to
erase: the key of its noise, and top, left, bottom, right, all 0 without a box.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_pipeline.augment import choose_operations
from data_pipeline.augment_choices import OPERATIONS, ChosenOperations, erasing_boxes
from data_pipeline.config import AugmentConfig
from data_pipeline.mix import draw_mixing
from data_pipeline.randomness import Stream, fold

OF_ROUND, OF_ERASING, OF_MIXING = 3, 5, 6
MIXUP, CUTMIX = 1, 2
ROTATE = OPERATIONS.index("Rotate")


class Program(NamedTuple):
    """values: int64 [OF_MIXING + samples · columns], the mixing and the rows; rounds: how many a row has."""

    values: np.ndarray
    columns: int
    rounds: int

    @property
    def mixing(self) -> np.ndarray:
        return self.values[:OF_MIXING]

    @property
    def rows(self) -> np.ndarray:
        """int64 [samples, columns], a view."""
        return self.values[OF_MIXING:].reshape(-1, self.columns)


def program_of(keys: np.ndarray, mix_key: int, size: int, config: AugmentConfig) -> Program:
    """The choices for samples with the int64 keys [m] and images of size x size pixels."""
    program = program_of_rounds(choose_operations(keys, config), len(keys))
    if config.erasing > 0:
        boxes, erasing = erasing_boxes(keys, config.erasing, size, size), program.rows[:, -OF_ERASING:]
        ends = boxes.tops + boxes.heights, boxes.lefts + boxes.widths
        noise_keys = fold(keys[boxes.rows], Stream.ERASE_NOISE)
        erasing[boxes.rows] = np.stack([noise_keys, boxes.tops, boxes.lefts, *ends], 1)
    drawn = draw_mixing(mix_key, size, size, config)
    if drawn is not None:
        program.mixing[:2] = MIXUP if drawn.box is None else CUTMIX, np.float64(drawn.share).view(np.int64)
        program.mixing[2:] = drawn.box or 0
    return program


def program_of_rounds(rounds: Sequence[ChosenOperations], count: int) -> Program:
    """The program that applies these operations to `count` samples, and neither erases nor mixes."""
    columns = OF_ROUND * len(rounds) + OF_ERASING
    program = Program(np.zeros(OF_MIXING + count * columns, np.int64), columns, len(rounds))
    for number, chosen in enumerate(rounds):
        _write_round(program.rows[:, OF_ROUND * number :], chosen)
    return program


def _write_round(columns: np.ndarray, chosen: ChosenOperations) -> None:
    """Write a round's operations and arguments into the first OF_ROUND columns of int64 [m, …]."""
    columns[:, 0] = chosen.operations
    arguments = chosen.arguments.copy()
    turned = np.flatnonzero(chosen.operations == ROTATE)
    angle = -np.deg2rad(arguments[turned])
    arguments[turned] = np.cos(angle)
    columns[:, 1] = arguments.view(np.int64)
    columns[turned, 2] = np.sin(angle).view(np.int64)
