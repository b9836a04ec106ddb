"""Loads micro-batches in the order of use, decoded ahead of time by threads.

Threads suffice because decoding releases the GIL: nothing is forked, pickled or shared. The contents of a micro-batch
are a function of (seed, step, index); threads, prefetching and ranks only decide when and where it is computed.

A damaged sample is replaced by another one, determined by (seed, id); in evaluation it is left out. The micro-batch
lists damaged samples and transient faults of the file system; the caller decides what to do about them.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import count
from threading import Barrier, Thread, current_thread
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map_only

from .annotations import Labels, Targets
from .backends import Backend, open_backend
from .config import DataConfig
from .faults import PassingFault
from .order import POOL, Order
from .randomness import Stream, fold, make_key
from .split import DataError, Split, UsageError
from .storage import Ahead, StagedSplit
from .views import Views, evaluation_slices

# Images of 224 x 224 pixels that a thread decodes at once: larger chunks hardly reduce the overhead per chunk (0.1 ms,
# which holds the GIL), and closing waits for one chunk per thread. Of smaller images, of which a chunk takes less time,
# up to four times as many. Fewer if the prefetched images would not make two such chunks per thread.
LARGEST_CHUNK = 64

# Samples that are tried in place of an unreadable one. If all of them fail, the cause is not a damaged sample.
REPLACEMENTS = 8


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be read.

    sentence: where it is stored, and why it is unreadable. replaced_by: the id used instead; None: left out.
    """

    id: int
    sentence: str
    replaced_by: int | None


@dataclass(frozen=True)
class MicroBatch:
    """Micro-batch `index` of step `step`, on the host; in pinned memory if there is a GPU.

    ids: int64 [m].
    draws: numpy int64 [m], one number per use of a sample in its epoch (id + samples · copy), from which the
    keys of its crop and augmentation are made.
    images: uint8 [m, 3, H, W], RGB, in channels-last memory (on the GPU if data.device=gpu).
    targets: what the task's `Targets` made of the samples' labels (annotations.py).
    counted: bool [m]; false for samples that an evaluation must leave out.
    bad: samples that could not be read. All other fields describe the samples actually used.
    faults: reads that failed since the previous micro-batch and were repeated.
    """

    step: int
    index: int
    ids: torch.Tensor
    draws: np.ndarray
    images: torch.Tensor
    counted: torch.Tensor
    targets: Any = None
    bad: tuple[BadSample, ...] = ()
    faults: tuple[PassingFault, ...] = ()


@dataclass(frozen=True)
class _Job:
    """A micro-batch to be loaded: its samples (`draws`, int64 [m]), the windows that may be used of each (`candidates`,
    int32 [m, K, 5]), and the (height, width) to which these are resized.

    substitute: (unreadable draw, attempt, shape) → the draw to use instead and its candidates for that shape; None: the
    sample is left out.
    """

    step: int
    index: int
    draws: np.ndarray
    candidates: np.ndarray
    shape: tuple[int, int]
    substitute: Callable[[int, int, tuple[int, int]], tuple[int, np.ndarray]] | None


