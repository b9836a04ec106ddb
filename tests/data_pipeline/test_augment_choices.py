import math

import numpy as np
import pytest
from pydantic import ValidationError

from data_pipeline.augment_choices import (
    NOTHING,
    OPERATIONS,
    RandAugment,
    choose_color_jitter,
    choose_rand_augment,
    erasing_boxes,
    parse_rand_augment,
)
from data_pipeline.config import AugmentConfig
from data_pipeline.randomness import Stream, fold, make_key

KEYS = fold(make_key(0, Stream.AUGMENT, 0), np.arange(60_000))


def chi_square(counts: np.ndarray) -> float:
    expected = counts.sum() / counts.size
    return float(((counts - expected) ** 2 / expected).sum())


def test_notation():
    assert parse_rand_augment("rand-m9-mstd0.5-inc1") == RandAugment(9, 2, 0.5, 0.5, True)
    assert parse_rand_augment("rand") == RandAugment(10, 2, 0.0, 0.5, False)
    assert parse_rand_augment("rand-n3-inc0-p0.25-mstd1-m7") == RandAugment(7, 3, 1.0, 0.25, False)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("rnd-m9", "does not begin with 'rand'"),
        ("v0", "does not begin with 'rand'"),
        ("", "does not begin with 'rand'"),
        ("rand-m9-mmax5", "'mmax5'"),
        ("rand-m9-tweights", "'tweights'"),
        ("rand-x3", "'x3'"),
        ("rand-m", "'m'"),
        ("rand-m9.5", "'m9.5'"),
        ("rand-m-1", "'m'"),
        ("rand--m9", "''"),
        ("rand-m9-m8", "'m' is given twice"),
        ("rand-n0", "n of at least 1"),
        ("rand-p1.5", "p of at most 1"),
        ("rand-inc2", "inc 0 or 1"),
    ],
)
def test_an_error_in_the_notation_is_one_sentence_that_names_it(text, named):
    with pytest.raises(ValidationError) as caught:
        AugmentConfig(rand_augment=text)
    (error,) = caught.value.errors()
    assert error["msg"].startswith("Value error, augment.rand_augment: ")
    assert named in error["msg"]
    assert "rand-m9-mstd0.5-inc1" in error["msg"]
    assert "\n" not in error["msg"]


@pytest.mark.parametrize(
    ("text", "probability"), [("rand-m9-mstd0.5-inc1", 0.5), ("rand-n3-p0.2", 0.2), ("rand-n1-p1", 1.0)]
)
def test_every_operation_is_equally_likely_in_every_round(text, probability):
    settings = parse_rand_augment(text)
    rounds = choose_rand_augment(KEYS, settings)
    assert len(rounds) == settings.count
    for chosen in rounds:
        applied = chosen.operations[chosen.operations != NOTHING]
        assert abs(len(applied) / len(KEYS) - probability) < 0.01
        assert chi_square(np.bincount(applied, minlength=15)) < 42  # 14 degrees of freedom: exceeded by 1 in 10,000


def test_rounds_are_independent_of_each_other():
    first, second = choose_rand_augment(KEYS, parse_rand_augment("rand-m9-mstd0.5-inc1-p1"))
    assert (
        chi_square(np.bincount(first.operations * 15 + second.operations, minlength=225)) < 310
    )  # 224 degrees of freedom
    both = (first.operations == second.operations) & (first.operations == OPERATIONS.index("Brightness"))
    assert abs(np.corrcoef(first.arguments[both], second.arguments[both])[0, 1]) < 0.25


def arguments_of(text: str, name: str) -> np.ndarray:
    rounds = choose_rand_augment(KEYS, parse_rand_augment(text))
    return np.concatenate([chosen.arguments[chosen.operations == OPERATIONS.index(name)] for chosen in rounds])


