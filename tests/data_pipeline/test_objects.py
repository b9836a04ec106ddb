"""The tables of objects: what preparing writes and evaluations read, damage, and shards of others."""

import contextlib
import copy
import io
import json
import shutil

import numpy as np
import pytest
import webdataset
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from data_pipeline.annotations import add_annotation
from data_pipeline.manifest import open_manifest
from data_pipeline.object_json import read_objects, write_objects
from data_pipeline.objects import ObjectTable, coco_json
from data_pipeline.preparation.foreign import index
from data_pipeline.preparation.verify import verify
from data_pipeline.split import CATEGORY_IDS, DETECTION, IMAGE, IMAGES, OBJECT, OBJECT_JSON, OBJECTS, DataError
from data_pipeline.validate import BadImage
from tests.data_pipeline.boxes import CLASSES, document_of, make_coco
from tests.data_pipeline.images import contents, encoded, listed, make_tar, picture, run, without_manifest

SIZE = (40, 30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_coco(tmp_path_factory.mktemp("source") / "zoo", train=12, val=11)


@pytest.fixture(scope="module")
def dataset(folder, tmp_path_factory):
    """`folder`, prepared in several shards."""
    dest = tmp_path_factory.mktemp("prepared") / "set"
    assert run(folder, dest, shard_bytes=10_000)
    return dest


# --- the tables ------------------------------------------------------------------------------------------------------


def test_what_is_written(folder, dataset):
    manifest = open_manifest(dataset)
    assert manifest.classes == CLASSES
    for name, split in manifest.splits.items():
        table, document = ObjectTable(split), document_of(folder, name)
        assert split.annotations.keys() == set(DETECTION) and not split.records["label"].any()
        assert table.objects.dtype == OBJECT and table.images.dtype == IMAGE
        assert table.category_ids.tolist() == [3, 7, 90] and table.category_ids.dtype == np.int64
        empty = {each["id"] for each in document["images"]} - {each["image_id"] for each in document["annotations"]}
        assert empty
        ids = [table.image_id(sample) for sample in range(split.samples)]
        assert set(ids) == {each["id"] for each in document["images"]} - (empty if name == "train" else set())
        assert len(set(ids)) == len(ids) and ids != sorted(ids)
        sizes = {each["id"]: (each["width"], each["height"]) for each in document["images"]}
        for sample, image_id in enumerate(ids):
            expected = [
                (*each["bbox"], each["area"], [3, 7, 90].index(each["category_id"]), each["iscrowd"], each["id"])
                for each in document["annotations"]
                if each["image_id"] == image_id
            ]
            assert table.of(sample).tolist() == expected
            record = split.records[sample]
            assert (record["width"], record["height"]) == sizes[image_id]
        assert isinstance(table.of(0).base, np.memmap)
    assert not (dataset / ".work").exists() and verify(dataset) == []
    report = json.loads((dataset / "report.json").read_text())
    assert report["detection"] == {"classes": 3}
    assert report["splits"]["val"] == {"samples": 11, "kept": 11, "objects": 27}


def test_any_webdataset_reader_gets_the_same_samples(folder, dataset):
    for name, split in open_manifest(dataset).splits.items():
        assert len(split.shards) > 1
        files = [str(dataset / shard.file) for shard in split.shards]
        samples = list(webdataset.WebDataset(files, shardshuffle=False))
        images = {each["id"]: each for each in document_of(folder, name)["images"]}
        table, shards = ObjectTable(split), [(dataset / shard.file).read_bytes() for shard in split.shards]
        for number, (sample, place) in enumerate(zip(samples, split.annotation(OBJECT_JSON), strict=True)):
            assert {key for key in sample if key[0] != "_"} == {"jpg", "json"}
            start = int(place["offset"])
            assert shards[place["shard"]][start : start + int(place["size"])] == sample["json"]
            found = json.loads(sample["json"])
            image = images[table.image_id(number)]
            assert (folder / name / image["file_name"]).read_bytes() == sample["jpg"]
            assert [each["id"] for each in found["objects"]] == table.of(number)["id"].tolist()
            assert [each["bbox"][0] for each in found["objects"]] == table.of(number)["x"].tolist()
            assert all("segmentation" in each for each in found["objects"])


def test_a_tar_and_other_workers_give_the_same_bytes(folder, dataset, tmp_path):
    make_tar(folder, tmp_path / "zoo.tar")
    run(tmp_path / "zoo.tar", tmp_path / "set", shard_bytes=10_000, workers=1)
    assert contents(tmp_path / "set", ("report.json", "report.jsonl")) == contents(
        dataset, ("report.json", "report.jsonl")
    )


def evaluated(document: dict, detections: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall by pycocotools."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(document)
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"], evaluation.eval["recall"]


def test_an_evaluation_equals_that_of_the_source(folder, dataset):
    """By pycocotools, to the bit, with crowds, and with an image and a class without objects."""
    document = document_of(folder, "val")
    found = coco_json(open_manifest(dataset).split("val"), CLASSES)
    assert found["categories"] == sorted(document["categories"], key=lambda each: each["id"])
    assert sorted(each["id"] for each in found["annotations"]) == sorted(each["id"] for each in document["annotations"])
    random, detections = np.random.default_rng(3), []
    for each in document["annotations"]:
        for _ in range(3):
            box = (np.array(each["bbox"]) * random.uniform(0.9, 1.1, 4)).tolist()
            score = float(random.integers(20)) / 20  # with ties
            detections.append({**{k: each[k] for k in ("image_id", "category_id")}, "bbox": box, "score": score})
    ours, theirs = evaluated(found, detections), evaluated(document, detections)
    assert all(np.array_equal(one, other) for one, other in zip(ours, theirs, strict=True))
    assert 0.1 < ours[0][ours[0] >= 0].mean() < 0.9


# --- damage ----------------------------------------------------------------------------------------------------------


def test_verify_checks_the_objects(dataset, tmp_path):
    copied = shutil.copytree(dataset, tmp_path / "set")
    split = open_manifest(copied).split("train")
    place = split.annotation(OBJECT_JSON)[4]
    path = copied / split.shards[place["shard"]].file
    whole = path.read_bytes()
    middle = int(place["offset"]) + int(place["size"]) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :])
    [fault] = verify(copied)
    assert fault == f"{path} is damaged: the JSON of sample 4 (byte {place['offset']}) fails its checksum."
    path.write_bytes(whole)
    objects = split.annotation(OBJECTS).copy()
    objects["x"][split.annotation(IMAGES)["first"][4]] += 1e-9
    add_annotation(open_manifest(copied), "train", OBJECTS, objects)
    [fault] = verify(copied)
    assert f"the JSON of sample 4 (byte {place['offset']}) cannot be used: it does not say what the split's" in fault


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        (OBJECTS, lambda t: t["label"].__setitem__(5, 3), "train.objects.npy .*the class of object 5 is none of the 3"),
        (OBJECTS, lambda t: t[:-1], "train.images.npy cannot be right: it does not share out the"),
        (OBJECTS, lambda t: t["x"].copy(), "train.objects.npy cannot be right: it is no table of objects"),
        (IMAGES, lambda t: t["first"].__setitem__(3, 1), "train.images.npy cannot be right: it does not share out the"),
        (CATEGORY_IDS, lambda t: t[:2], "train.category_ids.npy is damaged"),
        (CATEGORY_IDS, lambda t: t.astype(np.int32), "no table of category ids"),
        (OBJECT_JSON, lambda t: t["offset"].__setitem__(2, 1 << 40), "of sample 2 it says that it lies outside the f"),
        (OBJECT_JSON, lambda t: t["size"].copy(), "no table of object jsons"),
    ],
)
def test_tables_that_cannot_be_right_are_refused(dataset, tmp_path, name, change, sentence):
    copied = shutil.copytree(dataset, tmp_path / "set")
    table = open_manifest(copied).split("train").annotation(name).copy()
    changed = change(table)
    add_annotation(open_manifest(copied), "train", name, table if changed is None else changed)
    with pytest.raises(DataError, match=sentence):
        open_manifest(copied)


