"""Only this program's files are removed from a folder of checkpoints; a failed removal is not a failed save."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.runs import events, run, start
from tests.train.test_save_faults import SETTINGS, needs_strace, system_calls, wait_for_event
from train.checkpoint.info import CheckpointInfo, evaluated, list_checkpoints, step_of, write_manifest
from train.checkpoint.prune import clean_up, prune


@dataclass(frozen=True)
class CountKeys:
    """Writes into `file`, after each save that is waited for, which of the savers' keys are still in the store."""

    file: Path

    def __call__(self, rank: int) -> None:
        from train.checkpoint.saver import Saver

        finish = Saver.finish

        def counting(saver, monitor) -> None:
            finish(saver, monitor)
            names = [f"save/{count}/{name}" for count in range(1, saver._count + 1) for name in ("0", "1", "end")]
            self.file.write_text(" ".join(name for name in names if saver.store.get(name) is not None))

        if rank == 0:
            Saver.finish = counting


def checkpoint(folder, step: int, score: float | None = None, better: str = "higher"):
    """A checkpoint without weights."""
    path = folder / f"step_{step:08d}"
    path.mkdir(parents=True)
    (path / "shard_00000.safetensors").write_bytes(b"")
    shards = {"shard_00000.safetensors": 64 * "0"}
    info = CheckpointInfo(step, score, "", [], {"data": {"path": ""}}, step, {}, {}, {}, 1, shards, better=better)
    write_manifest(path, info)
    return path


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("better", "sign"), [("higher", 1), ("lower", -1)])
def test_the_newest_and_the_best_stay_of_equals_the_earliest(tmp_path, better, sign):
    for step, score in ((1, 10.0), (2, 70.0), (3, None), (4, 70.0), (5, 60.0), (6, None), (9, 99.0)):
        checkpoint(tmp_path, step, None if score is None else sign * score, better)
    assert [step_of(path) for path, _ in evaluated(tmp_path, until=6)] == [2, 4, 5, 1]
    assert prune(tmp_path, 6, 2) == []
    assert names(tmp_path) == [f"step_0000000{step}" for step in (2, 5, 6, 9)]  # 9 is not of this run


def test_checkpoints_are_listed_by_their_steps(tmp_path):
    for step in (3, 100_000_000, 99_999_999):
        checkpoint(tmp_path, step)
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [100_000_000, 99_999_999, 3]


def test_nothing_of_a_users_is_removed(tmp_path):
    """Similar names, links, and a foreign file in a checkpoint."""
    elsewhere = checkpoint(tmp_path / "elsewhere", 1)
    folder = tmp_path / "checkpoints"
    for step in (2, 3, 4):
        checkpoint(folder, step)
    (folder / "step_00000001").symlink_to(elsewhere)
    (folder / "step_00000002/notes.txt").write_text("keep me")
    for name in (
        ".step_best.tmp",
        ".step_00000002.backup.of.tmp",
        ".step_00000009.replaced.tmp2",
        "superseded_step_00000001",
    ):
        (folder / name).mkdir()
    (folder / ".step_00000005.tmp").symlink_to(elsewhere)
    (folder / ".step_00000007.tmp").mkdir()
    (folder / ".step_00000007.tmp/thesis.tex").write_text("keep me")
    (folder / ".step_00000008.1234abcd.tmp").mkdir()
    (folder / ".step_00000008.1234abcd.tmp/shard_00000.safetensors").write_text("half")
    before = set(names(folder))
    assert clean_up(folder) == [
        f"{folder / '.step_00000007.tmp'} is not removed: it contains thesis.tex, which is not a checkpoint's file"
    ]
    assert before - set(names(folder)) == {".step_00000008.1234abcd.tmp"}
    assert prune(folder, 4, 1) == [
        f"{folder / 'step_00000002'} is not removed: it contains notes.txt, which is not a checkpoint's file"
    ]
    assert before - set(names(folder)) == {".step_00000008.1234abcd.tmp", "step_00000003"}
    assert (folder / "step_00000002/shard_00000.safetensors").exists() and (elsewhere / "manifest.json").exists()


def test_a_run_killed_between_two_renames_has_its_checkpoint_again(tmp_path):
    for kept in (8, 9):
        os.rename(checkpoint(tmp_path, kept), tmp_path / f".step_0000000{kept}.1234abcd.replaced")
    checkpoint(tmp_path, 9)
    assert prune(tmp_path, 7, 1) == []
    assert names(tmp_path) == [".step_00000008.1234abcd.replaced", "step_00000009"]  # 9 has no other copy
    os.rename(checkpoint(tmp_path / "again", 9), tmp_path / ".step_00000009.1234abcd.replaced")
    (tmp_path / "again").rmdir()
    assert clean_up(tmp_path) == []
    assert names(tmp_path) == ["step_00000008", "step_00000009"]


@pytest.mark.slow
def test_saves_leave_nothing_in_the_store(tiny_config, tmp_path):
    """After eight saves on two ranks. Rank 0 keeps the store for the whole run, which may take months."""
    run(tiny_config, tmp_path, *SETTINGS, world=2, before=CountKeys(tmp_path / "keys"))
    assert len(events(tmp_path, "checkpoint")) == 8 and (tmp_path / "keys").read_text() == "save/8/end"


@needs_strace
@pytest.mark.slow
def test_an_old_checkpoint_that_cannot_be_removed_fails_no_save(tiny_config, tmp_path):
    """ENOTEMPTY, as on NFS while a shard is read: reported, and tried again at the next save and the next start."""
    settings = [*SETTINGS, "checkpoint.keep=1"]
    job = start(tiny_config, tmp_path, *settings, "train.epochs=5")
    wait_for_event(job, "checkpoint")
    with system_calls(job.processes[0].pid, "rmdir,unlinkat:error=ENOTEMPTY"):
        failed = wait_for_event(job, "prune_failed")
        assert "Directory not empty" in failed["reason"]
        wait_for_event(job, "checkpoint", 1 + len(events(tmp_path, "checkpoint")))
    assert job.wait() == [0] and "is not removed" in job.text()
    assert not events(tmp_path, "save_failed") and len(events(tmp_path, "checkpoint")) == 20
    assert names(tmp_path / "checkpoints") == ["step_00000040"]

    # It fails until the end: the run finishes nevertheless, and its next start cleans up.
    job = start(tiny_config, tmp_path, *settings, "train.epochs=6", "--resume-with-changes")
    wait_for_event(job, "resume")
    with system_calls(job.processes[0].pid, "rmdir,unlinkat:error=ENOTEMPTY"):
        assert job.wait() == [0]
    assert (tmp_path / "model.safetensors").exists() and len(names(tmp_path / "checkpoints")) > 1
    run(tiny_config, tmp_path, *settings, "train.epochs=6")
    assert names(tmp_path / "checkpoints") == ["step_00000048"]


@pytest.mark.slow
def test_a_run_starts_whatever_lies_in_its_folder(tiny_config, tmp_path):
    left = tmp_path / "checkpoints/.step_00000002.tmp"
    left.mkdir(parents=True)
    (left / "notes.txt").write_text("keep me")
    job = run(tiny_config, tmp_path, *SETTINGS, "train.max_steps=2")
    assert f"{left} is not removed: it contains notes.txt" in job.text() and (left / "notes.txt").exists()
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step_00000002"]
    assert json.loads((tmp_path / "checkpoints/step_00000002/manifest.json").read_text())["steps_per_epoch"] == 8
