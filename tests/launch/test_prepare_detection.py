"""launch/prepare.py for detection, as a process: what it says, kill -9, bad boxes, FFCV files, and shards of others."""

import importlib.util
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from data_pipeline.manifest import open_manifest
from data_pipeline.objects import ObjectTable
from tests.data_pipeline.boxes import change, document_of, make_coco
from tests.data_pipeline.images import contents
from tests.launch.prepare_process import (
    call,
    fails_with,
    finished_shards,
    kill,
    start_command,
    wait_until_gone,
    workers_of,
)
from train.tasks import classification


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """100 photographs with boxes that take a worker a second."""
    root = make_coco(tmp_path_factory.mktemp("source") / "zoo", train=90, val=10)
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        document = document_of(root, split)
        for image in document["images"]:
            image["width"], image["height"] = 300, 200
            pixels = Image.fromarray(random.integers(0, 256, (200, 300, 3), dtype=np.uint8))
            pixels.save(root / split / image["file_name"], quality=80)
        change(root, split, document)
    return root


def test_detection_killed_and_resumed(zoo, tmp_path):
    size = ("--shard-size", "0.3")
    process = start_command(
        zoo, tmp_path / "set", "--workers", 1, *size, until=lambda: finished_shards(tmp_path / "set") >= 2
    )
    workers = workers_of(process)
    kill(process)
    wait_until_gone(workers)
    assert not (tmp_path / "set/manifest.json").exists()
    for dest in ("set", "whole"):
        result = call(zoo, tmp_path / dest, *size)
        assert result.returncode == 0, result.stderr
        assert result.stdout.splitlines()[1:] == [
            "  detection: 3 classes",
            "  train: 72 images; 18 left out, without an object but crowds; 216 objects",
            "  val: 10 images; 24 objects",
            f"  {tmp_path / dest}/report.jsonl names the images that were transcoded, repaired or left out, with the "
            "reason",
        ]
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")
    assert call("verify", tmp_path / "set").returncode == 0
    fails_with(78, call(zoo, tmp_path / "set", *size, "--bad-boxes", "drop"), "bad_boxes None and not drop")
    with pytest.raises(ValueError, match="its images have boxes in place of classes: give task.name=detection"):
        classification.check_dataset(open_manifest(tmp_path / "set"))

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for path in (tmp_path / "set").glob("*.tar"):
        shutil.copy(path, foreign)
    fails_with(65, call("index", foreign), "has objects (in .json beside .jpg): name the classes in", "classes.txt")
    (foreign / "classes.txt").write_text("bear\nwolf\nfox\n")
    result = call("index", foreign)
    assert result.returncode == 0 and "  train: 72 images; 216 objects" in result.stdout.splitlines()


def test_bad_boxes_are_named(zoo, tmp_path):
    source = shutil.copytree(zoo, tmp_path / "zoo")
    for split in ("train", "val"):
        document = document_of(source, split)
        document["categories"].append({"id": 91, "name": "yak"})
        change(source, split, document)
    good = document["annotations"][0]
    document["annotations"] += [
        {**good, "id": 2, "bbox": [9, 9, -3, 4]},
        {**good, "id": 3, "category_id": 4},
        {**good, "id": 4, "bbox": [299, 3, 5, 5]},
    ]
    change(source, "val", document)
    said = "2 of the 27 boxes in annotations/instances_val.json cannot be right: correct them, or leave them out with"
    result = call(source, tmp_path / "set")
    fails_with(65, result, said, "the first is annotation 2 of 0", "its box is inverted: width -3, height 4.")
    assert not list((tmp_path / "set").glob("*"))
    result = call(source, tmp_path / "set", "--bad-boxes", "drop", "--empty-images", "keep")
    assert result.returncode == 0
    assert result.stdout.splitlines()[2:] == [
        "  train: 90 images; 216 objects; no object of yak",
        "  val: 10 images; 25 objects; 2 boxes left out, which cannot be right; 1 box partly outside of the image; no "
        "object of yak",
        f"  {tmp_path / 'set'}/report.jsonl names the boxes left out or reaching outside, with the reason",
    ]
    lines = [json.loads(line) for line in (tmp_path / "set/report.jsonl").read_text().splitlines()]
    assert [(line["outcome"], line["why"].split(":")[0]) for line in lines] == [
        ("partly_outside", "annotation 4"),
        ("dropped", "annotation 2"),
        ("dropped", "annotation 3"),
    ]
    fails_with(78, call(zoo, tmp_path / "other", "--max-side", 100), "--resize-short and --max-side would change")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ffcv") is None, reason="ffcv is not installed")
def test_ffcv_files_beside_objects(zoo, tmp_path):
    assert call(zoo, tmp_path / "set").returncode == 0
    before = open_manifest(tmp_path / "set").split("train")
    assert call(zoo, tmp_path / "set", "--formats", "webdataset,ffcv").returncode == 0
    after = open_manifest(tmp_path / "set").split("train")
    assert after.beton and (after.identity, after.annotations) == (before.identity, before.annotations)
    assert np.array_equal(after.beton_records["checksum"], after.records["checksum"])
    assert np.array_equal(ObjectTable(after).objects, ObjectTable(before).objects)
    assert call("verify", tmp_path / "set").returncode == 0
