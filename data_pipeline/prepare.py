"""Pack a source of images into a prepared dataset: WebDataset shards, one index per split, and the manifest (see manifest.py).

The shards are planned from the source's listing before the first one is written, so the plan is a pure function of the source and the
arguments: worker processes write shards in any order, a killed run goes on with those that are missing, and the result is the same to
the byte. A sample's key in its shard is its position in the plan; its id is its position in the index. The two differ only behind an
image that was found corrupt and left out.

In `DEST/.work`: `plan.json` (what is being prepared), and per finished shard `<shard>.done` (one line of JSON, then its records).
"""

import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tarfile
import threading
import time
import zlib
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path

import numpy as np

from data_pipeline.manifest import (
    FILE_NAME,
    RECORD,
    DataError,
    Manifest,
    Shard,
    Split,
    open_manifest,
    publish,
    sha256_of,
    write_atomically,
    write_manifest,
)
from data_pipeline.sources import SPLITS, Items, Listing, Source, UsageError, encode_jpeg, list_source, open_source, read_image

REPORT_NAME = "report.json"
BLOCK = 512  # bytes: everything in a tar file starts at a multiple of it
MAX_PIXELS = 89_478_485  # Pillow's limit against decompression bombs; a larger image is left out


class BadImage(Exception):
    """The bytes are no image that can be used; the message says why."""


@dataclass(frozen=True)
class ShardTask:
    """Everything a worker needs to write one shard. `first` is the key of its first sample, `slot` its place in the progress table."""

    dest: Path
    file: str
    source: Source
    first: int
    items: Items
    slot: int

    @property
    def done_path(self) -> Path:
        return self.dest / ".work" / f"{self.file}.done"


def prepare(source_text: str, dest: Path, *, workers: int, shard_bytes: int, val_fraction: float, seed: int) -> bool:
    """Prepare `dest`, or go on where a killed run with the same arguments stopped. False if it was finished already.

    Args: `source_text` as on the command line; `shard_bytes` the intended size of a shard; `val_fraction` the part of the images that
    becomes val where the source has no val of its own (0: none). Raises UsageError, DataError, OSError (a full disk), or
    BrokenProcessPool where a worker was killed.
    """
    dest = dest.resolve()
    path = Path(source_text)
    name = str(path.resolve()) if path.exists() else source_text
    arguments = {"source": name, "shard_bytes": shard_bytes, "val_fraction": val_fraction, "seed": seed}
    work = dest / ".work"
    if (dest / FILE_NAME).exists():
        _refuse_other(dest, arguments, dest / REPORT_NAME)
        open_manifest(dest)  # a file that has gone since is an error here, not a surprise in training
        shutil.rmtree(work, ignore_errors=True)  # the last run may have been killed just before this
        return False
    if dest.is_dir() and any(dest.iterdir()) and not work.is_dir():
        raise UsageError(f"{dest} is not empty: choose a new folder, or delete it.")
    work.mkdir(parents=True, exist_ok=True)
    with _locked(work):
        _refuse_other(dest, arguments, work / "plan.json")
        for left_over in [*work.glob("*.tmp"), *dest.glob("*.tmp")]:
            left_over.unlink()
        source = open_source(source_text, work)
        listing = _with_val(list_source(source), val_fraction, seed)
        plan = {"arguments": arguments, "listing": listing.digest()}
        if not (work / "plan.json").exists():
            write_atomically(work / "plan.json", json.dumps(plan).encode())
        elif json.loads((work / "plan.json").read_text()) != plan:
            raise UsageError(f"{source_text} has changed since {dest} was begun: delete {dest} and start again.")
        tasks = _plan(dest, source, listing, shard_bytes, seed)
        _pack_all([task for split in tasks.values() for task in split], workers)
        _finish(dest, listing, tasks, arguments)
    shutil.rmtree(work)
    return True


def _refuse_other(dest: Path, arguments: dict, path: Path) -> None:
    """Raise UsageError if `path` (a plan or a report) says that `dest` was begun with other arguments."""
    if path.exists():
        earlier = json.loads(path.read_text())["arguments"]
        changed = [f"{key} {earlier[key]} and not {value}" for key, value in arguments.items() if earlier[key] != value]
        if changed:
            raise UsageError(f"{dest} was prepared with {', '.join(changed)}: give another folder, or delete it.")


