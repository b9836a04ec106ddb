"""The layouts of sources with label maps, and sentences about those that are not understood."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.manifest import open_manifest
from data_pipeline.preparation.label_map_listing import NO_LABEL_OPTIONS, LabelOptions
from data_pipeline.preparation.listing import add_val, list_source, open_source
from data_pipeline.split import DataError, UsageError
from tests.data_pipeline import images
from tests.data_pipeline.boxes import make_coco
from tests.data_pipeline.images import run
from tests.data_pipeline.label_maps import (
    CLASSES,
    ade20k,
    cityscapes,
    labels,
    make_folder,
    pixels,
    png,
    stored_pairs,
    write,
)


def listing_of(root: Path, options: LabelOptions = NO_LABEL_OPTIONS):
    return list_source(open_source(str(root), root.parent), options)


def touch(root: Path, *names: str) -> Path:
    for name in names:
        write(root / name, b"x")
    return root


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "streets", train=2, val=1)


def test_images_and_labels_are_paired_by_their_names(folder):
    listing = listing_of(folder)
    assert listing.classes == CLASSES and listing.ignored == listing.lone_maps == 0
    train, val = listing.splits["train"], listing.splits["val"]
    assert train.names == ["images/train/0.jpg", "images/train/1.jpg"] and val.names == ["images/val/0.jpg"]
    assert train.maps.names == ["annotations/train/0.png", "annotations/train/1.png"]
    assert train.take(np.array([1])).maps.names == ["annotations/train/1.png"]


@pytest.mark.parametrize("around", [False, True])
def test_folders_in_folders_other_files_and_a_folder_around_it(folder, tmp_path, around):
    touch(folder, "images/train/city/a.PNG", "annotations/train/city/a.PNG", "images/test/b.jpg", "readme.md")
    touch(folder, "annotations/train/lonely.png", "annotations/test/b.png", "annotations/train/0.txt", "other/c.jpg")
    if around:
        shutil.move(folder, tmp_path / "around/a/inner")
        folder = tmp_path / "around"
    listing = listing_of(folder)
    prefix = "a/inner/" if around else ""
    assert f"{prefix}images/train/city/a.PNG" in listing.splits["train"].names
    assert f"{prefix}annotations/train/city/a.PNG" in listing.splits["train"].maps.names
    assert listing.classes == CLASSES and (listing.ignored, listing.lone_maps) == (5, 1)


def test_every_part_changes_the_digest(folder, tmp_path):
    before = listing_of(folder).digest()
    assert listing_of(folder).digest() == before
    assert listing_of(folder, LabelOptions(ignore_value=9)).digest() != before
    write(folder / "annotations/train/0.png", png(labels(77)) + b"longer")
    assert listing_of(folder).digest() != before


def test_ade20k(tmp_path):
    """Its own files: names of splits, objectInfo150.txt with synonyms, classes from 1, 0 for the rest."""
    root = tmp_path / "ADEChallengeData2016"
    values = labels(1, 3, ignored=3)  # 0 to 3
    ade20k(root, values)
    with pytest.raises(UsageError, match="is ADE20K, whose classes count from 1: give --reduce-zero-label"):
        listing_of(tmp_path)
    run(tmp_path, tmp_path / "set", label_options=LabelOptions(reduce_zero=True))
    assert open_manifest(tmp_path / "set").classes == ("wall", "building", "pool table")
    for split in ("train", "val"):
        [(_, label)] = stored_pairs(tmp_path / "set", split)
        assert np.array_equal(pixels(label), np.array([255, 0, 1, 2])[values])


def test_cityscapes(tmp_path):
    """Road (7), car (26) and bicycle (33) are classes; 0 to 6 and 255 are ignored, 34 would be a fault."""
    values = np.zeros((30, 40), np.uint8)
    values[1], values[2], values[3], values[4], values[5] = 7, 26, 33, 255, 6
    root = cityscapes(tmp_path / "cityscapes", "labelIds", values)
    listing = listing_of(root)
    assert len(listing.classes) == 19 and (listing.ignored, listing.lone_maps) == (5, 0)
    assert [listing.classes[i] for i in (0, 13, 18)] == ["road", "car", "bicycle"]
    assert listing.coding.classes == 19 and len({*listing.coding.values, *listing.coding.ignored}) == 35
    run(root, tmp_path / "set")
    [(_, label)] = stored_pairs(tmp_path / "set", "val")
    expected = np.full_like(values, 255)
    expected[1], expected[2], expected[3] = 0, 13, 18
    assert np.array_equal(pixels(label), expected)
    cityscapes(tmp_path / "own", "labelTrainIds", expected)
    run(tmp_path / "own", tmp_path / "own_set")
    assert stored_pairs(tmp_path / "own_set", "val")[0][1] == png(expected)
    with pytest.raises(UsageError, match="Cityscapes' layout, .*: leave --ignore-value and --reduce-zero-label out"):
        listing_of(root, LabelOptions(None, 3, True))


@pytest.mark.parametrize(
    ("remove", "add", "message"),
    [
        (
            "annotations/train/1.png",
            [],
            r"1 of 3 images of .*streets .* first is images/train/1.jpg, without annotations/",
        ),
        ("annotations/train", ["annotations/trian/0.png"], "2 of 3 images .* first is images/train/0.jpg, without"),
        ("annotations", ["annotation/train/0.png"], "3 of 3 images of .* have no label map: add it"),
        ("annotations/train/0.png", ["annotations/train/0.jpg"], "without annotations/train/0.png"),
        ("images", ["image/train/0.jpg"], "has no images in images/train or images/val"),
        ("images/train", ["images/trian/0.jpg"], "has images in images/trian; expected images/train and images/val"),
        ("images", ["images/0.jpg"], "has no images in images/train or images/val"),
        ("classes.txt", [], "has no classes.txt: write one, .* or give --classes FILE"),
    ],
)
def test_what_is_missing_is_named_before_packing(folder, remove, add, message):
    path = folder / remove
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    touch(folder, *add)
    with pytest.raises(DataError, match=message):
        listing_of(folder)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (b"sky\n\ntree\n", "classes.txt, line 2 is empty"),
        (b"sky\x07\n", "has control characters"),
        (b"", "names 0 classes; a label map has 2 to 65535"),
        (b"sky", "names 1 class; a label map has 2 to 65535"),
        (b"sky\nroad\nsky", "names 'sky' twice: give each class a name of its own"),
        ("ätsch".encode("latin-1"), "cannot read classes.txt in"),
    ],
)
def test_bad_names_of_classes(folder, names, message):
    (folder / "classes.txt").write_bytes(names)
    with pytest.raises(DataError, match=message):
        listing_of(folder)


def test_options_of_another_kind_of_source_are_refused(folder, tmp_path):
    other = images.make_folder(tmp_path / "pictures", train=2, val=0)
    with pytest.raises(UsageError, match="pictures has no label maps in a known layout: leave --classes out"):
        listing_of(other, LabelOptions(classes=folder / "classes.txt"))
    shutil.rmtree(folder / "images/val")
    with pytest.raises(UsageError, match="--val is for classification"):
        add_val(listing_of(folder), open_source(str(other), tmp_path), None)


def test_the_value_of_ignored_pixels_is_no_class(folder, tmp_path):
    with pytest.raises(
        UsageError, match="1 is the value of class 'road' and of ignored pixels: give another --ignore-v"
    ):
        listing_of(folder, LabelOptions(ignore_value=1))
    (folder / "classes.txt").write_text("\n".join(map(str, range(255))))
    with pytest.raises(UsageError, match="255 is the value of class '254' and of ignored pixels"):
        listing_of(folder, LabelOptions(reduce_zero=True))


def test_an_image_and_its_label_map_are_one_each(folder):
    shutil.copy(folder / "images/train/0.jpg", folder / "images/train/0.png")
    with pytest.raises(DataError, match=r"two images of one name, images/train/0.jpg and images/train/0.png, and a la"):
        listing_of(folder)
    (folder / "images/train/0.png").unlink()
    shutil.copy(folder / "annotations/train/0.png", folder / "annotations/train/0.PNG")
    with pytest.raises(
        DataError, match=r"two label maps of one image, annotations/train/0.PNG and annotations/train/0."
    ):
        listing_of(folder)


def test_boxes_and_label_maps_are_one_too_many(folder):
    make_coco(folder, folders="images/{}", train=2, val=2)
    with pytest.raises(
        DataError, match=r"has boxes and label maps, as annotations/train/0.png: take one of the two away"
    ):
        listing_of(folder)


@pytest.mark.parametrize(
    ("images_in", "maps_in"),
    [
        ("img_dir/{}", "ann_dir/{}"),
        ("images/{}", "masks/{}"),
        ("{}/images", "{}/masks"),
        ("Images", "Annotations"),
        ("JPEGImages", "SegmentationClass"),
        ("{}", "{}annot"),
        ("a/leftImg8bit_trainvaltest/leftImg8bit/{}/x", "a/gtFine_trainvaltest/gtFine/{}/x"),
        ("photographs/{}", "truth/{}"),
    ],
)
def test_label_maps_in_another_layout_are_no_class_of_photographs(tmp_path, images_in, maps_in):
    root = make_folder(tmp_path / "usual", train=2, val=2)
    for split in ("train", "val"):
        for file in sorted((root / "images" / split).iterdir()):
            write(tmp_path / "other" / images_in.format(split) / f"{split}{file.name}", file.read_bytes())
        for file in sorted((root / "annotations" / split).iterdir()):
            write(tmp_path / "other" / maps_in.format(split) / f"{split}{file.name}", file.read_bytes())
    with pytest.raises(
        DataError, match="seems to have label maps of the images in .*, arrange them as images/<split>/"
    ):
        listing_of(tmp_path / "other")


def test_classes_of_photographs_may_have_these_names(tmp_path):
    """Folders of classes, and a list of their names: still classification."""
    root = touch(tmp_path / "birds", "images/001.albatross/1.jpg", "images/002.wren/1.jpg", "classes.txt")
    assert listing_of(root).coding is None
    root = touch(tmp_path / "papers", "annotations/1.jpg", "letters/1.jpg")
    assert listing_of(root).classes == ("annotations", "letters")
