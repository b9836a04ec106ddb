"""Dropout whose mask is a function of a seed and a position."""

import math

import pytest
import torch

from catmodel.dropout import _hash, draw_seed, dropout, keep_mask

CPU = torch.device("cpu")


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.9])
def test_elements_are_kept_at_the_given_rate_in_rows_columns_and_pairs(rate: float):
    torch.manual_seed(0)
    keep = keep_mask(draw_seed(CPU), (1000, 1000), rate).double() - (1 - rate)
    sigma = math.sqrt(rate * (1 - rate) / 1000)
    assert abs(keep.mean()) < 5 * sigma / math.sqrt(1000)
    for sums in (keep.mean(0), keep.mean(1)):
        assert 0.9 < sums.std() / sigma < 1.1
    for neighbour in (keep.roll(1, 0), keep.roll(1, 1), keep.roll((1, 1), (0, 1)), keep.T):
        correlation = (keep * neighbour).mean() / (rate * (1 - rate))
        assert abs(correlation) < 5e-3


def test_the_mask_is_a_function_of_the_seed_and_the_position():
    torch.manual_seed(0)
    seed, other = draw_seed(CPU), draw_seed(CPU)
    mask = keep_mask(seed, (3, 40, 50), 0.3)
    assert torch.equal(mask, keep_mask(seed, (120, 50), 0.3).view(3, 40, 50)), (
        "rows are numbered through the leading dimensions"
    )
    assert torch.equal(mask[:1, :, :20], keep_mask(seed, (1, 40, 20), 0.3)), (
        "the mask at a position does not depend on the size"
    )
    agree = (mask == keep_mask(other, (3, 40, 50), 0.3)).double().mean()
    assert abs(agree - (0.7**2 + 0.3**2)) < 0.03


def unhash(x: int) -> int:
    """The inverse of lowbias32."""
    x ^= x >> 16
    x = x * 0x43021123 % 2**32
    x ^= x >> 15 ^ x >> 30
    x = x * 0x1D69E2A5 % 2**32
    return x ^ x >> 16


def test_no_two_seeds_give_the_same_rows_in_another_order():
    """For seeds that differ in the bits of a row number, or whose hashes do: a run of a million rows has such pairs."""
    seed = torch.tensor(123456789, dtype=torch.int32)
    hashed = _hash(seed).item() % 2**32
    assert unhash(hashed) == seed
    rows = {bytes(row.tolist()) for row in keep_mask(seed, (64, 100), 0.2)}
    for difference in (1, 5, 63):
        for other in (seed.item() ^ difference, unhash(hashed ^ difference)):
            mask = keep_mask(torch.tensor(other - 2**32 * (other >= 2**31), dtype=torch.int32), (64, 100), 0.2)
            assert not rows & {bytes(row.tolist()) for row in mask}


def test_kept_elements_are_scaled_to_preserve_the_mean():
    torch.manual_seed(0)
    x = torch.ones(500, 500, dtype=torch.double)
    y = dropout(x, 0.2, draw_seed(CPU))
    assert set(y.unique().tolist()) == {0.0, 1.25}
    assert abs(y.mean() - 1) < 0.01