def test_a_split_without_a_table_is_refused(dataset, tmp_path):
    copied = shutil.copytree(dataset, tmp_path / "set")
    document = json.loads((copied / "manifest.json").read_text())
    del document["splits"]["val"]["annotations"][IMAGES]
    (copied / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match="split 'val' has objects and no images. Prepare the dataset again"):
        open_manifest(copied)


# --- shards of others ------------------------------------------------------------------------------------------------


@pytest.fixture
def foreign(dataset, tmp_path):
    return without_manifest(dataset, tmp_path / "foreign", CLASSES)


def test_our_own_shards_get_the_same_tables(dataset, foreign):
    index(foreign, workers=2)
    for split in ("train", "val"):
        for name in ("index", *(f"{name}.npy" for name in (OBJECTS, IMAGES, OBJECT_JSON))):
            assert (foreign / f"{split}.{name}").read_bytes() == (dataset / f"{split}.{name}").read_bytes()
        # The shards have labels alone: the classes get numbers from 1 on.
        assert open_manifest(foreign).split(split).annotation(CATEGORY_IDS).tolist() == [1, 2, 3]
    assert json.loads((foreign / "report.json").read_text())["detection"] == {"classes": 3} and verify(foreign) == []
    before = contents(foreign)
    index(foreign, workers=1)  # once more
    assert contents(foreign) == before