def test_magnitudes_are_normal_around_m_and_clipped_to_10():
    degrees = arguments_of("rand-m5-mstd0.5-inc1-p1", "Rotate")
    levels = np.abs(degrees) / 3
    assert abs(levels.mean() - 5) < 0.03
    assert abs(levels.std() - 0.5) < 0.02
    assert abs(((levels - 5) ** 4).mean() / levels.std() ** 4 - 3) < 0.3
    assert abs((degrees > 0).mean() - 0.5) < 0.03
    high = np.abs(arguments_of("rand-m9-mstd0.5-inc1-p1", "Rotate")) / 3
    above = 0.5 * math.erfc(1 / 0.5 / math.sqrt(2))  # the share of N(9, 0.5²) above 10
    assert high.max() == pytest.approx(10)
    assert abs((high > 9.9999).mean() - above) < 0.008
    low = np.abs(arguments_of("rand-m0-mstd2-p1", "Rotate"))
    assert abs((low == 0).mean() - 0.5) < 0.03
    assert set(np.abs(arguments_of("rand-m9-inc1-p1", "Rotate")).round(9)) == {27.0}


def test_a_large_deviation_means_uniform_levels():
    levels = np.abs(arguments_of("rand-m8-mstd101-inc1-p1", "Rotate")) / 3
    assert levels.max() <= 8
    assert chi_square(np.histogram(levels, 20, (0, 8))[0]) < 50  # 19 degrees of freedom


def test_posterize_keeps_at_least_one_bit():
    for text in ("rand-m8-mstd5-inc1-p1", "rand-m5-mstd5-p1"):
        bits = arguments_of(text, "Posterize")
        assert set(bits.tolist()) == {1.0, 2.0, 3.0, 4.0}


def test_enhancements_go_both_ways_when_increasing():
    factors = arguments_of("rand-m9-mstd0.5-inc1-p1", "Sharpness")
    assert factors.min() >= 0.1
    assert factors.max() <= 1.9 + 1e-12
    assert abs((factors > 1).mean() - 0.5) < 0.03
    assert arguments_of("rand-m9-p1", "Sharpness").min() == pytest.approx(1.72)


@pytest.mark.parametrize(("strength", "low", "high"), [(0.4, 0.6, 1.4), (1.5, 0.0, 2.5)])
def test_color_jitter_draws_factors_and_orders_uniformly(strength, low, high):
    rounds = choose_color_jitter(KEYS, strength)
    names = np.stack([chosen.operations for chosen in rounds], 1)
    kinds = {tuple(sorted(OPERATIONS[place] for place in row)) for row in names.tolist()}
    assert kinds == {("Brightness", "Color", "Contrast")}
    orders = np.unique(names, axis=0, return_counts=True)[1]
    assert len(orders) == 6
    assert chi_square(orders) < 26  # 5 degrees of freedom
    for name in ("Brightness", "Contrast", "Color"):
        factors = np.concatenate([chosen.arguments[chosen.operations == OPERATIONS.index(name)] for chosen in rounds])
        assert len(factors) == len(KEYS)
        assert chi_square(np.histogram(factors, 20, (low, high))[0]) < 50


def test_choices_are_a_function_of_the_key():
    settings = parse_rand_augment("rand-m9-mstd0.5-inc1")
    order = np.random.default_rng(0).permutation(1000)
    for choose in (lambda keys: choose_rand_augment(keys, settings), lambda keys: choose_color_jitter(keys, 0.4)):
        for whole, part in zip(choose(KEYS[:1000]), choose(KEYS[:1000][order]), strict=True):
            assert np.array_equal(whole.operations[order], part.operations)
            assert np.array_equal(whole.arguments[order], part.arguments)
    boxes = erasing_boxes(KEYS[:1000], 0.25, 64, 64)
    alone = [erasing_boxes(KEYS[row : row + 1], 0.25, 64, 64) for row in boxes.rows]
    assert [box.tops[0] for box in alone] == boxes.tops.tolist()
    assert [box.widths[0] for box in alone] == boxes.widths.tolist()
    assert len(erasing_boxes(np.delete(KEYS[:1000], boxes.rows), 0.25, 64, 64).rows) == 0
