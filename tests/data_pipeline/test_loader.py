import ctypes
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch

from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.crop import evaluation_windows, training_windows
from data_pipeline.decode import decode_batch
from data_pipeline.loader import BadSample, Loader, MicroBatch, build_loader, evaluation_batches
from data_pipeline.manifest import open_manifest
from data_pipeline.order import Order
from data_pipeline.randomness import Stream, fold, make_key
from data_pipeline.split import DataError, Split
from data_pipeline.views import Crops
from tests.data_pipeline.shards import jpeg, write_split

ROOT = Path(__file__).parents[2]
AUGMENT = AugmentConfig(crop="resized")
SAMPLES = 101


def sides(number: int) -> tuple[int, int]:
    """Width and height of an image."""
    return 40 + number % 13, 36 + number % 7


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    return [jpeg(number, *sides(number)) for number in range(SAMPLES)]


@pytest.fixture(scope="module")
def split(images, tmp_path_factory) -> Split:
    folder = tmp_path_factory.mktemp("dataset")
    write_split(folder, images)
    return open_manifest(folder).split("train")


@pytest.fixture(autouse=True)
def no_thread_remains():
    yield
    assert decoders() == []


def decoders() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def config_of(split: Split, **changes) -> DataConfig:
    return DataConfig(**{"path": str(split.folder), "image_size": 16, "workers": 2, "prefetch": 3, **changes})


def take(
    split: Split,
    count: int,
    *,
    order: Order | None = None,
    augment: AugmentConfig = AUGMENT,
    data: dict | None = None,
    **place: int,
) -> list[MicroBatch]:
    order = order or Order(5, SAMPLES, 24, 4)
    data = config_of(split, **(data or {}))
    with build_loader(data, Crops(data, augment), split, order, **place) as loader:
        return list(itertools.islice(loader, count))


def loader_of(split: Split, order: Order, **changes) -> Loader:
    data = config_of(split, **changes)
    return build_loader(data, Crops(data, AUGMENT), split, order)


def evaluation_of(split: Split, batch_size: int, *, rank: int = 0, world: int = 1, **changes) -> Iterator:
    data = config_of(split, **changes)
    return evaluation_batches(data, Crops(data, AUGMENT), split, batch_size, rank=rank, world=world)


def same(one, other) -> bool:
    return (
        (one.step, one.index, one.bad) == (other.step, other.index, other.bad)
        and np.array_equal(one.draws, other.draws)
        and all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("ids", "images", "targets"))
    )


def expected_pixels(encoded: bytes, window: np.ndarray, size: int = 16) -> torch.Tensor:
    """[3, size, size]"""
    out = np.zeros((1, size, size, 3), np.uint8)
    height, width = simplejpeg.decode_jpeg_header(encoded)[:2]
    assert decode_batch([encoded], np.array([[width, height]]), window[None], (size, size), "bicubic", out) == {}
    return torch.from_numpy(out[0]).permute(2, 0, 1)


