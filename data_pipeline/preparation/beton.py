"""Write a prepared split of classification as one FFCV file (`.beton`), and check it.

The file is written by FFCV's DatasetWriter and readable by FFCV's stock Loader. It has an RGBImageField `image`, with
the original bytes of the JPEG (mode "jpeg"; FFCV by itself would encode it again) or its pixels ("raw"), and an
IntField `label`, so it holds one integer label per sample. Samples are in the order of their ids. `<file>.index`, a
table of manifest.RECORD, lets our backend read the file without FFCV.

Training does not use FFCV's engine. With the same decoder it reached 826 images/s on a core on which plain files
reached 865 to 905; it compiles for 5 to 11 s at every start; its random numbers cannot be reproduced; and for damaged
bytes it silently returns black or the pixels of another image. Only the format is used, because other programs can read
it.

DatasetWriter waits forever for a failed worker. So it runs in its own process group: every sample is checked before it
is passed on, a thread watches the worker, and any failure ends the group. It writes with one worker, and threads read
and decode ahead of it, so the same split gives the same file byte by byte, and samples with near ids lie near each
other.
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
from data_pipeline.durable import publish, sha256_of
from data_pipeline.jpeg import read_header
from data_pipeline.split import RECORD, Beton, DataError, Split, UsageError
from data_pipeline.validate import BadImage, errors_as_bad_image

MODES = ("jpeg", "raw")
PAGE = 1 << 23  # bytes: FFCV's default; a sample must fit in one page, so larger samples need larger pages


def require_ffcv() -> None:
    """Raise UsageError if FFCV is not installed. Does not import it, because that takes seconds."""
    if importlib.util.find_spec("ffcv") is None:
        raise UsageError(
            "writing FFCV files needs ffcv: apt-get install libopencv-dev libturbojpeg0-dev; pip install -e '.[ffcv]'."
        )


def write_beton(
    split: Split, path: Path, *, mode: str, workers: int, progress: Callable[[int], None] = lambda done: None
) -> Beton:
    """Write `split`, read from its shards, as the FFCV file `path` in the split's folder, with `<path>.index`.

    mode: "jpeg" or "raw". workers: threads that read and decode. progress: called with the number of samples written so
    far. Returns the entry for the manifest; the caller writes it. Both files get their final names after they have been
    read back, so an interruption leaves at most files named `*.tmp`. Raises UsageError if FFCV is not installed,
    DataError for a sample that cannot be read or is not an RGB or gray JPEG, OSError if the writer fails (a full disk,
    out of memory).
    """
    require_ffcv()
    temporary, index = (path.with_name(f"{name}.{os.getpid()}.tmp") for name in (path.name, f"{path.name}.index"))
    try:
        _run_writer(_Task(replace(split), temporary, index, mode, workers), progress)
        progress(split.samples)
        sha256, damaged = read_back(temporary, np.fromfile(index, RECORD))
        if damaged:  # FFCV does not check how much of a page was written
            raise OSError(
                f"{path}: {len(damaged)} samples differ from what was written, the first is {damaged[0]}; "
                "is the disk full?"
            )
        beton = Beton(path.name, temporary.stat().st_size, sha256, mode, sha256_of(index))
        publish(index, path.with_name(f"{path.name}.index"))
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        index.unlink(missing_ok=True)
    return beton


def check_beton(split: Split) -> list[str]:
    """Read the split's FFCV file and its index, and return one sentence per fault (an empty list if they are sound)."""
    path = split.folder / split.beton.file
    faults, records = [], split.beton_records
    if sha256_of(split.beton_index_path) != split.beton.fingerprint:
        faults.append(f"{split.beton_index_path} is damaged: its SHA-256 is not the manifest's.")
        records = records[:0]  # a damaged index cannot locate the samples
    sha256, damaged = read_back(path, records)
    faults += [
        f"{path} is damaged: sample {sample} (byte {records[sample]['offset']}) fails its checksum."
        for sample in damaged
    ]
    if not damaged and sha256 != split.beton.sha256:
        faults.append(
            f"{path} is damaged: its SHA-256 is not the manifest's"
            + (", though its samples are whole." if len(records) else ".")
        )
    return faults


def read_back(path: Path, records: np.ndarray) -> tuple[str, list[int]]:
    """A file's SHA-256, and the numbers of the `records` (manifest.RECORD, by rising offset) that fail their checksum.

    The file is read once, from its start to its end.
    """
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


