"""Annotations of boxes from strangers: whatever is in them, a sentence, and no other error."""

import copy
import json
import random

import pytest

from data_pipeline.object_json import read_objects
from data_pipeline.preparation.listing import list_source, open_source
from data_pipeline.preparation.object_listing import ObjectOptions
from data_pipeline.split import DataError
from data_pipeline.validate import BadImage
from tests.data_pipeline.boxes import change, document_of, make_coco, make_voc, voc_xml
from tests.data_pipeline.label_maps import write

ODD = (
    None,
    True,
    -1,
    0,
    2**63,
    10**400,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\x1b[2J",
    [],
    {},
    [[]],
    {"id": 1},
)


def spoiled(document: dict, chance: random.Random) -> dict:
    """A copy of which one place at random is replaced by something odd, or removed."""
    document = copy.deepcopy(document)
    node, places = document, []
    while isinstance(node, dict | list) and node and (not places or chance.random() < 0.9):
        key = chance.choice(list(node) if isinstance(node, dict) else range(len(node)))
        places.append((node, key))
        node = node[key]
    parent, key = places[-1]
    if chance.random() < 0.2:
        del parent[key]
    else:
        parent[key] = chance.choice(ODD)
    return document


def test_every_change_of_cocos_json_is_read_or_a_sentence(tmp_path):
    root, chance, errors = make_coco(tmp_path / "zoo"), random.Random(0), set()
    good, source = document_of(root, "train"), open_source(str(root), tmp_path)
    for _ in range(400):
        change(root, "train", spoiled(good, chance))
        try:
            listing = list_source(source, object_options=ObjectOptions(chance.choice(["stop", "drop"])))
        except DataError as error:
            assert len(str(error)) < 700 and "\x1b" not in str(error)
            errors.add(str(error))
        else:
            # What is packed can be read by training.
            for document in listing.splits["train"].objects.documents:
                fields = json.loads(document)
                read_objects(document, (fields["width"], fields["height"]))
    assert len(errors) > 100


def test_every_change_of_a_samples_json_is_read_or_a_reason():
    chance, reasons = random.Random(0), set()
    thing = {"id": 1, "label": 2, "bbox": [1, 2, 3, 4.5], "area": 9, "iscrowd": 0}
    good = {"image_id": 1, "width": 40, "height": 30, "objects": [thing, {**thing, "id": 2}]}
    for _ in range(2000):
        try:
            read_objects(json.dumps(spoiled(good, chance)).encode(), (40, 30))
        except BadImage as error:
            assert len(str(error)) < 400
            reasons.add(str(error))
    assert len(reasons) > 40


@pytest.mark.parametrize("data", [b"[" * 100_000, b"\xff\xfe", b"", b"3", b"[]", b'{"images": "abc"}'])
def test_files_that_are_something_else(tmp_path, data):
    root = make_coco(tmp_path / "zoo")
    write(root / "annotations/instances_train.json", data)
    with pytest.raises(DataError, match="annotations/instances_train.json"):
        list_source(open_source(str(root), tmp_path))


def entities() -> bytes:
    """XML that would grow to ten billion characters."""
    parts = [f'<!ENTITY x{i} "{f"&x{i - 1};" * 10}">' for i in range(1, 10)]
    return f'<!DOCTYPE a [<!ENTITY x0 "lol">{"".join(parts)}]><annotation>&x9;</annotation>'.encode()


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("Annotations/a.xml", entities(), "Annotations/a.xml in .* cannot be read"),
        ("Annotations/a.xml", b"\xff\xfe\0", "Annotations/a.xml in .* cannot be read"),
        ("Annotations/a.xml", voc_xml(("x", "1e999"), []), "each image needs .* whole numbers, .*nan"),
        ("Annotations/a.xml", voc_xml((40, 30), [("wolf", "1e999", 1, 4, 5, 0)]), "is not four finite numbers"),
        ("Annotations/a.xml", voc_xml((40, 30), [("&#x7f;", 1, 1, 4, 5, 0)]), "has control characters"),
        ("ImageSets/Main/train.txt", b"../../a\n", r"has no Annotations/\.\./\.\./a.xml"),
        ("ImageSets/Main/train.txt", b"a\x1b[2J\n", r"control characters: 'a\\x1b\[2J'"),
        ("ImageSets/Main/train.txt", b"\xff\xfe\n", "has no Annotations/"),
    ],
)
def test_pascal_vocs_files(tmp_path, name, data, sentence):
    root = make_voc(tmp_path / "VOC", {"train": "a"}, {"a": [("wolf", 1, 1, 40, 30, 0)]})
    write(root / name, data)
    with pytest.raises(DataError, match=sentence):
        list_source(open_source(str(root), tmp_path))
