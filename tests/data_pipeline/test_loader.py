import itertools
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.crop import evaluation_windows, training_windows
from data_pipeline.decode import decode
from data_pipeline.loader import build_loader, evaluation_batches
from data_pipeline.manifest import DataError, Split, open_manifest
from data_pipeline.order import Order
from data_pipeline.randomness import Stream, fold, make_key
from tests.data_pipeline.shards import jpeg, write_split

AUGMENT = AugmentConfig(crop="resized")
SAMPLES = 101


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    return [jpeg(number, 40 + number % 13, 36 + number % 7) for number in range(SAMPLES)]


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


def take(split: Split, count: int, *, order: Order | None = None, augment: AugmentConfig = AUGMENT, data: dict | None = None, **place):
    order = order or Order(5, SAMPLES, 24, 4)
    with build_loader(config_of(split, **(data or {})), augment, split, order, **place) as loader:
        return list(itertools.islice(loader, count))


def same(one, other) -> bool:
    return (one.step, one.index) == (other.step, other.index) and all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in ("ids", "images", "labels")
    )


def test_batches_hold_what_order_and_crop_say(split, images):
    order = Order(5, SAMPLES, 24, 4)
    batches = take(split, 30, order=order)  # 4 steps an epoch, 6 micro-batches a step: into the second epoch
    assert [(batch.step, batch.index) for batch in batches] == [(step, index) for step in range(5) for index in range(6)]
    for batch in batches[::5]:
        assert (batch.images.dtype, batch.images.shape) == (torch.uint8, (4, 3, 16, 16))
        assert (batch.ids.dtype, batch.labels.dtype, batch.count) == (torch.int64, torch.int64, True)
        ids = batch.ids.numpy()
        assert np.array_equal(ids, order.micro_batch_ids(batch.step, batch.index))
        assert np.array_equal(batch.labels.numpy(), ids % 10)
        keys = fold(make_key(5, Stream.CROP, batch.step // 4), ids)
        windows = training_windows(keys, split.records["width"][ids], split.records["height"][ids], AUGMENT)
        for number, window, pixels in zip(ids, windows.tolist(), batch.images, strict=False):
            expected = np.zeros((16, 16, 3), np.uint8)
            decode(images[number], window, 16, "bicubic", expected)
            assert np.array_equal(pixels.permute(1, 2, 0).numpy(), expected)


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


def damaged(tmp_path: Path, number: int) -> Split:
    write_split(tmp_path, [jpeg(n, 40, 40) for n in range(40)])
    split = open_manifest(tmp_path).split("train")
    record = split.records[number]
    with open(split.folder / split.shards[record["shard"]].file, "r+b") as file:
        file.seek(int(record["offset"]) + 200)
        file.write(b"damage")
    return split


def test_a_bad_sample_surfaces_in_its_turn_and_ends_the_threads(tmp_path):
    split = damaged(tmp_path, 17)
    order = Order(0, 40, 8, 4)
    turn = next(turn for turn in range(10) if 17 in order.micro_batch_ids(turn // 2, turn % 2))
    loader = build_loader(config_of(split), AUGMENT, split, order)
    for _ in range(turn):
        next(loader)
    with pytest.raises(DataError, match="sample 17 of split 'train'"):
        next(loader)
    assert decoders() == []
    with pytest.raises(StopIteration):
        next(loader)


def test_a_bad_sample_surfaces_in_evaluation(tmp_path):
    split = damaged(tmp_path, 39)
    with pytest.raises(DataError, match="sample 39"):
        list(evaluation_batches(config_of(split), split, 16))


def test_close_is_prompt_and_may_be_repeated(split):
    loader = build_loader(config_of(split, workers=3, prefetch=50), AUGMENT, split, Order(0, SAMPLES, 96, 96))
    next(loader)
    assert len(decoders()) == 3
    start = time.perf_counter()
    loader.close()
    assert time.perf_counter() - start < 2
    loader.close()


def test_the_callers_threads_in_torch_stay(split):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with build_loader(config_of(split), AUGMENT, split, Order(0, SAMPLES, 24, 4)) as loader:
            next(loader)
            assert torch.get_num_threads() == 2
            assert loader._executor.submit(torch.get_num_threads).result() == 1
    finally:
        torch.set_num_threads(before)


def test_a_program_that_forgets_to_close_still_ends(split):
    program = f"""
from data_pipeline.config import *; from data_pipeline.loader import *; from data_pipeline.manifest import open_manifest
split = open_manifest({str(split.folder)!r}).split("train")
loader = build_loader(DataConfig(path="", image_size=16, workers=2), AugmentConfig(), split, Order(0, {SAMPLES}, 24, 4))
print(next(loader).step)
"""
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=root, check=False)
    assert (result.returncode, result.stdout) == (0, "0\n"), result.stderr


def test_what_does_not_fit_is_refused(split):
    with pytest.raises(ValueError, match="the order is of 50 samples, split 'train' has 101"):
        take(split, 1, order=Order(0, 50, 10, 5))
    with pytest.raises(ValueError, match="world sizes that can: 1, 2, 3, 6"):
        take(split, 1, rank=0, world=4)
    with pytest.raises(ValueError, match="start_step -1"):
        take(split, 1, start_step=-1)


@pytest.mark.parametrize(("batch_size", "world"), [(8, 4), (101, 1), (100, 2), (1000, 4), (40, 8), (1, 4), (7, 3)])
def test_evaluation_counts_every_sample_once_and_keeps_ranks_in_step(split, batch_size, world):
    counted, lengths, repeats = [], set(), 0
    for rank in range(world):
        batches = list(evaluation_batches(config_of(split), split, batch_size, rank=rank, world=world))
        lengths.add(len(batches))
        for k, batch in batches:
            assert batch.index == k
            assert batch.ids.tolist() == list(range(k * batch_size, min((k + 1) * batch_size, SAMPLES)))
            assert batch.labels.tolist() == [number % 10 for number in batch.ids.tolist()]
            if batch.count:
                assert k % world == rank
                counted += batch.ids.tolist()
            else:
                repeats += 1
    assert sorted(counted) == list(range(SAMPLES))
    total = -(-SAMPLES // batch_size)
    assert lengths == {-(-total // world)}
    assert repeats == -total % world


def test_a_rank_without_a_batch_repeats_its_previous_one(split):
    batches = list(evaluation_batches(config_of(split), split, 30, rank=1, world=3))  # 4 batches: ranks 1 and 2 have one, rank 0 two
    assert [(k, batch.count) for k, batch in batches] == [(1, True), (1, False)]
    assert same(batches[0][1], batches[1][1])
    assert [(k, batch.count) for k, batch in evaluation_batches(config_of(split), split, 60, rank=2, world=3)] == [(0, False)]


def test_evaluation_uses_the_centre(split, images):
    (_, batch), *_ = evaluation_batches(config_of(split, eval_crop=0.5), split, 10)
    windows = evaluation_windows(split.records["width"], split.records["height"], 0.5)
    expected = np.zeros((16, 16, 3), np.uint8)
    decode(images[3], windows[3].tolist(), 16, "bicubic", expected)
    assert np.array_equal(batch.images[3].permute(1, 2, 0).numpy(), expected)


def test_leaving_evaluation_early_ends_its_threads(split):
    batches = evaluation_batches(config_of(split), split, 4)
    next(batches)
    batches.close()
    assert decoders() == []
