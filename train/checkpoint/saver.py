"""Saving checkpoints in the background, without collectives.

A save goes through these stages:

1. Every rank copies its share of the state to host memory (`snapshot`). Training continues after that.
2. A thread of every rank writes the share to a shard in a temporary folder, and reports the shard's hash, or an error,
   in the store under `save/<number>/<rank>`.
3. When all ranks have reported success, rank 0 writes the manifest and renames the folder to the checkpoint's name. It
   reports success, or an error, under `save/<number>/end`.
4. The threads of all ranks read that report; the main threads log it later (`tell`). Then rank 0 removes old
   checkpoints, or, after an error, the temporary folder.

So a rank that cannot write does not stop training, and earlier checkpoints stay until a save has succeeded.

A share with a number that is not finite is refused. No step mends such a state, so training has to go back (`broken`).
"""

import queue
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from train.checkpoint.format import commit, write_shard
from train.checkpoint.info import CheckpointInfo, checkpoint_path, write_manifest
from train.checkpoint.prune import prune
from train.config import Config
from train.engine.deepspeed_engine import Engine
from train.engine.ema import Ema
from train.guard.rank_store import Store
from train.telemetry.metrics import Metric
from train.telemetry.monitor import Monitor

NOT_FINITE = "is not finite: such a state is not saved"


@dataclass(frozen=True)
class Saved:
    """Result of a save."""

    step: int
    path: Path
    seconds: float  # from the beginning of the snapshot to the end of the save
    stall: float  # seconds of these during which training stood still
    error: str | None  # None: the checkpoint is complete
    left: list[str]  # sentences about old checkpoints that could not be removed


