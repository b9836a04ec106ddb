"""python launch/watch.py RUN, as a user types it, beside a run that is started, killed, stopped and finished."""

import os
import pty
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.runs import ROOT, events, metrics, run, start

COMMAND = [sys.executable, str(ROOT / "launch" / "watch.py")]
SETTINGS = ["checkpoint.every_steps=4", "train.evaluate_every=1"]


def watch(*arguments, columns="80"):
    environment = {**os.environ, "COLUMNS": columns}
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=60, env=environment)


@pytest.fixture(scope="module")
def finished(tiny_config, tmp_path_factory):
    return run(tiny_config, tmp_path_factory.mktemp("watched") / "run", *SETTINGS).output


def wait_for(job, happened):
    deadline = time.monotonic() + 120
    while not happened():
        assert all(process.is_alive() for process in job.processes) and time.monotonic() < deadline, job.text()
        time.sleep(0.01)


@pytest.mark.slow
def test_a_run_from_before_its_start_to_its_end(tiny_config, tmp_path):
    """The exit codes, and what a person reads, of one run through a kill and a stop."""
    folder = tmp_path / "run"
    folder.mkdir()
    result = watch(folder, "--once")
    assert result.returncode == 12 and "not started" in result.stdout

    job = start(tiny_config, folder, *SETTINGS, "train.epochs=100")
    wait_for(job, lambda: any(line["step"] >= 9 for line in metrics(folder, "train", missing_ok=True)))
    result = watch(folder, "--once")
    assert result.returncode == 10, result.stdout + result.stderr
    texts = ("running", " of 800", "of 100 ", " left (", "img/s", "data wait", "0 restarts", "bad samples 0 of 100")
    for text in (*texts, "top-1, %    model ", "EMA "):
        assert text in result.stdout, result.stdout
    job.kill()
    deadline = time.monotonic() + 60
    while (result := watch(folder, "--once")).returncode == 10 and time.monotonic() < deadline:
        time.sleep(1)  # its last sign of life is young
    assert result.returncode == 13 and "silent" in result.stdout and "last sign of life" in result.stdout, result.stdout

    job = start(tiny_config, folder, *SETTINGS, "train.epochs=100")
    wait_for(job, lambda: events(folder, "resume"))
    os.kill(job.processes[0].pid, signal.SIGTERM)
    assert job.wait() == [75]
    result = watch(folder, "--once")
    assert result.returncode == 75 and result.stderr == "", result.stdout
    assert "stopped after step" in result.stdout and "1 restart " in result.stdout


@pytest.mark.slow
def test_a_finished_run_ends_the_watching(finished):
    """On a terminal the page, which fits; elsewhere a line."""
    result = watch(finished)
    assert result.returncode == 0 and result.stdout.count("\n") == 1, result.stdout + result.stderr
    assert "finished" in result.stdout and "step 16/16" in result.stdout and "\x1b" not in result.stdout
    for columns in (80, 100, 200):
        text = on_terminal([*COMMAND, str(finished)], columns)
        lines = re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", text).splitlines()
        assert any("100.0%" in line and "step 16 of 16" in line for line in lines), text
        assert max(map(len, lines)) < columns


def on_terminal(command, columns):
    """What the command writes to a terminal that wide; it ends with exit code 0."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "LINES": "40"}
    with subprocess.Popen(command, stdin=follower, stdout=follower, env=environment) as process:
        os.close(follower)
        text = b""
        while chunk := read(leader):
            text += chunk
    os.close(leader)
    assert process.returncode == 0, text
    return text.decode()


def read(leader):
    try:
        return os.read(leader, 65536)
    except OSError:  # Linux raises this once the other end is closed
        return b""


def test_mistakes_get_one_sentence(tmp_path):
    result = watch(tmp_path / "nowhere")
    assert result.returncode == 78 and result.stderr == f"error: {tmp_path / 'nowhere'} is not a run's folder\n"


@pytest.mark.parametrize("inside", ["c3/metrics.jsonl", "step_8/manifest.json", "submitted/job.sh"])
def test_another_folder_is_not_a_run_that_has_not_started(tmp_path, inside):
    """One of runs, of checkpoints, or of a job array's runs: --once would say "not started", and others would wait."""
    (tmp_path / inside).parent.mkdir()
    (tmp_path / inside).touch()
    result = watch(tmp_path, "--once")
    assert result.returncode == 78 and result.stderr.startswith(f"error: {tmp_path} is no run's folder"), result.stdout


def test_a_submitted_run_has_not_started(tmp_path):
    (tmp_path / "logs").mkdir()
    result = watch(tmp_path, "--once")
    assert result.returncode == 12 and "not started" in result.stdout, result.stderr


@pytest.mark.slow
def test_torch_is_not_imported(finished):
    code = (
        f"import runpy, sys; sys.argv = ['watch', {str(finished)!r}, '--once']\n"
        "try: runpy.run_path('launch/watch.py', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, timeout=60)
