"""The same step on any number of ranks: the same samples, the same mixing, the same loss."""

import json

import pytest

from tests.runs import losses, run


@pytest.mark.slow
def test_one_two_and_four_ranks_take_the_same_steps(tiny_config, tmp_path):
    """20 steps in fp32 with mixup, cutmix, erasing, drop-path and attention dropout on: losses equal within 1e-5 relative."""
    for world in (1, 2, 4):
        run(tiny_config, tmp_path / f"{world}", "train.epochs=3", "train.max_steps=20", "train.evaluate_every=0", world=world)
    reference = losses(tmp_path / "1")
    assert sorted(reference) == list(range(1, 21))
    for world in (2, 4):
        assert losses(tmp_path / f"{world}") == pytest.approx(reference, rel=1e-5, abs=0)
        assert _ids(tmp_path / f"{world}", world) == _ids(tmp_path / "1", 1)


def _ids(output, world) -> dict[int, list[int]]:
    steps: dict[int, list[int]] = {}
    for rank in range(world):
        for line in (output / "samples" / f"rank_{rank}.jsonl").read_text().splitlines():
            entry = json.loads(line)
            steps.setdefault(entry["step"], []).extend(entry["ids"])
    return {step: sorted(ids) for step, ids in steps.items()}


@pytest.mark.slow
def test_a_checkpoint_goes_on_at_another_world_size_and_stage(tiny_config, tmp_path):
    settings = ["checkpoint.every_steps=5", "train.evaluate_every=0"]
    run(tiny_config, tmp_path / "whole", *settings, world=1)
    run(tiny_config, tmp_path / "parts", *settings, "train.max_steps=5", "zero.stage=0", world=4)
    run(tiny_config, tmp_path / "parts", *settings, "train.max_steps=10", "zero.stage=3", world=2)
    job = run(tiny_config, tmp_path / "parts", *settings, "zero.stage=2", world=1)
    assert "zero.stage (3 → 2)" in job.text()
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5, abs=0)
