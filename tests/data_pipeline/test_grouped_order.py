"""The order of aspect groups: a function of (seed, step), in micro-batches of one orientation."""

import tracemalloc
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from data_pipeline.grouped_order import GroupedOrder

SAMPLES, M = 211, 3
PORTRAIT = np.random.default_rng(0).random(SAMPLES) < 0.3


def order_of(seed: int = 0, portrait: np.ndarray = PORTRAIT, global_batch: int = 12, micro_batch: int = 4, **options):
    return GroupedOrder(seed, len(portrait), global_batch, micro_batch, portrait=portrait, **options)


def epoch_of(order: GroupedOrder, epoch: int = 0) -> np.ndarray:
    first = epoch * order.steps_per_epoch
    return np.stack([order.draws(step, range(M)) for step in range(first, first + order.steps_per_epoch)])


def test_an_epoch_uses_every_sample_once_but_the_dropped_rest():
    order = order_of()
    groups = [SAMPLES - PORTRAIT.sum(), PORTRAIT.sum()]
    assert order.steps_per_epoch == (groups[0] // 4 + groups[1] // 4) // M == 17
    dropped = []
    for epoch in range(20):
        ids = epoch_of(order, epoch).ravel()
        assert len(np.unique(ids)) == len(ids) == 17 * 12 and 0 <= ids.min() and ids.max() < SAMPLES
        dropped.append(frozenset(range(SAMPLES)) - set(ids.tolist()))
    assert len(set(dropped)) == 20 and len(frozenset().union(*dropped)) > 60  # different ones in each epoch


def test_micro_batches_are_of_one_group_and_mixed_over_the_epoch():
    epoch = PORTRAIT[epoch_of(order_of())]
    assert (epoch == epoch[:, :, :1]).all()
    kinds = epoch[:, :, 0].ravel()
    assert 11 <= kinds.sum() <= 16  # 15 of the 52 micro-batches are portrait
    changes = (kinds[1:] != kinds[:-1]).sum()
    assert changes > 10
    # No rank gets one kind alone.
    assert all(0 < epoch[:, index, 0].sum() < 17 for index in range(M))


def test_the_order_is_that_of_seed_epoch_and_step():
    order = order_of()
    assert np.array_equal(order.ids(40), order_of().ids(40))
    assert not np.array_equal(epoch_of(order), epoch_of(order, 1))
    assert not np.array_equal(epoch_of(order), epoch_of(order_of(seed=1)))
    for step in (0, 16, 17, 40):
        for world in (1, 3):
            for rank in range(world):
                share = order.share(rank, world)
                assert np.array_equal(order.draws(step, share), order.draws(step, range(M))[list(share)])
        assert np.array_equal(order.draws(step, [2])[0], order.ids(step)[8:])


def test_positions_of_each_group_are_uniform():
    """Over many epochs each sample comes first in its group as often as any other."""
    portrait = np.arange(24) % 3 == 0
    order = order_of(portrait=portrait, global_batch=4)
    first = np.array([order.draws(6 * epoch, [0])[0, 0] for epoch in range(800)])
    counts = np.bincount(first, minlength=24)
    assert np.abs(counts - 800 / 24).max() < 5 * np.sqrt(800 / 24)


@pytest.mark.parametrize("portrait", [np.zeros(50, bool), np.ones(50, bool)])
def test_one_group_is_enough(portrait):
    order = order_of(portrait=portrait)
    assert order.steps_per_epoch == 4 and len(np.unique(epoch_of(order))) == 48


def test_a_replacement_is_of_the_same_group():
    order = order_of()
    for sample in range(0, SAMPLES, 5):
        found = [order.replacement(sample, attempt) for attempt in range(8)]
        assert (PORTRAIT[found] == PORTRAIT[sample]).all() and len(set(found)) > 2


def test_a_position_takes_no_more_memory_in_a_large_dataset():
    portrait = np.zeros(10_000_000, bool)
    portrait[::4] = True
    order = order_of(portrait=portrait, global_batch=16, micro_batch=2)
    order.ids(0)  # once: the ids of both groups
    tracemalloc.start()
    order.ids(123_456)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


def test_the_order_of_a_seed_never_changes():
    """These values are part of the results of a seed: checkpoints and logs depend on them."""
    assert order_of().ids(0).tolist() == [39, 40, 115, 187, 86, 141, 22, 37, 185, 101, 32, 11]
    order = order_of(seed=3)
    assert order.ids(250).tolist() == [153, 167, 54, 93, 92, 154, 96, 157, 156, 41, 187, 60]
    assert [order.replacement(sample, attempt) for sample in (0, 2) for attempt in (0, 1)] == [147, 179, 129, 48]


def test_the_order_of_a_split_takes_square_images_for_landscape():
    records = np.zeros(SAMPLES, [("width", np.uint16), ("height", np.uint16)])
    records["width"], records["height"] = 4, np.where(PORTRAIT, 5, np.arange(SAMPLES) % 3 + 2)
    order = GroupedOrder.of(SimpleNamespace(samples=SAMPLES, records=records), 3, 12, 4)
    assert np.array_equal(order.portrait, PORTRAIT) and np.array_equal(order.ids(250), order_of(seed=3).ids(250))


def test_sizes_that_do_not_fit_are_refused():
    assert order_of(portrait=np.arange(12) < 4).steps_per_epoch == 1
    with pytest.raises(ValueError, match=r"5 landscape and 7 portrait images fill 2 micro-batches of 4 .* 3 of a step"):
        order_of(portrait=np.arange(12) > 4)
    for group, portrait in (("portrait", PORTRAIT), ("landscape", ~PORTRAIT)):
        few = portrait & (np.cumsum(portrait) <= 3)
        with pytest.raises(ValueError, match=f"3 {group} images fill no micro-batch of 4 .*: set task.aspect_groups=f"):
            order_of(portrait=few if group == "portrait" else ~few)
    with pytest.raises(ValueError, match="fewer than one global_batch of 12"):
        order_of(portrait=np.ones(11, bool))
    with pytest.raises(ValueError, match="2 ranks cannot share the 3 micro-batches"):
        order_of().share(0, 2)


def test_another_micro_batch_is_another_order():
    """As train.micro_batch=auto makes it."""
    order = replace(order_of(), micro_batch=6)
    assert order.micro_batches == 2 and order.steps_per_epoch == (148 // 6 + 63 // 6) // 2
    assert (PORTRAIT[order.draws(3, [1])].std(axis=1) == 0).all()
