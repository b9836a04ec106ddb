"""Labels beyond a record's integer, and targets of any structure on their way through the loader."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch

from data_pipeline.annotations import Cut, add_annotation
from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.loader import build_loader, evaluation_batches
from data_pipeline.manifest import open_manifest
from data_pipeline.order import Order
from data_pipeline.split import DataError
from data_pipeline.views import Crops


@pytest.fixture
def dataset(tiny_dataset, tmp_path):
    shutil.copytree(tiny_dataset, tmp_path / "set")
    manifest = open_manifest(tmp_path / "set")
    for name, split in list(manifest.splits.items()):
        sizes = np.arange(2 * split.samples).reshape(-1, 2) % 7 + 1
        manifest = add_annotation(manifest, name, "size", sizes)
    return tmp_path / "set"


class Maps:
    """A map of each sample's own size, filled with its id; and its window's mirroring."""

    stored = None

    def __init__(self, split):
        self._sizes = split.annotation("size")

    def read(self, ids, candidates, shape):
        maps = [
            torch.full(tuple(size), int(number)) for number, size in zip(ids, self._sizes[ids].tolist(), strict=True)
        ]
        windows = candidates[:, 0]
        return Cut(windows, list(zip(maps, windows[:, 4].tolist(), strict=True)))

    def collate(self, targets):
        maps, flips = zip(*targets, strict=True)
        return {"maps": list(maps), "flips": torch.tensor(flips)}


def config(split):
    return DataConfig(path=str(split.folder), image_size=16, workers=2, prefetch=3)


def views(split):
    return Crops(config(split), AugmentConfig())


def test_targets_of_varying_size_come_with_their_images(dataset):
    split = open_manifest(dataset).split("train")
    flips = set()
    with build_loader(config(split), views(split), split, Order(0, split.samples, 32, 8), Maps(split)) as loader:
        for _ in range(8):
            batch = next(loader)
            assert [int(found[0, 0]) for found in batch.targets["maps"]] == batch.ids.tolist()
            sizes = split.annotation("size")[batch.ids.numpy()]
            assert [tuple(found.shape) for found in batch.targets["maps"]] == [tuple(size) for size in sizes.tolist()]
            flips |= set(batch.targets["flips"].tolist())
    assert flips == {0, 1}


def test_evaluation_reads_the_same_targets_once(dataset):
    split = open_manifest(dataset).split("val")
    found = [
        int(one[0, 0])
        for rank in range(2)
        for _, batch in evaluation_batches(config(split), views(split), split, 8, Maps(split), rank=rank, world=2)
        for one, counted in zip(batch.targets["maps"], batch.counted, strict=True)
        if counted
    ]
    assert sorted(found) == list(range(split.samples))


def test_other_annotations_are_another_dataset(tiny_dataset, dataset):
    plain, annotated = (open_manifest(folder).split("train") for folder in (tiny_dataset, dataset))
    assert plain.identity == plain.fingerprint == annotated.fingerprint != annotated.identity
    manifest = add_annotation(open_manifest(dataset), "train", "size", np.ones((annotated.samples, 2), np.int64))
    assert manifest.split("train").identity != annotated.identity
    assert open_manifest(dataset).split("train").identity == manifest.split("train").identity


def test_a_damaged_annotation_is_named(dataset):
    with pytest.raises(DataError, match="has no annotation 'depth'"):
        open_manifest(dataset).split("train").annotation("depth")
    with pytest.raises(ValueError, match="3 rows for the 260 samples"):
        add_annotation(open_manifest(dataset), "train", "depth", np.zeros(3))
    path = dataset / "train.size.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="train.size.npy is damaged"):
        open_manifest(dataset)
    document = json.loads((dataset / "manifest.json").read_text())
    path.write_bytes(b"")
    empty = {"file": path.name, "bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    document["splits"]["train"]["annotations"]["size"] = empty
    (dataset / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match="train.size.npy is damaged"):
        open_manifest(dataset)
    document["splits"]["train"]["annotations"]["size"]["file"] = "../size.npy"
    (dataset / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match="lies outside the dataset's folder"):
        open_manifest(dataset)
