"""Run tasks in worker processes that end with their parent, with a killed sibling, and at Ctrl-C."""

import contextlib
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from typing import Any

from data_pipeline.preparation.progress import Progress


def run_tasks(function: Callable[[Any], None], tasks: Iterable, workers: int, slots: int, progress: Progress) -> None:
    """Call `function` with each of `tasks` in one of `workers` processes. `tasks` is consumed as tasks are needed.

    The function reports its progress with `count(slot, done)`, for slots 0 … slots-1. Raises the exceptions of
    `function`, and BrokenProcessPool if a worker was killed.
    """
    # Spawned, not forked: a forked worker inherits the pipes of its siblings and would outlive a killed parent.
    context = multiprocessing.get_context("spawn")
    counts = context.RawArray("q", max(1, slots))  # without a lock, because no two processes write the same element
    before = set(multiprocessing.active_children())
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(counts,)) as pool:
        try:
            queue, running = iter(tasks), set()
            while True:
                # A few at a time, because every task in the pool holds a copy of its part of the listing.
                while len(running) < 2 * workers and (task := next(queue, None)) is not None:
                    with _ctrl_c_held():
                        running.add(pool.submit(function, task))
                if not running:
                    break
                finished, running = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in finished:
                    future.result()
                progress.show(progress.first + sum(counts))
        except BaseException:
            # Leaving the pool waits for its workers. Kill them, so that it does not wait for their tasks.
            for child in set(multiprocessing.active_children()) - before:
                child.kill()
            raise


def count(slot: int, done: int) -> None:
    """Called in a worker: report that `done` images (or bytes) of slot `slot` are done."""
    _counts[slot] = done


@contextlib.contextmanager
def _ctrl_c_held():
    """Defer Ctrl-C to the end of this block. Processes started in it inherit the mask and never receive SIGINT."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


_counts = None  # the amounts done per slot, shared with the parent


def _start_worker(counts) -> None:
    global _counts
    _counts = counts
    warnings.simplefilter("ignore")  # Pillow warns about the metadata of images

    def follow_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)  # otherwise the worker of a killed parent would wait for its next task forever

    threading.Thread(target=follow_parent, daemon=True).start()
