"""A run that is killed and resumed ends with bitwise the same weights as one that is not."""

import shutil

import pytest

from tests.oracle import assert_same_state, ids_by_step, loss_by_hand, scores, state
from tests.runs import events, losses, metrics, run, start
from train.checkpoint.format import read_weights
from train.checkpoint.info import checkpoint_path, read_info


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_killed_and_resumed_run_is_bitwise_equal(tiny_config, tmp_path, stage, precision):
    """Two ranks with mixup, cutmix, erasing, drop-path and dropout, killed twice within an epoch.

    An epoch has 8 steps; checkpoints are written every 3 steps.
    """
    settings = [
        f"zero.stage={stage}",
        f"train.precision={precision}",
        "checkpoint.every_steps=3",
        "train.evaluate_every=0",
    ]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(tiny_config, whole, *settings, world=2)

    for step in (5, 11):
        start(tiny_config, broken, *settings, world=2).kill_at(step)
    run(tiny_config, broken, *settings, world=2)

    events = [line["event"] for line in metrics(broken, "event")]
    assert events.count("resume") == 2, events
    assert losses(broken) == losses(whole)
    assert sorted(losses(broken)) == list(range(1, 17))
    assert_same_state(state(broken, 16), state(whole, 16))
    weights = read_weights(checkpoint_path(whole / "checkpoints", 12), "model")
    by_hand = loss_by_hand(tiny_config, settings, weights, 12)  # in the second epoch
    assert losses(whole)[13] == pytest.approx(by_hand, rel=1e-6 if precision == "fp32" else 1e-2)
    steps = ids_by_step(broken, world=2)
    assert steps == ids_by_step(whole, world=2)
    for epoch in (range(1, 9), range(9, 17)):
        ids = [i for step in epoch for i in steps[step]]
        assert len(ids) == len(set(ids)) == 256


