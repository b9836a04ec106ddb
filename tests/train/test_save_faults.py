"""Disk failures and killed processes while a checkpoint is written."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import KillAtWrite, system_calls
from tests.oracle import assert_same_state, state
from tests.runs import RunningJob, events, losses, run, start
from train.checkpoint.info import checkpoint_path, first_sound, list_checkpoints, step_of, validate

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="making system calls fail needs strace")
SETTINGS, EPOCHS = ["train.evaluate_every=0", "checkpoint.every_steps=2"], "train.epochs=10"


LONG = [pytest.param(3, id="some"), pytest.param(1, marks=pytest.mark.long, id="all")]


def killed_at_writes(
    config: Path, folder: Path, *settings: str, stride: int, world: int, rank: int, prepared: Path | None = None
):
    """Yields folders of runs killed at every `stride`-th operation of `rank` on checkpoints, until a run survives."""
    for count in range(1, 100, stride):
        output = folder / str(count)
        if prepared:
            shutil.copytree(prepared, output)
        (output / "checkpoints").mkdir(parents=True, exist_ok=True)  # else the first rank does: one operation more
        code = start(config, output, *SETTINGS, *settings, world=world, before=KillAtWrite(rank, count)).wait_for_death(
            rank
        )
        if code == 0:
            assert count > 6, "the fault did not happen"
            return
        assert code == -signal.SIGKILL
        yield output


@pytest.mark.slow
@pytest.mark.parametrize("stride", LONG)
@pytest.mark.parametrize(("world", "rank"), [(1, 0), (2, 1)])
def test_killed_at_every_write_of_a_save(tiny_config, tmp_path, world, rank, stride):
    """Saves at 2 and 4, of which one is kept. Every folder with a checkpoint's name is complete after any kill."""
    newest, settings = [], ["train.max_steps=4", "checkpoint.keep=1"]
    for output in killed_at_writes(tiny_config, tmp_path, *settings, stride=stride, world=world, rank=rank):
        found = list_checkpoints(output / "checkpoints")
        for path in found:
            validate(path)
        newest.append(step_of(found[0]) if found else 0)
    assert newest == sorted(newest), "a checkpoint that was there has gone"
    assert {0, 2} <= set(newest)
    # A run started in the last of these folders goes on, and cleans up.
    run(tiny_config, output, *SETTINGS, *settings, world=world)
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step_00000004"]


@pytest.mark.slow
@pytest.mark.parametrize("stride", LONG)
def test_killed_while_a_damaged_checkpoint_is_replaced(tiny_config, tmp_path, stride):
    prepared = tmp_path / "prepared"
    run(tiny_config, prepared, *SETTINGS, "train.max_steps=4")
    (checkpoint_path(prepared / "checkpoints", 4) / "manifest.json").write_text("{")
    seen = set()
    for output in killed_at_writes(
        tiny_config, tmp_path, "train.max_steps=4", stride=stride, world=1, rank=0, prepared=prepared
    ):
        path, *_ = first_sound(list_checkpoints(output / "checkpoints"))
        seen.add(step_of(path))
        validate(checkpoint_path(output / "checkpoints", 2))
    assert seen == {2, 4} or stride > 1
    run(tiny_config, output, *SETTINGS, "train.max_steps=4")
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["step_00000002", "step_00000004"]


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def wait_for_event(job: RunningJob, name: str, count: int = 1) -> dict:
    deadline = time.monotonic() + 120
    while True:
        if (job.output / "metrics.jsonl").exists() and len(found := events(job.output, name)) >= count:
            return found[count - 1]
        assert all(process.is_alive() for process in job.processes), f"ended without {name}:\n{job.text()}"
        assert time.monotonic() < deadline, f"no {name}:\n{job.text()}"
        time.sleep(0.01)


