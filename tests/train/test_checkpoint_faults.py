"""Temporary disk faults while a checkpoint is read or the final weights are written."""

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.runs import ROOT, run
from tests.train.test_save_faults import needs_strace
from train.checkpoint.info import checkpoint_path

pytestmark = [pytest.mark.slow, needs_strace]

# Run in a process of its own, in which system calls on one file fail; `passing` is their number.
PROGRAM = """
import sys
from pathlib import Path
from data_pipeline import faults
from train.checkpoint.format import read_weights, write_final_weights
from train.checkpoint.info import first_sound, list_checkpoints
faults.PAUSES = (0.01, 0.01, 0.01, 0.01)
run = Path(sys.argv[1])
checkpoints = list_checkpoints(run / "checkpoints")
print("ready", flush=True)
sys.stdin.readline()
try:
    print("result", {}, flush=True)
except Exception as error:
    print("result", type(error).__name__, error, flush=True)
"""
CHOOSES = "first_sound(checkpoints)[0].name"
READS = "len(read_weights(checkpoints[0], 'ema'))"
WRITES = "write_final_weights(run, checkpoints[0], 'ema')"


@pytest.fixture(scope="module")
def finished(tiny_config, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished") / "run"
    run(tiny_config, output, "train.max_steps=4", "checkpoint.every_steps=2", "train.evaluate_every=0")
    return output


def with_faults(output: Path, does: str, injection: str, *paths: Path) -> str:
    """Output of PROGRAM with strace's `injection` into its system calls on `paths` (if none is given, on any path)."""
    calls = injection.partition(":")[0]
    command = [sys.executable, "-c", PROGRAM.replace("{}", does), str(output)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert any(line == "ready\n" for line in process.stdout)
        only = [argument for path in paths for argument in ("-P", str(path))]
        tracer = subprocess.Popen(
            [
                "strace",
                "-f",
                "-qq",
                "-o",
                "/dev/null",
                *only,
                "-e",
                f"trace={calls}",
                "-e",
                f"inject={injection}",
                "-p",
                str(process.pid),
            ]
        )
        with contextlib.closing(process.stdin):
            while any(
                "TracerPid:\t0" in (task / "status").read_text() for task in Path(f"/proc/{process.pid}/task").iterdir()
            ):
                assert tracer.poll() is None, "strace has ended"
                time.sleep(0.01)
            process.stdin.write("go\n")
        answer = next(line for line in process.stdout if line.startswith("result "))
        process.wait(120)
        tracer.wait(10)
    return answer.removeprefix("result ").strip()


@pytest.mark.parametrize("file", ["manifest.json", "shard_00000.safetensors"])
def test_a_fault_that_passes_costs_no_steps(finished, file):
    path = checkpoint_path(finished / "checkpoints", 4) / file
    assert with_faults(finished, CHOOSES, "read:error=EIO:when=1..3", path) == "step_00000004"


@pytest.mark.parametrize("file", ["manifest.json", "shard_00000.safetensors"])
def test_a_fault_that_stays_is_no_damage(finished, file):
    """The start fails rather than use an older valid checkpoint, which would lose steps."""
    path = checkpoint_path(finished / "checkpoints", 4) / file
    answer = with_faults(finished, CHOOSES, "read:error=EIO", path)
    assert answer.startswith(f"StorageError {path} cannot be read after 5 attempts: Input/output error"), answer


def test_weights_are_read_past_a_stale_handle(finished):
    path = checkpoint_path(finished / "checkpoints", 4) / "shard_00000.safetensors"
    assert int(with_faults(finished, READS, "preadv,preadv2:error=ESTALE:when=2..4", path)) > 0
    assert with_faults(finished, READS, "preadv,preadv2:error=ESTALE", path).startswith(
        f"StorageError {path} cannot be read"
    )


def test_final_weights_are_written_again(finished):
    before = (finished / "model.safetensors").read_bytes()
    assert with_faults(finished, WRITES, "fsync:error=EIO:when=1..3") == "None"
    answer = with_faults(finished, WRITES, "fsync:error=EIO")
    assert (
        answer.startswith(f"StorageError {finished / 'model.safetensors'} cannot be written")
        and "start again" in answer
    )
    assert (finished / "model.safetensors").read_bytes() == before
