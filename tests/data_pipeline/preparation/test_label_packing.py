"""Preparing a dataset for segmentation: what the shards hold, bad samples, options, and shards of others."""

import json
import shutil

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_pipeline.annotations import add_annotation
from data_pipeline.manifest import open_manifest
from data_pipeline.preparation.foreign import index
from data_pipeline.preparation.label_map_listing import LabelOptions
from data_pipeline.preparation.pack import INDEX, read_done
from data_pipeline.preparation.verify import verify
from data_pipeline.split import LABEL_MAP, RECORD, DataError, UsageError
from data_pipeline.validate import Encoding
from tests.data_pipeline.images import contents, encoded, listed, make_tar, picture, run, without_manifest
from tests.data_pipeline.label_maps import (
    CLASSES,
    SIZE,
    labels,
    make_folder,
    original_pairs,
    pixels,
    png,
    stored_pairs,
    write,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("source") / "streets")


@pytest.fixture(scope="module")
def dataset(folder, tmp_path_factory):
    """`folder`, prepared in several shards."""
    dest = tmp_path_factory.mktemp("prepared") / "set"
    assert run(folder, dest, shard_bytes=5_000)
    return dest


def report(dest) -> dict:
    return json.loads((dest / "report.json").read_text())


def test_any_webdataset_reader_gets_the_same_pairs(folder, dataset):
    for split in ("train", "val"):
        shards = open_manifest(dataset).split(split).shards
        assert len(shards) > 1
        files = [str(dataset / shard.file) for shard in shards]
        samples = list(webdataset.WebDataset(files, shardshuffle=False))
        assert {key for sample in samples for key in sample if key[0] != "_"} == {"jpg", "png"}
        pairs = [(sample["jpg"], sample["png"]) for sample in samples]
        assert set(pairs) == original_pairs(folder, split) and pairs == stored_pairs(dataset, split)
    decoded = next(iter(webdataset.WebDataset(files, shardshuffle=False).decode("pil")))
    assert decoded["png"].size == decoded["jpg"].size == SIZE


def test_what_is_written(dataset):
    manifest = open_manifest(dataset)
    assert manifest.classes == CLASSES
    for split in manifest.splits.values():
        maps = split.annotation(LABEL_MAP)
        assert maps.dtype == RECORD and len(maps) == split.samples
        for name in ("shard", "width", "height"):
            assert np.array_equal(maps[name], split.records[name])
        assert not maps["label"].any() and not split.records["label"].any()
        assert split.identity != split.fingerprint
    assert report(dataset)["segmentation"] == {"classes": 3, "labels_without_image": 0}
    assert report(dataset)["splits"]["train"] == {"samples": 6, "kept": 6} and report(dataset)["ignored_files"] == 0
    assert not (dataset / ".work").exists() and verify(dataset) == []


def test_a_tar_and_other_workers_give_the_same_bytes(folder, dataset, tmp_path):
    make_tar(folder, tmp_path / "streets.tar")
    run(tmp_path / "streets.tar", tmp_path / "set", shard_bytes=5_000, workers=1)
    assert contents(tmp_path / "set", ("report.json",)) == contents(dataset, ("report.json",))


def test_verify_checks_every_label_map(dataset, tmp_path):
    copy = shutil.copytree(dataset, tmp_path / "set")
    split = open_manifest(copy).split("train")
    record = split.annotation(LABEL_MAP)[4]
    path = copy / split.shards[record["shard"]].file
    whole = path.read_bytes()
    place = int(record["offset"]) + int(record["size"]) // 2
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
    [fault] = verify(copy)
    assert fault.startswith(
        f"{path} is damaged: the label map of sample 4 (byte {record['offset']}) fails its checksum"
    )
    path.write_bytes(whole)
    table = copy / f"train.{LABEL_MAP}.npy"
    data = table.read_bytes()
    table.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert [f"{table} is damaged: its SHA-256 is not the manifest's."] == verify(copy)
    table.write_bytes(data)
    document = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**document, "classes": ["sky", "road"]}))
    faults = verify(copy)
    assert len(faults) == 9 and all("has the value 2; the 2 classes are 0 to 1, ignored is 255" in x for x in faults)


