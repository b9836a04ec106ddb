"""All random choices of a micro-batch's recipe as one array of int64, the kernels' program; floats are stored as bits.

A row per sample: for each round of operations the operation, an index of OPERATIONS or NOTHING, and two float64: the
argument, or for Rotate the cosine and the sine; then the box to erase: the key of its noise, and top, left, bottom,
right, all 0 without a box. After the rows come six values for the micro-batch's mixing: 0, MIXUP or CUTMIX; a float64,
the weight of the image itself; with CutMix the box to replace: top, bottom, left, right.
"""

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
    """values: int64 [samples · columns + OF_MIXING]; rounds: the number of rounds of operations."""

    values: np.ndarray
    columns: int
    rounds: int


def program_of(keys: np.ndarray, mix_key: int, size: int, config: AugmentConfig) -> Program:
    """The choices for samples with the int64 keys [m] and images of size x size pixels."""
    rounds = choose_operations(keys, config)
    columns = OF_ROUND * len(rounds) + OF_ERASING
    values = np.zeros(len(keys) * columns + OF_MIXING, np.int64)
    rows, mixing = values[:-OF_MIXING].reshape(len(keys), columns), values[-OF_MIXING:]
    for number, chosen in enumerate(rounds):
        write_round(rows[:, OF_ROUND * number :], chosen)
    if config.erasing > 0:
        boxes, erasing = erasing_boxes(keys, config.erasing, size, size), OF_ROUND * len(rounds)
        rows[boxes.rows, erasing] = fold(keys[boxes.rows], Stream.ERASE_NOISE)
        rows[boxes.rows, erasing + 1], rows[boxes.rows, erasing + 2] = boxes.tops, boxes.lefts
        rows[boxes.rows, erasing + 3] = boxes.tops + boxes.heights
        rows[boxes.rows, erasing + 4] = boxes.lefts + boxes.widths
    drawn = draw_mixing(mix_key, size, size, config)
    if drawn is not None:
        mixing[:2] = MIXUP if drawn.box is None else CUTMIX, np.float64(drawn.share).view(np.int64)
        mixing[2:] = drawn.box or 0
    return Program(values, columns, len(rounds))


def write_round(columns: np.ndarray, chosen: ChosenOperations) -> None:
    """Write a round's operations and arguments into the first OF_ROUND columns of int64 [m, …]."""
    columns[:, 0] = chosen.operations
    arguments = chosen.arguments.copy()
    turned = np.flatnonzero(chosen.operations == ROTATE)
    angle = -np.deg2rad(arguments[turned])
    arguments[turned] = np.cos(angle)
    columns[:, 1] = arguments.view(np.int64)
    columns[turned, 2] = np.sin(angle).view(np.int64)
