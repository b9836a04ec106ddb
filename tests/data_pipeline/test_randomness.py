import warnings

import numpy as np
import pytest
import torch

from data_pipeline.randomness import Stream, bits, fold, integers, make_key, mix64, normals, uniform

MASK = (1 << 64) - 1


def splitmix64(state: int, count: int) -> list[int]:
    """A reference: the published algorithm in Python integers."""
    outputs = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        outputs.append(z ^ (z >> 31))
    return outputs


@pytest.mark.parametrize("state", [0, 1, 1234567, 2**63 - 1, -1, -(2**63)])
def test_bits_are_splitmix64(state):
    found = bits(np.array([state]), np.arange(20))
    assert [int(value) & MASK for value in found] == splitmix64(state & MASK, 20)
    assert [int(bits(np.array([state]), counter)[0]) & MASK for counter in range(20)] == splitmix64(state & MASK, 20)


def test_known_value():
    assert (
        int(bits(np.array([0]), 0)[0]) & MASK == 0xE220A8397B1DCDAF
    )  # first output of the reference implementation for seed 0


def test_numpy_and_torch_give_the_same_bits():
    values = np.concatenate([np.arange(-50, 50), np.array([2**63 - 1, -(2**63)])])
    key = make_key(7, Stream.CROP, 3)
    keys, torch_keys = fold(key, values), fold(key, torch.from_numpy(values))
    assert np.array_equal(keys, torch_keys.numpy())
    assert np.array_equal(fold(keys, 5), fold(torch_keys, 5).numpy())
    assert np.array_equal(fold(keys, values), fold(torch_keys, torch.from_numpy(values)).numpy())
    assert np.array_equal(bits(keys, 9), bits(torch_keys, 9).numpy())
    assert np.array_equal(mix64(keys), mix64(torch_keys).numpy())
    assert np.array_equal(integers(keys, 1000), integers(torch_keys, 1000).numpy())


def test_torch_uniform_is_numpys_truncated_to_24_bits():
    keys = fold(make_key(0, Stream.FLIP), np.arange(1000))
    wide, narrow = uniform(keys, 5), uniform(torch.from_numpy(keys), 5)
    assert wide.dtype == np.float64
    assert narrow.dtype == torch.float32
    assert np.array_equal(np.floor(wide * 2**24) / 2**24, narrow.double().numpy())


def test_keys_depend_on_every_part_and_its_place():
    keys = {
        make_key(seed, stream, *position)
        for seed in (0, 1, -1)
        for stream in Stream
        for position in [(), (0,), (0, 0), (1,), (0, 1), (1, 0), (2**40,)]
    }
    assert len(keys) == 3 * len(Stream) * 7
    assert all(-(2**63) <= key < 2**63 for key in keys)
    assert make_key(2**70 + 5, Stream.MIX) == make_key(5 + 2**70 % 2**64, Stream.MIX)


def test_keys_never_change():
    """These values are part of the results of a seed."""
    assert make_key(5, Stream.MIX, 2) == 325727604114977225
    assert make_key(0, Stream.CROP, 1) == 8375624030849302028
    assert make_key(-1, Stream.ORDER) == -2019832283722765627


def test_nothing_warns_of_overflow():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_key(2**63, Stream.ORDER, -1)
        integers(fold(make_key(1, Stream.CROP), np.arange(10)), 7)


def chi_square(counts) -> float:
    expected = sum(counts) / len(counts)
    return sum((count - expected) ** 2 / expected for count in counts)


@pytest.mark.parametrize("counter", [0, 1, 5])
def test_uniform_over_consecutive_ids(counter):
    keys = fold(make_key(3, Stream.CROP, 1), np.arange(100_000))
    numbers = uniform(keys, counter + 1)[:, counter]
    assert numbers.min() >= 0
    assert numbers.max() < 1
    # 99 degrees of freedom: exceeded by 1 in 10,000.
    assert chi_square(np.bincount((numbers * 100).astype(int), minlength=100)) < 160


def test_uniform_over_epochs_and_independent_of_the_neighbouring_counter():
    keys = [fold(make_key(3, Stream.CROP, epoch), np.arange(1)) for epoch in range(5000)]
    numbers = np.concatenate([uniform(key, 2) for key in keys])
    cells = (numbers * 8).astype(int)
    assert chi_square(np.bincount(cells[:, 0] * 8 + cells[:, 1], minlength=64)) < 115  # 63 degrees of freedom


# The limits are exceeded by 1 in 10,000 at min(bound, 50) - 1 degrees of freedom.
@pytest.mark.parametrize(("bound", "limit"), [(1, 1e-9), (2, 15.2), (7, 27.9), (1000, 94.1), (2**31, 94.1)])
def test_integers_are_uniform_below_their_bound(bound, limit):
    numbers = integers(fold(make_key(0, Stream.CROP), np.arange(20_000)), bound)
    assert numbers.min() >= 0
    assert numbers.max() < bound
    cells = min(bound, 50)
    assert chi_square(np.bincount(numbers * cells // bound, minlength=cells)) < limit


def test_normal_numbers():
    keys = fold(make_key(0, Stream.ERASE_NOISE), torch.arange(100_000))
    numbers = normals(keys)
    assert numbers.shape == (4, 100_000)
    assert numbers.dtype == torch.float32
    assert torch.isfinite(numbers).all()
    assert (numbers.mean(1).abs() < 0.015).all()
    assert ((numbers.std(1) - 1).abs() < 0.01).all()
    assert (((numbers**4).mean(1) - 3).abs() < 0.15).all()
    assert (((numbers.abs() < 1).float().mean(1) - 0.6827).abs() < 0.006).all()
    assert (torch.corrcoef(numbers) - torch.eye(4)).abs().max() < 0.015
    assert (torch.corrcoef(numbers**2) - torch.eye(4)).abs().max() < 0.015
    assert normals(keys[:3, None], torch.arange(4)).shape == (4, 3, 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_gives_the_same_bits():
    keys = fold(make_key(3, Stream.ERASE), torch.arange(-5000, 5000))
    assert torch.equal(keys, fold(make_key(3, Stream.ERASE), torch.arange(-5000, 5000, device="cuda")).cpu())
    assert torch.equal(uniform(keys, 5), uniform(keys.cuda(), 5).cpu())
    assert torch.equal(integers(keys, 1000), integers(keys.cuda(), 1000).cpu())
    torch.testing.assert_close(normals(keys.cuda()).cpu(), normals(keys), rtol=1e-4, atol=1e-5)
