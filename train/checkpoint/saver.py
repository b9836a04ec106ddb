"""Saving checkpoints while training goes on.

Every rank copies its share of the state to host memory; a thread writes it from there. No collective takes part, so a rank that cannot
write leaves the others training: the ranks tell each other through the store, and rank 0 gives the checkpoint its name only when every
share of it is on the disk. Until then, and whatever happens, the checkpoints before it stay as they are.
"""

import queue
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from train.checkpoint.format import CheckpointInfo, checkpoint_path, commit, write_manifest, write_shard
from train.checkpoint.prune import prune
from train.config import Config
from train.engine.deepspeed_engine import Engine
from train.engine.ema import Ema
from train.guard.rank_store import Store
from train.telemetry.metrics import Metric
from train.telemetry.monitor import Monitor


@dataclass(frozen=True)
class Saved:
    """How a save ended: `error` is None where the checkpoint is on the disk under its name. `seconds` from the snapshot to then."""

    step: int
    path: Path
    seconds: float
    stall: float  # seconds of them that training stood still
    error: str | None
    left: list[str]  # what should have been removed and could not be, in sentences


class Saver:
    """This rank's part of writing `folder/step_%08d`, one save at a time."""

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
        """about: what is the same in all checkpoints, and the step that the run starts from.

        best: score of the best checkpoint until then, or None.
        """
        self.folder, self.about, self.engine, self.ema, self.store = folder, about, engine, ema, store
        self.metric = metric
        self.keep, self.timeout = settings.checkpoint.keep, settings.guard.timeout.save
        self.go_back(about.step, best)
        self.failure: str | None = None  # of the newest save that failed
        self._results: list[Saved] = []
        self._count = 0
        self._work: queue.SimpleQueue = queue.SimpleQueue()
        self._idle = threading.Event()
        self._idle.set()
        threading.Thread(target=self._run_all, name="saver", daemon=True).start()

    def go_back(self, step: int, best: float | None) -> None:
        """Training goes on from the checkpoint of `step`; the best one until then has the score `best`. No save is under way."""
        self.begun = self.saved = step  # the last checkpoint that was begun, and the newest that is on the disk
        self.best = best  # score of the best checkpoint that is on the disk, or on its way there

    def improves(self, score: float) -> bool:
        """Whether `score` is better than that of every checkpoint. All ranks call this and get rank 0's answer: a save may just fail."""
        answer = torch.tensor(self.metric.improves(score, self.best), dtype=torch.uint8, device=self.engine.device)
        dist.broadcast(answer, 0)
        return bool(answer)

    def save(self, step: int, score: float | None, monitor: Monitor) -> None:
        """Take a snapshot of the state after `step` steps, and start writing it. All ranks call this at the same step.

        score: of this very state, if it was evaluated.
        """
        began = time.monotonic()
        if not self._idle.is_set():
            self._idle.wait()
            waited = time.monotonic() - began
            text = f"training waited {waited:.1f} s for the last checkpoint to be written: raise checkpoint.every_steps"
            monitor.event("save_slow", step, text, seconds=waited)
            began = time.monotonic()
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
        """Wait for the save that is under way, if any, on all ranks: rank 0, which keeps the store, may leave only then."""
        began = time.monotonic()
        self._idle.wait()
        dist.barrier()
        self.tell(monitor, waited=time.monotonic() - began)

    def settle(self, monitor: Monitor) -> None:
        """Wait for the save that is under way, if any, before this rank ends because of an error. The other ranks need not call this."""
        self._idle.wait()
        self.tell(monitor)

    def tell(self, monitor: Monitor, waited: float = 0.0) -> None:
        """Say how saves ended since the last call; training has `waited` for them."""
        saves, self._results = self._results, []
        for save in saves:
            if save.error:
                self.failure = save.error
                text = f"checkpoint of step {save.step} NOT saved: {save.error}. Training goes on; the newest is that of step {self.saved}"
                monitor.event("save_failed", save.step, text, reason=save.error)
            else:
                self.saved, stall = save.step, save.stall + waited
                text = f"checkpoint {save.path} in {save.seconds:.1f} s, training stood still for {1000 * stall:.0f} ms"
                monitor.event("checkpoint", save.step, text, seconds=save.seconds, stall_seconds=stall)
            for sentence in save.left:
                monitor.event("prune_failed", save.step, f"{sentence}; it is tried again at the next save or start", reason=sentence)

    def _run_all(self) -> None:
        while True:
            try:
                self._run(*self._work.get())
            finally:
                self._idle.set()  # also where rank 0 is gone: then the main thread finds out, too

    def _run(
        self, info: CheckpointInfo, best: float | None, tensors: dict[str, Tensor], starts: dict[str, int], began: float, stall: float
    ) -> None:
        """best: what self.best is again where this fails."""
        final, key = checkpoint_path(self.folder, info.step), f"save/{self._count}"
        # Named after this start of the run: what a killed one left behind is never taken for a part of this.
        temporary = self.folder / f".{final.name}.{self.store.run_id}.tmp"
        who = f"rank {self.engine.rank}: "
        self._report(f"{key}/{self.engine.rank}", who, lambda: self._write(temporary, tensors, starts))
        if self.engine.rank == 0:
            self._report(f"{key}/end", "", lambda: self._commit(info, key, temporary, final, began))
        answer = self.store.wait_for(f"{key}/end", self.timeout + 60) or "rank 0 does not answer"
        error, left = None if answer == "ok" else answer, []
        if error:
            self.best = best
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

    def _report(self, key: str, who: str, work: Callable[[], str]) -> None:
        """Put what `work` returns, or `who` and the error that it ends with, under `key`: whatever it is, training goes on."""
        try:
            answer = work()
        except Exception as error:
            answer = f"{who}{error}"
        self.store.set(key, answer)

    def _write(self, folder: Path, tensors: dict[str, Tensor], starts: dict[str, int]) -> str:
        broken = [key for key, tensor in tensors.items() if key.startswith("model/") and not tensor.isfinite().all()]
        if broken:
            raise ValueError(f"{broken[0].removeprefix('model/')} is not finite: such weights are not saved")
        folder.mkdir(parents=True, exist_ok=True)
        name = f"shard_{self.engine.rank:05d}.safetensors"
        return f"ok {name} {write_shard(folder / name, tensors, starts)}"

    def _commit(self, info: CheckpointInfo, key: str, temporary: Path, final: Path, began: float) -> str:
        shards, failures = {}, []
        for rank in range(self.engine.world):
            answer = self.store.wait_for(f"{key}/{rank}", max(0.0, began + self.timeout - time.monotonic()))
            if answer is None:
                raise TimeoutError(f"rank {rank} has not written its share after {self.timeout:g} s")
            if answer.startswith("ok "):
                _, name, sha256 = answer.split(" ")
                shards[name] = sha256
            else:
                failures.append(answer)
        # All have gone on from the save before this, so its keys are not read any more, nor are those read above.
        for old in (f"save/{self._count - 1}/end", *(f"{key}/{rank}" for rank in range(self.engine.world))):
            self.store.delete(old)
        if failures:  # only now: no rank writes into the folder any more, which is removed next
            raise OSError(failures[0])
        write_manifest(temporary, replace(info, shards=shards))
        commit(temporary, final)
        return "ok"


def snapshot(engine: Engine, ema: Ema | None) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Copies in host memory of this rank's share of the state: `<kind>/<parameter>` → flat piece, and its first element's place."""
    tensors, starts = {}, {}
    for index, fragment in enumerate(engine.fragments()):
        pieces = {"model": fragment.master, **fragment.moments}
        if ema is not None:
            pieces["ema"] = ema.averages[index]
        for kind, piece in pieces.items():
            tensors[f"{kind}/{fragment.name}"] = piece
            starts[f"{kind}/{fragment.name}"] = fragment.start
    if engine.rank == 0:
        tensors |= {f"buffer/{name}": buffer for name, buffer in engine.buffers().items()}
        if ema is not None:
            tensors |= {f"ema_buffer/{name}": average for name, average in ema.buffers.items()}
    copies = {key: _host_copy(tensor.detach()) for key, tensor in tensors.items()}
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()
    return copies, starts


def _host_copy(tensor: Tensor) -> Tensor:
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return copy.copy_(tensor, non_blocking=True)
