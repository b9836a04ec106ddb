"""Shards of other programs: written by webdataset's writer or by tar, indexed, and read in place."""

import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import webdataset

from data_pipeline.backends import open_backend
from data_pipeline.decode import crop_and_resize_batch
from data_pipeline.manifest import open_manifest
from data_pipeline.preparation.foreign import index
from data_pipeline.preparation.ownership import MARK
from data_pipeline.preparation.verify import verify
from data_pipeline.split import DataError, UsageError
from tests.data_pipeline.images import contents, encoded, listed, make_folder, picture, run, stored
from tests.data_pipeline.preparation.test_listing import add

GOOD = [encoded(picture(number)) for number in range(12)]


def write(path: Path, samples: list[dict]) -> Path:
    """Write a shard with webdataset's TarWriter: .cls as text, .json as JSON, bytes unchanged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    encoder = {"cls": lambda label: str(label).encode(), "json": lambda x: json.dumps(x).encode()}
    with webdataset.TarWriter(str(path), encoder=encoder) as writer:
        for sample in samples:
            writer.write(sample)
    return path


def sample(number: int, **fields) -> dict:
    return {"__key__": f"some/folder/{number:04d}", "jpg": GOOD[number], **fields}


def indexed(dest: Path, **options) -> dict[str, list[tuple[bytes, int]]]:
    """Index `dest`, check that only the results were added, and return {split: samples}."""
    before = {file: digest for file, digest in contents(dest).items() if file.endswith(".tar")}
    index(dest, workers=2, **options)
    manifest, after = open_manifest(dest), contents(dest)
    assert {file: digest for file, digest in after.items() if file.endswith(".tar")} == before
    results = {"manifest.json", "report.json", "report.jsonl", *(f"{split}.index" for split in manifest.splits)}
    assert set(after) == before.keys() | results | ({"classes.txt"} & set(after))
    assert verify(dest) == []
    return {split: stored(dest, split) for split in manifest.splits}


def test_cls_and_splits_by_name(tmp_path):
    labels = [3, 0, 2, 2, 1]
    write(tmp_path / "imagenet1k-train-0000.tar", [sample(i, cls=labels[i], txt="a caption") for i in range(3)])
    write(tmp_path / "imagenet1k-train-0001.tar", [sample(i, cls=labels[i]) for i in (3, 4)])
    write(tmp_path / "imagenet1k-validation-00.tar", [sample(i, cls=i - 5) for i in (5, 6)])
    splits = indexed(tmp_path)
    assert splits == {"train": list(zip(GOOD, labels, strict=False)), "val": [(GOOD[5], 0), (GOOD[6], 1)]}
    assert open_manifest(tmp_path).classes == ("0", "1", "2", "3")


def test_the_loader_reads_them(tmp_path):
    write(tmp_path / "shards/train-0.tar", [sample(i, cls=i) for i in range(4)])
    indexed(tmp_path)
    split = open_manifest(tmp_path).split("train")
    windows = np.array([[0, 0, 40, 30, 0]] * 4, np.int32)
    out = np.zeros((4, 24, 24, 3), np.uint8)
    assert open_backend("webdataset", split).decode_batch(np.arange(4), windows, (24, 24), "bicubic", out) == {}
    pixels, expected = [simplejpeg.decode_jpeg(image).tobytes() for image in GOOD[:4]], np.zeros_like(out)
    crop_and_resize_batch(pixels, np.array([[40, 30]] * 4), windows, (24, 24), "bicubic", expected)
    assert np.abs(out.astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("fields", "options", "classes", "labels"),
    [
        ([{"json": {"label": 1}}, {"json": {"label": 0}}], {}, ("0", "1"), [1, 0]),
        ([{"json": {"class": "dog"}}, {"json": {"class": "cat"}}], {}, ("cat", "dog"), [1, 0]),
        ([{"cls": "dog"}, {"cls": "cat"}], {}, ("cat", "dog"), [1, 0]),
        ([{"json": {"label": "7", "id": 3}}, {"json": {"label": 0}}], {}, tuple("01234567"), [7, 0]),
        (
            [{"cls": 5, "json": {"wnid": "b"}}, {"cls": 6, "json": {"wnid": "a"}}],
            {"label_key": "wnid"},
            ("a", "b"),
            [1, 0],
        ),
        ([{"cls": 5, "json": {"label": 1}}, {"cls": 0, "json": {"label": 1}}], {}, tuple("012345"), [5, 0]),
    ],
)
def test_labels(tmp_path, fields, options, classes, labels):
    write(tmp_path / "train-0.tar", [sample(i, **field) for i, field in enumerate(fields)])
    assert [label for _, label in indexed(tmp_path, **options)["train"]] == labels
    assert open_manifest(tmp_path).classes == classes


@pytest.mark.parametrize("label", [1, "dog"])
def test_classes_txt(tmp_path, label):
    """Its order gives the numbers of the classes, for labels that are numbers and for labels that are names."""
    (tmp_path / "classes.txt").write_text("wolf\ndog\ncat\n")
    write(tmp_path / "train-0.tar", [sample(0, cls=label)])
    assert indexed(tmp_path) == {"train": [(GOOD[0], 1)]}
    assert open_manifest(tmp_path).classes == ("wolf", "dog", "cat")


def test_unusable_samples_are_left_out_and_named(tmp_path):
    names = {
        "truncated": ({"jpg": GOOD[1][:-100]}, "Premature end"),
        "png": ({"png": encoded(picture(2), "PNG")}, "PNG to JPEG: not done here, because the shard is not changed"),
        "cmyk": ({"jpg": encoded(picture(3, "CMYK"))}, "CMYK JPEG: not done here"),
        "junk": ({"jpg": GOOD[4][:20] + b"junk" + GOOD[4][20:]}, "libjpeg warns about: not done here"),
        "two": ({"jpg": GOOD[5], "jpeg": GOOD[5]}, "more than one image"),
        "none": ({"1.jpg": GOOD[5]}, "no image: it has 1.jpg, cls"),
        "negative": ({"jpg": GOOD[6], "cls": "-1"}, "no label"),
        "list": ({"jpg": GOOD[6], "cls": None, "json": {"label": [1, 2]}}, r"no label: [1, 2]"),
        "bare": (
            {"jpg": GOOD[6], "cls": None},
            "no label: it has no .cls, or a field 'label' or 'class' or 'cls' in .json",
        ),
    }
    samples = [{"__key__": key, "cls": 0, **fields} for key, (fields, _) in names.items()]
    samples = [{key: value for key, value in fields.items() if value is not None} for fields in samples]
    write(tmp_path / "train-0.tar", [sample(0, cls=1), *samples, sample(7, cls=0)])
    assert indexed(tmp_path) == {"train": [(GOOD[0], 1), (GOOD[7], 0)]}
    report = listed(tmp_path)
    assert len(report) == len(names)
    for key, (_, words) in names.items():
        outcome, why = report[f"train-0.tar/{key}"]
        assert outcome == "excluded" and words in why
    counts = json.loads((tmp_path / "report.json").read_text())["splits"]["train"]
    assert counts == {"samples": 2, "kept": 2, "excluded": 9, "convertible": 3}


def test_the_same_key_in_two_folders_and_members_in_any_order(tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        add(tar, "./b/1.cls", b"1")
        add(tar, "./a/1.JPG", GOOD[0])
        add(tar, "./b/1.jpg", GOOD[1])
        add(tar, "./a/1.cls", b"0\n")
        add(tar, "./a/._1.jpg", b"a metadata file of macOS")
    assert indexed(tmp_path) == {"train": [(GOOD[0], 0), (GOOD[1], 1)]}


def test_splits(tmp_path):
    for number, name in enumerate(["train/0.tar", "sets/Valid_1/0.tar", "test.tar"]):
        write(tmp_path / name, [sample(number, cls=number)])
    assert indexed(tmp_path) == {"train": [(GOOD[0], 0)], "val": [(GOOD[1], 1)], "test": [(GOOD[2], 2)]}
    write(tmp_path / "00000.tar", [sample(3, cls=0)])
    with pytest.raises(UsageError, match="the name 00000.tar does not contain its split"):
        index(tmp_path, workers=1)
    assert len(indexed(tmp_path, split="train")["train"]) == 4


def test_shards_in_linked_folders_and_in_capitals_are_indexed(tmp_path):
    write(tmp_path / "set/train-0.TAR", [sample(0, cls=0)])
    write(tmp_path / "elsewhere/train-1.tar", [sample(1, cls=1)])
    (tmp_path / "set/more").symlink_to(tmp_path / "elsewhere")
    index(tmp_path / "set", workers=1)
    assert verify(tmp_path / "set") == []
    assert sorted(stored(tmp_path / "set", "train"), key=lambda each: each[1]) == [(GOOD[0], 0), (GOOD[1], 1)]
    (tmp_path / "set/again").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="again/train-1.tar and more/train-1.tar in .*set are one file: remove the lin"):
        index(tmp_path / "set", workers=1)


@pytest.mark.parametrize("ending", [".tar.gz", ".TGZ", ".tar.zst"])
def test_a_compressed_shard_is_not_passed_over(tmp_path, ending):
    write(tmp_path / "train-0.tar", [sample(0, cls=0)])
    (tmp_path / f"train-1{ending}").write_bytes(b"compressed")
    with pytest.raises(DataError, match=f"1 tars in .* are compressed, the first is train-1{ending}: decompress them"):
        index(tmp_path, workers=1)


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path, monkeypatch):
    """The tests may run as root, who reads every folder."""
    write(tmp_path / "train-0.tar", [sample(0, cls=0)])
    write(tmp_path / "more/train-1.tar", [sample(1, cls=0)])
    listdir = os.listdir

    def refused(folder: str) -> list[str]:
        if folder.rstrip("/").endswith("more"):
            raise PermissionError(13, "Permission denied")
        return listdir(folder)

    monkeypatch.setattr(os, "listdir", refused)
    with pytest.raises(DataError, match="cannot read .*more/: Permission denied"):
        index(tmp_path, workers=1)


def test_indexing_again_includes_changed_shards(tmp_path):
    write(tmp_path / "train-0.tar", [sample(0, cls=1)])
    indexed(tmp_path)
    write(tmp_path / "train-0.tar", [sample(1, cls=1)])
    write(tmp_path / "train-1.tar", [sample(2, cls=2)])
    assert indexed(tmp_path) == {"train": [(GOOD[1], 1), (GOOD[2], 2)]}


def test_a_bit_flipped_after_indexing_is_found(tmp_path):
    path = write(tmp_path / "train-0.tar", [sample(i, cls=i) for i in range(3)])
    indexed(tmp_path)
    offset = int(open_manifest(tmp_path).split("train").records[1]["offset"]) + 500
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
    [fault] = verify(tmp_path)
    assert "train-0.tar is damaged: the image of sample 1 " in fault


@pytest.mark.parametrize(
    ("fields", "options", "classes", "message"),
    [
        ([{"cls": 0}, {"cls": "dog"}], {}, None, "some labels are words .'dog' in train-0.tar., others numbers .0 in"),
        (
            [{"cls": 0}, {"cls": 3}],
            {},
            "cat\ndog",
            "train-0.tar has the label 3, which .*classes.txt does not name .2 classes.",
        ),
        ([{"cls": 0}, {"cls": 0}], {}, None, "that can be used are of one class, '0', so there is .* --label-key"),
        ([{"cls": "wolf"}], {}, "cat\ndog", "has the label 'wolf', which"),
        ([{"cls": "cat"}], {}, "cat\ncat", "two classes of one name"),
        (
            [{"json": {"id": 12345678}}],
            {"label_key": "id"},
            None,
            "has the label 12345678, no class number: name the field",
        ),
        (
            [{"json": {"id": 1}}],
            {},
            None,
            "no image of train can be used: the first of 1 is train-0.tar/some/folder/0000: no label",
        ),
    ],
)
def test_invalid_labels_are_refused(tmp_path, fields, options, classes, message):
    write(tmp_path / "train-0.tar", [sample(i, **field) for i, field in enumerate(fields)])
    if classes:
        (tmp_path / "classes.txt").write_text(classes)
    with pytest.raises(DataError, match=message):
        index(tmp_path, workers=1, **options)
    assert not (tmp_path / "manifest.json").exists()


def test_folders_without_foreign_shards_are_refused(tmp_path):
    with pytest.raises(UsageError, match="there is no folder"):
        index(tmp_path / "nowhere", workers=1)
    with pytest.raises(DataError, match=r"there is no \*.tar in"):
        index(tmp_path, workers=1)
    run(make_folder(tmp_path / "pictures"), tmp_path / "set")
    with pytest.raises(UsageError, match="is a prepared dataset with its own index"):
        index(tmp_path / "set", workers=1)
    (tmp_path / "half/.work").mkdir(parents=True)
    (tmp_path / "half/.work/plan.json").write_text('{"arguments": {"source": "pictures"}}')
    (tmp_path / "half/.work" / MARK).write_text(str(tmp_path / "half"))
    shutil.copy(next((tmp_path / "set").glob("*.tar")), tmp_path / "half")
    with pytest.raises(UsageError, match="is being prepared from pictures"):
        index(tmp_path / "half", workers=1)
    (tmp_path / "broken").mkdir()
    shutil.copy(tmp_path / "set/train-000000.tar", tmp_path / "broken")
    with open(tmp_path / "broken/train-000000.tar", "r+b") as file:
        file.truncate(5000)
    with pytest.raises(DataError, match="train-000000.tar is (damaged or )?cut off"):
        index(tmp_path / "broken", workers=1)
    with pytest.raises(UsageError, match="broken is not empty"):  # although index has made a .work in it
        run(tmp_path / "pictures", tmp_path / "broken")


def test_our_own_shards_get_the_same_index_as_from_prepare(tmp_path):
    """Without its manifest, a prepared dataset is a folder of foreign shards; only the class names are lost."""
    run(make_folder(tmp_path / "pictures"), tmp_path / "set", shard_bytes=10_000)
    (tmp_path / "foreign").mkdir()
    for path in (tmp_path / "set").glob("*.tar"):
        shutil.copy(path, tmp_path / "foreign")
    indexed(tmp_path / "foreign")
    ours, theirs = open_manifest(tmp_path / "set"), open_manifest(tmp_path / "foreign")
    assert {name: (split.fingerprint, split.shards) for name, split in ours.splits.items()} == {
        name: (split.fingerprint, split.shards) for name, split in theirs.splits.items()
    }
