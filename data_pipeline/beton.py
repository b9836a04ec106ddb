"""Write a prepared split once more as one FFCV file (`.beton`), and check it.

The file is FFCV's own format, written by FFCV's own DatasetWriter, and FFCV's stock Loader reads it: an RGBImageField `image` with the
original bytes of the JPEG ("jpeg"; FFCV by itself would encode it anew) or its pixels ("raw"), and an IntField `label`; samples in the
order of their ids. Beside it lies `<file>.index`, a table of manifest.RECORD, through which our backend reads it without FFCV.

Training does not go through FFCV's engine. Around the same decoder it reached 826 images/s on a core where plain files reached 865 to 905;
it compiles for 5 to 11 s at every start; its random numbers cannot be reproduced; and from damaged bytes it returns black or another
image's pixels without a word. What is FFCV's here is the format, which others can read.

DatasetWriter waits for ever for a worker that failed. So it runs in a process group of its own, where every sample is checked before it is
handed over, a thread watches the worker, and a failure of whatever kind ends the group. It writes with one worker, before which threads
read and decode ahead: so the same split makes the same file to the byte, and samples that are near in id are near in the file.
"""

import contextlib
import hashlib
import importlib.util
import json
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data_pipeline.backends.stored import StoredSamples, stored_in_shards
from data_pipeline.jpeg import read_header
from data_pipeline.manifest import RECORD, Beton, DataError, Split, UsageError, publish, sha256_of
from data_pipeline.validate import BadImage, one_sample

MODES = ("jpeg", "raw")
PAGE = 1 << 23  # bytes: FFCV's default; a sample lies inside one page, so a larger one needs larger pages


def require_ffcv() -> None:
    """Raise UsageError if FFCV is not installed. Does not import it, which takes seconds."""
    if importlib.util.find_spec("ffcv") is None:
        raise UsageError(
            "writing FFCV files needs ffcv: apt-get install libopencv-dev libturbojpeg0-dev; pip install 'cat-training[ffcv]'."
        )


def write_beton(split: Split, path: Path, *, mode: str, workers: int, progress: Callable[[int], None] = lambda done: None) -> Beton:
    """Write `split`, read from its WebDataset shards, as the FFCV file `path` in the split's folder, and its index `<path>.index`.

    mode: "jpeg" or "raw". workers: threads that read and decode. progress is called with the number of samples written so far.
    Returns the entry of the manifest, which is the caller's to write. Both files get their names when they are whole and have been read
    back; whatever ends this before leaves at most files named `*.tmp`. Raises UsageError without FFCV, DataError for a sample that cannot
    be read or is no RGB or gray JPEG, OSError where the writer fails (a full disk, killed for memory).
    """
    require_ffcv()
    temporary, index = (path.with_name(f"{name}.{os.getpid()}.tmp") for name in (path.name, f"{path.name}.index"))
    try:
        _run_writer(_Task(replace(split), temporary, index, mode, workers), progress)
        progress(split.samples)
        sha256, damaged = read_back(temporary, np.fromfile(index, RECORD))
        if damaged:  # FFCV does not look at how much of a page the disk took
            raise OSError(f"{path}: {len(damaged)} samples are not as they were written, the first is {damaged[0]}; is the disk full?")
        beton = Beton(path.name, temporary.stat().st_size, sha256, mode, sha256_of(index))
        publish(index, path.with_name(f"{path.name}.index"))
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        index.unlink(missing_ok=True)
    return beton


def check_beton(split: Split) -> list[str]:
    """Read the split's beton and its index, and return one sentence per fault found (none: they are whole)."""
    path = split.folder / split.beton.file
    faults, records = [], split.beton_records
    if sha256_of(split.beton_index_path) != split.beton.fingerprint:
        faults.append(f"{split.beton_index_path} is damaged: its SHA-256 is not the manifest's.")
        records = records[:0]  # it cannot tell the samples apart any more
    sha256, damaged = read_back(path, records)
    faults += [f"{path} is damaged: sample {sample} (byte {records[sample]['offset']}) fails its checksum." for sample in damaged]
    if not damaged and sha256 != split.beton.sha256:
        faults.append(
            f"{path} is damaged: its SHA-256 is not the manifest's" + (", though its samples are whole." if len(records) else ".")
        )
    return faults


def read_back(path: Path, records: np.ndarray) -> tuple[str, list[int]]:
    """A file's SHA-256, and which of its `records` (manifest.RECORD, by rising offset) fail their checksum. Read once, front to back."""
    digest, damaged = hashlib.sha256(), []
    with open(path, "rb") as file:
        columns = (records[name].tolist() for name in ("offset", "size", "checksum"))
        for number, (offset, size, checksum) in enumerate(zip(*columns, strict=True)):
            digest.update(file.read(offset - file.tell()))
            data = file.read(size)
            digest.update(data)
            if zlib.crc32(data) != checksum:
                damaged.append(number)
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest(), damaged


# --- the writer's process, seen from outside -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """What the writer's process is to do."""

    split: Split
    path: Path
    index: Path
    mode: str
    workers: int


