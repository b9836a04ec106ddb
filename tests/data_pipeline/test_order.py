import itertools
import time
import tracemalloc

import numpy as np
import pytest

from data_pipeline.order import Order, permute


@pytest.mark.parametrize("size", [*range(1, 70), 99, 100, 101, 127, 128, 129, 1000, 1023, 1024, 1025, 9999, 65_537])
def test_permutation(size):
    for key in (0, 1, -(2**63), 2**63 - 1):
        assert np.array_equal(np.sort(permute(key, size, np.arange(size))), np.arange(size))


def test_permutation_is_the_same_at_any_position_alone():
    whole = permute(5, 1000, np.arange(1000))
    assert [int(permute(5, 1000, np.array([position]))[0]) for position in range(0, 1000, 37)] == whole[::37].tolist()


def test_permutation_looks_random():
    # Where each of 20 positions goes, over 4000 keys: every cell of the 20 × 20 table about 200 times.
    counts = np.zeros((20, 20))
    for key in range(4000):
        counts[np.arange(20), permute(key * 7919, 20, np.arange(20))] += 1
    assert ((counts - 200) ** 2 / 200).sum() < 361 + 4 * np.sqrt(2 * 361)
    # Neighbours do not stay neighbours.
    steps = np.diff(permute(1, 100_000, np.arange(100_000)))
    assert np.mean(np.abs(steps) < 1000) < 0.03


def test_all_permutations_of_four_occur():
    seen = {tuple(permute(key, 4, np.arange(4)).tolist()) for key in range(1000)}
    assert len(seen) == 24


def test_every_epoch_uses_each_sample_at_most_once_and_leaves_another_rest():
    order = Order(seed=0, samples=103, global_batch=10, micro_batch=5)
    assert order.steps_per_epoch == 10
    rests = set()
    for epoch in range(5):
        steps = range(epoch * 10, epoch * 10 + 10)
        assert {order.epoch_of(step) for step in steps} == {epoch}
        used = np.concatenate([order.ids(step) for step in steps])
        assert used.dtype == np.int64
        assert len(set(used.tolist())) == 100
        assert 0 <= used.min() <= used.max() < 103
        rests.add(frozenset(set(range(103)) - set(used.tolist())))
    assert len(rests) == 5


def test_seeds_and_epochs_differ():
    first = Order(0, 1000, 100, 10).ids(0).tolist()
    assert first == Order(0, 1000, 100, 50).ids(0).tolist()  # the micro-batch does not change which samples a step uses
    assert first != Order(1, 1000, 100, 10).ids(0).tolist()
    assert first != Order(0, 1000, 100, 10).ids(10).tolist()


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 12])
def test_shares_make_up_the_same_step_at_any_world_size(world):
    order = Order(seed=3, samples=1000, global_batch=96, micro_batch=8)
    shares = [list(order.share(rank, world)) for rank in range(world)]
    assert {len(share) for share in shares} == {12 // world}
    assert sorted(itertools.chain(*shares)) == list(range(12))
    for step in (0, 9, 10, 12345):
        parts = np.concatenate([order.micro_batch_ids(step, index) for index in range(12)])
        assert np.array_equal(parts, order.ids(step))


def test_a_billion_samples_cost_no_more():
    order = Order(seed=0, samples=10**9, global_batch=4096, micro_batch=128)
    order.ids(0)
    tracemalloc.start()
    start = time.perf_counter()
    ids = order.ids(200_000)
    seconds = time.perf_counter() - start
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(ids.tolist())) == 4096
    assert peak < 2_000_000
    assert seconds < 1


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="the dataset has 9 samples, fewer than one global_batch of 10"):
        Order(0, 9, 10, 5)
    with pytest.raises(ValueError, match="micro_batch 3 does not divide global_batch 10"):
        Order(0, 100, 10, 3)
    with pytest.raises(ValueError, match="at least 1"):
        Order(0, 100, 10, 0)
    order = Order(0, 100, 12, 1)
    with pytest.raises(ValueError, match="5 ranks cannot share the 12 micro-batches .* 1, 2, 3, 4, 6, 12"):
        order.share(0, 5)
    with pytest.raises(ValueError, match="rank 4 of 4"):
        order.share(4, 4)
    with pytest.raises(ValueError, match="negative"):
        order.ids(-1)
    with pytest.raises(ValueError, match="micro-batch 12"):
        order.micro_batch_ids(0, 12)
