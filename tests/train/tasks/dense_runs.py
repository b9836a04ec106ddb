"""What the tests of segmentation's and detection's runs share. A run has 20 steps, and a checkpoint every 4."""

import json
from pathlib import Path

import pytest

from tests.oracle import assert_same_state, ids_by_step, sorted_ids_by_step, state
from tests.runs import events, losses, run, start, start_command
from train.checkpoint.info import checkpoint_path


def details(output: Path, weights: str) -> dict:
    """What the newest evaluation in a run's folder kept."""
    return json.loads((output / "evaluations" / f"{weights}.json").read_text())


def evaluate(output: Path, target: Path, *arguments: str, world: int = 1, code: int = 0) -> dict | str:
    """The scores that launch/evaluate.py prints, or what it says if it ends with another `code` than 0."""
    job = start_command("evaluate", output, str(target), "--json", *arguments, world=world)
    assert job.wait() == [code] * world, job.text()
    return json.loads(job.text().splitlines()[-1]) if code == 0 else job.text()


def check_a_killed_run(config: Path, whole: Path, output: Path) -> None:
    """A run that is killed and started again is `whole`, to the bit."""
    job = start(config, output, world=2)
    job.kill_at(7)
    run(config, output, world=2)
    assert len(events(output, "resume")) == 1
    assert losses(output) == losses(whole)
    assert_same_state(state(output, 20), state(whole, 20))
    assert ids_by_step(output, world=2) == ids_by_step(whole, world=2)
    for weights in ("ema", "model"):
        assert details(output, weights) == details(whole, weights)


def check_other_numbers_of_ranks(config: Path, whole: Path, output: Path) -> None:
    """One and four ranks take the steps of `whole`: from the start, and at another ZeRO stage from the middle."""
    settings = ["train.evaluate_every=0", "train.evaluate_every_steps=null"]
    run(config, output / "1", *settings, world=1)
    run(config, output / "4", *settings, "zero.stage=2", world=4)
    middle = ["--resume", str(checkpoint_path(whole / "checkpoints", 4)), "train.max_steps=8"]
    run(config, output / "elastic", *settings, *middle, "zero.stage=2", world=4)
    expected, ids = losses(whole), sorted_ids_by_step(whole, 2)
    for world in (1, 4):
        assert losses(output / str(world)) == pytest.approx(expected, rel=1e-5, abs=0)
        assert sorted_ids_by_step(output / str(world), world) == ids
    elastic = losses(output / "elastic")
    assert sorted(elastic) == [5, 6, 7, 8]
    assert elastic == pytest.approx({step: expected[step] for step in elastic}, rel=1e-5, abs=0)
