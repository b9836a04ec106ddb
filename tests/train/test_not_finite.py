"""A loss that is not a number, on one rank: all ranks skip that step; too many in a row lead back to a checkpoint."""

import pytest
import torch
from safetensors.torch import load_file

from tests.faults import FlipBits, NanLoss
from tests.oracle import assert_same_state, ids_by_step, state
from tests.runs import events, losses, run, start
from tests.train.test_families import TINY, with_model
from train.checkpoint.info import checkpoint_path, list_checkpoints, read_info

LONG = [
    (0, "bf16", False),
    (2, "bf16", False),
    (1, "fp16", False),
    (2, "fp16", False),
    (3, "fp16", False),
    (1, "bf16", True),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "precision", "offload"),
    [
        *((stage, "fp32", False) for stage in range(4)),
        *((1, "bf16", False), (3, "bf16", False), (0, "fp16", False), (2, "bf16", True)),
        *(pytest.param(*case, marks=pytest.mark.long) for case in LONG),
    ],
)
def test_all_ranks_skip_the_step_and_nothing_changes(tiny_config, tmp_path, stage, precision, offload):
    settings = [
        f"zero.stage={stage}",
        f"train.precision={precision}",
        "checkpoint.every_steps=1",
        "checkpoint.keep=9",
        "train.max_steps=6",
    ]
    settings.append(f"zero.offload={offload}")
    job = run(
        tiny_config,
        tmp_path,
        *settings,
        "train.evaluate_every=0",
        world=2,
        allow_fp16=precision == "fp16",
        before=NanLoss(1, steps=(4,)),
    )
    assert [line["step"] for line in events(tmp_path, "skipped_step")] == [4]
    assert "step 4 skipped" in job.text()
    assert_same_state(state(tmp_path, 4), state(tmp_path, 3))  # weights, EMA, moments, and the optimizer's own count
    before, after = (state(tmp_path, step) for step in (4, 5))
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert not torch.equal(before["model/head.weight"], after["model/head.weight"])
    assert read_info(checkpoint_path(tmp_path / "checkpoints", 6)).optimizer_step == 5
    shown = losses(tmp_path)
    assert shown[4] is None and all(shown[step] > 0 for step in (1, 2, 3, 5, 6))


@pytest.mark.slow
def test_muon_skips_too(tiny_config, tmp_path):
    settings = [
        "optimizer.name=muon",
        "zero.stage=0",
        "checkpoint.every_steps=1",
        "train.max_steps=4",
        "train.evaluate_every=0",
    ]
    run(tiny_config, tmp_path, *settings, world=2, before=NanLoss(0, steps=(3,)))
    one, other = (state(tmp_path, step, kinds=("model", "ema", "momentum_buffer")) for step in (2, 3))
    assert_same_state(one, other)


@pytest.mark.slow
def test_too_many_in_a_row_lead_back_to_a_checkpoint(tiny_config, tmp_path):
    """Steps 7 to 9 fail once, but not when they are repeated from step 4: the run ends as if they had not failed."""
    settings = ["checkpoint.every_steps=4", "train.evaluate_every=0", "guard.max_skipped=3"]
    run(tiny_config, tmp_path / "whole", *settings, world=2)
    job = run(tiny_config, tmp_path / "run", *settings, world=2, before=NanLoss(1, steps=(7, 8, 9)))
    (back,) = events(tmp_path / "run", "rollback")
    assert (back["steps"], back["to"]) == ([7, 8, 9], 8)  # weights are those of step 6, so step 8's save is valid
    assert "steps 7 to 9 had no finite gradient: back to" in job.text()
    assert all(line["step"] in (7, 8, 9) for line in events(tmp_path / "run", "skipped_step"))
    assert sorted(losses(tmp_path / "run")) == list(range(1, 17))
    assert losses(tmp_path / "run")[6] == losses(tmp_path / "whole")[6]


@pytest.mark.slow
def test_going_back_restores_the_run_exactly(tiny_config, tmp_path):
    """The checkpoint is older than the first skipped step: the fault leaves no trace, bitwise."""
    settings = ["checkpoint.every_steps=5", "train.evaluate_every=0", "guard.max_skipped=3"]
    run(tiny_config, tmp_path / "whole", *settings, world=2)
    run(tiny_config, tmp_path / "run", *settings, world=2, before=NanLoss(1, steps=(7, 8, 9)))
    (back,) = events(tmp_path / "run", "rollback")
    assert (back["steps"], back["to"]) == ([7, 8, 9], 5)
    assert_same_state(state(tmp_path / "run", 16), state(tmp_path / "whole", 16))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert ids_by_step(tmp_path / "run", 2) == ids_by_step(tmp_path / "whole", 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("every_steps", "sentence"),
    [
        (5, "steps 7 to 9 had no finite gradient, again after going back to a checkpoint; lower optimizer.lr"),
        (100, "steps 7 to 9 had no finite gradient, and there is no checkpoint to go back to; lower optimizer.lr"),
    ],
)
def test_what_does_not_help_ends_the_run(tiny_config, tmp_path, every_steps, sentence):
    settings = ["guard.max_skipped=3", "train.evaluate_every=0", f"checkpoint.every_steps={every_steps}"]
    job = start(tiny_config, tmp_path, *settings, world=2, before=NanLoss(1, steps=(7, 8, 9), times=2))
    assert job.wait() == [70, 70]
    assert sentence in job.text().splitlines()[-1]
    assert len(events(tmp_path, "rollback")) == (every_steps == 5)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "offload"), [(3, False), pytest.param(1, True, marks=pytest.mark.long)])
