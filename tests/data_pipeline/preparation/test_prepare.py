"""Preparing a dataset: the contents of the shards, the kinds of sources, and the arguments."""

import io
import shutil
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_pipeline.manifest import open_manifest
from data_pipeline.preparation.verify import verify
from data_pipeline.split import DataError, UsageError
from tests.data_pipeline.images import (
    CLASSES,
    SAMPLE,
    contents,
    encoded,
    listed,
    make_folder,
    make_tar,
    originals,
    picture,
    run,
    stored,
)
from tests.data_pipeline.label_maps import write


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("source") / "pictures")


@pytest.fixture(scope="module")
def dataset(folder, tmp_path_factory):
    """`folder`, prepared in several shards."""
    dest = tmp_path_factory.mktemp("prepared") / "set"
    assert run(folder, dest, shard_bytes=10_000)
    return dest


def test_any_webdataset_reader_gets_the_same_images_and_labels(folder, dataset):
    for split in ("train", "val"):
        shards = open_manifest(dataset).split(split).shards
        assert len(shards) > 1
        files = [str(dataset / shard.file) for shard in shards]
        samples = list(webdataset.WebDataset(files, shardshuffle=False).to_tuple("jpg", "cls", "__key__"))
        assert {(data, int(label)) for data, label, _ in samples} == originals(folder, split)
        assert [(data, int(label)) for data, label, _ in samples] == stored(dataset, split)
        keys = [key for *_, key in samples]
        assert keys == [f"{i:09d}" for i in range(len(keys))]


def test_the_index_gives_exact_bytes_sizes_and_checksums(folder, dataset):
    split = open_manifest(dataset).split("train")
    samples = stored(dataset, "train")
    assert set(samples) == originals(folder, "train") and len(samples) == split.samples == 15
    for (data, _), record in zip(samples, split.records, strict=True):
        assert zlib.crc32(data) == record["checksum"]
        assert (record["width"], record["height"]) == (40, 30)


def test_classes_are_mixed_and_no_temporary_files_remain(dataset):
    labels = [label for _, label in stored(dataset, "train")]
    assert labels != sorted(labels)
    assert not (dataset / ".work").exists()
    assert open_manifest(dataset).classes == CLASSES
    assert verify(dataset) == []


def test_the_order_depends_on_the_seed_and_not_on_the_workers(folder, dataset, tmp_path):
    run(folder, tmp_path / "one", shard_bytes=10_000, workers=1)
    assert contents(tmp_path / "one") == contents(dataset)
    run(folder, tmp_path / "other", shard_bytes=10_000, seed=1)
    assert stored(tmp_path / "other", "train") != stored(dataset, "train")
    assert sorted(stored(tmp_path / "other", "train")) == sorted(stored(dataset, "train"))


@pytest.mark.parametrize("ending", ["tar", "tar.xz", "tar.gz", "tar.bz2", "tar.zst"])
def test_a_tar_gives_the_same_dataset_as_its_folder(folder, dataset, tmp_path, ending):
    if ending == "tar.zst":
        if shutil.which("zstd") is None:
            pytest.skip("no zstd program")
        import subprocess

        tar = make_tar(folder, tmp_path / "pictures.tar")
        subprocess.run(["zstd", "-q", tar, "-o", tmp_path / "pictures.tar.zst"], check=True)
    else:
        make_tar(folder, tmp_path / f"pictures.{ending}", "w:" + ending.partition(".")[2])
    run(tmp_path / f"pictures.{ending}", tmp_path / "set", shard_bytes=10_000)
    # The report names the source, so it differs.
    assert contents(tmp_path / "set", ("report.json",)) == contents(dataset, ("report.json",))


def test_imagefolder_of_torchvision(folder, tmp_path):
    from torchvision.datasets import ImageFolder

    run(f"imagefolder:{folder}/train", tmp_path / "set")
    theirs = ImageFolder(str(folder / "train"))
    assert open_manifest(tmp_path / "set").classes == tuple(theirs.classes)
    expected = {(Path(path).read_bytes(), label) for path, label in theirs.samples}
    assert set(stored(tmp_path / "set", "train")) == expected
    with pytest.raises(DataError, match="has no split 'val'"):
        open_manifest(tmp_path / "set").split("val")


