"""launch/prepare.py for segmentation, as a process: what it says, kill -9, and FFCV files beside label maps."""

import importlib.util
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from data_pipeline.manifest import open_manifest
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


@pytest.fixture(scope="module")
def streets(tmp_path_factory):
    """90 photographs with label maps that take a worker a second."""
    root = tmp_path_factory.mktemp("source") / "streets"
    random = np.random.default_rng(0)
    for split, count in (("train", 80), ("val", 10)):
        for name in ("images", "annotations"):
            (root / name / split).mkdir(parents=True)
        for i in range(count):
            image = Image.fromarray(random.integers(0, 256, (200, 300, 3), dtype=np.uint8))
            image.save(root / f"images/{split}/{i}.jpg", quality=80)
            labels = np.kron(random.integers(0, 3, (20, 30), dtype=np.uint8), np.ones((10, 10), np.uint8))
            Image.fromarray(labels).save(root / f"annotations/{split}/{i}.png")
    (root / "classes.txt").write_text("sky\nroad\ntree\n")
    return root


def test_segmentation_killed_and_resumed(streets, tmp_path):
    size = ("--shard-size", "0.3")
    process = start_command(
        streets, tmp_path / "set", "--workers", 1, *size, until=lambda: finished_shards(tmp_path / "set") >= 2
    )
    workers = workers_of(process)
    kill(process)
    wait_until_gone(workers)
    assert not (tmp_path / "set/manifest.json").exists()
    for dest in ("set", "whole"):
        result = call(streets, tmp_path / dest, *size)
        assert result.returncode == 0, result.stderr
        assert result.stdout.splitlines()[1:] == [
            "  segmentation: 3 classes, a label map beside every image",
            "  train: 80 images",
            "  val: 10 images",
        ]
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")
    assert call("verify", tmp_path / "set").returncode == 0
    fails_with(78, call(streets, tmp_path / "set", *size, "--ignore-value", 9), "ignore_value None and not 9")


def test_bad_labels_are_named(streets, tmp_path):
    source = shutil.copytree(streets, tmp_path / "streets")
    (source / "annotations/train/7.png").write_bytes((source / "images/train/7.jpg").read_bytes())
    Image.new("RGB", (300, 200)).save(source / "annotations/train/8.png")
    (source / "images/val/9.jpg").unlink()
    (source / "classes.txt").write_text("sky\nroad\ntree\nmoon\n")
    result = call(source, tmp_path / "set")
    assert "train: 78 images; 2 left out, which cannot be used; no pixel of moon\n" in result.stdout
    assert "    the first of those that cannot be used: images/train/" in result.stdout
    assert "ignored: 1 label map without an image\n" in result.stdout and "warning" not in result.stderr
    report = (tmp_path / "set/report.jsonl").read_text()
    assert "its label annotations/train/7.png: not a PNG" in report and "its label annotations/train/8.png" in report
    (source / "annotations/train/5.png").unlink()
    fails_with(65, call(source, tmp_path / "other"), "1 of 89 images", "images/train/5.jpg", "annotations/train/5.png")


def test_the_reason_is_said_if_the_classes_do_not_fit(streets, tmp_path):
    """The third class lacks its name, so that only the two label maps without it can be used."""
    source = shutil.copytree(streets, tmp_path / "streets")
    (source / "classes.txt").write_text("sky\nroad\n")
    for number in (7, 8):
        pixels = np.kron(np.eye(10, dtype=np.uint8), np.ones((20, 30), np.uint8))
        Image.fromarray(pixels).save(source / f"annotations/train/{number}.png")
    for name in ("images", "annotations"):
        shutil.rmtree(source / name / "val")
    result = call(source, tmp_path / "set")
    assert result.returncode == 0 and "train: 2 images; 78 left out, which cannot be used\n" in result.stdout
    reason = r"first of those that cannot be used: images/train/.*: its label .* has the value 2; the 2 classes are 0"
    assert re.search(reason, result.stdout)
    assert "warning: 78 of the 80 images of train cannot be used\n" in result.stderr


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ffcv") is None, reason="ffcv is not installed")
def test_ffcv_files_beside_label_maps(streets, tmp_path):
    assert call(streets, tmp_path / "set").returncode == 0
    before = open_manifest(tmp_path / "set").split("train")
    assert call(streets, tmp_path / "set", "--formats", "webdataset,ffcv").returncode == 0
    after = open_manifest(tmp_path / "set").split("train")
    assert after.beton and (after.identity, after.annotations) == (before.identity, before.annotations)
    assert np.array_equal(after.beton_records["checksum"], after.records["checksum"])
    assert call("verify", tmp_path / "set").returncode == 0
