"""The manifest: reading returns what was written, and every kind of damage gives one clear sentence."""

import json

import numpy as np
import pytest

from data_pipeline.durable import sha256_of
from data_pipeline.manifest import Manifest, open_manifest, write_manifest
from data_pipeline.split import RECORD, DataError, Shard, Split


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train-000000.tar").write_bytes(b"x" * 2048)
    records = np.zeros(3, dtype=RECORD)
    records["label"] = [0, 1, 1]
    records["width"] = records["height"] = 1
    (tmp_path / "train.index").write_bytes(records.tobytes())
    shard = Shard("train-000000.tar", 3, 2048, sha256_of(tmp_path / "train-000000.tar"))
    split = Split(tmp_path, "train", 3, sha256_of(tmp_path / "train.index"), (shard,))
    write_manifest(Manifest(tmp_path, ("cat", "dog"), {"train": split}))
    return tmp_path


def test_reading_returns_what_was_written(folder):
    manifest = open_manifest(folder)
    assert manifest.classes == ("cat", "dog")
    split = manifest.split("train")
    assert split.samples == 3 and split.shards[0].samples == 3
    assert split.records["label"].tolist() == [0, 1, 1]
    assert not [path for path in folder.iterdir() if path.suffix == ".tmp"]


def test_the_index_is_memory_mapped(folder):
    assert isinstance(open_manifest(folder).split("train").records, np.memmap)


def test_the_error_for_a_missing_split_names_the_existing_ones(folder):
    with pytest.raises(DataError, match="has no split 'val'; it has train"):
        open_manifest(folder).split("val")


def test_no_dataset(tmp_path):
    with pytest.raises(DataError, match="manifest.json is missing. Make one with: python launch/prepare.py"):
        open_manifest(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["train-000000.tar", "train.index"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(DataError, match=f"{name} is missing"):
        open_manifest(folder)


@pytest.mark.parametrize("name", ["train-000000.tar", "train.index"])
def test_a_file_cut_short_is_named(folder, name):
    (folder / name).write_bytes(b"x")
    with pytest.raises(DataError, match=f"{name} has 1 bytes where the manifest says"):
        open_manifest(folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda document: "{",
        lambda document: "[]",
        lambda document: json.dumps({**document, "splits": {"train": {}}}),
        lambda document: json.dumps({key: value for key, value in document.items() if key != "classes"}),
    ],
)
def test_a_damaged_manifest(folder, damage):
    path = folder / "manifest.json"
    path.write_text(damage(json.loads(path.read_text())))
    with pytest.raises(DataError, match="manifest.json is damaged"):
        open_manifest(folder)


def test_another_version(folder):
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))
    with pytest.raises(DataError, match="format version 99, this program reads version 1"):
        open_manifest(folder)
