"""The published recipe of CAT-S with RetinaNet at its full size, on 200 photographs of COCO: minutes for each test."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from tests.runs import ROOT, metrics
from tests.train.tasks.detection.coco_cases import pycocotools_of
from train.tasks.detection.scores import METRICS

SAMPLE = ROOT.parent / "shared/data/coco200.tar"
CONFIG = ROOT / "configs/detection/retinanet_cat_s_1x.yaml"

pytestmark = [pytest.mark.long, pytest.mark.skipif(not SAMPLE.exists(), reason="needs coco200.tar")]


def command(folder: Path, name: str, *arguments: object) -> str:
    """The output of launch/<name>.py, run in `folder` on one rank."""
    program = [sys.executable, str(ROOT / f"launch/{name}.py"), *map(str, arguments)]
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the prepared dataset, a classifier's weights where the recipe names them, and a run of two steps.

    Only the dataset and the sizes of batches are others than published. The weights are random.
    """
    import catmodel

    folder = tmp_path_factory.mktemp("coco200")
    command(folder, "prepare", SAMPLE, "coco")
    (folder / "weights").mkdir()
    torch.manual_seed(0)
    torch.save({"model": catmodel.create_model("cat_small").state_dict()}, folder / "weights/cat_small.pth")
    sizes = ["train.global_batch=2", "train.micro_batch=1", "train.max_steps=2"]
    command(folder, "train", "--config", CONFIG, "--output", "run", "data.path=coco", *sizes, "train.log_every=1")
    return folder


def test_it_takes_steps(folder):
    lines = metrics(folder / "run", "train")
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert 1.0 < line["cls"] < 1.5  # focal loss of a prior of 0.01
        assert line["grad_norm"] > 0


@pytest.mark.timeout(3600)  # 17 minutes of a core
def test_evaluation_of_random_weights_equals_pycocotools(folder):
    """Every score of the 100 images, to the last bit. The threshold is just above the initial scores of 0.01."""
    found = json.loads(
        command(folder, "evaluate", "run", "--json", "--results", "found.json", "task.score_threshold=0.0101")
    )
    results = json.loads((folder / "found.json").read_text())
    assert found["count"] == 100 and len({row["image_id"] for row in results}) > 90
    with tarfile.open(SAMPLE) as archive:
        truth = json.load(archive.extractfile("coco200/annotations/instances_val2017.json"))
    stats = pycocotools_of(truth, results).stats
    names = ("ap", "ap50", "ap75", "aps", "apm", "apl", "ar1", "ar10", "ar100", "ars", "arm", "arl")
    expected = {name: 100 * value for name, value in zip(names, stats.tolist(), strict=True)}
    assert {name: found[name] for name in METRICS} == {name: expected[name] for name in METRICS}