def build_loader(
    data: DataConfig,
    views: Views,
    split: Split,
    order: Order,
    targets: Targets | None = None,
    *,
    rank: int = 0,
    world: int = 1,
    start_step: int = 0,
) -> "Loader":
    """Iterate over the micro-batches of `rank` in the order of use, from step `start_step` on, without end.

    `targets`, which the loader closes, defaults to the records' labels. Decoding starts at once. Close the loader when
    done (it is a context manager). Raises ValueError for sizes that do not fit together.
    """
    share = order.share(rank, world)

    def jobs() -> Iterator[_Job]:
        for step in count(start_step):
            key = make_key(order.seed, Stream.CROP, order.epoch_of(step))

            def substitute(draw: int, attempt: int, shape: tuple[int, int], key: int = key) -> tuple[int, np.ndarray]:
                copy, number = divmod(draw, order.samples)
                used = order.replacement(number, attempt) + order.samples * copy
                keys, records = fold(key, np.array([used])), split.records[[used % order.samples]]
                return used, views.training(keys, records["width"], records["height"], np.array([shape]))[0]

            draws = order.draws(step, share)
            keys, records = fold(key, draws), split.records[draws % order.samples]
            widths, heights = records["width"], records["height"]
            shapes = views.shapes(keys, widths, heights)
            rows = shapes.repeat(order.micro_batch, axis=0)
            planned = views.training(keys.ravel(), widths.ravel(), heights.ravel(), rows)
            planned = planned.reshape(*draws.shape, -1, 5)
            for row, index in enumerate(share):
                yield _Job(step, index, draws[row], planned[row], tuple(shapes[row].tolist()), substitute)

    needs = (draws % order.samples for step in count(start_step) for draws in order.draws(step, share))
    return Loader(data, split, targets or Labels(split), jobs(), needs, -(-POOL * len(share) // order.global_batch))


def evaluation_batches(
    data: DataConfig,
    views: Views,
    split: Split,
    batch_size: int,
    targets: Targets | None = None,
    *,
    rank: int = 0,
    world: int = 1,
) -> Iterator[tuple[int, MicroBatch]]:
    """Every sample of `split` once, over all ranks: yields (k, batch k), where batch k holds the ids of slice k of
    `views.evaluation_slices`.

    Rank r takes k = r, r + world, …; some batches are short. All ranks yield the same number of times, because
    under ZeRO-3 every rank must take part in every forward pass: a rank without a batch in the last round repeats its
    previous one (batch 0 if it never had one), not counted. A sample that cannot be read is black, and not counted.
    """
    slices = evaluation_slices(views, split.records["width"], split.records["height"], batch_size)
    rounds = -(-len(slices) // world)
    mine = range(rank, len(slices), world)

    def needs() -> Iterator[np.ndarray]:
        for k in mine or (0,):
            yield np.arange(slices[k].start, slices[k].stop, dtype=np.int64)

    def jobs() -> Iterator[_Job]:
        for k, ids in zip(mine or (0,), needs(), strict=True):
            records = split.records[ids]
            windows, shapes = views.evaluation(records["width"], records["height"])
            yield _Job(0, k, ids, windows[:, None], tuple(shapes[0].tolist()), None)

    ahead = -(-POOL * len(slices) // (split.samples * world))
    with Loader(data, split, targets or Labels(split), jobs(), needs(), ahead) as loader:
        batch = None
        for number in range(rounds):
            batch = next(loader, batch)
            if number >= len(mine):
                batch = replace(batch, counted=torch.zeros_like(batch.counted), bad=(), faults=())
            yield batch.index, batch


class Loader(AbstractContextManager):
    """Iterator over the micro-batches of `jobs`, `data.prefetch` of them ahead.

    An error of a thread is raised in its batch's turn.

    needs: the ids of the same micro-batches; of `ahead` of them the files are staged before they are decoded, where
    `split` is staged.
    """

    def __init__(
        self,
        data: DataConfig,
        split: Split,
        targets: Targets,
        jobs: Iterator[_Job],
        needs: Iterator[np.ndarray],
        ahead: int,
    ):
        self._data, self._samples, self._targets = data, split.samples, targets
        self._backend: Backend = open_backend(data.backend, split)
        self._stored = [self._backend.stored, *([targets.stored] if targets.stored else [])]
        if data.device == "gpu" and not torch.cuda.is_available():
            raise UsageError("data.device gpu needs a GPU, and there is none here: set data.device=cpu.")
        self._jobs = jobs
        self._pin = torch.cuda.is_available()
        # A backend that writes to the GPU uses a stream of its own; on the model's stream it would wait for the model.
        self._stream = torch.cuda.Stream() if data.device == "gpu" else None
        self._executor, self._threads = _start_threads(data.workers)
        self._ahead = Ahead(self._stored, needs, ahead) if isinstance(split, StagedSplit) else None
        # One thread of its own: the training thread must not wait for files that are opened, and in a decoding thread
        # it would come too late.
        self._adviser = ThreadPoolExecutor(1, thread_name_prefix="advise")
        self._pending: deque[tuple[MicroBatch, list[Future]]] = deque()
        for _ in range(data.prefetch):
            self._submit()

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> MicroBatch:
        if not self._pending:
            raise StopIteration
        batch, chunks = self._pending.popleft()
        try:
            self._submit()
            while wait(chunks, timeout=1).not_done:
                if not all(thread.is_alive() for thread in self._threads):
                    raise RuntimeError("a decoding thread has died, and its images with it")
            bad = [sample for chunk in chunks for sample in chunk.result()[0]]
            targets = self._targets.collate([target for chunk in chunks for target in chunk.result()[1]])
        except BaseException:
            self.close()
            raise
        if self._pin:
            targets = tree_map_only(torch.Tensor, torch.Tensor.pin_memory, targets)
        faults = tuple(fault for stored in self._stored for fault in stored.take_faults())
        return replace(batch, targets=targets, bad=tuple(bad), faults=faults)

    def close(self) -> None:
        """Stop the threads and close all files. Waits for the chunks that are being decoded."""
        self._pending.clear()
        for stored in self._stored:
            stored.closing.set()
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._adviser.shutdown(wait=True, cancel_futures=True)
        if self._ahead:
            self._ahead.close()
        for stored in self._stored:
            stored.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _submit(self) -> None:
        """Start the next micro-batch, if there is one: allocate its memory, which the threads fill chunk by chunk."""
        job = next(self._jobs, None)
        if job is None:
            return
        if self._ahead:
            self._ahead.advance()
        total, (height, width) = len(job.draws), job.shape
        ids = torch.empty(total, dtype=torch.int64, pin_memory=self._pin)
        counted = torch.ones(total, dtype=torch.bool, pin_memory=self._pin)
        if self._stream is None:
            images = torch.empty((total, height, width, 3), dtype=torch.uint8, pin_memory=self._pin)
            pixels = images.numpy()
            largest = LARGEST_CHUNK * min(4, max(1, (224 // math.isqrt(height * width)) ** 2))
            length = min(largest, max(1, total * self._data.prefetch // (2 * self._data.workers)))
        else:
            with torch.cuda.stream(self._stream):
                images = torch.empty((total, height, width, 3), dtype=torch.uint8, device="cuda")
            pixels, length = images, total
        batch = MicroBatch(job.step, job.index, ids, job.draws, images.permute(0, 3, 1, 2), counted)
        chunks = [
            self._executor.submit(self._fill, job, batch, slice(start, start + length), pixels[start : start + length])
            for start in range(0, total, length)
        ]
        self._pending.append((batch, chunks))
        if not self._ahead:
            self._adviser.submit(self._will_need, job.draws % self._samples, chunks[-1])

    def _will_need(self, ids: np.ndarray, last: Future) -> None:
        """Let the system read the samples of a micro-batch ahead, unless its last chunk is being decoded already."""
        for stored in self._stored:
            if not (last.running() or last.done()):
                stored.will_need(ids)

    def _fill(
        self, job: _Job, batch: MicroBatch, part: slice, pixels: "np.ndarray | torch.Tensor"
    ) -> tuple[list[BadSample], list]:
        """Fill some rows of a micro-batch. Returns its bad samples and the targets of its rows.

        `draws` (a view of the batch's) become those of the samples actually used.
        """
        draws = job.draws[part]
        targets, failures = self._read(draws, job.candidates[part], job.shape, pixels)
        bad = [
            sample
            for row in sorted(failures)
            for sample in self._replace(job, draws, targets, pixels, row, failures[row])
        ]
        ids = draws % self._samples
        batch.ids.numpy()[part] = ids
        if job.substitute is None:
            batch.counted.numpy()[part][list(failures)] = False
        return bad, targets

    def _replace(
        self,
        job: _Job,
        draws: np.ndarray,
        targets: list,
        pixels: "np.ndarray | torch.Tensor",
        row: int,
        sentence: str,
    ) -> list[BadSample]:
        """Replace the sample in `row`, which is unreadable for the reason in `sentence`.

        Raises DataError if none can be read.
        """
        first = int(draws[row])
        if job.substitute is None:
            pixels[row] = 0
            return [BadSample(first, sentence, None)]
        sentences = {first % self._samples: sentence}
        for attempt in range(REPLACEMENTS):
            one = slice(row, row + 1)
            draws[row], candidates = job.substitute(first, attempt, job.shape)
            used = int(draws[row]) % self._samples
            targets[one], failures = self._read(draws[one], candidates[None], job.shape, pixels[one])
            if not failures:
                return [BadSample(number, text, used) for number, text in sentences.items()]
            sentences[used] = failures[0]
        raise DataError(f"{sentence} Nor could any of {REPLACEMENTS} others in its place: is the disk still there?")

    def _read(
        self, draws: np.ndarray, candidates: np.ndarray, shape: tuple[int, int], pixels: "np.ndarray | torch.Tensor"
    ) -> tuple[list, dict[int, str]]:
        """Decode the images of samples into `pixels`; returns their targets, and {row: sentence} of unreadable ones."""
        ids = draws % self._samples
        cut = self._targets.read(ids, candidates, shape)
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            failures = self._backend.decode_batch(ids, cut.windows, shape, self._data.interpolation, pixels)
        return cut.targets, failures | cut.failures


def _start_threads(workers: int) -> tuple[ThreadPoolExecutor, list[Thread]]:
    """Start a pool of threads that each use one core in torch; returns the pool and its threads.

    torch.set_num_threads in a thread also changes the number that the rest of the process sees (torch 2.15), so the
    caller's is put back once the last of them has set its own.
    """
    before, threads = torch.get_num_threads(), []

    def begin() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # at its first use of torch a thread adopts the process's number: trigger it now
        threads.append(current_thread())

    executor = ThreadPoolExecutor(workers, thread_name_prefix="decode", initializer=begin)
    everyone = Barrier(workers)  # all threads must have started before any continues
    try:
        for future in [executor.submit(everyone.wait) for _ in range(workers)]:
            future.result()
    except BaseException:
        everyone.abort()  # else the threads that did start would wait forever
        executor.shutdown()
        raise
    torch.set_num_threads(before)
    return executor, threads