def test_a_table_of_label_maps_that_points_elsewhere_is_refused(dataset, tmp_path):
    copy = shutil.copytree(dataset, tmp_path / "set")
    maps = open_manifest(copy).split("train").annotation(LABEL_MAP).copy()
    maps["offset"][2] = 1 << 40
    add_annotation(open_manifest(copy), "train", LABEL_MAP, maps)
    with pytest.raises(DataError, match="of sample 2 it says that it lies outside the files"):
        open_manifest(copy)


BAD = {
    "small": (png(labels(1, size=(20, 15))), "it has 20x15 pixels, and its image 40x30"),
    "outside": (png(labels(1, classes=5)), "has the value 3; the 3 classes are 0 to 2, ignored is 255"),
    "colour": (encoded(picture(1, size=SIZE), "PNG"), "it is RGB: a label map has the number of a class"),
    "cut": (png(labels(1))[:-40], "Truncated File Read"),
}


def test_bad_labels_are_left_out_and_named(folder, tmp_path):
    source = shutil.copytree(folder, tmp_path / "source")
    good = original_pairs(folder, "train")
    for name, (data, _) in BAD.items():
        write(source / f"images/train/{name}.jpg", encoded(picture(7, size=SIZE)))
        write(source / f"annotations/train/{name}.png", data)
    palette = Image.fromarray(labels(5, ignored=2))
    palette.putpalette(list(range(30)))
    accepted = {"palette": encoded(palette, "PNG"), "sixteen": png(labels(6).astype(np.uint16))}
    for name, data in accepted.items():
        write(source / f"images/train/{name}.jpg", encoded(picture(7, size=SIZE)))
        write(source / f"annotations/train/{name}.png", data)
    write(source / "images/train/broken.jpg", b"no")
    write(source / "annotations/train/broken.png", png(labels(1)))
    write(source / "annotations/train/alone.png", png(labels(1)))
    write(source / "notes.txt", b"not a picture")
    run(source, tmp_path / "set")
    outcomes = listed(tmp_path / "set")
    assert outcomes.pop("images/train/broken.jpg") == ("excluded", "not an image of a known format")
    assert outcomes.keys() == {f"images/train/{name}.jpg" for name in BAD}
    for name, (_, reason) in BAD.items():
        outcome, why = outcomes[f"images/train/{name}.jpg"]
        assert outcome == "excluded" and why.startswith(f"its label annotations/train/{name}.png: ") and reason in why
    stored = stored_pairs(tmp_path / "set", "train")
    assert good < set(stored) and len(stored) == len(good) + 2
    rewritten = {pixels(label).tobytes() for image, label in stored if (image, label) not in good}
    assert rewritten == {labels(5, ignored=2).tobytes(), labels(6).tobytes()}
    said = report(tmp_path / "set")
    assert said["splits"]["train"] == {"samples": 8, "excluded": 5, "kept": 8, "labels_rewritten": 2}
    assert said["segmentation"]["labels_without_image"] == 1 and said["ignored_files"] == 1
    assert verify(tmp_path / "set") == []


def test_a_split_without_a_good_label_is_an_error(folder, tmp_path):
    source = shutil.copytree(folder, tmp_path / "source")
    (source / "classes.txt").write_text("sky\nroad\n")
    with pytest.raises(DataError, match=r"no image of train can be used: the first of 6 is images/train/.*label"):
        run(source, tmp_path / "set")


