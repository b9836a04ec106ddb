"""launch/prepare.py as a process: exit codes, messages, kill -9 of it and of a worker, Ctrl-C, damaged datasets."""

import importlib.util
import io
import json
import os
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data_pipeline.images import contents, encoded, make_folder, picture, without_manifest
from tests.data_pipeline.label_maps import write
from tests.launch.prepare_process import (
    SIZE,
    call,
    command,
    fails_with,
    finished_shards,
    kill,
    said,
    start,
    start_command,
    wait_until_gone,
    workers_of,
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """240 images that take a worker about a second, so that it can be killed meanwhile."""
    root = tmp_path_factory.mktemp("source") / "pictures"
    random = np.random.default_rng(0)
    buffer = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (500, 400, 3), dtype=np.uint8)).save(buffer, "JPEG", quality=80)
    for split, count in (("train", 100), ("val", 20)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                # One picture, and a comment that tells the files apart.
                data = (
                    buffer.getvalue()[:2]
                    + b"\xff\xfe\x00\x12"
                    + f"{split:>6}{name:>4}{i:6d}".encode()
                    + buffer.getvalue()[2:]
                )
                (root / split / name / f"{i}.jpg").write_bytes(data)
    return root


@pytest.fixture(scope="module")
def dataset(source, tmp_path_factory):
    """`source`, prepared without interruption."""
    dest = tmp_path_factory.mktemp("prepared") / "set"
    result = call(source, dest, *SIZE)
    assert result.returncode == 0, result.stderr
    assert "  classification: " in result.stdout
    assert "train: 200 images" in result.stdout and "val: 40 images" in result.stdout
    return dest


def test_help_is_quick():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = call("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0 and "SOURCE" in result.stdout and "verify" in result.stdout
    assert (
        after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
    )  # CPU seconds: the machine may be busy


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(source, dataset, tmp_path):
    process = start(source, tmp_path / "set")
    workers = workers_of(process)
    assert workers
    kill(process)
    wait_until_gone(workers)
    assert not (tmp_path / "set/manifest.json").exists()
    # A shard that was being written leaves only a temporary file; what has its name is whole.
    finished = {
        path.stem: (tmp_path / "set" / path.stem).stat().st_mtime_ns for path in (tmp_path / "set/.work").glob("*.done")
    }
    assert len(finished) >= 2

    result = call(source, tmp_path / "set", *SIZE, "--workers", 2)
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "set") == contents(dataset)
    assert {name: (tmp_path / "set" / name).stat().st_mtime_ns for name in finished} == finished, (
        "finished shards were written again"
    )


def test_a_killed_run_refuses_other_arguments_and_a_changed_source(source, tmp_path):
    changing = shutil.copytree(source, tmp_path / "source")
    process = start(changing, tmp_path / "set")
    kill(process)
    fails_with(78, call(changing, tmp_path / "set", *SIZE, "--seed", 1), "seed 0 and not 1")
    (changing / "train/cat/0.jpg").rename(changing / "train/cat/new.jpg")
    fails_with(78, call(changing, tmp_path / "set", *SIZE), "has changed since")


def test_a_killed_worker_is_an_error_and_not_a_hang(source, dataset, tmp_path):
    process = start(source, tmp_path / "set", workers=2)
    os.kill(workers_of(process)[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=30)
    assert (
        process.returncode == 70
        and said(errors).startswith("error: a worker process was killed")
        and errors.endswith("finished shards are kept.\n")
    ), errors
    assert call(source, tmp_path / "set", *SIZE).returncode == 0
    assert contents(tmp_path / "set") == contents(dataset)


def test_control_c_ends_it_cleanly(source, dataset, tmp_path):
    process = start(source, tmp_path / "set", workers=2)
    workers = workers_of(process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: to everyone
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and said(errors) == "error: interrupted; the same command goes on from here.\n", (
        errors
    )
    wait_until_gone(workers)
    assert call(source, tmp_path / "set", *SIZE).returncode == 0
    assert contents(tmp_path / "set") == contents(dataset)


def test_two_runs_at_a_time_are_refused(source, tmp_path):
    process = start(source, tmp_path / "set")
    os.kill(process.pid, signal.SIGSTOP)
    try:
        fails_with(78, call(source, tmp_path / "set", *SIZE), "another process is preparing")
    finally:
        kill(process)


def test_a_finished_dataset_is_left_as_it_is(source, dataset):
    before = contents(dataset)
    result = call(source, dataset, *SIZE)
    assert result.returncode == 0
    assert "is already prepared; the source is not read again (if it has changed, give another DEST)" in result.stdout
    assert contents(dataset) == before
    fails_with(78, call(source, dataset, *SIZE, "--val-fraction", 0.5), "val_fraction 0.0 and not 0.5")


def test_a_finished_dataset_without_its_reports(tmp_path):
    source, dest = make_folder(tmp_path / "pictures", train=1, val=1), tmp_path / "set"
    (source / "train/cat/bad.jpg").write_bytes(b"no")
    summary = call(source, dest).stdout.splitlines()[1:]
    assert any("cannot be used: train/cat/bad.jpg: not an image" in line for line in summary)
    for report, lines in (("report.jsonl", summary), ("report.json", [])):
        (dest / report).unlink()
        again = call(source, dest)
        assert (again.returncode, again.stdout.splitlines()[1:]) == (0, lines) and "already prepared" in again.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "required"),
        (["nowhere/at/all", "{dest}"], "nowhere/at/all is neither a folder"),
        (["imagefolder:nowhere", "{dest}"], "there is no folder 'nowhere'"),
        (["{source}", "{dest}", "--workers", "0"], "'0' is not a whole number of at least 1"),
        (["{source}", "{dest}", "--shard-size", "many"], "'many' is not a number from 0.001 to 1000000"),
        (["{source}", "{dest}", "--val-fraction", "1.5"], "'1.5' is not a number from 0 to 1"),
        (["{source}", "{dest}", "--seed", "-1"], "'-1' is not a whole number from 0 to"),
        (["{source}", "{dest}", "--val-fraction", "0.5"], "has a val split of its own"),
        (["{source}", "{dest}", "--val", "{source}"], "has a val split of its own: leave --val out"),
        (["{source}", "{dest}", "--val-labels", "{source}"], "--val-labels belongs to --val"),
        (["{source}", "{dest}", "--resize-short", "0"], "'0' is not a whole number of at least 1"),
        (["{source}", "{dest}", "--quality", "101"], "'101' is not a whole number from 1 to 100"),
        (["{source}", "{dest}", "--formats", "ffcv"], "give webdataset,ffcv"),
        (
            ["{source}", "{dest}", "--formats", "webdataset,dali"],
            "there is no format dali: the formats are webdataset and ffcv",
        ),
        (["{source}", "{dest}", "--ignore-value", "70000"], "'70000' is not a whole number from 0 to 65535"),
        (
            ["{source}", "{dest}", "--reduce-zero-label"],
            "has no label maps in a known layout: leave --reduce-zero-label",
        ),
        (["{source}", "{dest}", "--ffcv-mode", "raw"], "--ffcv-mode belongs to --formats"),
        (["index", "nowhere"], "there is no folder nowhere"),
        (["index", "{dest}", "--split", "dev"], "invalid choice: 'dev'"),
    ],
)
def test_bad_arguments(source, tmp_path, arguments, words):
    arguments = [argument.format(source=source, dest=tmp_path / "set") for argument in arguments]
    fails_with(78, call(*arguments, cwd=tmp_path), words)


