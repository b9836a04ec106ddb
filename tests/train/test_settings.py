"""Settings that must not change results."""

import pytest

from tests.runs import losses, run


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_activation_checkpointing_changes_nothing(tiny_config, tmp_path, stage):
    """With drop-path and attention dropout: the recomputed forward pass draws the same masks."""
    settings = [f"zero.stage={stage}", "train.max_steps=6", "train.evaluate_every=0"]
    run(tiny_config, tmp_path / "kept", *settings, world=2)
    run(tiny_config, tmp_path / "recomputed", *settings, "train.activation_checkpointing=true", world=2)
    assert losses(tmp_path / "recomputed") == pytest.approx(losses(tmp_path / "kept"), rel=1e-6, abs=0)


@pytest.mark.slow
def test_threads_and_prefetching_change_nothing(tiny_config, tmp_path):
    settings = ["train.max_steps=6", "train.evaluate_every=0"]
    run(tiny_config, tmp_path / "few", *settings, "data.workers=1", "data.prefetch=1")
    run(tiny_config, tmp_path / "many", *settings, "data.workers=5", "data.prefetch=7")
    assert losses(tmp_path / "few") == losses(tmp_path / "many")
