"""FFCV files: written by FFCV's writer, read by FFCV's Loader and our backend, and no remains of a failed writer."""

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import simplejpeg

from data_pipeline.backends import open_backend
from data_pipeline.durable import sha256_of
from data_pipeline.manifest import Manifest, open_manifest, write_manifest
from data_pipeline.preparation.beton import check_beton, write_beton
from data_pipeline.split import DataError, Split
from tests.data_pipeline.shards import jpeg, picture, write_split

ROOT = Path(__file__).resolve().parents[3]


if importlib.util.find_spec("ffcv") is None:
    pytest.skip("ffcv is not installed (the optional extra `ffcv`)", allow_module_level=True)
pytestmark = pytest.mark.slow  # every test that writes starts FFCV, which takes 4 s


def images() -> list[bytes]:
    """JPEGs of one size, as FFCV's simplest decoder requires; the third is gray."""
    pictures = [jpeg(number, 72, 48) for number in range(10)]
    gray = np.ascontiguousarray(picture(2, 72, 48)[:, :, :1])
    return [*pictures[:2], simplejpeg.encode_jpeg(gray, colorspace="GRAY", quality=95), *pictures[3:]]


@pytest.fixture(scope="module")
def as_jpeg(tmp_path_factory) -> Split:
    folder = tmp_path_factory.mktemp("jpeg")
    split = write_split(folder, images(), labels=[7, 1, 4, 3, 0, 2, 9, 8, 6, 5], per_shard=4)
    done = []
    beton = write_beton(split, folder / "train.beton", mode="jpeg", workers=2, progress=done.append)
    assert done == list(range(11))
    write_manifest(Manifest(folder, tuple("abcdefghij"), {"train": replace(split, beton=beton)}))
    return open_manifest(folder).split("train")


def left_over(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if "beton" in path.name]


# --- contents --------------------------------------------------------------------------------------------------------


def test_the_original_bytes_in_the_order_of_the_ids(as_jpeg):
    data = (as_jpeg.folder / "train.beton").read_bytes()
    records = as_jpeg.beton_records
    assert [data[record["offset"] : record["offset"] + record["size"]] for record in records] == images()
    assert (np.diff(records["offset"].astype(np.int64)) > 0).all()
    for name in ("label", "width", "height", "checksum"):
        assert np.array_equal(records[name], as_jpeg.records[name])
    assert sorted(left_over(as_jpeg.folder)) == ["train.beton", "train.beton.index"]
    assert check_beton(as_jpeg) == []


STOCK_LOADER = """
import sys
import numpy as np
from ffcv.fields.basics import IntDecoder
from ffcv.fields.rgb_image import SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption
pipelines = {"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]}
batches = [
    [np.array(column) for column in batch]
    for batch in Loader(sys.argv[1], batch_size=5, num_workers=1, order=OrderOption.SEQUENTIAL, pipelines=pipelines)
]
images, labels = (np.concatenate(column) for column in zip(*batches))
np.savez(sys.argv[2], images=images, labels=labels)
"""


def test_ffcvs_own_loader_reads_it(as_jpeg, tmp_path):
    command = [sys.executable, "-c", STOCK_LOADER, str(as_jpeg.folder / "train.beton"), str(tmp_path / "out.npz")]
    subprocess.run(command, check=True, capture_output=True)
    found = np.load(tmp_path / "out.npz")
    assert found["labels"][:, 0].tolist() == as_jpeg.records["label"].tolist()
    expected = np.stack([simplejpeg.decode_jpeg(data, "RGB", fastdct=True) for data in images()])  # as FFCV decodes
    assert np.array_equal(found["images"], expected)


def test_the_same_bits_as_webdataset(as_jpeg):
    windows = np.array([[3, 5, 40, 30, number % 2] for number in range(10)], np.int32)
    pixels = {}
    for name in ("webdataset", "ffcv"):
        pixels[name] = np.zeros((10, 24, 24, 3), np.uint8)
        assert open_backend(name, as_jpeg).decode_batch(np.arange(10), windows, (24, 24), "bicubic", pixels[name]) == {}
    assert np.array_equal(pixels["webdataset"], pixels["ffcv"])