def test_fp16_that_does_not_recover_is_the_guards_to_end(tiny_config, tmp_path, stage, offload):
    """More overflows in a row than it takes to reach the minimum loss scale, where DeepSpeed would raise an error."""
    settings = [
        f"zero.stage={stage}",
        f"zero.offload={offload}",
        "train.precision=fp16",
        "train.evaluate_every=0",
        "guard.max_skipped=20",
    ]
    settings += [
        "train.global_batch=2",
        "train.micro_batch=2",
        "checkpoint.every_steps=100",
        "model.depths=[1]",
        "model.num_heads=[2]",
    ]
    job = start(tiny_config, tmp_path, *settings, allow_fp16=True, before=NanLoss(0, steps=tuple(range(2, 22))))
    assert job.wait() == [70], job.text()
    assert (
        "steps 2 to 21 had no finite gradient, and there is no checkpoint to go back to" in job.text().splitlines()[-1]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "why"),
    [("model", "steps 5 to 7 had no finite gradient"), ("ema", "the state after step 8 was not finite")],
)
def test_a_state_that_is_lost_before_the_first_checkpoint(tiny_config, tmp_path, what, why):
    """Another start may help, as after a memory fault: that is no final code."""
    settings = ["checkpoint.every_steps=8", "guard.max_skipped=3", "train.evaluate_every=0", "train.max_steps=8"]
    job = start(tiny_config, tmp_path, *settings, world=2, before=FlipBits(1, 3, what))
    assert job.wait() == [1, 1]
    assert f"error: {why}, and there is no checkpoint to go back to: start again, from the beginning" in job.text()
    assert [line["code"] for line in events(tmp_path, "failed")] == [1]


@pytest.mark.slow
def test_weights_that_are_not_finite_are_never_saved(tiny_config, tmp_path):
    """A weight becomes NaN after step 7: the save at 10 refuses it, the run goes back to 5 and ends as without it."""
    settings = ["checkpoint.every_steps=5", "guard.max_skipped=4", "train.evaluate_every=0"]
    run(tiny_config, tmp_path / "whole", *settings, world=2)
    job = run(tiny_config, tmp_path / "run", *settings, world=2, before=FlipBits(1, step=7))
    (failed,) = events(tmp_path / "run", "save_failed")
    assert failed["step"] == 10 and "is not finite: such a state is not saved" in failed["reason"]
    assert "checkpoint of step 10 NOT saved: rank 1: " in job.text()
    assert [line["to"] for line in events(tmp_path / "run", "rollback")] == [5]
    assert_same_state(state(tmp_path / "run", 16), state(tmp_path / "whole", 16))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


BROKEN = ["checkpoint.every_steps=2", "checkpoint.keep=9", "train.evaluate_every=0", "train.max_steps=7"]


@pytest.fixture(scope="module")
def whole(tiny_config, tmp_path_factory):
    """By family, a config, and the folder of a run of 7 steps that was not disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    configs = {"cat": tiny_config, "cotnet": with_model(tiny_config, folder, TINY["cotnet"])}
    for family, config in configs.items():
        run(config, folder / family, *BROKEN)
    return {family: (config, folder / family) for family, config in configs.items()}


def shards(output) -> dict[str, torch.Tensor]:
    """All tensors of all checkpoints of a run on one rank, and of its final weights."""
    files = [path / "shard_00000.safetensors" for path in list_checkpoints(output / "checkpoints")]
    files.append(output / "model.safetensors")
    return {f"{file.relative_to(output)}/{key}": value for file in files for key, value in load_file(file).items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "what", "step"),
    [
        *(("cat", what, 4) for what in ("ema", "exp_avg", "exp_avg_sq")),
        *(("cotnet", what, 4) for what in ("buffer", "ema_buffer")),
        ("cat", "ema", 7),  # found by the save that the run waits for
    ],
)
def test_no_number_that_is_not_finite_is_saved(whole, tmp_path, family, what, step):
    """No step need be skipped for it: the save at `step` refuses it, the run goes back and ends as without it."""
    config, undisturbed = whole[family]
    run(config, tmp_path, *BROKEN, before=FlipBits(0, step, what))
    (failed,) = events(tmp_path, "save_failed")
    assert failed["step"] == step and failed["reason"].startswith(f"rank 0: {what}/")
    (back,) = events(tmp_path, "rollback")
    assert back["steps"] == [step] and back["to"] == {4: 2, 7: 6}[step]
    found = shards(tmp_path)
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert_same_state(found, shards(undisturbed))


@pytest.mark.slow
def test_all_ranks_go_back_from_what_one_found(tiny_config, tmp_path):
    """Once: the second time, the run ends."""
    job = start(tiny_config, tmp_path, *BROKEN, world=2, before=FlipBits(1, 4, "ema", times=2))
    assert job.wait() == [70, 70]
    assert [line["to"] for line in events(tmp_path, "rollback")] == [2]
    assert (
        "error: the state after step 4 was not finite, again after going back to a checkpoint"
        in job.text().splitlines()[-1]
    )