@pytest.mark.slow
def test_fp16_resumes_bitwise_with_its_loss_scale(tiny_config, tmp_path):
    settings = ["zero.stage=1", "train.precision=fp16", "checkpoint.every_steps=3", "train.evaluate_every=0"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(tiny_config, whole, *settings, world=2, allow_fp16=True)
    start(tiny_config, broken, *settings, world=2, allow_fp16=True).kill_at(7)
    run(tiny_config, broken, *settings, world=2, allow_fp16=True)
    assert losses(broken) == losses(whole)
    assert_same_state(state(broken, 16), state(whole, 16))
    scales = [read_info(checkpoint_path(output / "checkpoints", 16)).loss_scale for output in (whole, broken)]
    assert scales[0] == scales[1] and scales[0]["cur_scale"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offload_changes_nothing(tiny_config, tmp_path, stage):
    settings = [f"zero.stage={stage}", "train.max_steps=6", "train.evaluate_every=0"]
    run(tiny_config, tmp_path / "device", *settings, world=2)
    run(tiny_config, tmp_path / "host", *settings, "zero.offload=true", world=2)
    assert losses(tmp_path / "host") == pytest.approx(losses(tmp_path / "device"), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer", [["optimizer.name=sgd", "optimizer.lr=0.05"], ["optimizer.name=muon", "zero.stage=0"]]
)
def test_other_optimizers_resume_bitwise(tiny_config, tmp_path, optimizer):
    settings = [*optimizer, "checkpoint.every_steps=4", "train.evaluate_every=0"]
    run(tiny_config, tmp_path / "whole", *settings)
    start(tiny_config, tmp_path / "broken", *settings).kill_at(6)
    run(tiny_config, tmp_path / "broken", *settings)
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_max_steps_changes_nothing_else_and_a_larger_one_goes_on(tiny_config, tmp_path):
    run(tiny_config, tmp_path / "whole")
    run(tiny_config, tmp_path / "parts", "train.max_steps=6")
    run(tiny_config, tmp_path / "parts", "train.max_steps=5")  # has finished already
    assert checkpoint_path(tmp_path / "parts" / "checkpoints", 6).is_dir()
    run(tiny_config, tmp_path / "parts")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    last = [
        {key: value for key, value in scores(tmp_path / name).items() if key[0] == 16} for name in ("parts", "whole")
    ]
    assert last[0] == last[1] and len(last[0]) == 2


@pytest.mark.slow
def test_damaged_checkpoint_is_skipped_and_named(tiny_config, tmp_path):
    settings = ["checkpoint.every_steps=4", "train.max_steps=8", "train.evaluate_every=0"]
    job = run(tiny_config, tmp_path / "run", *settings)
    whole = losses(tmp_path / "run")
    shard = checkpoint_path(tmp_path / "run" / "checkpoints", 8) / "shard_00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    job = run(tiny_config, tmp_path / "run", *settings)
    assert "shard_00000.safetensors is damaged" in job.text()
    assert f"going back to {tmp_path / 'run' / 'checkpoints' / 'step_00000004'} instead costs 4 steps" in job.text()
    (resumed,) = events(tmp_path / "run", "resume")
    assert (resumed["step"], resumed["lost_steps"]) == (4, 4)
    assert losses(tmp_path / "run") == whole


@pytest.mark.slow
@pytest.mark.parametrize("file", ["manifest.json", "shard_00000.safetensors"])
def test_a_damaged_newer_checkpoint_displaces_no_sound_one(tiny_config, tmp_path, file):
    """Step 8 is damaged, so the run goes on from 4. The save at 6 stays, although 8 is newer and only one is kept."""
    settings = ["train.evaluate_every=0"]
    run(tiny_config, tmp_path, *settings, "checkpoint.every_steps=4", "train.max_steps=8")
    damaged = checkpoint_path(tmp_path / "checkpoints", 8) / file
    damaged.write_bytes(damaged.read_bytes()[:100])
    run(tiny_config, tmp_path, *settings, "checkpoint.every_steps=2", "checkpoint.keep=1", "train.max_steps=6")
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step_00000006", "step_00000008"}
    job = run(tiny_config, tmp_path, *settings, "checkpoint.every_steps=2", "checkpoint.keep=1", "train.max_steps=10")
    assert "step_00000006: step 6 of 10" in job.text()
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step_00000010"}


@pytest.mark.slow
def test_half_written_checkpoint_does_not_count(tiny_config, tmp_path):
    settings = ["checkpoint.every_steps=4", "train.max_steps=8", "train.evaluate_every=0"]
    run(tiny_config, tmp_path / "run", *settings)
    folder = tmp_path / "run" / "checkpoints"
    half = folder / ".step_00000012.tmp"
    shutil.copytree(checkpoint_path(folder, 8), half)
    (half / "manifest.json").unlink()
    run(tiny_config, tmp_path / "run", "checkpoint.every_steps=4", "train.max_steps=12", "train.evaluate_every=0")
    assert checkpoint_path(folder, 12).is_dir() and not half.exists()


@pytest.mark.slow
def test_going_back_on_purpose_sets_later_checkpoints_aside(tiny_config, tmp_path):
    """After `--resume` with an older checkpoint, later checkpoints of before must not be taken for the newest."""
    settings = ["checkpoint.every_steps=4", "train.evaluate_every=0"]
    run(tiny_config, tmp_path, *settings, "train.max_steps=12")
    folder = tmp_path / "checkpoints"
    job = run(tiny_config, tmp_path, *settings, "train.max_steps=8", "--resume", str(checkpoint_path(folder, 4)))
    assert "step_00000012 is behind this start: renamed to superseded_step_00000012" in job.text()
    assert {path.name for path in folder.iterdir()} == {
        *("step_00000004", "step_00000008", "superseded_step_00000008", "superseded_step_00000012")
    }
    job = run(tiny_config, tmp_path, *settings, "train.max_steps=12")
    assert f"resumed from {checkpoint_path(folder, 8)}" in job.text()


@pytest.mark.slow
def test_a_named_checkpoint_that_is_broken_is_an_error(tiny_config, tmp_path):
    settings = ["checkpoint.every_steps=4", "train.max_steps=8", "train.evaluate_every=0"]
    run(tiny_config, tmp_path, *settings)
    named = checkpoint_path(tmp_path / "checkpoints", 8)
    (named / "shard_00000.safetensors").unlink()
    before = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    job = start(tiny_config, tmp_path, *settings, "--resume", str(named))
    assert job.wait() == [78]
    assert job.text().splitlines()[-1] == f"error: {named / 'shard_00000.safetensors'} is missing"
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == before
