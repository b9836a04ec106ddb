"""Starting, awaiting and observing `launch/prepare.py` as a process."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def command(*arguments) -> list[str]:
    return [sys.executable, str(ROOT / "launch/prepare.py"), *map(str, arguments)]


def call(*arguments, cwd=None) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=100, cwd=cwd)


def fails_with(code: int, result: subprocess.CompletedProcess, *words: str) -> None:
    """Assert that the process failed with `code` and one sentence on standard error, without a traceback."""
    assert result.returncode == code, result.stderr
    sentence = said(result.stderr)
    assert sentence.startswith("error: ") and sentence.count("\n") == 1, result.stderr
    for word in words:
        assert word in sentence


def said(errors: str) -> str:
    """Standard error without the progress lines, which appear on a busy machine."""
    progress = ("listing: ", "packing: ", "indexing: ", "verifying: ")
    return "".join(line for line in errors.splitlines(keepends=True) if not line.startswith(progress))


SIZE = ("--shard-size", "0.5")


def start(source: Path, dest: Path, workers: int = 1, finished: int = 2) -> subprocess.Popen:
    """A process that has finished some shards, but not all."""
    return start_command(source, dest, "--workers", workers, *SIZE, until=lambda: finished_shards(dest) >= finished)


def start_command(*arguments, until: Callable[[], bool]) -> subprocess.Popen:
    """A process that has reached the state `until` and is still running."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command(*arguments), start_new_session=True, **pipes)
    deadline = time.monotonic() + 100
    while not until():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return process


def finished_shards(dest: Path) -> int:
    return len(list((dest / ".work").glob("*.done")))


def kill(process: subprocess.Popen) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


def workers_of(process: subprocess.Popen) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 20
    while any(map(alive, pids)):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.01)
