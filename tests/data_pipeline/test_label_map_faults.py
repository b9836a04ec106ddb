"""Label maps that are damaged, that a file system refuses, and that are staged."""

import os
import threading
from dataclasses import replace
from itertools import islice

import pytest
import torch

from data_pipeline import faults
from data_pipeline.label_maps import LabelMaps
from data_pipeline.loader import build_loader
from data_pipeline.manifest import open_manifest, write_manifest
from data_pipeline.order import Order
from data_pipeline.split import LABEL_MAP, Split
from data_pipeline.storage import open_dataset
from tests.data_pipeline.labelled_splits import (
    CLASSES,
    SIZES,
    VIEWS,
    config_of,
    evaluate,
    images_of,
    label_map,
    maps_of,
    same,
    train,
    write,
)
from tests.data_pipeline.shards import add_beton, png
from tests.data_pipeline.staging import Server, staged


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> Split:
    return write(tmp_path_factory.mktemp("labelled"))


# --- damage ----------------------------------------------------------------------------------------------------------


def spoil(split: Split, number: int) -> None:
    """Change a byte of a label map in its shard."""
    record = split.annotation(LABEL_MAP)[number]
    with open(split.folder / split.shards[record["shard"]].file, "r+b") as file:
        file.seek(int(record["offset"]) + int(record["size"]) // 2)
        file.write(b"\x00\x01\x02")


def damaged(folder) -> Split:
    """Sample 3: bytes that do not match the checksum. 5: a PNG of another size."""
    maps = maps_of(SIZES)
    maps[5] = png(label_map(0, 48, 47))
    split = write(folder, maps)
    spoil(split, 3)
    return split


REASONS = {
    3: "train-00001.tar: label map of sample 3 of split 'train' (bytes ",
    5: "it is 48x47 pixels where its image has 48x48.",
}


def test_a_damaged_label_map_is_a_bad_sample_on_any_rank(tmp_path):
    split = damaged(tmp_path)
    order = Order(0, 10, 4, 2)
    expected = {3: order.replacement(3, 0), 5: order.replacement(5, 0)}
    assert not {*expected.values()} & {3, 5}
    whole = train(split, 10)
    by_rank = [train(split, 5, rank=rank, world=2, workers=1) for rank in (0, 1)]
    assert all(map(same, whole, [by_rank[number % 2][number // 2] for number in range(10)]))
    named = {}
    for batch in whole:
        planned = order.draws(batch.step, [batch.index])[0]
        assert batch.ids.tolist() == [expected.get(number, number) for number in (planned % 10).tolist()]
        assert [sample.id for sample in batch.bad] == [number for number in planned.tolist() if number in expected]
        named |= {sample.id: sample for sample in batch.bad}
        # The substitute is what it is anywhere else in this epoch: image and labels by the same window.
        for row, number in enumerate(batch.ids.tolist()):
            for other in whole:
                if other.step // 2 == batch.step // 2 and number in other.ids.tolist():
                    place = other.ids.tolist().index(number)
                    assert torch.equal(batch.images[row], other.images[place])
                    assert torch.equal(batch.targets["labels"][row], other.targets["labels"][place])
    assert {number: sample.replaced_by for number, sample in named.items()} == expected
    assert all(REASONS[number] in sample.sentence for number, sample in named.items())


def test_a_damaged_label_map_is_not_counted_in_evaluation(tmp_path):
    batches = [batch for _, batch in evaluate(damaged(tmp_path))]
    for batch in batches:
        for number, labels, counted in zip(batch.ids.tolist(), batch.targets["labels"], batch.counted, strict=True):
            assert counted == (number not in REASONS)
            assert tuple(labels.shape) == SIZES[number][::-1]
            assert counted or (labels == 255).all()
    bad = {sample.id: sample for batch in batches for sample in batch.bad}
    assert set(bad) == set(REASONS)
    assert all(sample.replaced_by is None and REASONS[number] in sample.sentence for number, sample in bad.items())


def test_a_fault_of_the_file_system_is_retried_and_reported(split, monkeypatch):
    monkeypatch.setattr(faults, "PAUSES", (0.0, 0.0))
    expected, reads, read = train(split, 4), [], os.pread

    def failing(descriptor: int, length: int, offset: int) -> bytes:
        reads.append(offset)
        if len(reads) == 1:
            raise OSError(5, "Input/output error")
        return read(descriptor, length, offset)

    targets = LabelMaps(split, CLASSES, True, VIEWS.cat_max_ratio)
    monkeypatch.setattr(os, "pread", failing)
    # The compiled library reads nothing of the label maps, so all of them are read by os.pread.
    monkeypatch.setattr(targets.stored, "_read_together", lambda chunk, _: dict.fromkeys(range(len(chunk)), -1))
    with build_loader(config_of(split), VIEWS, split, Order(0, 10, 4, 2), targets) as loader:
        found = list(islice(loader, 4))
    assert all(map(same, found, expected))
    (fault,) = [fault for batch in found for fault in batch.faults]
    assert fault.error == "Input/output error" and fault.file.endswith(".tar") and fault.count == 1


def test_closing_the_loader_closes_the_shards(split):
    before = len(os.listdir("/proc/self/fd"))
    train(split)
    evaluate(split)
    assert len(os.listdir("/proc/self/fd")) == before


# --- staging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["webdataset", "ffcv"])
def test_label_maps_are_staged_and_no_shard_is_fetched_twice(tmp_path, backend):
    split = write(tmp_path / "set")
    if backend == "ffcv":
        split = add_beton(split, images_of(SIZES), "jpeg")
        write_manifest(replace(open_manifest(split.folder), splits={"train": split}))
    expected = train(split, backend=backend), evaluate(split, backend=backend)
    server = Server(split.folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        data = {"path": server.url, "cache_dir": str(tmp_path / "cache"), "backend": backend}
        copy = open_dataset(config_of(split, **data)).split("train")
        assert all(map(same, train(copy, **data), expected[0]))
        assert all(same(one[1], other[1]) for one, other in zip(evaluate(copy, **data), expected[1], strict=True))
    finally:
        server.shutdown()
        server.server_close()
    names = {path.name for path in split.folder.iterdir()} - {"manifest.json"}
    assert staged(tmp_path / "cache") == names
    assert {name: server.requests.count(name) for name in names} == dict.fromkeys(names, 1)


def test_a_damaged_copy_is_fetched_again(split, tmp_path):
    expected = train(split)
    data = {"path": str(split.folder), "cache_dir": str(tmp_path / "cache")}
    copy = open_dataset(config_of(split, **data)).split("train")
    train(copy, **data)
    for number in (2, 6):
        spoil(copy, number)
    found = train(copy, **data)
    assert all(map(same, found, expected))
    files = {fault.file.rpartition("/")[2]: fault.error for batch in found for fault in batch.faults}
    assert files == dict.fromkeys(
        ["train-00000.tar", "train-00002.tar"], "damaged on this node's disk, and fetched again"
    )
