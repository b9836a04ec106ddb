"""What launch/evaluate.py takes and refuses, without ranks; its scores: tests of the tasks and test_best.py."""

import os
import pty
import subprocess
import sys
import termios

import pytest

from launch.evaluate import for_evaluation
from tests.launch.test_watch import read
from tests.runs import ROOT, run
from train.config import ConfigError, parse_config

TASKS = {
    "classification": {},
    "segmentation": {"name": "segmentation", "crop": [64, 64]},
    "fcos": {"name": "detection", "detector": "fcos"},
    "retinanet": {"name": "detection", "detector": "retinanet"},
}


def config(task: str = "classification", **sections: dict):
    train = {"global_batch": 64, "micro_batch": 8}
    tree = {"task": TASKS[task], "model": {"name": "cat_tiny"}, "data": {"path": "somewhere"}, "train": train}
    return parse_config({**tree, **sections}, "a test")


@pytest.mark.parametrize(
    ("task", "setting", "sentence"),
    [
        ("retinanet", "task.anchor_scale=8", "cannot be set in an evaluation of task.name=detection; it takes data.pa"),
        ("retinanet", "task.bgr=true", "cannot be set"),
        ("fcos", "task.detector=atss", "cannot be set"),
        ("fcos", "task.neck_channels=64", "cannot be set"),
        ("fcos", "task={nms: 0.5}", "cannot be set"),
        ("fcos", "data.eval_crop=0.5", "cannot be set"),
        ("segmentation", "task.crop=[64,64]", "cannot be set"),
        ("classification", "data.image_size=48", "cannot be set in an evaluation of task.name=classification"),
        ("classification", "model.name=cat_small", "cannot be set"),
        ("classification", "train.micro_batch=auto", "an evaluation needs a number of images per forward pass"),
        ("classification", "train.micro_batch=0", "an evaluation needs a number of images per forward pass"),
        ("classification", "data.cache_dir=there", "give --cache-dir FOLDER in its place"),
        ("classification", "data.path=s3://bucket/images", "give --cache-dir, a folder for its files"),
        ("classification", "data.workers", "is not of the form section.key=value"),
    ],
)
def test_what_an_evaluation_cannot_have_otherwise_is_refused(task, setting, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        for_evaluation(config(task), [setting])
    assert setting in str(caught.value) or "the dataset is behind a URL" in str(caught.value)


def test_what_plays_a_part_is_taken():
    changed = for_evaluation(config("fcos"), ["task.nms=0.4", "task.test_scale=[640,480]", "data.workers=2"])
    assert (changed.task.nms, changed.task.scale_of_tests, changed.data.workers) == (0.4, (640, 480), 2)
    assert for_evaluation(config(), ["data.eval_crop=1.0"]).data.eval_crop == 1
    assert for_evaluation(config(), ["data.path=elsewhere"]).data.path == "elsewhere"
    remote = for_evaluation(config(), [], "s3://bucket/images", "cache")
    assert (remote.data.path, remote.data.cache_dir) == ("s3://bucket/images", "cache")


def test_what_concerns_training_alone_is_in_nobodys_way():
    """A number of images that does not divide the global batch; windows, at a ZeRO stage that has none."""
    assert for_evaluation(config(), ["train.micro_batch=48"]).train.micro_batch == 48
    sharded = config("segmentation", zero={"stage": 3, "offload": True})
    changed = for_evaluation(sharded, ["task.test=slide", "task.window=[64,64]"])
    assert (changed.task.test, changed.zero.stage, changed.zero.offload) == ("slide", 0, False)


@pytest.mark.slow
def test_progress_is_shown_on_a_terminal_alone(tiny_config, tmp_path):
    output = run(tiny_config, tmp_path / "run", "train.max_steps=1", "train.evaluate_every=0").output
    command = [sys.executable, str(ROOT / "launch" / "evaluate.py"), str(output)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert result.stderr == "" and "(101 images)" in result.stdout
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 80))
    again = subprocess.run(command, stdout=subprocess.PIPE, stderr=follower, text=True, timeout=120, check=True)
    os.close(follower)
    shown = b""
    while chunk := read(leader):
        shown += chunk
    os.close(leader)
    assert again.stdout == result.stdout
    assert b"101/101" in shown and b" images/s]" in shown, shown