def _run_writer(task: _Task, progress: Callable[[int], None]) -> None:
    """Run `_main` below in a process group of its own, and end all of it whatever happens here."""
    root = str(Path(__file__).resolve().parents[1])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        "NUMBA_DISABLE_JIT": "1",  # nothing of it is needed to write, and importing FFCV compiles for 5 s
        "PYTHONWARNINGS": "ignore",  # so that the last line on standard error is a failure's
        "TQDM_DISABLE": "1",
    }
    command = [sys.executable, "-c", "from data_pipeline import beton; beton._main()"]
    with tempfile.TemporaryFile() as errors:
        writer = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment, start_new_session=True
        )
        try:
            done = 0
            with contextlib.suppress(BrokenPipeError):  # it died at once: its exit code is looked at below
                pickle.dump(task, writer.stdin)
                writer.stdin.flush()  # and stays open: its end is how the writer learns of ours
            for line in writer.stdout:
                message = json.loads(line)
                if "error" in message:
                    raise DataError(message["error"])
                done = message["done"]
                progress(done)
            if writer.wait():
                errors.seek(0)
                lines = errors.read().decode(errors="replace").split("\n")
                reason = next((line for line in reversed(lines) if line.strip()), "it was killed (out of memory?)")
                raise OSError(f"FFCV's writer failed at sample {done} of split {task.split.name!r}: {reason}")
        finally:
            # Not SIGKILL: multiprocessing's resource tracker ignores this signal, sees the others go, and frees their shared memory.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(writer.pid, signal.SIGTERM)
            writer.wait()
            writer.stdout.read()  # ends when the last of the group has
            writer.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                writer.stdin.close()


# --- in the writer's process -----------------------------------------------------------------------------------------------------------


def _main() -> None:
    task: _Task = pickle.load(sys.stdin.buffer)
    from ffcv.fields import IntField, RGBImageField
    from ffcv.reader import Reader
    from ffcv.writer import DatasetWriter

    records = task.split.records
    image = RGBImageField()
    # On the object and not in a subclass, which the file would name as a custom field: so it is a stock one for every reader.
    image.encode = _encode
    pixels = records["width"].astype(np.int64) * records["height"] * 3
    largest = int((pixels if task.mode == "raw" else records["size"]).max())
    page = max(PAGE, 1 << (largest - 1).bit_length())
    samples = _Samples(task)
    threading.Thread(target=_watch, daemon=True).start()
    writer = DatasetWriter(str(task.path), {"image": image, "label": IntField()}, page_size=page, num_workers=1)
    writer.from_indexed_dataset(samples)

    table = Reader(str(task.path)).alloc_table
    table = table[np.argsort(table["sample_id"])]
    index = np.array(records)
    index["offset"], index["size"], index["shard"] = table["ptr"], table["size"], 0
    index["checksum"] = samples.checksums
    index.tofile(task.index)


def _watch() -> None:
    """End the group when the worker fails, for which the writer would wait for ever, or when our parent has ended before us."""
    while not (workers := multiprocessing.active_children()):
        time.sleep(0.02)
    parent = sys.stdin.fileno()
    for worker in workers:
        ended = multiprocessing.connection.wait([parent, worker.sentinel])
        if parent not in ended:
            worker.join()
        if worker.exitcode != 0:
            os.killpg(0, signal.SIGTERM)


def _say(**message: object) -> None:
    """A line to the parent process, from whichever process of the group."""
    os.write(1, json.dumps(message).encode() + b"\n")


@dataclass(frozen=True)
class _Image:
    """What is to be stored of an image: the bytes of a JPEG, or its pixels."""

    data: np.ndarray
    mode: str
    width: int
    height: int


def _encode(destination: np.ndarray, image: _Image, malloc: Callable) -> None:
    """FFCV's Field.encode: the image's bytes, as they are, into FFCV's page."""
    from ffcv.fields.rgb_image import IMAGE_MODES

    destination["mode"] = IMAGE_MODES["jpg" if image.mode == "jpeg" else "raw"]
    destination["width"], destination["height"] = image.width, image.height
    destination["data_ptr"], storage = malloc(image.data.size)
    storage[:] = image.data


class _Samples:
    """The split, as DatasetWriter asks for it: every sample once, by rising number. Threads read and decode ahead."""

    def __init__(self, task: _Task):
        self.task, self.records = task, task.split.records
        self.stored: StoredSamples = stored_in_shards(task.split)
        # Of what is stored; written by the worker, read by the process that forked it.
        self.checksums = multiprocessing.RawArray("I", len(self))
        self.pending: deque[Future] = deque()
        self.begun = 0
        self.pool: ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int) -> tuple[_Image, int]:
        self.pool = self.pool or ThreadPoolExecutor(self.task.workers)  # here, because threads do not survive the fork
        while self.begun < min(number + 2 * self.task.workers, len(self)):
            self.pending.append(self.pool.submit(self._load, self.begun))
            self.begun += 1
        try:
            image = self.pending.popleft().result()
        except DataError as error:
            _say(error=str(error))
            raise
        _say(done=int(number))
        return image, int(self.records["label"][number])

    def _load(self, number: int) -> _Image:
        """Read sample `number` and see that it is what FFCV can hold. Raises DataError with a sentence that names it."""
        import simplejpeg

        [data], failures = self.stored.read(np.array([number]))
        try:
            if failures:
                raise BadImage(failures[0])
            with one_sample():
                width, height, colorspace = read_header(data)
                if colorspace in ("CMYK", "YCCK"):
                    raise BadImage(f"it is a {colorspace} JPEG, which an FFCV file cannot hold")
                expected = tuple(int(self.records[name][number]) for name in ("width", "height"))
                if (width, height) != expected:
                    raise BadImage(f"it is {width}x{height} pixels where the index says {expected[0]}x{expected[1]}")
                stored = np.frombuffer(data, np.uint8)
                if self.task.mode == "raw":
                    stored = simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True).reshape(-1)
        except BadImage as error:
            raise DataError(self.stored.sentence(number, str(error))) from error
        self.checksums[number] = zlib.crc32(stored)
        return _Image(stored, self.task.mode, width, height)