@contextlib.contextmanager
def _locked(work: Path):
    """Hold the work folder for this process alone; the lock goes with the process, however it ends."""
    with open(work / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another process is preparing {work.parent} at this moment.") from None
        yield


def _with_val(listing: Listing, fraction: float, seed: int) -> Listing:
    """The listing with `fraction` of its train images drawn, by the seed, as val."""
    if not fraction:
        return listing
    if "val" in listing.splits:
        raise UsageError("the source has a val split of its own: leave --val-fraction out.")
    train = listing.splits["train"]
    count = round(len(train.names) * fraction)
    if not 0 < count < len(train.names):
        raise UsageError(f"--val-fraction {fraction} of {len(train.names)} images leaves a split empty.")
    order = _permutation(len(train.names), seed, stream=len(SPLITS))
    return Listing(
        listing.classes, {"train": train.take(np.sort(order[count:])), "val": train.take(np.sort(order[:count]))}, listing.ignored
    )


def _permutation(n: int, seed: int, stream: int) -> np.ndarray:
    """A permutation of 0 … n-1 that depends on the seed and the stream alone."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, stream], dtype=np.uint64))).permutation(n)


def _plan(dest: Path, source: Source, listing: Listing, shard_bytes: int, seed: int) -> dict[str, list[ShardTask]]:
    """Shuffle each split and cut it into shards of about equal size, at most `shard_bytes` where images are small beside that."""
    tasks, slot = {}, 0
    for stream, split in enumerate(SPLITS):
        if split not in listing.splits:
            continue
        items = listing.splits[split]
        order = _permutation(len(items.names), seed, stream)
        # An image takes a header, its bytes in whole blocks, and as much as two blocks for its label.
        ends = np.cumsum(3 * BLOCK + -(-items.sizes[order] // BLOCK) * BLOCK)
        starts = np.concatenate([[0], ends[:-1]])
        count = -(-int(ends[-1]) // shard_bytes)
        shard = starts * count // ends[-1]
        cuts = [0, *(np.flatnonzero(np.diff(shard)) + 1), len(order)]
        tasks[split] = []
        for number, (first, last) in enumerate(zip(cuts, cuts[1:], strict=False)):
            file = f"{split}-{number:06d}.tar"
            tasks[split].append(ShardTask(dest, file, source, int(first), items.take(order[first:last]), slot))
            slot += 1
    return tasks


# --- in the parent ---------------------------------------------------------------------------------------------------------------------


def _pack_all(tasks: list[ShardTask], workers: int) -> None:
    """Write every shard that is not finished, in `workers` processes."""
    # Spawned, not forked: a forked worker inherits the pipes of its siblings, and would outlive a killed parent.
    context = multiprocessing.get_context("spawn")
    counts = context.RawArray("q", max(1, len(tasks)))  # images done per shard: no two processes write the same place, so no lock
    todo = []
    for task in tasks:
        if _is_done(task):
            counts[task.slot] = len(task.items.names)
        else:
            todo.append(task)
    if not todo:
        return
    before = set(multiprocessing.active_children())
    progress = _Progress(sum(len(task.items.names) for task in tasks), sum(counts))
    with (
        contextlib.closing(progress),
        ProcessPoolExecutor(min(workers, len(todo)), mp_context=context, initializer=_start_worker, initargs=(counts,)) as pool,
    ):
        try:
            queue, running = iter(todo), set()
            while True:
                # A few at a time: every task that waits in the pool is a copy of its part of the listing.
                with _ctrl_c_held():
                    while len(running) < 2 * workers and (task := next(queue, None)) is not None:
                        running.add(pool.submit(_pack, task))
                if not running:
                    break
                finished, running = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in finished:
                    future.result()
                progress.show(sum(counts))
        except BaseException:
            # Leaving the pool waits for its workers: end them now rather than after their shards.
            for child in set(multiprocessing.active_children()) - before:
                child.kill()
            raise


@contextlib.contextmanager
def _ctrl_c_held():
    """Ctrl-C waits until this block is over. Processes started in it never see one, not even before their first line of Python."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _is_done(task: ShardTask) -> bool:
    """True if the shard was finished: its `.done` file is written after it, and both in one piece."""
    try:
        return (task.dest / task.file).stat().st_size == _read_done(task)[0]["shard"]["bytes"]
    except FileNotFoundError:
        return False


def _read_done(task: ShardTask) -> tuple[dict, np.ndarray]:
    header, _, records = task.done_path.read_bytes().partition(b"\n")
    return json.loads(header), np.frombuffer(records, dtype=RECORD).copy()


class _Progress:
    """A progress bar on a terminal, a line every ten seconds elsewhere; on standard error. `done` images are there from before."""

    def __init__(self, total: int, done: int):
        from tqdm import tqdm

        self.total, self.first, self.start = total, done, time.monotonic()
        self.next_line = self.start + 10
        self.bar = tqdm(total=total, initial=done, unit=" images", smoothing=0.1) if sys.stderr.isatty() else None

    def show(self, done: int) -> None:
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(done - self.bar.n)
        elif now >= self.next_line:
            rate = (done - self.first) / (now - self.start)
            print(f"{done}/{self.total} images, {rate:.0f} images/s", file=sys.stderr, flush=True)
            self.next_line = now + 10

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _finish(dest: Path, listing: Listing, tasks: dict[str, list[ShardTask]], arguments: dict) -> None:
    """Join the shards' records into each split's index, then write the report, and last the manifest."""
    splits, report = {}, {"arguments": arguments, "ignored_files": listing.ignored, "splits": {}}
    for split, shard_tasks in tasks.items():
        index = dest / f"{split}.index"
        temporary = dest / f"{split}.index.tmp"
        shards, transcoded, excluded = [], [], []
        with open(temporary, "wb") as file:
            for number, task in enumerate(shard_tasks):
                header, records = _read_done(task)
                records["shard"] = number
                file.write(records.tobytes())
                shards.append(Shard(**header["shard"]))
                transcoded += header["transcoded"]
                excluded += header["excluded"]
        samples = sum(shard.samples for shard in shards)
        if not samples:
            raise DataError(f"none of the {len(excluded)} images of {split} can be read; the first is {excluded[0][0]}: {excluded[0][1]}.")
        publish(temporary, index)
        splits[split] = Split(dest, split, samples, sha256_of(index), tuple(shards))
        report["splits"][split] = {"samples": samples, "transcoded": transcoded, "excluded": excluded}
    write_atomically(dest / REPORT_NAME, json.dumps(report, indent=1).encode())
    write_manifest(Manifest(dest, listing.classes, splits))


# --- in a worker -----------------------------------------------------------------------------------------------------------------------

_counts = None  # the table of images done per shard, shared with the parent


def _start_worker(counts) -> None:
    global _counts
    _counts = counts

    def follow_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)  # a worker of a killed parent would wait for its next task for ever

    threading.Thread(target=follow_parent, daemon=True).start()


