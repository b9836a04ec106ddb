"""A step is the same on any number of ranks: samples, mixing and loss."""

import pytest

from tests.oracle import sorted_ids_by_step
from tests.runs import events, losses, run
from train.checkpoint.info import checkpoint_path, read_info


@pytest.mark.slow
def test_one_two_and_four_ranks_take_the_same_steps(tiny_config, tmp_path):
    """20 fp32 steps with mixup, cutmix, erasing, drop-path and attention dropout: losses equal within 1e-5 relative."""
    for world in (1, 2, 4):
        run(
            tiny_config,
            tmp_path / f"{world}",
            "train.epochs=3",
            "train.max_steps=20",
            "train.evaluate_every=0",
            world=world,
        )
    reference = losses(tmp_path / "1")
    assert sorted(reference) == list(range(1, 21))
    for world in (2, 4):
        assert losses(tmp_path / f"{world}") == pytest.approx(reference, rel=1e-5, abs=0)
        assert sorted_ids_by_step(tmp_path / f"{world}", world) == sorted_ids_by_step(tmp_path / "1", 1)


@pytest.mark.slow
def test_fp16_overflows_in_the_same_steps_at_zero_3(tiny_config, tmp_path):
    """Gradients of single images, so large that twice the loss scale makes some overflow."""
    sizes = ["train.global_batch=4", "train.micro_batch=1", "model.init_std=0.3", "augment.mixup=0", "augment.cutmix=0"]
    settings = ["zero.stage=3", "train.precision=fp16", "train.max_steps=4", "train.evaluate_every=0", *sizes]
    for world in (1, 4):
        run(tiny_config, tmp_path / f"{world}", *settings, world=world, allow_fp16=True)
    one, four = (tmp_path / f"{world}" for world in (1, 4))
    assert losses(four) == pytest.approx(losses(one), rel=1e-3, abs=0)
    assert events(four, "skipped_step") == events(one, "skipped_step") == []
    run(tiny_config, four, *settings, "train.max_steps=5", world=2, allow_fp16=True)
    scales = [
        read_info(checkpoint_path(output / "checkpoints", step)).loss_scale for output, step in ((one, 4), (four, 5))
    ]
    assert [scale["cur_scale"] for scale in scales] == [2.0**16] * 2


@pytest.mark.slow
def test_world_size_and_stage_change_along_a_run(tiny_config, tmp_path):
    """4 → 2 → 1 → 4 ranks, ZeRO 1 → 3 → 0 → 2 (offloaded): the same samples, fp32 losses within 1e-5 relative."""
    settings = ["checkpoint.every_steps=4", "train.evaluate_every=0"]
    run(tiny_config, tmp_path / "whole", *settings, world=1)
    taken = {}
    for start, (world, stage) in enumerate([(4, 1), (2, 3), (1, 0), (4, 2)]):
        extra = ["zero.offload=true"] if start == 3 else []
        job = run(
            tiny_config,
            tmp_path / "parts",
            *settings,
            f"train.max_steps={4 * start + 4}",
            f"zero.stage={stage}",
            *extra,
            world=world,
        )
        steps = sorted_ids_by_step(tmp_path / "parts", world)
        taken |= {step: steps[step] for step in range(4 * start + 1, 4 * start + 5)}
    assert "zero.stage (0 → 2)" in job.text()
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5, abs=0)
    assert taken == sorted_ids_by_step(tmp_path / "whole", 1)