# --- in the parent process -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """The arguments of the writer's process."""

    split: Split
    path: Path
    index: Path
    mode: str
    workers: int


def _run_writer(task: _Task, progress: Callable[[int], None]) -> None:
    """Run `_main` in its own process group, and end the whole group on return or on any exception."""
    root = str(Path(__file__).resolve().parents[2])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        "NUMBA_DISABLE_JIT": "1",  # writing needs no compiled code, and importing FFCV would compile for 5 s
        "PYTHONWARNINGS": "ignore",  # so that the last line on standard error is that of a failure
        "TQDM_DISABLE": "1",
    }
    command = [sys.executable, "-c", "from data_pipeline.preparation import beton; beton._main()"]
    with tempfile.TemporaryFile() as errors:
        writer = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            start_new_session=True,
        )
        try:
            done = 0
            with contextlib.suppress(BrokenPipeError):  # it died at once: its exit code is checked below
                pickle.dump(task, writer.stdin)
                writer.stdin.flush()  # stays open: the writer ends when the pipe does
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
            # Not SIGKILL: multiprocessing's resource tracker ignores SIGTERM, outlives the others and frees their
            # shared memory.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(writer.pid, signal.SIGTERM)
            writer.wait()
            writer.stdout.read()  # returns when the last process of the group has ended
            writer.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                writer.stdin.close()


# --- in the writer's process -----------------------------------------------------------------------------------------


def _main() -> None:
    task: _Task = pickle.load(sys.stdin.buffer)
    from ffcv.fields import IntField, RGBImageField
    from ffcv.reader import Reader
    from ffcv.writer import DatasetWriter

    records = task.split.records
    image = RGBImageField()
    # Set on the object, not in a subclass: the file would name a subclass as a custom field, which stock readers lack.
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
    # Everything is written. The interpreter's own end would wait for numba's threads, with one CPU for ever.
    os._exit(0)


def _watch() -> None:
    """End the group if the worker fails, because the writer would wait for it forever, or if our parent has ended."""
    while not (workers := multiprocessing.active_children()):
        time.sleep(0.02)
    parent = sys.stdin.fileno()
    for worker in workers:
        ended = multiprocessing.connection.wait([parent, worker.sentinel])
        if parent not in ended:
            worker.join()
        if worker.exitcode != 0:
            os.killpg(0, signal.SIGTERM)


def _send(**message: object) -> None:
    """Send a line to the parent process, from any process of the group."""
    os.write(1, json.dumps(message).encode() + b"\n")


@dataclass(frozen=True)
class _Image:
    """An image as it is stored: the bytes of a JPEG, or its pixels."""

    data: np.ndarray
    mode: str
    width: int
    height: int


def _encode(destination: np.ndarray, image: _Image, malloc: Callable) -> None:
    """FFCV's Field.encode: copy the image's bytes unchanged into FFCV's page."""
    from ffcv.fields.rgb_image import IMAGE_MODES

    destination["mode"] = IMAGE_MODES["jpg" if image.mode == "jpeg" else "raw"]
    destination["width"], destination["height"] = image.width, image.height
    destination["data_ptr"], storage = malloc(image.data.size)
    storage[:] = image.data


class _Samples:
    """The split as an indexed dataset for DatasetWriter, which reads every sample once, by rising number.

    Threads read and decode ahead.
    """

    def __init__(self, task: _Task):
        self.task, self.records = task, task.split.records
        self.stored: StoredSamples = stored_in_shards(task.split)
        # CRC-32 of the stored bytes; written by the worker, read by the process that forked it.
        self.checksums = multiprocessing.RawArray("I", len(self))
        self.pending: deque[Future] = deque()
        self.begun = 0
        self.pool: ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int) -> tuple[_Image, int]:
        # Created here, in the worker, because threads do not survive the fork.
        self.pool = self.pool or ThreadPoolExecutor(self.task.workers)
        while self.begun < min(number + 2 * self.task.workers, len(self)):
            self.pending.append(self.pool.submit(self._load, self.begun))
            self.begun += 1
        try:
            image = self.pending.popleft().result()
        except DataError as error:
            _send(error=str(error))
            raise
        _send(done=int(number))
        return image, int(self.records["label"][number])

    def _load(self, number: int) -> _Image:
        """Read sample `number` and check that FFCV can hold it.

        Raises DataError with a sentence that names the sample.
        """
        import simplejpeg

        [data], failures = self.stored.read(np.array([number]))
        try:
            if failures:
                raise BadImage(failures[0])
            with errors_as_bad_image():
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
