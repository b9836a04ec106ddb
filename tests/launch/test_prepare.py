"""`launch/prepare.py` as a process: exit codes, sentences, kill -9 of the run and of a worker, Ctrl-C, damaged datasets."""

import hashlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


def command(*arguments) -> list[str]:
    return [sys.executable, str(ROOT / "launch/prepare.py"), *map(str, arguments)]


def call(*arguments, cwd=None) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=100, cwd=cwd)


def contents(dest: Path) -> dict[str, str]:
    """SHA-256 of every file of a dataset."""
    return {str(path.relative_to(dest)): hashlib.sha256(path.read_bytes()).hexdigest() for path in dest.rglob("*") if path.is_file()}


def fails_with(code: int, result: subprocess.CompletedProcess, *words: str) -> None:
    """One sentence on standard error, no traceback, the right code."""
    assert result.returncode == code, result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """240 images that take a worker about a second: enough to be killed in."""
    root = tmp_path_factory.mktemp("source") / "pictures"
    random = np.random.default_rng(0)
    buffer = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (500, 400, 3), dtype=np.uint8)).save(buffer, "JPEG", quality=80)
    for split, count in (("train", 100), ("val", 20)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                # One picture, and a comment that tells the files apart.
                data = buffer.getvalue()[:2] + b"\xff\xfe\x00\x12" + f"{split:>6}{name:>4}{i:6d}".encode() + buffer.getvalue()[2:]
                (root / split / name / f"{i}.jpg").write_bytes(data)
    return root


SIZE = ("--shard-size", "0.5")


@pytest.fixture(scope="module")
def dataset(source, tmp_path_factory):
    """`source`, prepared without interruption."""
    dest = tmp_path_factory.mktemp("prepared") / "set"
    result = call(source, dest, *SIZE)
    assert result.returncode == 0, result.stderr
    assert "train: 200 images" in result.stdout and "val: 40 images" in result.stdout
    return dest


def start(source: Path, dest: Path, workers: int = 1, finished: int = 2) -> subprocess.Popen:
    """A run that has finished some shards and has others before it."""
    process = subprocess.Popen(
        command(source, dest, "--workers", workers, *SIZE),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while len(list((dest / ".work").glob("*.done"))) < finished:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    return process


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


def test_help_is_quick():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = call("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0 and "SOURCE" in result.stdout and "verify" in result.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1  # CPU seconds: the machine may be busy


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(source, dataset, tmp_path):
    process = start(source, tmp_path / "set")
    workers = workers_of(process)
    assert workers
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    wait_until_gone(workers)
    assert not (tmp_path / "set/manifest.json").exists()
    # A shard that was being written leaves only a temporary file; what has its name is whole.
    finished = {path.stem: (tmp_path / "set" / path.stem).stat().st_mtime_ns for path in (tmp_path / "set/.work").glob("*.done")}
    assert len(finished) >= 2

    result = call(source, tmp_path / "set", *SIZE, "--workers", 2)
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "set") == contents(dataset)
    assert {name: (tmp_path / "set" / name).stat().st_mtime_ns for name in finished} == finished, "finished shards were written again"


def test_a_killed_run_refuses_other_arguments_and_a_changed_source(source, tmp_path):
    changing = shutil.copytree(source, tmp_path / "source")
    process = start(changing, tmp_path / "set")
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    fails_with(78, call(changing, tmp_path / "set", *SIZE, "--seed", 1), "seed 0 and not 1")
    (changing / "train/cat/0.jpg").rename(changing / "train/cat/new.jpg")
    fails_with(78, call(changing, tmp_path / "set", *SIZE), "has changed since")


def test_a_killed_worker_is_an_error_and_not_a_hang(source, dataset, tmp_path):
    process = start(source, tmp_path / "set", workers=2)
    os.kill(workers_of(process)[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 70 and errors.startswith("error: a worker process was killed") and errors.count("\n") == 1, errors
    assert call(source, tmp_path / "set", *SIZE).returncode == 0
    assert contents(tmp_path / "set") == contents(dataset)


def test_control_c_ends_it_cleanly(source, dataset, tmp_path):
    process = start(source, tmp_path / "set", workers=2)
    workers = workers_of(process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: to everyone
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and errors == "error: interrupted; the same command goes on from here.\n", errors
    wait_until_gone(workers)
    assert call(source, tmp_path / "set", *SIZE).returncode == 0
    assert contents(tmp_path / "set") == contents(dataset)


def test_two_runs_at_a_time_are_refused(source, tmp_path):
    process = start(source, tmp_path / "set")
    os.kill(process.pid, signal.SIGSTOP)
    try:
        fails_with(78, call(source, tmp_path / "set", *SIZE), "another process is preparing")
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()


def test_a_finished_dataset_is_left_as_it_is(source, dataset):
    before = contents(dataset)
    result = call(source, dataset, *SIZE)
    assert result.returncode == 0 and "is already prepared" in result.stdout
    assert contents(dataset) == before
    fails_with(78, call(source, dataset, *SIZE, "--val-fraction", 0.5), "val_fraction 0.0 and not 0.5")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "required"),
        (["nowhere/at/all", "{dest}"], "nowhere/at/all is neither a folder"),
        (["imagefolder:nowhere", "{dest}"], "there is no folder 'nowhere'"),
        (["{source}", "{dest}", "--workers", "0"], "0 is not a positive number"),
        (["{source}", "{dest}", "--shard-size", "many"], "invalid float value: 'many'"),
        (["{source}", "{dest}", "--val-fraction", "1.5"], "1.5 is not between 0 and 1"),
        (["{source}", "{dest}", "--seed", "-1"], "-1 is not an integer"),
        (["{source}", "{dest}", "--val-fraction", "0.5"], "has a val split of its own"),
    ],
)
def test_bad_arguments(source, tmp_path, arguments, words):
    arguments = [argument.format(source=source, dest=tmp_path / "set") for argument in arguments]
    fails_with(78, call(*arguments, cwd=tmp_path), words)


def test_bad_data(tmp_path):
    (tmp_path / "empty").mkdir()
    fails_with(65, call(tmp_path / "empty", tmp_path / "set"), "contains no images")


def test_a_full_disk_is_one_sentence(source, tmp_path):
    """A limit on the size of files stands in for the disk: the write fails in a worker, as on a full disk."""
    limited = ["bash", "-c", 'trap "" XFSZ; ulimit -f 100; exec "$@"', "-", *command(source, tmp_path / "set", *SIZE)]
    fails_with(70, subprocess.run(limited, capture_output=True, text=True, timeout=100), "File too large")


def source_of(dest: Path) -> str:
    """The source that a dataset was made from."""
    return json.loads((dest / "report.json").read_text())["arguments"]["source"]


def flip_bit(path: Path, byte: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 4
    path.write_bytes(data)


def test_verify(dataset, tmp_path):
    from data_pipeline.manifest import open_manifest

    result = call("verify", dataset)
    assert result.returncode == 0 and "is whole" in result.stdout

    copy = shutil.copytree(dataset, tmp_path / "set")
    split = open_manifest(copy).split("train")
    record, shards = split.records[7], split.shards
    shard = shards[record["shard"]].file
    flip_bit(copy / shard, int(record["offset"]) + int(record["size"]) // 2)
    fails_with(65, call("verify", copy), shard, "sample 7 ")
    flip_bit(copy / shard, int(record["offset"]) + int(record["size"]) // 2)

    flip_bit(copy / shards[-1].file, 3)  # in a tar header
    fails_with(65, call("verify", copy), shards[-1].file, "its images are whole")
    flip_bit(copy / shards[-1].file, 3)

    flip_bit(copy / "val.index", 5)
    fails_with(65, call("verify", copy), "val.index is damaged")
    flip_bit(copy / "val.index", 5)
    assert call("verify", copy).returncode == 0

    (copy / shard).unlink()
    fails_with(65, call(source_of(copy), copy, *SIZE), shard, "is missing")
    fails_with(65, call("verify", copy), shard, "is missing")
    fails_with(65, call("verify", tmp_path / "nothing"), "manifest.json is missing")
