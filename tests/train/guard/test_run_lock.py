"""One run per folder: real processes, a real kill -9, and a kernel that refuses flock."""

import json
import os
import re
import select
import subprocess
import sys
import threading
import time

import pytest

from data_pipeline.faults import StorageError
from tests.runs import ROOT
from train.config import ConfigError
from train.guard.run_lock import BEAT, SIZE, WATCH, RunLock

# A run: takes and releases the folder on command. "no-flock": the kernel returns ENOLCK, as on some file systems.
RUN = """
import ctypes, errno, os, platform, struct, sys
from pathlib import Path
from train.config import ConfigError
from train.guard.run_lock import RunLock

def refuse_flock():
    number = {"x86_64": 73, "aarch64": 32}[platform.machine()]
    load, if_equal, answer = 0x20, 0x15, 0x06  # BPF: load the number; ENOLCK if it is flock's; else allow
    code = [(load, 0, 0, 0), (if_equal, 0, 1, number)]
    code += [(answer, 0, 0, 0x00050000 | errno.ENOLCK), (answer, 0, 0, 0x7FFF0000)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code), ctypes.addressof(program)))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, header, 0, 0) == 0, os.strerror(ctypes.get_errno())

if sys.argv[2] == "no-flock":
    refuse_flock()
lock = RunLock(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
try:
    lock.acquire()
    lock.check()
except ConfigError as error:
    print(error, flush=True)
    sys.exit(error.exit_code)
print("held", "torch" in sys.modules, flush=True)
if sys.stdin.readline() == "fork\\n":
    if os.fork() == 0:
        print("forked", flush=True)
        sys.stdin.readline()
        os._exit(0)
    sys.stdin.readline()
lock.release()
"""


class Run:
    def __init__(self, folder, how="flock"):
        self.process = subprocess.Popen(
            [sys.executable, "-c", RUN, str(folder), how],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert self.answer() == "ready"

    def tell(self, line=""):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self

    def answer(self):
        assert select.select([self.process.stdout], [], [], 60)[0], "no answer in 60 s"
        return self.process.stdout.readline().strip()

    def kill(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture
def start(tmp_path):
    runs = []

    def start(how="flock"):
        runs.append(Run(tmp_path, how))
        return runs[-1]

    yield start
    for run in runs:
        run.kill()


def record(folder, **changes):
    """Write the lock file of a run on another machine."""
    fields = {
        "host": "node17",
        "boot": "another",
        "pid": 4711,
        "token": "t",
        "started": 1.7e9,
        "beat": 1.7e9,
        "ended": False,
        **changes,
    }
    (folder / ".lock").write_bytes(json.dumps(fields).encode().ljust(SIZE))


def test_second_run_is_refused_while_the_first_lives_and_free_after_kill(start, tmp_path):
    first = start().tell()
    assert first.answer() == "held False"  # without torch
    second = start().tell()
    sentence = second.answer()
    assert second.process.wait(60) == 78
    owner = rf"a run on host {os.uname().nodename}, process {first.process.pid}, since \d{{4}}-"
    held = rf"{re.escape(str(tmp_path))} is in use by {owner}"
    assert re.match(held, sentence) and sentence.endswith("wait for it, stop it, or choose another --output")
    first.kill()
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.release()
    assert lock.previous["pid"] == first.process.pid and not lock.previous["ended"]


def test_forked_child_does_not_keep_the_folder(start, tmp_path):
    run = start().tell()
    assert run.answer() == "held False"
    assert run.tell("fork").answer() == "forked"
    run.kill()  # its child lives on
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.release()


def test_clean_end_is_free_on_any_machine(tmp_path):
    first = RunLock(tmp_path)
    first.acquire()
    assert first.previous is None
    first.release()
    content = json.loads((tmp_path / ".lock").read_text())
    assert content["ended"] and content["beat"] >= content["started"]
    record(tmp_path, ended=True, beat=123.0)
    second = RunLock(tmp_path)
    second.acquire()
    second.release()
    assert second.previous["beat"] == 123.0


def test_respects_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        lock = RunLock(tmp_path)
        lock.acquire()
        lock.release()
    finally:
        os.umask(old)
    assert (tmp_path / ".lock").stat().st_mode & 0o777 == 0o640


@pytest.mark.slow
def test_record_of_another_machine_decides_where_flock_does_not(tmp_path):
    (tmp_path / ".lock").write_bytes(b'{"host": "no')  # read while it was being written
    stop = threading.Event()

    def beat():
        for count in range(1000):
            if stop.wait(BEAT):
                return
            record(tmp_path, beat=1.7e9 + count)  # its clock is years behind

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(ConfigError, match="node17, process 4711"):
            RunLock(tmp_path).acquire()
    finally:
        stop.set()
        thread.join()
    lock = RunLock(tmp_path)
    began = time.monotonic()
    lock.acquire()  # its record does not change any more
    lock.release()
    assert time.monotonic() - began >= WATCH and lock.previous["host"] == "node17"


@pytest.mark.slow
def test_without_flock_heartbeats_decide(start):
    first = start("no-flock").tell()
    assert first.answer() == "held False"
    second = start("no-flock").tell()
    assert f"process {first.process.pid}" in second.answer() and second.process.wait(60) == 78


def test_of_two_at_the_same_moment_without_flock_one_goes_on(start):
    runs = [start("no-flock") for _ in range(4)]
    for run in runs:
        run.tell()
    answers = [run.answer() for run in runs]
    assert answers.count("held False") == 1 and sum("in use" in answer for answer in answers) == 3


def test_taken_by_another_machine_nevertheless(tmp_path):
    lock = RunLock(tmp_path)
    lock.acquire()
    record(tmp_path)  # a run that started at the same moment, and wrote last
    with pytest.raises(ConfigError, match="node17, process 4711"):
        lock.check()
    lock.release()
    assert "node17" in (tmp_path / ".lock").read_text()


def test_a_write_that_fails_ends_nothing(tmp_path):
    lock = RunLock(tmp_path)
    lock.acquire()
    (tmp_path / ".lock").unlink()
    (tmp_path / ".lock").mkdir()  # can be neither read nor written, even by root
    lock.check()
    lock.release()


def test_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere/.lock cannot be written \(No such file"):
        RunLock(tmp_path / "nowhere").acquire()
    (tmp_path / ".lock").symlink_to("/dev/full")
    for _ in range(2):  # the same process may try again
        with pytest.raises(StorageError, match=r".lock cannot be written \(No space left on device\); mend that"):
            RunLock(tmp_path).acquire()
