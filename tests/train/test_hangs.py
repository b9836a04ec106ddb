"""Frozen and slow ranks are found and named, and the run goes on."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from tests.faults import SignalIn
from tests.oracle import assert_same_state, state
from tests.runs import RunningJob, events, losses, metrics, run, start


def wait_for_step(job: RunningJob, step: int) -> None:
    deadline = time.monotonic() + 120
    while not any(line["step"] >= step for line in metrics(job.output, "train", missing_ok=True)):
        assert all(process.is_alive() for process in job.processes), job.text()
        assert time.monotonic() < deadline, job.text()
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "stage"), [(1, 1), (0, 3)])
def test_a_frozen_rank_is_named_and_the_run_goes_on(tiny_config, tmp_path, rank, stage):
    """A rank gets SIGSTOP.

    The other ends with 71 within guard.timeout.step and a few seconds, names the rank, and writes its stacks.
    """
    settings = [f"zero.stage={stage}", "checkpoint.every_steps=3", "train.evaluate_every=0", "train.epochs=3"]
    run(tiny_config, tmp_path / "whole", *settings, world=2)
    job = start(tiny_config, tmp_path / "run", *settings, "guard.timeout.step=4", world=2)
    wait_for_step(job, 5)
    os.kill(job.processes[rank].pid, signal.SIGSTOP)
    assert job.wait_for_death(1 - rank, timeout=60) == 71
    said = job.text(1 - rank)
    assert "error: hung: " in said and f"Silent, so frozen or dead: rank {rank}" in said and " in step of step " in said
    assert "train_from" in (tmp_path / "run" / "stacks" / f"rank_{1 - rank}.txt").read_text()
    run(tiny_config, tmp_path / "run", *settings, world=2)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert_same_state(state(tmp_path / "run", 24), state(tmp_path / "whole", 24))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("section", "count"),
    [("evaluation", 5), *(pytest.param(*case, marks=pytest.mark.long) for case in [("first_step", 1), ("save", 2)])],
)
def test_every_section_has_its_limit(tiny_config, tmp_path, section, count):
    """Rank 1 stops when it enters the section. The save is the run's last one, for which the others wait."""
    fault = SignalIn(1, signal.SIGSTOP, section, count)
    settings = ["train.max_steps=8", "checkpoint.every_steps=4", f"guard.timeout.{section}=4"]
    job = start(tiny_config, tmp_path, *settings, world=2, before=fault)
    assert job.wait_for_death(0, timeout=60) == 71
    said = next(line for line in job.text().splitlines() if line.startswith("error: hung: "))
    assert f" s in {section} of step " in said and "(limit 4 s)" in said and "Silent, so frozen or dead: rank 1" in said


@contextlib.contextmanager
def slowed(pid: int) -> Iterator[None]:
    """The process runs for a quarter of the time."""
    stop = threading.Event()

    def turn_on_and_off() -> None:
        while not stop.is_set():
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.09)
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.03)

    thread = threading.Thread(target=turn_on_and_off)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.long)])
def test_a_slow_rank_is_named(tiny_config, tmp_path, rank):
    """The rank is stopped for three quarters of the time, in slices shorter than a step of the model."""
    settings = [
        "train.epochs=100",
        "train.evaluate_every=0",
        "model.embed_dim=64",
        "model.depths=[2, 2]",
        "data.image_size=32",
    ]
    job = start(tiny_config, tmp_path, *settings, world=2)
    wait_for_step(job, 3)
    with slowed(job.processes[rank].pid):
        deadline = time.monotonic() + 90
        while not events(tmp_path, "slow_rank"):
            assert time.monotonic() < deadline and all(process.is_alive() for process in job.processes), job.text()
            time.sleep(0.05)
    (found,) = events(tmp_path, "slow_rank")
    job.kill()
    assert found["rank"] == rank and found["seconds"] > 2 * found["median"]
    assert f"rank {rank} is slow: " in job.text()


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_no_false_alarm_in_a_thousand_steps(tiny_config, tmp_path, record_property):
    """Four ranks on few cores, with evaluations and saves: no rank is called slow or hung, no step or save fails."""
    settings = ["train.epochs=125", "train.evaluate_every=25", "checkpoint.every_steps=50", "guard.timeout.step=30"]
    job = run(tiny_config, tmp_path, *settings, world=4)
    assert len(metrics(tmp_path, "train")) == 1000
    names = [line["event"] for line in metrics(tmp_path, "event")]
    assert set(names) == {"start", "checkpoint", "finished"}
    assert "error" not in job.text()
    stalls = sorted(1000 * line["stall_seconds"] for line in events(tmp_path, "checkpoint"))
    record_property("steps, and false alarms among them", [1000, 0])
    record_property("save stall in ms, median of 20", round(stalls[len(stalls) // 2], 1))
    record_property("save stall in ms, largest", round(stalls[-1], 1))