class Saver:
    """This rank's part of writing the checkpoints `folder/step_%08d`, one save at a time.

    begun: step of the last save that was started. saved: step of the newest complete checkpoint. best: score of the
    best checkpoint that is complete or being written. failure: error of the newest save that failed. broken: whether
    the save of step `begun` was refused, because a number is not finite; all ranks learn of it at the next save, or in
    `finish`.
    """

    def __init__(
        self,
        folder: Path,
        about: CheckpointInfo,
        metric: Metric,
        best: float | None,
        engine: Engine,
        ema: Ema | None,
        store: Store,
        settings: Config,
    ):
        """All ranks call this.

        about: the manifest's fields shared by all checkpoints; its step is the one that this start begins after.
        metric: the primary metric, of scores. best: score of the best checkpoint up to that step, or None.
        """
        self.folder, self.about, self.engine, self.ema, self.store = folder, about, engine, ema, store
        self.metric = metric
        self.keep, self.timeout = settings.checkpoint.keep, settings.guard.timeout.save
        self.go_back(about.step, best)
        self.failure: str | None = None
        self._results: list[Saved] = []
        self._count = 0
        self._work: queue.SimpleQueue = queue.SimpleQueue()
        self._idle = threading.Event()
        self._idle.set()
        self._thread = threading.Thread(target=self._run_all, name="saver", daemon=True)
        self._thread.start()

    def go_back(self, step: int, best: float | None) -> None:
        """Training continues from the checkpoint of `step`; `best` is the best score up to it.

        No save may be in progress.
        """
        self.begun = self.saved = step
        self.best = best
        self.broken = self._refused = False

    def improves(self, score: float | None) -> bool:
        """Whether there is a score, and it is better than those of all checkpoints. All ranks call this.

        They get rank 0's answer, because `best` may differ between ranks while a save is failing.
        """
        return self._as_rank_0(score is not None and self.metric.improves(score, self.best))

    def state_is_finite(self) -> bool:
        """Whether every number that a save would write is finite, on all ranks. All ranks call this."""
        tensors, _ = snapshot(self.engine, self.ema)
        answer = torch.tensor(_not_finite(tensors) is None, dtype=torch.uint8, device=self.engine.device)
        dist.all_reduce(answer, dist.ReduceOp.MIN)
        return bool(answer)

    def save(self, step: int, score: float | None, monitor: Monitor) -> None:
        """Take a snapshot of the state after `step` steps, and start writing it. All ranks call this at the same step.

        Waits for the save before, if it is in progress; does nothing if that was refused. score: of this state, None if
        it was not evaluated.
        """
        began = time.monotonic()
        if not self._idle.is_set():
            self._idle.wait()
            waited = time.monotonic() - began
            text = (
                f"training waited {waited:.1f} s for the last checkpoint to be written: raise checkpoint.every_steps, "
                "or train.evaluate_every, because a better evaluation is saved"
            )
            monitor.event("save_slow", step, text, seconds=waited)
            began = time.monotonic()
        self.broken = self._as_rank_0(self._refused)
        if self.broken:
            return
        self._count += 1
        counts = {"optimizer_step": self.engine.optimizer_step_count(), "loss_scale": self.engine.loss_scale_state()}
        info = replace(self.about, step=step, score=score, **counts)
        tensors, starts = snapshot(self.engine, self.ema)
        self.begun, before = step, self.best
        if score is not None and self.metric.improves(score, before):
            self.best = score
        self._idle.clear()
        self._work.put((info, before, tensors, starts, began, time.monotonic() - began))

    def finish(self, monitor: Monitor) -> None:
        """Wait until all ranks have ended the save in progress, if any, and log it. All ranks call this.

        Rank 0 must not exit before, because it keeps the store.
        """
        began = time.monotonic()
        self._idle.wait()
        dist.barrier()
        self.broken = self._as_rank_0(self._refused)
        self.report(monitor, waited=time.monotonic() - began)

    def wait_and_report(self, monitor: Monitor) -> None:
        """Wait for this rank's save in progress, if any, and log it: before this rank ends with an error.

        Unlike `finish`, other ranks need not call it.
        """
        self._idle.wait()
        self.report(monitor)

    def close(self) -> None:
        """End the saving thread, after the save in progress, if any. Waits for it if there is no other rank."""
        self._work.put(None)
        if self.engine.world == 1:  # this process may run again, in the same folder
            self._thread.join()

    def report(self, monitor: Monitor, waited: float = 0.0) -> None:
        """Log the saves that have ended since the last call. waited: seconds that training waited for them."""
        saves, self._results = self._results, []
        for save in saves:
            if save.error:
                self.failure = save.error
                text = (
                    f"checkpoint of step {save.step} NOT saved: {save.error}. "
                    f"Training goes on; the newest is that of step {self.saved}"
                )
                monitor.event("save_failed", save.step, text, reason=save.error)
            else:
                self.saved, stall = save.step, save.stall + waited
                text = f"checkpoint {save.path} in {save.seconds:.1f} s, training stood still for {1000 * stall:.0f} ms"
                monitor.event("checkpoint", save.step, text, seconds=save.seconds, stall_seconds=stall)
            for sentence in save.left:
                monitor.event(
                    "prune_failed",
                    save.step,
                    f"{sentence}; it is tried again at the next save or start",
                    reason=sentence,
                )

    def _as_rank_0(self, answer: bool) -> bool:
        """Rank 0's answer, on all ranks."""
        answer = torch.tensor(answer, dtype=torch.uint8, device=self.engine.device)
        dist.broadcast(answer, 0)
        return bool(answer)

    def _run_all(self) -> None:
        """The saving thread."""
        while work := self._work.get():
            try:
                self._run(*work)
            finally:
                self._idle.set()  # even if rank 0 is gone, which the main thread will notice, too

    def _run(
        self,
        info: CheckpointInfo,
        best: float | None,
        tensors: dict[str, Tensor],
        starts: dict[str, int],
        began: float,
        stall: float,
    ) -> None:
        """Write and commit one save. best: value of self.best to restore if the save fails."""
        final, key = checkpoint_path(self.folder, info.step), f"save/{self._count}"
        # The name contains the id of this start, so that parts left by a killed start are not taken for this one's.
        temporary = self.folder / f".{final.name}.{self.store.run_id}.tmp"
        who = f"rank {self.engine.rank}: "
        self._publish(f"{key}/{self.engine.rank}", who, lambda: self._write(temporary, tensors, starts))
        if self.engine.rank == 0:
            self._publish(f"{key}/end", "", lambda: self._commit(info, key, temporary, final, began))
        answer = self.store.wait_for(f"{key}/end", self.timeout + 60) or "rank 0 does not answer"
        error, left = None if answer == "ok" else answer, []
        if error:
            self.best, self._refused = best, NOT_FINITE in error
        if self.engine.rank == 0:
            if error:
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                left = self._prune(info.step)
        self._results.append(Saved(info.step, final, time.monotonic() - began, stall, error, left))

    def _prune(self, step: int) -> list[str]:
        try:
            return prune(self.folder, step, self.keep)
        except OSError as error:
            return [f"no old checkpoint is removed ({error})"]

    def _publish(self, key: str, who: str, work: Callable[[], str]) -> None:
        """Set `key` in the store to the result of `work`, or to `who` and its error. No error may stop training."""
        try:
            answer = work()
        except Exception as error:
            answer = f"{who}{error}"
        self.store.set(key, answer)

    def _write(self, folder: Path, tensors: dict[str, Tensor], starts: dict[str, int]) -> str:
        """Write this rank's shard; returns "ok", its name and its hash. Raises ValueError if a number is not finite."""
        if key := _not_finite(tensors):
            raise ValueError(f"{key} {NOT_FINITE}")
        folder.mkdir(parents=True, exist_ok=True)
        name = f"shard_{self.engine.rank:05d}.safetensors"
        return f"ok {name} {write_shard(folder / name, tensors, starts)}"

    def _commit(self, info: CheckpointInfo, key: str, temporary: Path, final: Path, began: float) -> str:
        """Rank 0: wait for the shards of all ranks, write the manifest and rename the folder; returns "ok".

        Raises OSError if a rank failed, TimeoutError if one has not reported within guard.timeout.save.
        """
        shards, failures = {}, []
        for rank in range(self.engine.world):
            answer = self.store.wait_for(f"{key}/{rank}", began + self.timeout - time.monotonic())
            if answer is None:
                raise TimeoutError(f"rank {rank} has not written its share after {self.timeout:g} s")
            if answer.startswith("ok "):
                _, name, sha256 = answer.split(" ")
                shards[name] = sha256
            else:
                failures.append(answer)
        # These keys are not read any more: all ranks have gone on from the save before this one.
        for old in (f"save/{self._count - 1}/end", *(f"{key}/{rank}" for rank in range(self.engine.world))):
            self.store.delete(old)
        if failures:  # raise only after all ranks have reported, when none of them writes into the folder any more
            raise OSError(min(failures, key=lambda failure: NOT_FINITE not in failure))  # training must learn of that
        write_manifest(temporary, replace(info, shards=shards))
        commit(temporary, final)
        return "ok"