def test_batches_follow_order_and_crop(split, images):
    order = Order(5, SAMPLES, 24, 4)
    batches = take(split, 30, order=order)  # 4 steps per epoch, 6 micro-batches per step: ends in the second epoch
    assert [(batch.step, batch.index) for batch in batches] == [
        (step, index) for step in range(5) for index in range(6)
    ]
    for batch in batches[::5]:
        assert (batch.images.dtype, batch.images.shape) == (torch.uint8, (4, 3, 16, 16))
        assert (batch.ids.dtype, batch.targets.dtype, batch.bad) == (torch.int64, torch.int64, ())
        ids = batch.ids.numpy()
        assert np.array_equal(ids, order.draws(batch.step, [batch.index])[0])
        assert np.array_equal(batch.targets.numpy(), ids % 10)
        keys = fold(make_key(5, Stream.CROP, batch.step // 4), ids)
        windows = training_windows(keys, split.records["width"][ids], split.records["height"][ids], AUGMENT)
        for number, window, pixels in zip(ids, windows, batch.images, strict=True):
            assert torch.equal(pixels, expected_pixels(images[number], window))


@pytest.mark.parametrize("crop", ["resized", "padded", "none"])
def test_workers_and_prefetch_change_nothing(split, crop):
    augment = AugmentConfig(crop=crop)
    reference = take(split, 12, augment=augment, data={"workers": 1, "prefetch": 1})
    for data in ({"workers": 2, "prefetch": 5}, {"workers": 7, "prefetch": 2}):
        assert all(map(same, reference, take(split, 12, augment=augment, data=data)))


@pytest.mark.parametrize("world", [2, 3, 6])
def test_world_size_changes_nothing(split, world):
    reference = {(batch.step, batch.index): batch for batch in take(split, 30)}
    for rank in range(world):
        batches = take(split, 30 // world, rank=rank, world=world)
        assert [batch.index for batch in batches[: 6 // world]] == list(range(rank, 6, world))
        for batch in batches:
            assert same(batch, reference.pop((batch.step, batch.index)))
    assert not reference


@pytest.mark.parametrize("start_step", [1, 3, 4])
def test_starting_later_changes_nothing(split, start_step):
    reference = take(split, 36)[start_step * 6 :]
    found = take(split, len(reference), start_step=start_step)
    assert all(map(same, reference, found))


def test_copies_of_a_sample_are_cropped_differently(split, images):
    order = Order(5, SAMPLES, 24, 4, repeats=3)
    batches = take(split, 12, order=order)
    assert [batch.ids.tolist() for batch in batches] == [
        (order.draws(step, [index])[0] % SAMPLES).tolist() for step in (0, 1) for index in range(6)
    ]
    for batch in batches:
        draws = order.draws(batch.step, [batch.index])[0]
        assert np.array_equal(batch.draws, draws)
        ids = draws % SAMPLES
        windows = training_windows(
            fold(make_key(5, Stream.CROP, 0), draws), split.records["width"][ids], split.records["height"][ids], AUGMENT
        )
        for number, window, pixels in zip(ids, windows, batch.images, strict=True):
            assert torch.equal(pixels, expected_pixels(images[number], window))
    # The first copy has the same window as without repeats; the others have different ones.
    uses = {int(draw): pixels for batch in batches for draw, pixels in zip(batch.draws, batch.images, strict=True)}
    plain = {int(i): pixels for batch in take(split, 12) for i, pixels in zip(batch.ids, batch.images, strict=True)}
    assert all(torch.equal(pixels, plain[draw]) for draw, pixels in uses.items() if draw < SAMPLES)
    assert not any(torch.equal(uses[draw + SAMPLES], plain[draw]) for draw in plain if draw + SAMPLES in uses)


def damaged(folder: Path, *numbers: int, samples: int = 40) -> Split:
    """A split in which some samples differ from their checksums."""
    write_split(folder, [jpeg(n, *sides(n)) for n in range(samples)])
    split = open_manifest(folder).split("train")
    for record in split.records[list(numbers)]:
        with open(split.folder / split.shards[record["shard"]].file, "r+b") as file:
            file.seek(int(record["offset"]) + 200)
            file.write(b"damage")
    return split


@pytest.mark.parametrize("repeats", [1, 2])
def test_a_bad_sample_is_replaced_and_named_on_any_rank(tmp_path, repeats):
    order = Order(0, 40, 8, 4, repeats=repeats)
    first, second = order.replacement(17, 0), order.replacement(17, 1)
    assert len({17, first, second}) == 3
    split = damaged(tmp_path, 17, first)  # its replacement is bad too
    batches = take(split, 10, order=order, data={"workers": 1})
    by_rank = [take(split, 5, order=order, data={"workers": 3, "prefetch": 9}, rank=rank, world=2) for rank in (0, 1)]
    assert all(map(same, batches, [by_rank[index][step] for step in range(5) for index in (0, 1)]))
    met = 0
    for batch in batches:
        planned = order.draws(batch.step, [batch.index])[0]
        expected = {17: second, first: order.replacement(first, 0)}
        used = np.array([draw - draw % 40 + expected.get(draw % 40, draw % 40) for draw in planned])
        assert np.array_equal(batch.draws, used)
        assert batch.ids.tolist() == (used % 40).tolist()
        assert batch.targets.tolist() == (used % 40 % 10).tolist() and batch.counted.all()
        widths, heights = (split.records[name][used % 40] for name in ("width", "height"))
        windows = training_windows(fold(make_key(0, Stream.CROP, 0), used), widths, heights, AUGMENT)
        for number, window, pixels in zip(used % 40, windows, batch.images, strict=True):
            assert torch.equal(pixels, expected_pixels(jpeg(int(number), *sides(int(number))), window))
        if 17 in planned % 40:
            met += 1
            assert {(sample.id, sample.replaced_by) for sample in batch.bad} >= {(17, second), (first, second)}
            assert all(f"sample {sample.id} of split 'train'" in sample.sentence for sample in batch.bad)
        elif first not in planned % 40:
            assert batch.bad == ()
    assert met == repeats


def test_an_unreadable_dataset_is_an_error(tmp_path):
    write_split(tmp_path, [jpeg(n, 40, 40) for n in range(40)], per_shard=40)
    split = open_manifest(tmp_path).split("train")
    os.truncate(tmp_path / split.shards[0].file, 0)
    loader = loader_of(split, Order(0, 40, 8, 4))
    with pytest.raises(DataError, match=r"sample \d+ of split 'train'.*only 0 of \d+ bytes.*Nor could any of 8 others"):
        next(loader)
    assert decoders() == []
    with pytest.raises(StopIteration):
        next(loader)


def test_evaluation_leaves_a_bad_sample_out_and_names_it(tmp_path):
    split = damaged(tmp_path, 5, 39)
    batches = [batch for _, batch in evaluation_of(split, 16)]
    counted = torch.cat([batch.counted for batch in batches])
    assert counted.tolist() == [number not in (5, 39) for number in range(40)]
    bad = [sample for batch in batches for sample in batch.bad]
    assert [(type(sample), sample.id, sample.replaced_by) for sample in bad] == [
        (BadSample, 5, None),
        (BadSample, 39, None),
    ]
    assert "sample 39 of split 'train'" in bad[1].sentence
    assert not batches[0].images[5].any()
    assert batches[0].images[4].any()


class FailingBackend:
    """A backend that calls `what` at call number `turn`, from 0."""

    def __init__(self, backend, turn: int, what):
        self.stored, self.decode, self.turn, self.what = (
            backend.stored,
            backend.decode_batch,
            itertools.count(-turn),
            what,
        )

    def decode_batch(self, *arguments):
        if next(self.turn) == 0:
            self.what()
        return self.decode(*arguments)


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt, SystemExit])
def test_an_exception_of_a_thread_is_raised_when_its_batch_is_due(split, error):
    def fail():
        raise error("in a thread")

    with loader_of(split, Order(0, SAMPLES, 24, 4), workers=1, prefetch=1) as loader:
        loader._backend = FailingBackend(loader._backend, 5, fail)
        with pytest.raises(error, match="in a thread"):
            for _ in range(10):
                next(loader)


def test_a_thread_that_dies_is_an_error_and_not_a_hang(split):
    """In the worst case it has taken a chunk from the queue and not begun it, so the chunk is never finished."""
    loader = loader_of(split, Order(0, SAMPLES, 24, 4), workers=2, prefetch=1)
    next(loader)
    next(loader)
    time.sleep(0.2)  # both threads finish their chunks and wait for work
    raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
    for thread in loader._threads:
        assert raise_in(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit)) == 1
    with pytest.raises(RuntimeError, match="a decoding thread has died"):
        for _ in range(20):
            next(loader)
    assert decoders() == []


def test_a_pool_that_was_shut_down_is_an_error_and_not_a_hang(split):
    loader = loader_of(split, Order(0, SAMPLES, 96, 96), prefetch=8)
    loader._executor.shutdown(wait=False, cancel_futures=True)
    with pytest.raises(RuntimeError, match="shutdown"):
        next(loader)


def test_threads_that_cannot_start_are_an_error_and_not_a_hang(split):
    """In a process whose memory limit permits the stacks of two threads only."""
    program = f"""
import resource, threading, torch
from data_pipeline.config import *; from data_pipeline.loader import *; from data_pipeline.views import Crops
from data_pipeline.manifest import open_manifest
split = open_manifest({str(split.folder)!r}).split("train")
pages = int(open("/proc/self/statm").read().split()[0])
threading.stack_size(256 << 20)
resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + (700 << 20), resource.getrlimit(resource.RLIMIT_AS)[1]))
data = DataConfig(path="", image_size=16, workers=8)
try:
    build_loader(data, Crops(data, AugmentConfig()), split, Order(0, {SAMPLES}, 24, 4))
except RuntimeError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=ROOT, check=False
    )
    assert (result.returncode, result.stdout) == (0, "can't start new thread\n"), result.stderr


def test_close_drops_pending_work_and_may_be_repeated(split):
    loader = loader_of(split, Order(0, SAMPLES, 96, 96), workers=3, prefetch=50)
    next(loader)
    assert len(decoders()) == 3
    loader.close()
    assert decoders() == []
    loader.close()


def test_the_callers_number_of_torch_threads_is_kept(split):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with loader_of(split, Order(0, SAMPLES, 24, 4)) as loader:
            next(loader)
            assert torch.get_num_threads() == 2
            with ThreadPoolExecutor(1) as later:
                assert later.submit(torch.get_num_threads).result() == 2
            assert loader._executor.submit(torch.get_num_threads).result() == 1
    finally:
        torch.set_num_threads(before)


def test_a_program_that_does_not_close_the_loader_ends(split):
    program = f"""
from data_pipeline.config import *; from data_pipeline.loader import *; from data_pipeline.views import Crops
from data_pipeline.manifest import open_manifest
split = open_manifest({str(split.folder)!r}).split("train")
data = DataConfig(path="", image_size=16, workers=2)
loader = build_loader(data, Crops(data, AugmentConfig()), split, Order(0, {SAMPLES}, 24, 4))
print(next(loader).step)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=ROOT, check=False
    )
    assert (result.returncode, result.stdout) == (0, "0\n"), result.stderr


def test_a_world_size_that_does_not_fit_is_refused(split):
    with pytest.raises(ValueError, match="world sizes that can: 1, 2, 3, 6"):
        take(split, 1, rank=0, world=4)


@pytest.mark.parametrize(("batch_size", "world"), [(8, 4), (101, 1), (100, 2), (1000, 4), (40, 8), (1, 4), (7, 3)])
def test_evaluation_counts_every_sample_once_and_keeps_ranks_in_step(split, batch_size, world):
    counted, lengths, repeats = [], set(), 0
    for rank in range(world):
        batches = list(evaluation_of(split, batch_size, rank=rank, world=world))
        lengths.add(len(batches))
        for k, batch in batches:
            assert batch.index == k
            assert batch.ids.tolist() == list(range(k * batch_size, min((k + 1) * batch_size, SAMPLES)))
            if k % world == rank and batch.counted.all():
                assert batch.targets.tolist() == [number % 10 for number in batch.ids.tolist()]
                counted += batch.ids.tolist()
            else:
                assert not batch.counted.any()
                repeats += 1
    assert sorted(counted) == list(range(SAMPLES))
    total = -(-SAMPLES // batch_size)
    assert lengths == {-(-total // world)}
    assert repeats == -total % world


def test_a_rank_without_a_batch_repeats_its_previous_one(tmp_path):
    """Whose bad samples have been reported."""
    split = damaged(tmp_path, 19)

    def found(rank: int, size: int) -> list[tuple[int, bool, list[int]]]:
        batches = evaluation_of(split, size, rank=rank, world=3)
        return [(k, batch.counted[0].item(), [sample.id for sample in batch.bad]) for k, batch in batches]

    assert found(1, 12) == [(1, True, [19]), (1, False, [])]  # 4 batches: rank 0 has two, ranks 1 and 2 have one
    assert found(2, 24) == [(0, False, [])]


def test_evaluation_uses_the_centre_crop(split, images):
    (_, batch), *_ = evaluation_of(split, 10, eval_crop=0.5)
    windows = evaluation_windows(split.records["width"], split.records["height"], 0.5)
    assert torch.equal(batch.images[3], expected_pixels(images[3], windows[3]))


def test_leaving_evaluation_early_ends_its_threads(split):
    batches = evaluation_of(split, 4)
    next(batches)
    batches.close()
    assert decoders() == []