def test_label_maps_that_teach_nothing_are_an_error(folder, tmp_path):
    """As masks of 0 and 255, where 255 is ignored."""
    for name, values, sentence in (
        (
            "masks",
            (0, 255),
            "all pixels of the label maps of train are of class 'sky', or ignored: in a label map 0 to 2 are",
        ),
        ("ignored", (255, 255), "no pixel of the label maps of train has a class, because all are ignored"),
    ):
        source = shutil.copytree(folder, tmp_path / name)
        for path in (source / "annotations").rglob("*.png"):
            path.write_bytes(png(np.where(labels(1) == 0, *values).astype(np.uint8)))
        with pytest.raises(DataError, match=sentence):
            run(source, tmp_path / f"set of {name}")


def test_classes_without_a_pixel_are_in_the_report(folder, tmp_path):
    source = shutil.copytree(folder, tmp_path / "source")
    (source / "classes.txt").write_text("\n".join([*CLASSES, "moon"]))
    run(source, tmp_path / "set")
    assert json.loads((tmp_path / "set/report.json").read_text())["absent"] == {"train": ["moon"], "val": ["moon"]}


def test_options_map_the_values(folder, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("road\ntree\n")
    options = LabelOptions(names, ignore_value=255, reduce_zero=True)
    run(folder, tmp_path / "set", label_options=options)
    assert open_manifest(tmp_path / "set").classes == ("road", "tree")
    expected = {
        np.select([original == 1, original == 2], [0, 1], 255).astype(np.uint8).tobytes()
        for original in (pixels(label) for _, label in original_pairs(folder, "train"))
    }
    assert {pixels(label).tobytes() for _, label in stored_pairs(tmp_path / "set", "train")} == expected
    assert run(folder, tmp_path / "set", label_options=options) is False
    for other, words in (
        (LabelOptions(names, 255), "reduce_zero_label True and not None"),
        (LabelOptions(names, 254, True), "ignore_value 255 and not 254"),
        (LabelOptions(None, 255, True), "classes .*names.txt and not None"),
    ):
        with pytest.raises(UsageError, match=words):
            run(folder, tmp_path / "set", label_options=other)


def test_smaller_images_have_smaller_label_maps(folder, tmp_path):
    run(folder, tmp_path / "set", encoding=Encoding(resize_short=15))
    originals = {pixels(label)[1::2, 1::2].tobytes() for _, label in original_pairs(folder, "train")}
    stored = stored_pairs(tmp_path / "set", "train")
    assert {pixels(label).tobytes() for _, label in stored} == originals
    assert all(pixels(image).shape == (15, 20, 3) for image, _ in stored) and verify(tmp_path / "set") == []


def test_a_val_split_is_drawn_with_its_labels(folder, tmp_path):
    source = shutil.copytree(folder, tmp_path / "source")
    shutil.rmtree(source / "images/val")
    run(source, tmp_path / "set", val_fraction=0.34)
    train, val = (set(stored_pairs(tmp_path / "set", split)) for split in ("train", "val"))
    assert (len(train), len(val)) == (4, 2) and train | val == original_pairs(folder, "train")


def test_more_than_255_classes(tmp_path):
    names = "\n".join(f"class {number}" for number in range(300)).encode()
    write(tmp_path / "source/classes.txt", names)
    values = labels(1, 300, 65_535)
    write(tmp_path / "source/images/train/a.png", encoded(picture(1, size=SIZE), "PNG"))
    write(tmp_path / "source/annotations/train/a.png", png(values))
    run(tmp_path / "source", tmp_path / "set")
    [(_, label)] = stored_pairs(tmp_path / "set", "train")
    assert label == png(values) and len(open_manifest(tmp_path / "set").classes) == 300
    assert listed(tmp_path / "set") == {"images/train/a.png": ("transcoded", "PNG to JPEG")}


def test_what_an_earlier_version_left_unfinished_is_read(tmp_path):
    """A `.done` file without the number of its tables, and one with it in place of their names."""
    records = np.ones(6, RECORD)
    records["size"] = range(6)
    (tmp_path / "a.done").write_bytes(b"{}\n" + records.tobytes())
    header, tables = read_done(tmp_path / "a.done")
    assert header == {} and tables.keys() == {INDEX} and np.array_equal(tables[INDEX], records)
    (tmp_path / "a.done").write_bytes(b'{"tables": 2}\n' + records.tobytes())
    header, tables = read_done(tmp_path / "a.done")
    assert tables.keys() == {INDEX, LABEL_MAP}
    assert np.array_equal(tables[INDEX], records[:3]) and np.array_equal(tables[LABEL_MAP], records[3:])


# --- shards of others ------------------------------------------------------------------------------------------------


@pytest.fixture
def foreign(dataset, tmp_path):
    return without_manifest(dataset, tmp_path / "foreign", CLASSES)


def test_our_own_shards_get_the_same_tables(dataset, foreign):
    index(foreign, workers=2)
    for name in ("train.index", "val.index", f"train.{LABEL_MAP}.npy", f"val.{LABEL_MAP}.npy", "manifest.json"):
        assert (foreign / name).read_bytes() == (dataset / name).read_bytes()
    assert report(foreign)["segmentation"] == {"classes": 3} and verify(foreign) == []
    before = contents(foreign)
    index(foreign, workers=1)  # once more
    assert contents(foreign) == before


def test_samples_that_cannot_be_used_as_they_are_are_left_out(foreign):
    good = encoded(picture(1, size=SIZE))
    palette = Image.fromarray(labels(5, ignored=2))
    palette.putpalette(list(range(30)))
    members = {
        "palette.png": encoded(palette, "PNG"),
        "palette.jpg": good,
        "colour.jpg": good,
        "colour.png": encoded(picture(1, size=SIZE), "PNG"),
        "alone.jpg": good,
        "two.jpg": good,
        "two.jpeg": good,
        "two.png": png(labels(1)),
        "good.png": png(labels(1)),
        "good.jpg": good,
        "unnamed.json": b"{}",
        "unnamed.png": png(labels(1)),
    }
    with webdataset.TarWriter(str(foreign / "train-other.tar")) as writer:
        for name, data in members.items():
            key, _, ending = name.partition(".")
            writer.write({"__key__": key, ending: data})
    index(foreign, workers=1)
    assert listed(foreign) == {
        "train-other.tar/palette": (
            "excluded",
            "its label is a PNG of another form than 8 bits gray: not rewritten here, because the shard is not changed",
        ),
        "train-other.tar/colour": (
            "excluded",
            "its label: it is RGB: a label map has the number of a class in each pixel, as gray or as indices of a "
            "palette",
        ),
        "train-other.tar/alone": ("excluded", "no label (.png)"),
        "train-other.tar/two": ("excluded", "more than one image"),
        "train-other.tar/unnamed": ("excluded", "no image: it has json"),
    }
    assert report(foreign)["splits"]["train"] == {"samples": 7, "convertible": 1, "excluded": 5, "kept": 7}
    assert (good, png(labels(1))) in stored_pairs(foreign, "train") and verify(foreign) == []


def test_foreign_shards_need_the_names_of_their_classes(foreign):
    with pytest.raises(UsageError, match="train-000000.tar has label maps .*leave --label-key out"):
        index(foreign, workers=1, label_key="label")
    (foreign / "classes.txt").unlink()
    with pytest.raises(DataError, match=r"has label maps \(.png beside .jpg\): name the classes in .*classes.txt"):
        index(foreign, workers=1)
    assert not (foreign / ".work").exists()


def test_an_index_of_classes_in_place_of_one_of_label_maps_leaves_no_table(foreign):
    index(foreign, workers=1)
    for path in foreign.glob("*.tar"):
        with webdataset.TarWriter(str(path)) as writer:
            writer.write({"__key__": "0", "jpg": encoded(picture(1)), "cls": b"1"})
    index(foreign, workers=1)
    assert not list(foreign.glob("*.npy")) and open_manifest(foreign).split("train").annotations == {}