@pytest.fixture
def one_cpu():
    """With one CPU, an interpreter that has imported FFCV waits for ever for numba's threads at its end."""
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cpus)})
    yield
    os.sched_setaffinity(0, cpus)


@pytest.mark.usefixtures("one_cpu")
def test_raw_pixels_and_a_sample_larger_than_a_page(tmp_path):
    # 2400 x 1200 x 3 bytes are more than a page of 8 MiB.
    pictures = [jpeg(0, 40, 30), jpeg(1, 2400, 1200), images()[2], jpeg(3, 33, 77)]
    split = write_split(tmp_path, pictures)
    split = replace(split, beton=write_beton(split, tmp_path / "train.beton", mode="raw", workers=2))
    assert check_beton(split) == []
    data = (tmp_path / "train.beton").read_bytes()
    for record, image in zip(split.beton_records, pictures, strict=True):
        assert (
            data[record["offset"] : record["offset"] + record["size"]] == simplejpeg.decode_jpeg(image, "RGB").tobytes()
        )
    windows = np.array([[5, 3, 20, 20, 1], [100, 50, 2000, 1000, 0], [0, 0, 72, 48, 0], [-5, 10, 33, 77, 1]], np.int32)
    pixels = {}
    for name in ("webdataset", "ffcv"):
        pixels[name] = np.zeros((4, 24, 24, 3), np.uint8)
        assert open_backend(name, split).decode_batch(np.arange(4), windows, (24, 24), "bicubic", pixels[name]) == {}
    assert np.array_equal(pixels["webdataset"], pixels["ffcv"])


# --- damage to a finished file ---------------------------------------------------------------------------------------


@pytest.fixture
def copy(as_jpeg, tmp_path) -> Split:
    for path in as_jpeg.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return open_manifest(tmp_path).split("train")


def flip(path: Path, position: int) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))


def test_a_flipped_bit_is_found_and_named(copy):
    path = copy.folder / "train.beton"
    flip(path, int(copy.beton_records["offset"][3]) + 500)
    assert [fault.replace(str(copy.folder), "") for fault in check_beton(copy)] == [
        f"/train.beton is damaged: sample 3 (byte {copy.beton_records['offset'][3]}) fails its checksum."
    ]
    out = np.zeros((3, 24, 24, 3), np.uint8)
    windows = np.array([[0, 0, 72, 48, 0]] * 3, np.int32)
    failures = open_backend("ffcv", copy).decode_batch(np.array([2, 3, 4]), windows, (24, 24), "bicubic", out)
    assert list(failures) == [1] and "train.beton: sample 3 of split 'train'" in failures[1]


def test_damage_beside_the_samples_and_in_the_index_is_found(copy):
    flip(copy.folder / "train.beton", 1000)  # in FFCV's own header
    [fault] = check_beton(copy)
    assert "train.beton is damaged" in fault and "its samples are whole" in fault
    flip(copy.folder / "train.beton.index", 40)
    assert any("train.beton.index is damaged" in fault for fault in check_beton(copy))


@pytest.mark.parametrize("name", ["train.beton", "train.beton.index"])
def test_a_missing_file_is_named(copy, name):
    (copy.folder / name).unlink()
    with pytest.raises(DataError, match=f"{name} is missing"):
        open_manifest(copy.folder)


# --- failures while writing ------------------------------------------------------------------------------------------


def children() -> set[psutil.Process]:
    """Child processes of this process. Other tests may have left a server process for theirs."""
    return set(psutil.Process().children(recursive=True))


def shared_memory(processes: list[psutil.Process]) -> set[Path]:
    """The segments that the processes have mapped."""
    paths = [part.path for process in processes for part in process.memory_maps()]
    return {Path(path) for path in paths if path.startswith("/dev/shm/psm_")}