@pytest.mark.parametrize("dest", ["out", "new/out"])
def test_a_destination_among_the_classes(tmp_path, dest):
    """It is named, and not left there: a further try would take it for a class."""
    for name in ("a", "b"):
        write(tmp_path / "source" / name / "1.jpg", encoded(picture(1)))
    folder = tmp_path / "source" / dest
    fails_with(78, call(tmp_path / "source", folder), f"DEST {folder} lies in SOURCE {tmp_path}/source, where its")
    assert sorted(path.name for path in (tmp_path / "source").iterdir()) == ["a", "b"]
    assert call(tmp_path / "source", tmp_path / "out").returncode == 0


def test_bad_data(tmp_path):
    (tmp_path / "empty").mkdir()
    fails_with(65, call(tmp_path / "empty", tmp_path / "set"), "contains no images")


def test_a_name_that_is_not_utf8(tmp_path, monkeypatch):
    """It is shown in the summary, also where Python's output is strict, as in most locales."""
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")
    source = make_folder(tmp_path / "pictures", train=1, val=0)
    Path(os.fsdecode(bytes(source / "train/cat") + b"/caf\xe9.jpg")).write_bytes(b"no")
    result = call(source, tmp_path / "set")
    assert result.returncode == 0 and r"train/cat/caf\udce9.jpg: not an image" in result.stdout, result


def test_a_full_disk_is_one_sentence(source, tmp_path):
    """A limit on the size of files makes a write fail in a worker, as on a full disk."""
    limited = ["bash", "-c", 'trap "" XFSZ; ulimit -f 100; exec "$@"', "-", *command(source, tmp_path / "set", *SIZE)]
    fails_with(74, subprocess.run(limited, capture_output=True, text=True, timeout=100), "File too large")


def source_of(dest: Path) -> str:
    """The source of a dataset."""
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


