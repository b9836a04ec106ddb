import itertools
import tracemalloc

import numpy as np
import pytest

from data_pipeline.order import BLOCK, POOL, Order, block_permute, permute


@pytest.mark.parametrize("size", [*range(1, 70), 99, 100, 101, 127, 128, 129, 1000, 1023, 1024, 1025, 9999, 65_537])
def test_permutation(size):
    for key in (0, 1, -(2**63), 2**63 - 1):
        assert np.array_equal(np.sort(permute(key, size, np.arange(size))), np.arange(size))


def test_permutation_can_be_evaluated_at_single_positions():
    whole = permute(5, 1000, np.arange(1000))
    assert [int(permute(5, 1000, np.array([position]))[0]) for position in range(0, 1000, 37)] == whole[::37].tolist()


def test_permutation_looks_random():
    # The destinations of 20 positions over 4000 keys: every cell of the 20 × 20 table occurs about 200 times.
    counts = np.zeros((20, 20))
    for key in range(4000):
        counts[np.arange(20), permute(key * 7919, 20, np.arange(20))] += 1
    assert ((counts - 200) ** 2 / 200).sum() < 361 + 4 * np.sqrt(2 * 361)
    # Neighbours are separated.
    distances = np.diff(permute(1, 100_000, np.arange(100_000)))
    assert np.mean(np.abs(distances) < 1000) < 0.03


def test_all_permutations_of_four_occur():
    seen = {tuple(permute(key, 4, np.arange(4)).tolist()) for key in range(1000)}
    assert len(seen) == 24


@pytest.mark.parametrize("shuffle", ["full", "block"])
def test_every_epoch_uses_each_sample_at_most_once_and_leaves_out_other_samples(shuffle):
    order = Order(seed=0, samples=103, global_batch=10, micro_batch=5, shuffle=shuffle)
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


def test_the_order_of_a_seed_never_changes():
    """These values are part of the results of a seed: checkpoints and logs depend on them."""
    assert Order(0, 1000, 10, 5).ids(0).tolist() == [666, 438, 888, 927, 30, 70, 22, 417, 10, 68]
    assert Order(3, 1000, 10, 5).ids(250).tolist() == [200, 641, 233, 538, 444, 789, 935, 650, 229, 370]
    block = Order(0, 100_000, 10, 5, "block").ids(3).tolist()
    assert block == [70698, 58982, 51379, 58949, 40805, 38617, 21928, 29421, 35313, 75466]
    order = Order(3, 1000, 10, 5)
    assert [order.replacement(sample, attempt) for sample in (0, 17) for attempt in (0, 1)] == [141, 842, 422, 95]


def test_seeds_and_epochs_differ():
    first = Order(0, 1000, 100, 10).ids(0).tolist()
    assert first == Order(0, 1000, 100, 50).ids(0).tolist()  # independent of the micro-batch
    assert first != Order(1, 1000, 100, 10).ids(0).tolist()
    assert first != Order(0, 1000, 100, 10).ids(10).tolist()


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 12])
def test_shares_add_up_to_the_same_step_at_any_world_size(world):
    order = Order(seed=3, samples=1000, global_batch=96, micro_batch=8)
    shares = [list(order.share(rank, world)) for rank in range(world)]
    assert {len(share) for share in shares} == {12 // world}
    assert sorted(itertools.chain(*shares)) == list(range(12))
    for step in (0, 9, 10, 12345):
        parts = np.concatenate([order.draws(step, [index]).ravel() for index in range(12)])
        assert np.array_equal(parts, order.ids(step))


@pytest.mark.parametrize("shuffle", ["full", "block"])
def test_memory_does_not_grow_with_the_dataset(shuffle):
    order = Order(seed=0, samples=10**9, global_batch=4096, micro_batch=128, shuffle=shuffle)
    order.ids(0)
    tracemalloc.start()
    ids = order.ids(200_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(ids.tolist())) == 4096
    assert peak < 2_000_000


def test_sizes_that_do_not_fit_together_are_refused():
    assert Order(0, 10, 10, 5).steps_per_epoch == 1
    with pytest.raises(ValueError, match="the dataset has 9 samples, fewer than one global_batch of 10"):
        Order(0, 9, 10, 5)
    with pytest.raises(ValueError, match="micro_batch 3 does not divide global_batch 10"):
        Order(0, 100, 10, 3)
    order = Order(0, 100, 12, 1)
    with pytest.raises(ValueError, match="5 ranks cannot share the 12 micro-batches .* 1, 2, 3, 4, 6, 12"):
        order.share(0, 5)


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 300, 511, 512, 16_383, 16_384, 16_385, 16_640, 40_000, 65_537])
def test_block_permutation(size):
    for key in (0, -(2**63), 2**63 - 1):
        whole = block_permute(key, size, np.arange(size))
        assert np.array_equal(np.sort(whole), np.arange(size))
        positions = np.arange(0, size, 97)[::-1]
        assert np.array_equal(block_permute(key, size, positions), whole[positions])


def test_block_order_reads_few_places_and_different_ones_in_every_epoch():
    size = 1_000_000
    order = Order(3, size, POOL // 4, 128, shuffle="block")
    for pool in (0, 7, 59):
        ids = np.concatenate([order.ids(step) for step in range(4 * pool, 4 * pool + 4)])
        inside = np.sort(ids)
        assert len(np.unique(ids)) == POOL
        assert np.sum(np.diff(inside) > 1) + 1 <= 64
        assert inside[-1] - inside[0] > size / 2  # from the whole dataset
    # A step mixes all blocks of its pool, and neighbours are separated.
    assert len(np.unique(ids[:1024] // BLOCK)) > 60
    assert np.mean(np.abs(np.diff(ids)) < BLOCK) < 0.05
    again = np.concatenate(
        [order.ids(step) for step in range(order.steps_per_epoch + 236, order.steps_per_epoch + 240)]
    )
    assert len(np.intersect1d(np.unique(ids // BLOCK), np.unique(again // BLOCK))) < 20


def test_block_order_leaves_every_sample_out_equally_often():
    left_out = np.zeros(1000)
    for key in range(500):
        left_out[block_permute(key * 7919, 1000, np.arange(900, 1000))] += 1
    assert left_out.sum() == 50_000
    assert left_out.min() > 20
    assert left_out.max() < 85


@pytest.mark.parametrize("shuffle", ["full", "block"])
# 64 is not a multiple of the three copies, so some samples have copies in two steps.
@pytest.mark.parametrize("global_batch", [96, 64])
def test_repeats_are_copies_in_other_micro_batches(shuffle, global_batch):
    plain, order = (Order(1, 1000, global_batch, 8, shuffle, repeats) for repeats in (1, 3))
    assert order.steps_per_epoch == plain.steps_per_epoch
    epoch = [order.draws(step, range(order.micro_batches)) for step in range(order.steps_per_epoch)]
    for step, draws in enumerate(epoch):
        assert np.array_equal((draws % 1000).ravel(), order.ids(step))
        assert np.array_equal(draws[2], order.draws(step, [2])[0])
        assert all(len(np.unique(batch % 1000)) == 8 for batch in draws)
    # In the order before they are distributed, the uses are the plain order with each sample three times.
    uses = np.concatenate([draws.T.ravel() for draws in epoch])
    first = np.concatenate([plain.ids(step) for step in range(plain.steps_per_epoch)])
    assert np.array_equal(uses % 1000, np.repeat(first, 3)[: len(uses)])
    assert np.array_equal(uses // 1000, np.arange(len(uses)) % 3)