@pytest.mark.slow
def test_a_torchvision_dataset_by_name(tmp_path):
    """Raw files of MNIST made here: 40 train and 20 test images, each with a bar whose height gives its digit."""
    raw = tmp_path / "root/MNIST/raw"
    raw.mkdir(parents=True)
    for prefix, count in (("train", 40), ("t10k", 20)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = np.zeros((count, 28, 28), np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[: 2 * label + 2] = 255
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 2051, count, 28, 28) + images.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 2049, count) + labels.tobytes())
    run(f"mnist:{tmp_path / 'root'}", tmp_path / "set", workers=1)  # each worker imports torch
    manifest = open_manifest(tmp_path / "set")
    assert manifest.classes[:2] == ("0 - zero", "1 - one")
    assert {name: split.samples for name, split in manifest.splits.items()} == {"train": 40, "val": 20}
    for data, label in stored(tmp_path / "set", "val"):
        assert (np.asarray(Image.open(io.BytesIO(data)))[:, 5] > 127).sum() == 2 * label + 2


def test_the_error_for_an_unavailable_torchvision_dataset_is_one_sentence(tmp_path):
    with pytest.raises(UsageError, match="FakeData has neither train= nor split="):
        run("fakedata", tmp_path / "set")
    with pytest.raises(DataError, match="torchvision cannot open or download ImageNet at"):
        run(f"imagenet:{tmp_path}", tmp_path / "other")


def test_a_split_without_a_good_image_is_an_error(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "source" / name).mkdir(parents=True)
        (tmp_path / "source" / name / "a.jpg").write_bytes(b"no")
    with pytest.raises(DataError, match=r"no image of train can be used: the first of 2 is .*/a.jpg: not an image"):
        run(tmp_path / "source", tmp_path / "set")


def test_rarer_names_of_images(tmp_path):
    """Images that no decoder here reads are left out and named."""
    names = ("cat/a.jfif", "cat/b.JPE", "dog/c.HEIC", "dog/d.jpg", "dog/e.txt")
    for name in names:
        write(tmp_path / "source" / name, b"\0\0\0\x18ftypheic" if "HEIC" in name else encoded(picture(ord(name[4]))))
    run(tmp_path / "source", tmp_path / "set")
    assert open_manifest(tmp_path / "set").split("train").samples == 3
    assert listed(tmp_path / "set") == {"dog/c.HEIC": ("excluded", "not an image of a known format")}


@pytest.mark.parametrize("beside", ["annotations.json", "labels.csv", None])
@pytest.mark.parametrize("folders", [["images"], ["train/images", "val/images"]])
def test_one_class_is_refused(tmp_path, folders, beside):
    for name in (f"{folder}/1.jpg" for folder in folders):
        (tmp_path / "source" / name).parent.mkdir(parents=True)
        (tmp_path / "source" / name).write_bytes(encoded(picture(1)))
    if beside:
        (tmp_path / "source" / beside).write_text("{}")
        (tmp_path / "source/notes.txt").write_text("behind both by name")
    unread = rf" \({beside} is not read\)" if beside else ""
    message = f"one class, the folder 'images': .* the boxes must be in annotations/instances_train.json{unread}, and"
    with pytest.raises(DataError, match=message):
        run(tmp_path / "source", tmp_path / "set")
    assert not (tmp_path / "set/manifest.json").exists()