@needs_root
@pytest.mark.slow
def test_a_full_disk_costs_nothing_but_checkpoints(tiny_config, tmp_path):
    """Room for two of three checkpoints: the run goes on, old ones stay, and it saves when there is room again."""
    run(tiny_config, tmp_path / "whole", *SETTINGS, EPOCHS, world=2)
    size = sum(file.stat().st_size for file in list_checkpoints(tmp_path / "whole" / "checkpoints")[0].iterdir())
    checkpoints = tmp_path / "run" / "checkpoints"
    with small_disk(checkpoints, str(int(2.5 * size))):
        job = start(tiny_config, tmp_path / "run", *SETTINGS, EPOCHS, world=2)
        failed = wait_for_event(job, "save_failed")
        assert failed["step"] == 6 and "No space left on device" in failed["reason"]
        assert {step_of(path) for path in list_checkpoints(checkpoints)} == {2, 4}
        for path in list_checkpoints(checkpoints):
            validate(path)
        remount(checkpoints, "size=100m")
        assert job.wait() == [0, 0]
        assert "NOT saved" in job.text() and "Traceback" not in job.text() + job.text(1)
        assert not list(checkpoints.glob(".*"))
        assert_same_state(state(tmp_path / "run", 80), state(tmp_path / "whole", 80))
    assert losses(tmp_path / "run").keys() == losses(tmp_path / "whole").keys()


@needs_root
@pytest.mark.slow
def test_the_last_checkpoint_cannot_be_written(tiny_config, tmp_path):
    """The run ends with an error and its own exit code; the same command finishes it once there is room."""
    checkpoints = tmp_path / "run" / "checkpoints"
    with small_disk(checkpoints, "16k"):
        job = start(tiny_config, tmp_path / "run", "train.max_steps=4", "train.evaluate_every=0", world=2)
        assert job.wait() == [74, 74]
        last = job.text().splitlines()[-1]
        assert (
            last.startswith("error: the last checkpoint, of step 4, was not written (rank 0: ")
            and "No space left on device" in last
        )
        assert not (tmp_path / "run" / "model.safetensors").exists() and not list(checkpoints.iterdir())
        remount(checkpoints, "size=100m")
        run(tiny_config, tmp_path / "run", "train.max_steps=4", "train.evaluate_every=0", world=2)


@needs_root
@pytest.mark.slow
def test_a_file_system_turns_read_only(tiny_config, tmp_path):
    checkpoints = tmp_path / "checkpoints"
    with small_disk(checkpoints, "100m"):
        job = start(tiny_config, tmp_path, *SETTINGS, EPOCHS, world=2)
        newest = wait_for_event(job, "checkpoint")["step"]
        remount(checkpoints, "ro")
        failed = wait_for_event(job, "save_failed")
        assert "Read-only file system" in failed["reason"] and failed["step"] > newest
        validate(first_sound(list_checkpoints(checkpoints))[0])
        remount(checkpoints, "rw")
        assert job.wait() == [0, 0]
        assert first_sound(list_checkpoints(checkpoints))[::2] == (checkpoint_path(checkpoints, 80), [])


@needs_strace
@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.long)])
def test_a_disk_with_errors(tiny_config, tmp_path, rank):
    """fsync fails with EIO on one rank: no checkpoint of that step on any rank, and training goes on."""
    job = start(tiny_config, tmp_path, *SETTINGS, EPOCHS, world=2)
    wait_for_event(job, "checkpoint")
    with system_calls(job.processes[rank].pid, "fsync:error=EIO"):
        failed = wait_for_event(job, "save_failed")
    assert "Input/output error" in failed["reason"]
    assert job.wait() == [0, 0]
    assert first_sound(list_checkpoints(tmp_path / "checkpoints"))[::2] == (
        checkpoint_path(tmp_path / "checkpoints", 80),
        [],
    )
    steps = {line["step"] for name in ("checkpoint", "save_failed") for line in events(tmp_path, name)}
    assert steps == set(range(2, 81, 2))
    assert sorted(losses(tmp_path)) == list(range(1, 81))


@needs_strace
@pytest.mark.slow
def test_a_slow_file_system_is_named(tiny_config, tmp_path):
    job = start(tiny_config, tmp_path, *SETTINGS, EPOCHS)
    wait_for_event(job, "checkpoint")
    with system_calls(job.processes[0].pid, "fsync:delay_enter=1000000"):
        slow = wait_for_event(job, "save_slow")
    assert slow["seconds"] > 0 and "raise checkpoint.every_steps" in job.text()
    assert job.wait() == [0]
