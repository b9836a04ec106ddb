"""Sources with boxes in COCO's layout, the table of bad annotations, and what is always refused."""

import json
import re
import shutil

import numpy as np
import pytest

from data_pipeline.manifest import open_manifest
from data_pipeline.object_targets import ObjectTargets
from data_pipeline.objects import ObjectTable
from data_pipeline.preparation.label_map_listing import LabelOptions
from data_pipeline.preparation.listing import add_val, list_source, open_source
from data_pipeline.preparation.object_listing import ObjectOptions
from data_pipeline.split import IMAGES, DataError, UsageError
from data_pipeline.validate import Encoding
from tests.data_pipeline import images, label_maps
from tests.data_pipeline.boxes import CLASSES, change, document_of, listing_of, make_coco, stored_objects
from tests.data_pipeline.images import encoded, listed, make_tar, picture, run
from tests.data_pipeline.label_maps import write


@pytest.fixture
def folder(tmp_path):
    return make_coco(tmp_path / "zoo")


# --- layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folders", ["{}", "{}2017", "images/{}", "images/{}2017"])
@pytest.mark.parametrize("names", ["{}", "{}2017"])
def test_coco(tmp_path, folders, names):
    root = tmp_path / "a/b/zoo"
    make_coco(root, folders=folders, names=names)
    write(root / "annotations/captions_train2017.json", b"no")
    write(root / "test2017/9.jpg", b"no")
    if "2017" in folders and "2017" not in names:
        with pytest.raises(
            DataError, match=r"instances_train.json has no images beside it: put them into a/b/zoo/train/"
        ):
            listing_of(tmp_path)
        return
    listing = listing_of(tmp_path)
    assert listing.classes == CLASSES and listing.category_ids == (3, 7, 90) and listing.ignored == 2
    train = listing.splits["train"]
    assert train.names == [f"a/b/zoo/{folders.format('train')}/{i:03d}.jpg" for i in range(6)]
    document = json.loads((root / f"annotations/instances_{names.format('train')}.json").read_text())
    for image, found in zip(document["images"], stored_objects(train), strict=True):
        expected = [each for each in document["annotations"] if each["image_id"] == image["id"]]
        assert found == {
            "image_id": image["id"],
            **{name: image[name] for name in ("file_name", "width", "height")},
            "objects": [
                {
                    "id": each["id"],
                    "label": {3: 0, 7: 1, 90: 2}[each["category_id"]],
                    **{name: each[name] for name in ("bbox", "area", "iscrowd", "segmentation")},
                }
                for each in expected
            ],
        }
    assert train.objects.counts.tolist() == [2, 3, 3, 2, 0, 3]  # without crowds


def test_a_tar_and_a_folder_around_it_give_the_same_objects(folder, tmp_path):
    before = listing_of(folder).splits["train"]
    make_tar(folder, tmp_path / "zoo.tar")
    found = listing_of(tmp_path / "zoo.tar").splits["train"]
    assert found.objects.documents == before.objects.documents
    assert found.names == [f"zoo/{name}" for name in before.names]
    taken = found.take(np.array([5, 0]))
    assert taken.objects.documents == [before.objects.documents[i] for i in (5, 0)]
    assert taken.objects.counts.tolist() == [3, 2]


def test_every_part_changes_the_digest(folder):
    before = listing_of(folder).digest()
    assert listing_of(folder).digest() == before
    document = document_of(folder, "val")
    document["annotations"][0]["bbox"][0] += 1e-9
    change(folder, "val", document)
    second = listing_of(folder).digest()
    for split in ("train", "val"):
        document = document_of(folder, split)
        document["categories"][0]["id"] += 1
        for each in document["annotations"]:
            each["category_id"] += each["category_id"] == 7
        change(folder, split, document)
    assert len({before, second, listing_of(folder).digest()}) == 3


def test_label_maps_and_boxes(tmp_path):
    """PNGs among COCO's annotations, as of its panoptic part, are no label maps."""
    root = make_coco(tmp_path / "zoo", folders="images/{}")
    write(root / "annotations/panoptic_train2017/1.png", b"")
    assert listing_of(root).category_ids and listing_of(root).ignored == 1


