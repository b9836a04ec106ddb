"""The one door to the data: micro-batches in the order of use, decoded ahead by threads.

Threads, not processes: decoding releases the GIL, so there is nothing to fork, to pickle or to share. Everything that a
micro-batch holds is a function of (seed, step, index); threads, prefetching and ranks only decide who computes it and when.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import count
from threading import Barrier

import numpy as np
import torch

from .backends import Backend, open_backend
from .config import AugmentConfig, DataConfig
from .crop import evaluation_windows, training_windows
from .manifest import DataError, Split
from .order import Order
from .randomness import Stream, fold, make_key

# A chunk of work is at most this many images, so that closing never waits for more than one such chunk per thread.
LARGEST_CHUNK = 64

# (ids [n], widths [n], heights [n]) → windows [n, 5]
Windows = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class MicroBatch:
    """Micro-batch `index` of step `step`, on the host; in pinned memory where there is a GPU.

    ids int64 [m]; images uint8 [m, 3, S, S], RGB, in channels-last memory; labels int64 [m]. draws (numpy int64 [m]): a number per use of
    a sample in its epoch, from which the keys of its crop and augmentation are made. `count` is False only for an evaluation batch that is
    there to keep the ranks in step and must not be counted.
    """

    step: int
    index: int
    ids: torch.Tensor
    draws: np.ndarray
    images: torch.Tensor
    labels: torch.Tensor
    count: bool = True


@dataclass(frozen=True)
class _Job:
    """A micro-batch to be made. Its windows are computed by the threads, beside the decoding."""

    step: int
    index: int
    ids: np.ndarray
    windows: Windows


def build_loader(
    data: DataConfig, augment: AugmentConfig, split: Split, order: Order, *, rank: int = 0, world: int = 1, start_step: int = 0
) -> "Loader":
    """The micro-batches of `rank`, in the order of use: those of step start_step, then start_step + 1, …, without end.

    Decoding starts at once. Close it when done (it is a context manager). ValueError for sizes that do not fit together.
    """
    if order.samples != split.samples:
        raise ValueError(f"the order is of {order.samples} samples, split {split.name!r} has {split.samples}")
    if start_step < 0:
        raise ValueError(f"start_step {start_step} is negative")
    share = order.share(rank, world)

    def jobs() -> Iterator[_Job]:
        for step in count(start_step):
            key = make_key(order.seed, Stream.CROP, order.epoch_of(step))

            def windows(ids: np.ndarray, widths: np.ndarray, heights: np.ndarray, key: int = key) -> np.ndarray:
                return training_windows(fold(key, ids), widths, heights, augment, data.eval_crop)

            for index in share:
                yield _Job(step, index, order.micro_batch_ids(step, index), windows)

    return Loader(data, split, jobs())


def evaluation_batches(
    data: DataConfig, split: Split, batch_size: int, *, rank: int = 0, world: int = 1
) -> Iterator[tuple[int, MicroBatch]]:
    """Every sample of `split` once, over all ranks: yields (k, batch k), where batch k holds the ids [k·b, (k + 1)·b).

    Rank r takes k = r, r + world, …; the last batch may be short. All ranks yield the same number of times, because under ZeRO-3
    every rank must take part in every forward pass: a rank without a batch in the last round repeats its previous one (batch 0
    where it never had one) with `count=False`.
    """
    batches = -(-split.samples // batch_size)
    rounds = -(-batches // world)
    mine = range(rank, batches, world)

    def windows(ids: np.ndarray, widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
        return evaluation_windows(widths, heights, data.eval_crop)

    def jobs() -> Iterator[_Job]:
        for k in mine or (0,):
            ids = np.arange(k * batch_size, min((k + 1) * batch_size, split.samples), dtype=np.int64)
            yield _Job(0, k, ids, windows)

    with Loader(data, split, jobs()) as loader:
        batch = None
        for number in range(rounds):
            batch = next(loader, batch)
            batch = batch if number < len(mine) else replace(batch, count=False)
            yield batch.index, batch


class Loader(AbstractContextManager):
    """Iterator over the micro-batches of `jobs`, `data.prefetch` of them ahead. An error of a thread is raised in its batch's turn."""

    def __init__(self, data: DataConfig, split: Split, jobs: Iterable[_Job]):
        self._data = data
        self._records = split.records
        self._backend: Backend = open_backend(data.backend, split)
        self._jobs = iter(jobs)
        self._pin = torch.cuda.is_available()
        self._executor = _start_threads(data.workers)
        self._pending: deque[tuple[MicroBatch, list[Future]]] = deque()
        for _ in range(data.prefetch):
            self._submit()

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> MicroBatch:
        if not self._pending:
            self.close()
            raise StopIteration
        batch, chunks = self._pending.popleft()
        try:
            self._submit()
            for chunk in chunks:
                chunk.result()
        except BaseException:
            self.close()
            raise
        return batch

    def close(self) -> None:
        """End the threads: what has not begun is dropped, what has is waited for (at most LARGEST_CHUNK images each)."""
        self._pending.clear()
        self._executor.shutdown(wait=True, cancel_futures=True)

    def __exit__(self, *_: object) -> None:
        self.close()

    def _submit(self) -> None:
        """Start the next micro-batch, if there is one: its memory is allocated here and filled by the threads, chunk by chunk."""
        job = next(self._jobs, None)
        if job is None:
            return
        total, size = len(job.ids), self._data.image_size
        images = torch.empty((total, size, size, 3), dtype=torch.uint8, pin_memory=self._pin)
        labels = torch.from_numpy(self._records["label"][job.ids].astype(np.int64))
        ids = torch.from_numpy(job.ids)
        if self._pin:
            ids, labels = ids.pin_memory(), labels.pin_memory()
        pixels = images.numpy()
        length = min(LARGEST_CHUNK, -(-total // self._data.workers))
        chunks = [
            self._executor.submit(self._fill, job, slice(start, start + length), pixels[start : start + length])
            for start in range(0, total, length)
        ]
        self._pending.append((MicroBatch(job.step, job.index, ids, job.ids, images.permute(0, 3, 1, 2), labels), chunks))

    def _fill(self, job: _Job, part: slice, pixels: np.ndarray) -> None:
        ids = job.ids[part]
        records = self._records[ids]
        windows = job.windows(ids, records["width"], records["height"])
        failures = self._backend.decode_batch(ids, windows, self._data.image_size, self._data.interpolation, pixels)
        if failures:
            first = failures[min(failures)]
            raise DataError(f"{first} Check the dataset with: python launch/prepare.py verify {self._data.path}")


def _start_threads(workers: int) -> ThreadPoolExecutor:
    """A pool whose threads are running and use one core each in torch.

    torch.set_num_threads in a thread also changes the number that the rest of the process sees (torch 2.15), so the caller's is put
    back once the last of them has set its own.
    """
    threads = torch.get_num_threads()
    executor = ThreadPoolExecutor(workers, thread_name_prefix="decode", initializer=_use_one_core)
    everyone = Barrier(workers)  # no thread gets past it before all have started
    for future in [executor.submit(everyone.wait) for _ in range(workers)]:
        future.result()
    torch.set_num_threads(threads)
    return executor


def _use_one_core() -> None:
    torch.set_num_threads(1)
    torch.get_num_threads()  # a thread takes over the process's number at its first use of torch: let that be now