def snapshot(engine: Engine, ema: Ema | None) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Copies in host memory of this rank's share of the state.

    Returns the flat pieces by `<kind>/<parameter>` (see format.py), and the index of each piece's first element in its
    parameter.
    """
    tensors, starts = {}, {}
    for index, fragment in enumerate(engine.fragments()):
        pieces = {"model": fragment.master, **fragment.moments}
        if ema is not None:
            pieces["ema"] = ema.averages[index]
        for kind, piece in pieces.items():
            tensors[f"{kind}/{fragment.name}"] = piece
            starts[f"{kind}/{fragment.name}"] = fragment.start
    if engine.rank == 0:
        tensors |= {f"buffer/{name}": buffer for name, buffer in engine.whole().items()}
        if ema is not None:
            tensors |= {f"ema_buffer/{name}": average for name, average in ema.buffers.items()}
    copies = {key: _host_copy(tensor.detach()) for key, tensor in tensors.items()}
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()
    return copies, starts


def _not_finite(tensors: dict[str, Tensor]) -> str | None:
    """The first one with a number that is not finite."""
    # NumPy's isfinite is much faster than torch's.
    return next((key for key, tensor in tensors.items() if not np.isfinite(tensor.float().numpy()).all()), None)


def _host_copy(tensor: Tensor) -> Tensor:
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return copy.copy_(tensor, non_blocking=True)