def json_of(image_id: int, size=SIZE, **changes) -> bytes:
    thing = {"id": 1, "label": 2, "bbox": [1, 2, 3, 4.5], "area": 9, "iscrowd": 0, **changes}
    return write_objects({"image_id": image_id, "width": size[0], "height": size[1]}, [thing])


BAD = {
    "damaged": (b"{", "its boxes cannot be read: Expecting property name"),
    "list": (b"[]", "its boxes cannot be read: TypeError list indices"),
    "nothing": (b"{}", "its boxes cannot be read: KeyError 'image_id'"),
    "word": (json_of("x"), "its image_id 'x' is not a whole number"),
    "size": (json_of(1, size=(30, 40)), "its boxes are those of 30x40 pixels, and it has 40x30"),
    "id": (json_of(1, id=None), "the id None of an object is not a whole number"),
    "label": (json_of(1, label="cat"), "object 1 has the label 'cat', no class"),
    "class": (json_of(1, label=3), "object 1 has the label 3; classes.txt names 3 classes"),
    "crowd": (json_of(1, iscrowd=2), "object 1 has iscrowd 2, neither 0 nor 1"),
    "box": (json_of(1, bbox=[1, 2, 0, 4]), "object 1: its box is empty: width 0, height 4"),
    "outside": (json_of(1, bbox=[41, 2, 4, 4]), "object 1: its box [41, 2, 4, 4] lies outside of the image"),
}


def test_samples_that_cannot_be_used_are_left_out(foreign):
    good = encoded(picture(1, size=SIZE))
    with webdataset.TarWriter(str(foreign / "train-other.tar")) as writer:
        for name, (data, _) in BAD.items():
            writer.write({"__key__": name, "jpg": good, "json": data})
        writer.write({"__key__": "alone", "jpg": good})
        writer.write({"__key__": "png", "png": encoded(picture(1, size=SIZE), "PNG"), "json": json_of(2)})
        writer.write({"__key__": "good", "json": json_of(5), "jpg": good, "cls": b"7"})
    index(foreign, workers=1)
    found = listed(foreign)
    for name, (_, reason) in BAD.items():
        outcome, why = found.pop(f"train-other.tar/{name}")
        assert outcome == "excluded" and why.startswith(reason), why
    assert found == {
        "train-other.tar/alone": ("excluded", "no boxes (.json)"),
        "train-other.tar/png": (
            "excluded",
            "PNG to JPEG: not done here, because the shard is not changed",
        ),
    }
    table = ObjectTable(open_manifest(foreign).split("train"))
    [sample] = np.flatnonzero(table.images["image_id"] == 5)
    assert table.of(sample).tolist() == [(1, 2, 3, 4.5, 9, 2, 0, 1)] and verify(foreign) == []


def test_foreign_shards_that_are_refused(foreign):
    with webdataset.TarWriter(str(foreign / "val-other.tar")) as writer:
        for key in "ab":
            writer.write({"__key__": key, "jpg": encoded(picture(1, size=SIZE)), "json": json_of(5)})
    with pytest.raises(DataError, match="two images of val have the image_id 5: give each an id of its own"):
        index(foreign, workers=1)
    (foreign / "classes.txt").unlink()
    with pytest.raises(DataError, match=r"has objects \(in .json beside .jpg\): name the classes in .*classes.txt"):
        index(foreign, workers=1)


def test_json_with_a_label_is_classification(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "train-0.tar")) as writer:
        fields = {**json.loads(json_of(1)), "label": 1}
        writer.write({"__key__": "a", "jpg": encoded(picture(1)), "json": json.dumps(fields).encode()})
    index(tmp_path, workers=1)
    split = open_manifest(tmp_path).split("train")
    assert split.annotations == {} and split.records["label"].tolist() == [1]


def test_the_form_of_a_sample():
    image_id, rows = read_objects(json_of(3), SIZE)
    assert image_id == 3 and np.array(rows, OBJECT)["height"].tolist() == [4.5]
    with pytest.raises(BadImage, match="object 1: its area None is not a finite number"):
        read_objects(json_of(3, area=None), SIZE)