def test_val_fraction_is_reproducible(folder, tmp_path):
    for dest in ("one", "two"):
        run(folder / "train", tmp_path / dest, val_fraction=0.2, workers=1)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    train, val = (set(stored(tmp_path / "one", split)) for split in ("train", "val"))
    assert (len(train), len(val)) == (12, 3) and train | val == originals(folder, "train")
    run(folder / "train", tmp_path / "three", val_fraction=0.2, seed=5)
    assert set(stored(tmp_path / "three", "val")) != val


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "val/c/1.jpg"], "only train has b and only val has c"),
        (
            ["train/a/1.jpg", "test/a/1.jpg"],
            "folders test, train; expected train and val, or class folders only; if train is for training and test for "
            "validation, give .*/source/train as the source, with --val .*/source/test",
        ),
        (["val/a/1.jpg", "test/a/1.jpg"], "give .*/source/test as the source, with --val .*/source/val"),
        (["a/1.jpg", "2.jpg"], "2.jpg in .* is not in a class folder"),
        (["readme.txt"], "contains no images"),
    ],
)
def test_unclear_layouts_are_refused(tmp_path, names, message):
    for name in names:
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / name).write_bytes(encoded(picture(1)))
    with pytest.raises(DataError, match=message):
        run(tmp_path / "source", tmp_path / "set")


def test_classes_may_be_named_train_and_contain_folders(tmp_path):
    for number, name in enumerate(["data/train/1.jpg", "data/bus/1.jpg", "data/bus/old/2.jpg"]):
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / name).write_bytes(encoded(picture(number)))
    run(tmp_path / "source", tmp_path / "set")
    manifest = open_manifest(tmp_path / "set")
    assert manifest.classes == ("bus", "train") and list(manifest.splits) == ["train"]
    assert sorted(label for _, label in stored(tmp_path / "set", "train")) == [0, 0, 1]


def test_a_damaged_archive_is_one_sentence(folder, tmp_path):
    path = make_tar(folder, tmp_path / "pictures.tar.xz", "w:xz")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match="pictures.tar.xz cannot be decompressed"):
        run(path, tmp_path / "set")
    (tmp_path / "note.tar").write_text("this is no tar file" * 100)
    with pytest.raises(DataError, match="note.tar is not a whole tar archive"):
        run(tmp_path / "note.tar", tmp_path / "other")


def test_a_finished_dataset_knows_a_relative_source_that_is_gone(tmp_path, monkeypatch):
    """So FFCV files can still be added."""
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "pictures", train=1, val=1)
    assert run("pictures", tmp_path / "set", workers=1)
    shutil.rmtree(tmp_path / "pictures")
    assert not run("pictures", tmp_path / "set") and not run("../" + tmp_path.name + "/pictures", tmp_path / "set")
    with pytest.raises(UsageError, match="was prepared with source .*/pictures and not others"):
        run("others", tmp_path / "set")


def test_other_arguments_or_another_source_are_refused(folder, tmp_path):
    source = shutil.copytree(folder, tmp_path / "source")
    run(source, tmp_path / "set")
    assert run(source, tmp_path / "set") is False
    with pytest.raises(UsageError, match="prepared with seed 0 and not 1"):
        run(source, tmp_path / "set", seed=1)
    with pytest.raises(UsageError, match="source .*source and not .*pictures"):
        run(folder, tmp_path / "set")
    with pytest.raises(UsageError, match="is not empty"):
        run(folder, source)
    with pytest.raises(UsageError, match="has a val split of its own"):
        run(folder, tmp_path / "other", val_fraction=0.5)


@pytest.mark.slow
@pytest.mark.skipif(not SAMPLE.exists(), reason="imagenet_sample.tar is missing")
def test_real_photographs_keep_their_bytes(tmp_path):
    """200 photographs of ImageNet in a new tar."""
    with tarfile.open(SAMPLE) as tar, tarfile.open(tmp_path / "some.tar", "w") as some:
        members = [member for member in tar if member.isreg()][:200]
        data = {member.name: tar.extractfile(member).read() for member in members}
        for member in members:
            some.addfile(member, io.BytesIO(data[member.name]))
    run(tmp_path / "some.tar", tmp_path / "set", shard_bytes=4 << 20)
    images = [image for image, _ in stored(tmp_path / "set", "train")]
    assert sorted(images) == sorted(data.values())
    for image, record in zip(images, open_manifest(tmp_path / "set").split("train").records, strict=True):
        assert Image.open(io.BytesIO(image)).size == (record["width"], record["height"])
