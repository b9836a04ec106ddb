"""Untrusted manifests and indexes: reading one may end a program with one sentence and must have no other effect."""

import tracemalloc

import numpy as np
import pytest

from data_pipeline.backends.stored import StoredSamples
from data_pipeline.durable import sha256_of
from data_pipeline.manifest import open_manifest
from data_pipeline.split import DataError, Shard, Split
from data_pipeline.storage import open_dataset
from tests.data_pipeline.staging import config
from tests.hostile.datasets import contents, flip_a_bit, rewrite, split_entry


def shard(**fields):
    return lambda document: document["splits"]["train"]["shards"][1].update(fields)


def renamed(name: str):
    return lambda document: document["splits"].update({name: document["splits"].pop("train")})


HOSTILE = {
    "absolute": shard(file="/tmp/evil.pth"),
    "upwards": shard(file="../../evil.pth"),
    "upwards, inside": shard(file="a/../../evil.pth"),
    "not normal": shard(file="a/./b.tar"),
    "the folder": shard(file="."),
    "empty": shard(file=""),
    "NUL": shard(file="a\0b"),
    "escape": shard(file="a\x1b[2Jb"),
    "no text": shard(file="a\ud800b"),
    "no string": shard(file=["a"]),
    "twice": shard(file="train-00000.tar"),
    "an index": shard(file="train.index"),
    "the manifest": shard(file="manifest.json"),
    "a file as folder": shard(file="train-00000.tar/b.tar"),
    "split upwards": renamed("../train"),
    "split absolute": renamed("/tmp/train"),
    "split of nothing": renamed(""),
    "split hidden": renamed(".train"),
    "samples text": split_entry(samples="12"),
    "samples float": split_entry(samples=12.0),
    "samples true": split_entry(samples=True),
    "samples negative": split_entry(samples=-12),
    "samples huge": split_entry(samples=10**30),
    "samples none": split_entry(samples=0, shards=[]),
    "samples that do not add up": split_entry(samples=13),
    "bytes negative": shard(bytes=-1),
    "bytes huge": shard(bytes=2**63),
    "hash short": shard(sha256="abc"),
    "hash number": split_entry(fingerprint=7),
    "shards no list": split_entry(shards=7),
    "unknown field": shard(command="rm"),
    "no classes": lambda document: document.update(classes=[]),
    "classes numbers": lambda document: document.update(classes=[1, 2]),
    "classes text": lambda document: document.update(classes="abc"),
    "splits a list": lambda document: document.update(splits=[]),
    "beton mode": split_entry(
        beton={"file": "b", "bytes": 1, "sha256": "0" * 64, "mode": "exec", "fingerprint": "0" * 64}
    ),
    "beton upwards": split_entry(
        beton={"file": "../b", "bytes": 1, "sha256": "0" * 64, "mode": "raw", "fingerprint": "0" * 64}
    ),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_manifest_is_refused_in_one_sentence(dataset, tmp_path, change):
    rewrite(dataset, change)
    before, staged = contents(tmp_path), config(f"file://{dataset}", tmp_path / "cache")
    for attempt in (lambda: open_manifest(dataset), lambda: open_dataset(staged)):
        with pytest.raises(DataError, match=r"manifest\.json is damaged \(.*\)\. Prepare the dataset again\.$"):
            attempt()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5000, '{"version": 1}', "null", "\ufeff{}", ""])
def test_a_file_that_is_not_a_manifest_is_refused(dataset, text):
    (dataset / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"manifest\.json (is damaged|has format version)"):
        open_manifest(dataset)


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("label", 2**30 + 2, "its class is none of the 10"),
        ("label", 10, "its class is none of the 10"),
        ("shard", 3, "it lies outside the files"),
        ("shard", 2**32 - 1, "it lies outside the files"),
        ("offset", 2**63, "it lies outside the files"),
        ("offset", 2**64 - 1, "it lies outside the files"),
        ("size", 2**32 - 1, "it lies outside the files"),
        ("width", 0, "it has no pixels"),
    ],
)
def test_an_index_with_impossible_values_is_refused(dataset, tmp_path, field, value, sentence):
    """Its hash is correct, because an attacker can compute it too."""
    path = dataset / "train.index"
    records = np.array(open_manifest(dataset).split("train").records)
    records[field][7] = value
    records.tofile(path)
    rewrite(dataset, split_entry(fingerprint=sha256_of(path)))
    for data in (config(dataset), config(dataset, tmp_path / "cache")):
        with pytest.raises(DataError, match=rf"train\.index cannot be right: of sample 7 it says that {sentence}"):
            open_dataset(data)


def test_a_flipped_bit_in_an_index_is_found_at_the_start(dataset):
    flip_a_bit(dataset / "train.index", 16)  # of the first label
    with pytest.raises(DataError, match=r"train\.index is damaged: its SHA-256 is not the manifest's\. Copy it again"):
        open_dataset(config(dataset))


def test_one_process_of_a_node_checks_the_files(dataset, monkeypatch):
    (dataset / "train-00001.tar").unlink()
    monkeypatch.setenv("LOCAL_RANK", "1")
    open_dataset(config(dataset))
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(DataError, match=r"train-00001\.tar is missing"):
        open_dataset(config(dataset))


def test_the_doctor_chooses_samples_of_a_billion_in_little_memory(dataset):
    from operate.doctor.files import sample_ids

    small = StoredSamples(open_manifest(dataset).split("train"))
    ids = sample_ids(small, 2, 0)
    assert len(set(ids.tolist())) == 8 and len(set(small.records["shard"][ids].tolist())) == 2
    shards = tuple(Shard(f"{number}.tar", 10_000, 1, "") for number in range(100_000))
    large = StoredSamples(Split(dataset, "train", 10**9, "", shards))
    tracemalloc.start()
    ids = sample_ids(large, 16, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(ids.tolist())) == 256 and len(set((ids // 10_000).tolist())) <= 16
    assert peak < 20e6
