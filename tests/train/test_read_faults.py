"""Temporary and permanent faults of file systems while a run reads its data."""

import os
import shutil
import time
from pathlib import Path

import pytest

from data_pipeline.manifest import open_manifest
from tests.faults import LoseDisk, ShortPauses, system_calls
from tests.oracle import assert_same_state, ids_by_step, state
from tests.runs import RunningJob, events, losses, metrics, run, start

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("strace") is None, reason="making system calls fail needs strace"),
]
SETTINGS = ["train.epochs=6", "checkpoint.every_steps=8"]
LAST = 48


@pytest.fixture(scope="module")
def undisturbed(tiny_config, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed")
    run(tiny_config, output, *SETTINGS, world=2)
    return output


def wait_for_step(job: RunningJob) -> None:
    while not metrics(job.output, "train", missing_ok=True):
        assert all(process.is_alive() for process in job.processes), job.text()
        time.sleep(0.005)


def shards(dataset: Path, split: str) -> list[Path]:
    return [dataset / shard.file for shard in open_manifest(dataset).split(split).shards]


def assert_undisturbed(output: Path, undisturbed: Path) -> None:
    assert ids_by_step(output, 2) == ids_by_step(undisturbed, 2)
    assert losses(output) == losses(undisturbed)
    assert_same_state(state(output, LAST), state(undisturbed, LAST))
    assert events(output, "bad_sample") == []


@pytest.mark.parametrize(
    ("split", "error", "says"), [("train", "EIO", "Input/output error"), ("val", "ESTALE", "Stale file handle")]
)
def test_reads_that_fail_for_a_while_cost_time_only(
    tiny_config, tiny_dataset, undisturbed, tmp_path, split, error, says
):
    """In training and in evaluation, on one of two ranks: reported, without any other effect."""
    job = start(tiny_config, tmp_path, *SETTINGS, world=2)
    wait_for_step(job)
    with system_calls(job.processes[1].pid, f"pread64:error={error}", shards(tiny_dataset, split)):
        time.sleep(1.5)
    assert job.wait() == [0, 0], job.text() + job.text(1)
    assert_undisturbed(tmp_path, undisturbed)
    found = events(tmp_path, "io_retry")
    assert {(event["rank"], event["error"]) for event in found} == {(1, says)}
    assert all(Path(event["file"]) in shards(tiny_dataset, split) and event["count"] >= 1 for event in found)
    log = (tmp_path / "train.log").read_text()
    assert f"rank 1 reads {found[0]['file']} again: {found[0]['count']} attempt" in log and f"failed ({says})" in log
    assert "Traceback" not in job.text() + job.text(1)


def test_reads_that_fail_for_good_end_the_run_for_now(tiny_config, tiny_dataset, undisturbed, tmp_path):
    """With an exit code that allows a restart, and the file's name. No sample counts as bad; the next start goes on."""
    job = start(tiny_config, tmp_path, *SETTINGS, world=2, before=ShortPauses((0.1, 0.1)))
    wait_for_step(job)
    with system_calls(job.processes[0].pid, "pread64:error=EIO", shards(tiny_dataset, "train")):
        assert job.wait_for_death(0) == 74
    last = job.text().splitlines()[-1]
    assert (
        last.startswith(f"error: {tiny_dataset}/train-")
        and "cannot be read after 3 attempts: Input/output error" in last
    )
    assert "Traceback" not in job.text()
    assert [event["code"] for event in events(tmp_path, "failed")] == [74]
    os.remove(tmp_path / "stdout_0")
    (tmp_path / "samples").rename(tmp_path / "samples_before")
    run(tiny_config, tmp_path, *SETTINGS, world=2)
    assert_same_state(state(tmp_path, LAST), state(undisturbed, LAST))
    assert events(tmp_path, "bad_sample") == []
    assert set(losses(tmp_path)) == set(range(1, LAST + 1))


def test_an_error_of_one_rank_while_the_ema_is_evaluated_is_no_hang(tiny_config, tmp_path):
    """The rank ends with its error at once, although the others cannot restore the weights with it."""
    job = start(tiny_config, tmp_path, "guard.timeout.evaluation=20", world=2, before=LoseDisk(1, 12))  # model: 1 to 7
    assert job.wait_for_death(1) == 74, job.text(1)
    assert "rank 1: val-000.tar cannot be read after 9 attempts" in job.text(1) and "Traceback" not in job.text(1)
    assert [line["weights"] for line in metrics(tmp_path, "eval")] == ["model"]
