"""Messages and exit codes of failing ranks: the table in docs/failures.md. Under SLURM: test_slurm.py."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch import cli
from tests.runs import ROOT, start
from train.config import ConfigError


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error: ")]


def test_a_crash_ends_a_rank_at_once():
    """With its traceback, although an exit handler and a thread would keep the process running for ever."""
    program = """
import atexit, threading
from launch.cli import leave, run
def crash(arguments):
    atexit.register(threading.Event().wait)
    threading.Thread(target=threading.Event().wait).start()
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
leave(run(crash, None))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback ") and done.stderr.endswith("an illegal memory access was encountered\n")


def test_control_c_ends_a_command_without_a_traceback():
    program = """
import os, signal, time
from launch.cli import run
def wait(arguments):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
raise SystemExit(run(wait, None))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (130, "")


def test_a_log_on_a_full_disk_changes_no_exit_code():
    program = """
from launch.cli import leave, run
def fail(arguments):
    print("said")
    raise MemoryError
leave(run(fail, None))
"""
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, stdout=full, stderr=full, env=buffered, timeout=60
        )
    assert done.returncode == 69


@pytest.mark.parametrize(
    ("command", "at_the_end"),
    [("watch --once", 13), ("watch", 141), ("goodput", 0), ("prepare verify", 0), ("train --help", 0)],
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_command_whose_reader_has_left_ends_quietly(command, at_the_end, unbuffered, tiny_dataset, tmp_path):
    """As `watch RUN | head -1`. at_the_end: the code if Python prints nothing before the process ends."""
    name, *options = command.split()
    target = tiny_dataset if name == "prepare" else tmp_path
    start = {"kind": "event", "event": "start", "step": 0, "time": 1e9, "last": 9, "world_size": 1}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(start) + "\n")
    (tmp_path / "config.yaml").write_text("guard: {bad_samples: 10, max_skipped: 20}\n")
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, f"launch/{name}.py", *options, str(target)],
        cwd=ROOT,
        stdout=writing,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        timeout=60,
    )
    os.close(writing)
    code = 141 if unbuffered and name != "train" else at_the_end  # argparse ignores what it cannot print
    assert (done.returncode, done.stderr) == (code, b"")


def test_another_pipe_that_breaks_is_a_crash():
    program = """
import os
from launch.cli import run
def write(arguments):
    reading, writing = os.pipe()
    os.close(reading)
    os.write(writing, b"to another process")
raise SystemExit(run(write, None))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.endswith("BrokenPipeError: [Errno 32] Broken pipe\n")


