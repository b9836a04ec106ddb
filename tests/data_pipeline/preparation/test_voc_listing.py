"""Sources with boxes in Pascal VOC's layout."""

import pytest

from data_pipeline.split import DataError
from tests.data_pipeline.boxes import listing_of, make_voc, stored_objects, voc_xml
from tests.data_pipeline.label_maps import write

VOC = {
    "a": [("\n  wolf ", 1, 1, 40, 30, 0), ("bear", 11, 6, 20, 10, 1)],
    "b": [("bear", 3.5, 4.5, 8.5, 9.5, 0)],
    "c": [],
    "d": [("wolf", 2, 2, 2, 2, 0)],
}


def test_pascal_voc(tmp_path):
    make_voc(tmp_path / "VOCdevkit/VOC2012", {"train": "ba", "val": "cd", "trainval": "abcd"}, VOC)
    write(tmp_path / "VOCdevkit/VOC2012/SegmentationClass/a.png", b"")
    listing = listing_of(tmp_path)
    assert listing.classes == ("bear", "wolf") and listing.category_ids == (1, 2) and listing.ignored == 5
    prefix = "VOCdevkit/VOC2012/JPEGImages/"
    assert listing.splits["train"].names == [f"{prefix}a.jpg", f"{prefix}b.jpg"]
    assert listing.splits["val"].names == [f"{prefix}c.jpg", f"{prefix}d.jpg"]
    a, b = stored_objects(listing.splits["train"])
    assert a == {
        "image_id": 1,
        "file_name": "a.jpg",
        "width": 40,
        "height": 30,
        "objects": [
            {"id": 1, "label": 1, "bbox": [0, 0, 40, 30], "area": 1200, "iscrowd": 0},
            {"id": 2, "label": 0, "bbox": [10, 5, 10, 5], "area": 50, "iscrowd": 1},
        ],
    }
    assert (b["image_id"], b["objects"][0]["bbox"], b["objects"][0]["area"]) == (2, [2.5, 3.5, 6.0, 6.0], 36.0)
    assert stored_objects(listing.splits["val"])[1]["objects"][0]["bbox"] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("lists", "train", "val"),
    [
        ({"trainval": "ab"}, "ab", ""),
        ({"trainval": "abc", "test": "d"}, "abc", "d"),
        ({"train": "a", "val": "b", "trainval": "ab", "test": "cd"}, "ab", "cd"),
        ({"train": "a", "val": "b", "trainval": "ab", "test": "x"}, "a", "b"),  # VOC2012: no annotations of test
    ],
)
def test_the_lists_of_pascal_voc(tmp_path, lists, train, val):
    listing = listing_of(make_voc(tmp_path / "VOC2007", lists, VOC))
    expected = {
        split: [f"JPEGImages/{name}.jpg" for name in names] for split, names in (("train", train), ("val", val))
    }
    assert {split: items.names for split, items in listing.splits.items()} == {k: v for k, v in expected.items() if v}


def test_folders_below_those_of_pascal_voc(tmp_path):
    listing = listing_of(make_voc(tmp_path / "VOC", {"train": ["more/a"]}, {"more/a": VOC["a"]}))
    assert listing.splits["train"].names == ["JPEGImages/more/a.jpg"] and listing.classes == ("bear", "wolf")


def test_names_with_spaces(tmp_path):
    """Lines that name one image count once. A name that ends as a flag does is not cut."""
    objects = dict.fromkeys(["IMG 1", "IMG", "x"], VOC["a"])
    lists = {"train": ["\ufeffIMG 1\r", "", " x", "x", "IMG 1"], "val": ["IMG"]}
    root = make_voc(tmp_path / "VOC", lists, objects)
    listing = listing_of(root)
    assert listing.splits["train"].names == [f"JPEGImages/{name}.jpg" for name in ("IMG 1", "x")]
    assert listing.splits["val"].names == ["JPEGImages/IMG.jpg"]
    write(root / "ImageSets/Main/train.txt", b"IMG 1")
    for path in ("Annotations/IMG 1.xml", "JPEGImages/IMG 1.jpg"):
        assert listing_of(root).splits["train"].names == ["JPEGImages/IMG 1.jpg"]
        (root / path).rename(tmp_path / "away")
        with pytest.raises(DataError, match=r"no Annotations/IMG 1.xml, though a l|IMG 1.jpg"):
            listing_of(root)
        (tmp_path / "away").rename(root / path)


def test_lists_with_flags(tmp_path):
    root = make_voc(tmp_path / "VOC", {"train": ["a  1", "b -1", "b\t 0"], "val": ["c 1"]}, VOC)
    listing = listing_of(root)
    assert listing.splits["train"].names == ["JPEGImages/a.jpg", "JPEGImages/b.jpg"]
    assert listing.splits["val"].names == ["JPEGImages/c.jpg"]
    write(root / "ImageSets/Main/train.txt", b"a 1\nb")
    with pytest.raises(DataError, match=r"VOC has no Annotations/a 1.xml, though a list in ImageSets/Main names it"):
        listing_of(root)


def test_two_images_of_one_name(tmp_path):
    root = make_voc(tmp_path / "VOC", {"train": "ab"}, VOC)
    write(root / "JPEGImages/a.png", b"")
    with pytest.raises(DataError, match=r"two images of one name, JPEGImages/a.jpg and a.png: remove one"):
        listing_of(root)


def test_an_image_of_train_and_val(tmp_path):
    root = make_voc(tmp_path / "VOC", {"train": "abc", "val": "bcd"}, VOC)
    with pytest.raises(DataError, match=r"Main/train.txt and ImageSets/Main/val.txt in .* 2 names in common, .* is b"):
        listing_of(root)


def test_faults_of_pascal_voc(tmp_path):
    root = make_voc(tmp_path / "VOC", {"train": "ab", "val": "cd"}, VOC)
    write(root / "Annotations/a.xml", voc_xml((40, 30), [("wolf", 9, 1, 4, 5, 0), ("wolf", "x", 1, 4, 5, 0)]))
    with pytest.raises(
        DataError, match=r"2 of the 3 boxes in ImageSets/Main/train.txt .* a.jpg: .*inverted: width -4, h"
    ):
        listing_of(root)
    notes = listing_of(root, bad_boxes="drop").notes
    assert [note[2] for note in notes] == ["dropped"] * 2 and "nan, 0, nan, 5] is not four finite numbers" in notes[1][
        3
    ]
    write(root / "Annotations/a.xml", b"<annotation>")
    with pytest.raises(DataError, match=r"Annotations/a.xml in .*VOC cannot be read \(no element found"):
        listing_of(root)
    (root / "Annotations/a.xml").unlink()
    with pytest.raises(DataError, match=r"VOC has no Annotations/a.xml, though a list in ImageSets/Main names it"):
        listing_of(root)
    make_voc(tmp_path / "other", {"train": "ab"}, VOC)
    with pytest.raises(DataError, match=r"has several sets of Pascal VOC \(VOC/, other/\): give one"):
        listing_of(tmp_path)
    with pytest.raises(DataError, match=r"has boxes, as in Annotations/a.xml, and no list of the images: write I"):
        listing_of(make_voc(tmp_path / "lists/other", {}, VOC))
    with pytest.raises(DataError, match="has test.txt alone in ImageSets/Main"):
        listing_of(make_voc(tmp_path / "test", {"test": "a"}, VOC))