@pytest.mark.slow
def test_smaller_images(source, tmp_path):
    from data_pipeline.manifest import open_manifest

    # One shard each: what a shard holds is planned by what the images will be.
    options = ("--resize-short", 100, "--quality", 80, "--shard-size", 4)
    result = call(source, tmp_path / "set", *options)
    assert result.returncode == 0 and "train: 200 images; 200 encoded again" in result.stdout, result.stdout
    manifest = open_manifest(tmp_path / "set")
    for split in manifest.splits.values():
        assert (
            len(split.shards) == 1 and (split.records["width"] == 100).all() and (split.records["height"] == 125).all()
        )
    assert call(source, tmp_path / "set", *options).stdout.startswith(f"{tmp_path / 'set'} is already prepared")

    killed = tmp_path / "killed"
    kill(start_command(source, killed, *options, until=lambda: (killed / ".work/plan.json").exists()))
    assert call(source, killed, *options).returncode == 0 and contents(killed) == contents(tmp_path / "set")
    fails_with(
        78,
        call(source, tmp_path / "set", "--max-side", 100, "--shard-size", 4),
        "resize_short 100 and not None, max_side None and",
    )


# --- index ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def foreign(dataset, tmp_path):
    return without_manifest(dataset, tmp_path / "foreign")


def test_index(foreign, dataset):
    result = call("index", foreign)
    assert result.returncode == 0 and "is indexed" in result.stdout and "train: 200 images\n" in result.stdout, result
    for split in ("train", "val"):
        assert (foreign / f"{split}.index").read_bytes() == (dataset / f"{split}.index").read_bytes()
    assert call("verify", foreign).returncode == 0


def test_a_killed_index_goes_on(foreign, dataset):
    process = start_command("index", foreign, "--workers", 1, until=lambda: finished_shards(foreign) >= 3)
    workers = workers_of(process)
    kill(process)
    wait_until_gone(workers)
    assert not (foreign / "manifest.json").exists()
    fails_with(65, call("verify", foreign), "manifest.json is missing")
    finished = {path: path.stat().st_mtime_ns for path in (foreign / ".work").glob("*.done")}

    # Stopped once more, to see that the second run begins where the first one ended.
    process = start_command("index", foreign, "--workers", 1, until=lambda: finished_shards(foreign) > len(finished))
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    kill(process)
    assert call("index", foreign).returncode == 0
    assert (foreign / "train.index").read_bytes() == (dataset / "train.index").read_bytes()
    assert not (foreign / ".work").exists() and call("verify", foreign).returncode == 0


def test_index_says_what_it_left_out(foreign):
    import tarfile

    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    with tarfile.open(foreign / "train-png.tar", "w") as tar:
        for name, data in (("1.png", picture.getvalue()), ("1.cls", b"0")):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    output = call("index", foreign).stdout
    assert "train: 200 images; 1 left out, which cannot be used" in output
    assert "sound, but not JPEGs that training can read: 1 of those left out" in output
    assert "unpack the shards into class folders" in output


# --- FFCV -------------------------------------------------------------------------------------------------------------

needs_ffcv = pytest.mark.skipif(importlib.util.find_spec("ffcv") is None, reason="ffcv is not installed")
FFCV = (*SIZE, "--formats", "webdataset,ffcv")


@pytest.fixture(scope="module")
def with_ffcv(source, dataset, tmp_path_factory):
    """`dataset` with FFCV files that were added afterwards."""
    dest = shutil.copytree(dataset, tmp_path_factory.mktemp("ffcv") / "set")
    result = call(source, dest, *FFCV)
    assert result.returncode == 0 and "is prepared" in result.stdout, result
    return dest


@pytest.mark.slow
@needs_ffcv
def test_ffcv_files_are_added_to_what_is_there(source, dataset, with_ffcv):
    before, after = contents(dataset), contents(with_ffcv)
    new = {f"{split}.beton{ending}" for split in ("train", "val") for ending in ("", ".index")}
    assert after.keys() == before.keys() | new
    assert {name for name in before if before[name] != after[name]} == {"manifest.json"}
    again = call(source, with_ffcv, *FFCV)
    assert again.returncode == 0 and "is already prepared" in again.stdout and contents(with_ffcv) == after
    fails_with(78, call(source, with_ffcv, *FFCV, "--ffcv-mode", "raw"), "has FFCV files of mode jpeg, not raw")


@pytest.mark.slow
@needs_ffcv
def test_killed_while_it_writes_an_ffcv_file(source, dataset, with_ffcv, tmp_path):
    dest = tmp_path / "set"
    process = start_command(source, dest, *FFCV, until=lambda: any(dest.glob("train.beton*.tmp")))
    kill(process)
    shards_only = call("verify", dest)
    assert shards_only.returncode == 0 and not (dest / "train.beton").exists()
    result = call(source, dest, *FFCV)
    assert result.returncode == 0 and "is prepared" in result.stdout, result
    assert contents(dest) == contents(with_ffcv)


@pytest.mark.slow
@needs_ffcv
def test_verify_finds_a_flipped_bit_in_an_ffcv_file(with_ffcv):
    from data_pipeline.manifest import open_manifest

    assert call("verify", with_ffcv).returncode == 0
    record = open_manifest(with_ffcv).split("train").beton_records[5]
    byte = int(record["offset"]) + int(record["size"]) // 2
    flip_bit(with_ffcv / "train.beton", byte)
    fails_with(65, call("verify", with_ffcv), "train.beton is damaged: sample 5 ")
    flip_bit(with_ffcv / "train.beton", byte)