@pytest.mark.parametrize("code", [65, 78])
def test_an_error_that_rank_0_has_too_is_said_once(code, monkeypatch, capsys):
    """The launcher ends rank 1 if rank 0 has ended; what rank 1 alone has is said by it, a moment later."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(cli, "YIELD_SECONDS", 0.2)
    monkeypatch.setattr(cli.stop_signals, "received", None)
    assert cli.fail(code, "no dataset at nowhere") == code
    assert capsys.readouterr().err == "error: rank 1: no dataset at nowhere\n"
    threading.Timer(0.05, lambda: setattr(cli.stop_signals, "received", signal.SIGTERM)).start()
    assert cli.fail(code, "no dataset at nowhere") == code
    assert capsys.readouterr().err == ""


def test_a_stop_is_said_once_which_the_run_has_done(capsys):
    assert cli.fail(75, "stopped after step 5") == 75
    assert capsys.readouterr().err == ""


def test_what_cannot_be_written_is_said_before_the_work(tmp_path, monkeypatch):
    """Of a file, of a folder that is made, and of a file whose folders are made. Nothing is left or changed."""
    file, new = tmp_path / "file", tmp_path / "new"
    file.write_text("an earlier one")
    refused = [
        (tmp_path, {}, "Is a directory"),
        (new / "x.json", {}, "No such file or directory"),
        (file / "x.json", {"parents": True}, "Not a directory"),
        (f"{file}/", {}, "Not a directory"),
    ]
    for path, options, reason in refused:
        with pytest.raises(ConfigError) as caught:
            cli.check_output("--to", path, **options)
        assert str(caught.value) == f"--to {path} cannot be written ({reason}): name another"
    with pytest.raises(ConfigError):
        cli.check_output("--to", "/proc/new/x/")  # where not even root may write
    monkeypatch.chdir(tmp_path)
    for path, options in [(file, {}), ("x", {}), (new / "x", {"parents": True}), (f"{new}/x/", {}), ("/dev/null", {})]:
        cli.check_output("--to", path, **options)
    assert list(tmp_path.iterdir()) == [file] and file.read_text() == "an earlier one"


@dataclass(frozen=True)
class CrashWith:
    """Rank `rank` raises an error in its second step. An exit handler and a thread would keep the process running."""

    rank: int
    wanted: int  # bytes: more than there are. 0: the error is another

    def __call__(self, rank: int) -> None:
        if rank != self.rank:
            return
        import atexit

        import torch

        from train.trainer import Run

        def loss(model, inputs):
            atexit.register(threading.Event().wait)
            threading.Thread(target=threading.Event().wait).start()
            if not self.wanted:
                raise RuntimeError("CUDA error: unspecified launch failure")
            torch.empty(self.wanted, dtype=torch.uint8)

        train_step = Run.train_step

        def failing(run: Run, step: int, batches: object):
            if step == 1:
                run.task.loss = loss
            return train_step(run, step, batches)

        Run.train_step = failing


@pytest.mark.slow
@pytest.mark.parametrize(("wanted", "code"), [(0, 1), (2**50, 69)])
def test_a_rank_that_crashes_or_has_no_memory(tiny_config, tmp_path, wanted, code):
    """The rank has its own code and sentence; its neighbour ends with a traceback and 1; no process stays."""
    job = start(tiny_config, tmp_path, world=2, before=CrashWith(1, wanted))
    assert job.wait(120) == [1, code]
    assert "[rank1]: Traceback" in job.text(1)
    assert job.text(0).count("Traceback") >= 1 and errors(job.text(0)) == []
    if wanted:
        (sentence,) = errors(job.text(1))
        assert sentence.startswith("error: rank 1: out of memory: ") and "train.micro_batch" in sentence
        assert job.text(1).index("can't allocate memory") < job.text(1).index(sentence)
    else:
        assert "unspecified launch failure" in job.text(1) and errors(job.text(1)) == []


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "doctor"])
def test_a_port_in_use(tiny_config, tmp_path, command):
    """One sentence with the remedy, and an exit code after which the run is restarted."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        environment = {
            "RANK": "0",
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        program = [
            sys.executable,
            str(ROOT / "launch" / f"{command}.py"),
            "--config",
            str(tiny_config),
            "--output",
            str(tmp_path),
        ]
        done = subprocess.run(program, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 69, done.stderr
    (sentence,) = errors(done.stderr)
    assert f"port {port} of {socket.gethostname()} is in use" in sentence and "--master_port" in sentence
    assert "Traceback" not in done.stderr


@dataclass(frozen=True)
class WorkIn:
    """Rank n works in the folder n of `folder`."""

    folder: Path

    def __call__(self, rank: int) -> None:
        os.chdir(self.folder / str(rank))


@pytest.mark.slow
def test_what_one_rank_alone_finds_is_said_by_it(tiny_config, tmp_path):
    """The cache folder is usable on the first of two nodes only."""
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    (tmp_path / "1" / "cache").touch()
    job = start(
        tiny_config,
        tmp_path / "run",
        "data.cache_dir=cache",
        "guard.timeout.startup=20",
        world=2,
        before=WorkIn(tmp_path),
    )
    deadline = time.monotonic() + 120
    while job.processes[1].exitcode is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job.kill()
    assert job.processes[1].exitcode == 78
    (sentence,) = errors(job.text(1))
    assert sentence.startswith("error: rank 1: data.cache_dir cache") and "Traceback" not in job.text(1)


@pytest.mark.slow
def test_a_full_disk_at_the_start(tiny_config, tmp_path):
    """The run continues without its logs, and ends with a restartable code if its last checkpoint is not written."""
    run = tmp_path / "run"
    run.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(run)], check=True)
    try:
        (run / "full").write_bytes(bytes(8192))
        program = [
            sys.executable,
            str(ROOT / "launch" / "train.py"),
            "--config",
            str(tiny_config),
            "--output",
            str(run),
        ]
        done = subprocess.run(program, capture_output=True, text=True, timeout=120)
    finally:
        subprocess.run(["umount", str(run)], check=True)
    assert done.returncode == 74, done.stderr
    assert "No space left on device" in errors(done.stderr)[-1]