def _pack(task: ShardTask) -> None:
    """Write one shard under a temporary name, then name it, then its `.done` file."""
    records, transcoded, excluded = [], [], []
    digest, position = hashlib.sha256(), 0
    temporary = task.dest / ".work" / f"{task.file}.{os.getpid()}.tmp"
    with open(temporary, "wb") as file:
        rows = zip(task.items.names, task.items.labels.tolist(), task.items.offsets.tolist(), task.items.sizes.tolist(), strict=True)
        for number, (name, label, offset, size) in enumerate(rows):
            try:
                data, width, height, change = check_image(read_image(task.source, name, offset, size))
            except BadImage as error:
                excluded.append([name, str(error)])
                continue
            finally:
                _counts[task.slot] = number + 1
            if change:
                transcoded.append([name, change])
            key = f"{task.first + number:09d}"
            records.append((position + BLOCK, len(data), 0, label, zlib.crc32(data), width, height))
            block = _tar_member(f"{key}.jpg", data) + _tar_member(f"{key}.cls", str(label).encode())
            file.write(block)
            digest.update(block)
            position += len(block)
        end = bytes(2 * BLOCK)  # the tar format's end mark
        file.write(end)
        digest.update(end)
        position += len(end)
    publish(temporary, task.dest / task.file)
    header = {"shard": asdict(Shard(task.file, len(records), position, digest.hexdigest())), "transcoded": transcoded, "excluded": excluded}
    write_atomically(task.done_path, json.dumps(header).encode() + b"\n" + np.array(records, dtype=RECORD).tobytes())


def _tar_member(name: str, data: bytes) -> bytes:
    info = tarfile.TarInfo(name)  # owner, time and mode are constants: the same shard must have the same bytes
    info.size = len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % BLOCK)


def check_image(data: bytes) -> tuple[bytes, int, int, str]:
    """Decode an image completely and strictly. Returns its JPEG's bytes, width, height, and what was changed ("" where nothing was).

    A sound RGB or gray JPEG keeps its bytes; CMYK and other formats become an RGB JPEG. Raises BadImage where it does not decode.
    """
    import simplejpeg
    from PIL import Image

    kind = "JPEG"
    if data.startswith(b"\xff\xd8"):
        try:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
            _check_size(width, height)
            cmyk = colorspace in ("CMYK", "YCCK")
            simplejpeg.decode_jpeg(data, "CMYK" if cmyk else "RGB")  # strict: bit rot and truncation raise, where Pillow may be silent
        except ValueError as error:
            raise BadImage(str(error)) from error
        if not cmyk:
            return data, width, height, ""
        kind = "CMYK JPEG"
    try:
        with Image.open(BytesIO(data)) as image:
            kind = kind if image.format == "JPEG" else image.format
            _check_size(*image.size)
            return encode_jpeg(image), *image.size, f"{kind} to JPEG"
    except BadImage:
        raise
    except Exception as error:  # Pillow's plugins raise nearly every kind there is
        raise BadImage("not an image" if isinstance(error, Image.UnidentifiedImageError) else str(error)) from error


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width}x{height} pixels, more than {MAX_PIXELS}")
