"""Checkpoints of format 1, which knew classification and epochs alone, go on."""

import json

import pytest

from tests.oracle import assert_same_state, state
from tests.runs import events, losses, run
from train.checkpoint.info import CheckpointInfo, checkpoint_path, evaluated, read_info, write_manifest

SETTINGS = ["train.epochs=2", "checkpoint.every_steps=8", "zero.stage=1"]
NEWER = {
    "train": ("steps", "evaluate_every_steps"),
    "schedule": ("kind", "warmup_steps", "power", "decay_epochs", "decay_steps", "decay_rate"),
    "checkpoint": ("every_epochs",),
}


def as_version_1(path) -> None:
    file = path / "manifest.json"
    document = json.loads(file.read_text())
    document["top1"] = document.pop("score")
    del document["metric"], document["better"], document["config"]["task"]
    for section, keys in NEWER.items():
        for key in keys:
            del document["config"][section][key]
    file.write_text(json.dumps({**document, "version": 1}))


@pytest.mark.slow
def test_a_run_of_format_1_goes_on_to_the_same_bits(tiny_config, tmp_path):
    run(tiny_config, tmp_path / "whole", *SETTINGS, world=2)
    run(tiny_config, tmp_path / "old", *SETTINGS, "train.max_steps=8", world=2)
    first = checkpoint_path(tmp_path / "old" / "checkpoints", 8)
    score = read_info(first).score
    as_version_1(first)
    assert read_info(first).score == score and evaluated(first.parent) == [(first, score)]
    job = run(tiny_config, tmp_path / "old", *SETTINGS, world=2)
    assert (
        len(events(tmp_path / "old", "resume")) == 1 and "changed since the checkpoint: train.max_steps" in job.text()
    )
    assert losses(tmp_path / "old") == losses(tmp_path / "whole")
    assert_same_state(state(tmp_path / "old", 16), state(tmp_path / "whole", 16))


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("https://me:word@host/data", "https://host/data"),
        ("ssh://user@host/data", "ssh://user@host/data"),
    ],
)
def test_a_secret_in_the_datasets_address_is_not_read(tmp_path, written, read):
    """Checkpoints from before November 2026 may have one."""
    write_manifest(tmp_path, CheckpointInfo(1, None, "", [], {"data": {"path": written}}, 1, {}, {}, {}, 1))
    assert read_info(tmp_path).config["data"]["path"] == read