# --- the table of bad annotations ------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
BAD = {
    "not a number": ({"bbox": [1, NAN, 5, 5]}, r"its box [1, nan, 5, 5] is not four finite numbers"),
    "infinite": ({"bbox": [1, 2, INF, 5]}, r"its box [1, 2, inf, 5] is not four finite numbers"),
    "text": ({"bbox": [1, 2, "5", 5]}, r"its box [1, 2, '5', 5] is not four finite numbers"),
    "too few": ({"bbox": [1, 2, 3]}, r"its box [1, 2, 3] is not four finite numbers"),
    "none": ({"bbox": None}, r"its box None is not four finite numbers"),
    "huge": ({"bbox": [10**400, 1, 1, 1]}, "is not four finite numbers"),
    "inverted": ({"bbox": [9, 2, -5, 5]}, "its box is inverted: width -5, height 5"),
    "empty": ({"bbox": [9, 2, 5, 0]}, "its box is empty: width 5, height 0"),
    "right of the image": ({"bbox": [40, 2, 5, 5]}, "[40, 2, 5, 5] lies outside of the image of 40x30 pixels"),
    "left of the image": ({"bbox": [-5, 2, 5, 5]}, "[-5, 2, 5, 5] lies outside of the image of 40x30 pixels"),
    "below the image": ({"bbox": [1, 30.5, 5, 5]}, "[1, 30.5, 5, 5] lies outside of the image of 40x30 pixels"),
    "above the image": ({"bbox": [1, -9, 5, 5]}, "[1, -9, 5, 5] lies outside of the image of 40x30 pixels"),
    "area": ({"area": NAN}, "its area nan is not a finite number of pixels"),
    "negative area": ({"area": -4}, "its area -4 is not a finite number of pixels"),
    "a crowd by text": ({"iscrowd": "0"}, "its iscrowd '0' is neither 0 nor 1"),
    "category": ({"category_id": 4}, "there is no category 4"),
    "category of another type": ({"category_id": [3]}, "there is no category [3]"),
    "image": ({"image_id": 4}, "there is no image 4"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_boxes_stop_or_are_dropped(folder, kind):
    changes, sentence = BAD[kind]
    document = document_of(folder, "train")
    good = document["annotations"]
    file, path = "000.jpg", "train/000.jpg"
    if kind == "image":
        file = path = "annotations/instances_train.json"
    bad = {**good[0], "id": 4, "image_id": 1000, "bbox": [1, 2, 5, 5], "category_id": 3, **changes}
    change(folder, "train", {**document, "annotations": [*good[:3], bad, *good[3:]]})
    with pytest.raises(DataError) as error:
        listing_of(folder)
    said = str(error.value)
    assert said.startswith(f"1 of the {len(good) + 1} boxes in annotations/instances_train.json cannot be right: ")
    assert f"--bad-boxes drop; the first is annotation 4 of {file}: " in said and sentence in said
    listing = listing_of(folder, bad_boxes="drop")
    [(split, name, outcome, why)] = listing.notes
    assert (split, name, outcome) == ("train", path, "dropped") and why.startswith("annotation 4: ") and sentence in why
    change(folder, "train", document)
    assert listing.digest() == listing_of(folder).digest()


def test_boxes_partly_outside_are_kept_and_listed(folder, tmp_path):
    document = document_of(folder, "train")
    document["annotations"][0] |= {"image_id": 1000, "bbox": [-3.5, 2, 10, 5], "id": 4}
    change(folder, "train", document)
    run(folder, tmp_path / "set")
    split = open_manifest(tmp_path / "set").split("train")
    [row] = [row for row in ObjectTable(split).objects if row["id"] == 4]
    assert row.tolist()[:4] == (-3.5, 2, 10, 5)
    outcome, why = listed(tmp_path / "set")["train/000.jpg"]
    assert outcome == "partly_outside"
    assert why == "annotation 4: its box [-3.5, 2, 10, 5] lies partly outside of the image: training cuts it off"
    assert json.loads((tmp_path / "set/report.json").read_text())["splits"]["train"]["partly_outside"] == 1


def test_boxes_that_training_leaves_out_are_listed(folder, tmp_path):
    """As ObjectTargets does: boxes without area, or with less than a pixel in the image."""
    document = document_of(folder, "train")
    chosen = [each for each in document["annotations"] if each["image_id"] == 1000 and not each["iscrowd"]][:2]
    chosen[0] |= {"bbox": [39.5, 2, 10, 5], "id": 4}
    chosen[1] |= {"area": 0, "id": 5}
    change(folder, "train", document)
    run(folder, tmp_path / "set")
    split = open_manifest(tmp_path / "set").split("train")
    sample = int(np.flatnonzero(split.annotation(IMAGES)["image_id"] == 1000)[0])
    _, labels = ObjectTargets(split, training=True)._usable(sample, np.array([40, 30]))
    assert len(labels) == sum(not each["crowd"] for each in ObjectTable(split).of(sample)) - 2
    lines = [json.loads(line) for line in (tmp_path / "set/report.jsonl").read_text().splitlines()]
    assert {line["why"] for line in lines if line["outcome"] == "not_learnt"} == {
        f"annotation 4: box [39.5, 2, 10, 5], area {chosen[0]['area']}: too small, training leaves it out",
        f"annotation 5: box {chosen[1]['bbox']}, area 0: too small, training leaves it out",
    }
    for each in document["annotations"]:
        each["area"] = 0
    change(folder, "train", document)
    with pytest.raises(DataError, match=r"_train.json has 13 objects, and training would leave out all of them"):
        listing_of(folder)


def test_images_without_boxes(folder, tmp_path):
    """Of train they are left out by default, those with crowds alone, too; of val they stay."""
    document = document_of(folder, "train")
    for each in document["annotations"]:
        each["iscrowd"] |= each["image_id"] == 993
    change(folder, "train", document)
    found = {}
    for policy in ("exclude", "keep"):
        run(folder, tmp_path / policy, object_options=ObjectOptions(empty_images=policy))
        manifest = open_manifest(tmp_path / policy)
        found[policy] = {name: ObjectTable(split) for name, split in manifest.splits.items()}
    ids = {policy: [set(table.images["image_id"].tolist()) for table in found[policy].values()] for policy in found}
    assert ids["keep"][0] - ids["exclude"][0] == {993, 972} and len(ids["exclude"][0]) == 4
    assert ids["keep"][1] == ids["exclude"][1] and 972 in ids["keep"][1]
    assert 0 in found["keep"]["val"].images["count"] and 0 not in found["exclude"]["train"].images["count"]
    names = ("train/001.jpg", "train/004.jpg")
    assert listed(tmp_path / "exclude") == dict.fromkeys(names, ("empty", "no object but crowds"))
    assert listed(tmp_path / "keep") == {}
    report = json.loads((tmp_path / "exclude/report.json").read_text())
    assert report["splits"]["train"]["empty"] == 2 and report["detection"] == {"classes": 3}
    with pytest.raises(UsageError, match="was prepared with empty_images keep and not None"):
        run(folder, tmp_path / "keep")
    change(folder, "train", {**document, "annotations": []})
    with pytest.raises(
        DataError, match="no image of train has an object: add annotations, or give --empty-images keep"
    ):
        run(folder, tmp_path / "none")


def test_a_val_split_is_drawn_before_empty_images_are_left_out(tmp_path):
    source = make_coco(tmp_path / "zoo", train=20, val=0)
    run(source, tmp_path / "set", val_fraction=0.5)
    train, val = (ObjectTable(split).images["count"] for split in open_manifest(tmp_path / "set").splits.values())
    assert len(val) == 10 and 0 in val and 0 not in train and len(train) == 6 + (val == 0).sum()


# --- what is always refused ------------------------------------------------------------------------------------------


def without(document: dict, part: str, name: str) -> None:
    del document[part][0][name]


def twice(document: dict, part: str) -> None:
    document[part].append({**document[part][0]})


FAULTS = {
    "no images": (lambda d: d.pop("images"), "is not as COCO's: a field 'images' is missing"),
    "no annotations": (lambda d: d.pop("annotations"), "is not as COCO's: a field 'annotations' is missing"),
    "a list": (lambda d: d.update(images=3), r"is not as COCO's \('int' object is not iterable\)"),
    "no size": (lambda d: without(d, "images", "width"), "a field 'width' is missing"),
    "no box": (lambda d: without(d, "annotations", "bbox"), "a field 'bbox' is missing"),
    "no category": (lambda d: without(d, "annotations", "category_id"), "a field 'category_id' is missing"),
    "images only": (lambda d: d.update(categories=[]), "has no categories: add them"),
    "categories only": (lambda d: d.update(images=[]), "has no images: add them"),
    "two images": (lambda d: twice(d, "images"), "has two image entries with the id 1000"),
    "two images of a file": (
        lambda d: d["images"][1].update(file_name=d["images"][0]["file_name"]),
        "has two images with the file_name 000.jpg: leave one of them",
    ),
    "two categories": (lambda d: twice(d, "categories"), "has two category entries with the id 7"),
    "two categories of a name": (
        lambda d: d["categories"][2].update(name="wolf"),
        r"instances_train.json names 'wolf' twice, as the categories 7 and 90: rename one, or take it out",
    ),
    "two annotations": (lambda d: twice(d, "annotations"), r"the annotation id \d+ is no whole number, or another"),
    "words for ids": (lambda d: d["images"][0].update(id="000"), "each image needs an id, .*; one is .*'id': '000'"),
    "size of 0": (lambda d: d["images"][0].update(height=0), "whole numbers, no side of 0, .*'height': 0"),
    "a file": (lambda d: d["images"][0].update(file_name=3), "and a file_name; .*'file_name': 3"),
    "a name": (lambda d: d["categories"][0].update(name=3), "each category needs an id .* and a name; .*3"),
    "a bell": (lambda d: d["categories"][0].update(name="\x07"), r"the class name '\\x07' has control characters"),
    "another category": (lambda d: d["categories"].pop(), "other categories than annotations/instances_train.json"),
    "an image": (
        lambda d: d["images"][1].update(file_name="x/y.jpg"),
        r"1 of the 5 images that annotations/instances_val.json names .*the first is val/x/y.jpg",
    ),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_annotations_that_are_not_understood(folder, kind):
    spoil, sentence = FAULTS[kind]
    for split in ("val",) if kind in ("another category", "an image") else ("train", "val"):
        document = document_of(folder, split)
        document["annotations"] = [each for each in document["annotations"] if each["category_id"] != 90]
        spoil(document)
        change(folder, split, document)
    with pytest.raises(DataError, match=sentence):
        listing_of(folder, bad_boxes="drop")


def test_files_that_are_not_understood(folder):
    shutil.copy(folder / "annotations/instances_train.json", folder / "annotations/instances_train2014.json")
    with pytest.raises(DataError, match="has two files of annotations for train, .*: leave one"):
        listing_of(folder)
    (folder / "annotations/instances_train2014.json").unlink()
    (folder / "annotations/instances_train.json").write_text("{")
    with pytest.raises(DataError, match=r"annotations/instances_train.json in .*zoo is not JSON \(Expecting"):
        listing_of(folder)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("annotations/instances_{}.json", "annotations/{}.json"),
        ("annotations/instances_{}.json", "annotations/bccd_{}.json"),
        ("annotations/instances_{}.json", "{}/_annotations.coco.json"),
    ],
)
def test_annotations_of_another_name_are_not_ignored(folder, old, new):
    for split in ("train", "val"):
        (folder / old.format(split)).rename(folder / new.format(split))
    with pytest.raises(DataError, match=f"{new.format('train')} in .*zoo is not read, because of its name: for detec"):
        listing_of(folder)


def test_a_val_of_another_name_is_not_ignored(folder):
    write(folder / "annotations/instances_test2017.json", b"no")  # which is
    assert set(listing_of(folder).splits) == {"train", "val"}
    (folder / "annotations/instances_val.json").rename(folder / "annotations/instances_valid.json")
    with pytest.raises(DataError, match=r"instances_valid.json in .* is not read, because of its name"):
        listing_of(folder)


def test_options_that_do_not_fit(folder, tmp_path):
    with pytest.raises(UsageError, match="--resize-short and --max-side would change the size of the images"):
        run(folder, tmp_path / "set", encoding=Encoding(max_side=20))
    with pytest.raises(UsageError, match="zoo has no label maps in a known layout: leave --ignore-value out"):
        list_source(open_source(str(folder), tmp_path), LabelOptions(ignore_value=3))
    for make in (images.make_folder, label_maps.make_folder):
        other = make(tmp_path / make.__module__, train=2, val=1)
        with pytest.raises(UsageError, match="has no boxes in a known layout: leave --bad-boxes out"):
            listing_of(other, bad_boxes="drop")
    (folder / "annotations/instances_val.json").unlink()
    with pytest.raises(UsageError, match="--val is for classification: put these images and their annotations into"):
        add_val(listing_of(folder), open_source(str(folder), tmp_path), None)


def test_an_image_of_another_size_is_left_out(folder, tmp_path):
    """As with EXIF's orientation, which is ignored: the boxes are those of the turned image."""
    write(folder / "train/001.jpg", encoded(picture(1, size=(40, 30))))
    run(folder, tmp_path / "set")
    outcome, why = listed(tmp_path / "set")["train/001.jpg"]
    assert (outcome, why) == ("excluded", "its boxes are those of 30x40 pixels, and it has 40x30")
    assert re.search(r'"excluded": 1', (tmp_path / "set/report.json").read_text())