@pytest.mark.parametrize(
    ("bad", "why"),
    [(b"\x89PNG\r\n", "Could not determine"), (None, "checksum")],
)
def test_a_sample_that_ffcv_cannot_hold_is_named(tmp_path, bad, why):
    before = children()
    pictures = images()
    pictures[6] = bad or pictures[6]
    split = write_split(tmp_path, pictures, sizes=[(72, 48)] * 10)
    if bad is None:
        flip(tmp_path / split.shards[0].file, int(split.records["offset"][6]) + 100)
    with pytest.raises(DataError, match=f"train-00000.tar: sample 6 of split 'train' .*{why}"):
        write_beton(split, tmp_path / "train.beton", mode="jpeg", workers=2)
    assert left_over(tmp_path) == [] and children() == before


@pytest.fixture
def long(tmp_path) -> Split:
    """A split that keeps FFCV's writer busy for a while: ten images, each many times."""
    split = write_split(tmp_path, images())
    np.tile(np.array(split.records), 30_000).tofile(split.index_path)
    [shard] = split.shards
    shards = (replace(shard, samples=300_000),)
    return replace(split, samples=300_000, fingerprint=sha256_of(split.index_path), shards=shards)


def worker_of(process: psutil.Process) -> psutil.Process:
    """The process that DatasetWriter started below `process`: it and its parent have the writer's command line."""
    writers = [child for child in process.children(recursive=True) if "beton" in " ".join(child.cmdline())]
    return next(child for child in writers if child.ppid() in [writer.pid for writer in writers])


def test_a_worker_that_is_killed_ends_the_writing(long):
    before = children()
    segments = set()

    def kill_the_worker(done: int) -> None:
        if done == 1000:
            worker = worker_of(psutil.Process())
            segments.update(shared_memory([worker]))
            worker.kill()

    with pytest.raises(OSError, match=r"FFCV's writer failed at sample \d+ of split 'train': it was killed"):
        write_beton(long, long.folder / "train.beton", mode="jpeg", workers=1, progress=kill_the_worker)
    assert left_over(long.folder) == [] and children() == before
    assert segments and not any(segment.exists() for segment in segments)


def test_a_disk_that_is_full_ends_the_writing(long):
    """A limit on the size of files simulates it: the write that crosses the limit is short, and the next one fails."""
    script = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (30_000_000, 30_000_000))"
    assert run_in_process(long, script, stdout=subprocess.DEVNULL).wait() == 1
    [line] = (long.folder / "error").read_text().splitlines()
    assert line.startswith("OSError: FFCV's writer failed at sample") and "File too large" in line
    assert left_over(long.folder) == []


def run_in_process(split: Split, before: str = "", stdout: int = subprocess.PIPE) -> subprocess.Popen:
    """Run write_beton in another process, which prints its progress and writes its exception to the file `error`."""
    write_manifest(Manifest(split.folder, tuple("abcdefghij"), {"train": split}))
    script = f"""
import sys, traceback
from pathlib import Path
from data_pipeline.preparation.beton import write_beton
from data_pipeline.manifest import open_manifest
{before}
folder = Path(sys.argv[1])
try:
    split = open_manifest(folder).split("train")
    write_beton(split, folder / "train.beton", mode="jpeg", workers=1, progress=lambda done: print(done, flush=True))
except BaseException as error:
    (folder / "error").write_text("".join(traceback.format_exception_only(error)))
    sys.exit(1)
"""
    return subprocess.Popen([sys.executable, "-c", script, str(split.folder)], cwd=ROOT, stdout=stdout)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_writer_ends_with_its_parent(long, number):
    with run_in_process(long) as parent:
        below = []
        try:
            for line in parent.stdout:
                if int(line) >= 1000:
                    break
            below = psutil.Process(parent.pid).children(recursive=True)
            assert len(below) >= 2  # FFCV's writer, its worker and multiprocessing's resource tracker
            segments = shared_memory(below)
            os.kill(parent.pid, number)
            parent.stdout.read()
            parent.wait()
            _, alive = psutil.wait_procs(below, timeout=300)
            assert alive == []
            assert segments and not any(segment.exists() for segment in segments)
        finally:
            parent.kill()
            for process in below:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
    assert not (long.folder / "train.beton").exists() and not (long.folder / "train.beton.index").exists()
    if number == signal.SIGINT:
        assert (long.folder / "error").read_text() == "KeyboardInterrupt\n"
        assert left_over(long.folder) == []
