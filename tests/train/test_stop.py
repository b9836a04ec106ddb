"""A stop request at one rank: all ranks stop after the same step, lose nothing, and exit with 75."""

import os
import signal
import time

import pytest

from tests.faults import SignalIn
from tests.oracle import assert_same_state, ids_by_step, scores, state
from tests.runs import events, handles, losses, metrics, run, start
from train.checkpoint.info import list_checkpoints, step_of


@pytest.fixture(scope="module")
def whole(tiny_config, tmp_path_factory):
    """A run without stops, evaluated after steps 8 and 16."""
    output = tmp_path_factory.mktemp("whole") / "run"
    run(tiny_config, output, world=2)
    return output


def assert_nothing_lost(config, output, whole, stopped_after):
    """The run saved and stopped after `stopped_after`; restarted, it takes each later step once, ends like `whole`."""
    taken = [line["step"] for line in metrics(output, "train")]
    assert max(taken, default=0) == stopped_after
    assert not stopped_after or step_of(list_checkpoints(output / "checkpoints")[0]) == stopped_after
    run(config, output, world=2)
    (resumed,) = events(output, "resume") if stopped_after else events(output, "start")[1:]
    assert (resumed["step"], resumed["lost_steps"]) == (stopped_after, 0)
    assert losses(output) == losses(whole)
    assert ids_by_step(output, 2) == ids_by_step(whole, 2)
    assert_same_state(state(output, 16), state(whole, 16))
    assert scores(output) == scores(whole)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "number"), [(0, signal.SIGTERM), (1, signal.SIGUSR1)])
def test_in_start_up(tiny_config, whole, tmp_path, rank, number):
    job = start(tiny_config, tmp_path, world=2)
    deadline = time.monotonic() + 60
    while not handles(job.processes[rank].pid, number):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(job.processes[rank].pid, number)
    assert job.wait() == [75, 75]
    assert "Traceback" not in job.text() + job.text(1) and job.text().count("stopped after step 0") == 1
    assert_nothing_lost(tiny_config, tmp_path, whole, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "settings", "steps"),
    [
        (SignalIn(1, signal.SIGTERM, "first_step", 1), [], {1, 2, 3}),
        (SignalIn(0, signal.SIGUSR1, "step", 4), [], {5, 6, 7}),
        # At the steps' pace the ranks agree again in hours, but an evaluation has a pace of its own.
        (SignalIn(1, signal.SIGINT, "step", 7), ["guard.agree_every=3600"], {8}),
        (SignalIn(1, signal.SIGTERM, "evaluation", 12), [], {8}),
        (SignalIn(0, signal.SIGTERM, "save", 1), [], {8, 9, 10, 11}),
    ],
    ids=lambda value: f"{value.section}-{value.number.name}" if isinstance(value, SignalIn) else None,
)
def test_while_it_runs(tiny_config, whole, tmp_path, fault, settings, steps):
    """steps: after which the run may stop. The ranks agree one round after the signal, and its handling takes time."""
    job = start(tiny_config, tmp_path, *settings, world=2, before=fault)
    assert job.wait() == [75, 75]
    (stop,) = events(tmp_path, "preempted")
    assert stop["signal"] == fault.number.name and stop["rank"] == fault.rank and stop["step"] in steps
    assert f"rank {fault.rank} got {fault.number.name}" in job.text() and "Traceback" not in job.text() + job.text(1)
    assert_nothing_lost(tiny_config, tmp_path, whole, stop["step"])


@pytest.mark.slow
def test_in_the_last_save_the_run_finishes(tiny_config, whole, tmp_path):
    job = start(tiny_config, tmp_path, world=2, before=SignalIn(1, signal.SIGUSR1, "save", 2))
    assert job.wait() == [0, 0]
    assert events(tmp_path, "finished") and not events(tmp_path, "preempted")
    assert losses(tmp_path) == losses(whole) and scores(tmp_path) == scores(whole)
    assert_same_state(state(tmp_path, 16), state(whole, 16))
    assert (tmp_path / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [3, pytest.param(0, marks=pytest.mark.long)])
def test_at_other_zero_stages(tiny_config, tmp_path, stage):
    settings = [f"zero.stage={stage}"]
    run(tiny_config, tmp_path / "whole", *settings, world=2)
    job = start(tiny_config, tmp_path / "run", *settings, world=2, before=SignalIn(1, signal.SIGTERM, "evaluation", 3))
    assert job.wait() == [75, 75]
    run(tiny_config, tmp_path / "run", *settings, world=2)
    assert_same_state(state(tmp_path / "run", 16), state(tmp_path / "whole", 16))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
