"""Faults inside a rank's process at a given moment, for `before` of tests.runs.start; and faults by strace.

The faults are real (a signal is sent, the process is killed, a loss is not a number); only their moment is arranged.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class SignalIn:
    """Rank `rank` receives the signal `number` when it enters `section` for the `count`-th time."""

    rank: int
    number: signal.Signals
    section: str
    count: int

    def __call__(self, rank: int) -> None:
        if rank != self.rank:
            return
        from train.guard.watchdog import Watchdog

        enter, left = Watchdog.enter, self.count

        def entering(watchdog: Watchdog, section: str, step: int) -> None:
            nonlocal left
            enter(watchdog, section, step)
            left -= section == self.section
            if section == self.section and left == 0:
                os.kill(os.getpid(), self.number)

        Watchdog.enter = entering


@dataclass(frozen=True)
class LoseDisk:
    """On rank `rank` the `count`-th batch of the run's evaluations cannot be read: its disk is lost for good."""

    rank: int
    count: int

    def __call__(self, rank: int) -> None:
        if rank != self.rank:
            return
        from data_pipeline.faults import StorageError
        from train.guard.bad_samples import BadSamples

        meet, left = BadSamples.meet, self.count

        def failing(samples: BadSamples, split: str, step: int, batch: object) -> None:
            nonlocal left
            left -= split == "val"
            if left == 0:
                raise StorageError("val-000.tar cannot be read after 9 attempts: Input/output error")
            meet(samples, split, step, batch)

        BadSamples.meet = failing


@dataclass(frozen=True)
class NanLoss:
    """On rank `rank` the loss of `steps` (counted from 1) is NaN, the first `times` times that a step is computed."""

    rank: int
    steps: tuple[int, ...]
    times: int = 1

    def __call__(self, rank: int) -> None:
        if rank != self.rank:
            return
        from train.trainer import Run

        train_step, left = Run.train_step, dict.fromkeys(self.steps, self.times)

        def broken(run: Run, step: int, batches: object):
            if not left.get(step + 1, 0):
                return train_step(run, step, batches)
            left[step + 1] -= 1
            loss = run.task.loss
            run.task.loss = lambda *arguments: {name: value * float("nan") for name, value in loss(*arguments).items()}
            try:
                return train_step(run, step, batches)
            finally:
                del run.task.loss

        Run.train_step = broken


@dataclass(frozen=True)
class FlipBits:
    """After step `step`, the first `times` times, all exponent bits of one fp32 number of rank `rank` are set, as by a
    memory fault.

    what: the number's kind, as in a checkpoint: "model", "ema", a moment, or "buffer" and "ema_buffer" (a running
    variance).
    """

    rank: int
    step: int
    what: str = "model"
    times: int = 1

    def __call__(self, rank: int) -> None:
        if rank != self.rank:
            return
        import torch

        from train.engine.ema import Ema

        update, left = Ema.update, self.times

        def corrupting(ema: Ema, step: int, skipped: torch.Tensor) -> None:
            nonlocal left
            update(ema, step, skipped)
            if step + 1 == self.step and left:
                self._victim(ema).view(-1).view(dtype=torch.int32)[0] |= 0x7F800000
                left -= 1

        Ema.update = corrupting

    def _victim(self, ema):
        if self.what in ("buffer", "ema_buffer"):
            buffers = ema.buffers if self.what == "ema_buffer" else ema.engine.buffers()
            return next(buffer for name, buffer in buffers.items() if name.endswith("running_var"))
        fragment = ema.engine.fragments()[0]
        return {"model": fragment.master, "ema": ema.averages[0], **fragment.moments}[self.what]


@dataclass(frozen=True)
class KillAtWrite:
    """Rank `rank` is killed with SIGKILL just before its `count`-th file operation in a checkpoint's folder.

    Python's audit hooks see every open, mkdir, rename and removal; the writes of safetensors lie between two of them.
    """

    rank: int
    count: int
    events: tuple[str, ...] = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")

    def __call__(self, rank: int) -> None:
        if rank != self.rank:
            return
        left = self.count

        def hook(event: str, arguments: tuple) -> None:
            nonlocal left
            if event in self.events and arguments and "/checkpoints/.step_" in str(arguments[0]):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)


@dataclass(frozen=True)
class ShortPauses:
    """All ranks stop retrying a file after the given pauses, rather than after a minute."""

    pauses: tuple[float, ...]

    def __call__(self, rank: int) -> None:
        from data_pipeline import faults

        faults.PAUSES = self.pauses


@contextlib.contextmanager
def system_calls(pid: int, injection: str, paths: Iterable[Path] = ()) -> Iterator[None]:
    """Inject faults into a process's system calls with strace, e.g. "fsync:error=EIO".

    paths: only into calls on these files.
    """
    name = injection.partition(":")[0]
    command = [
        "strace",
        "-f",
        "-qq",
        "-o",
        "/dev/null",
        "-e",
        f"trace={name}",
        "-e",
        f"inject={injection}",
        "-p",
        str(pid),
    ]
    command += [part for path in paths for part in ("-P", str(path))]
    os.kill(pid, signal.SIGSTOP)  # otherwise the run might end before strace is attached
    with subprocess.Popen(command) as tracer:
        try:
            tasks = list(Path(f"/proc/{pid}/task").iterdir())
            while any("TracerPid:\t0" in (task / "status").read_text() for task in tasks):
                assert tracer.poll() is None, "strace has ended"
                time.sleep(0.01)
            os.kill(pid, signal.SIGCONT)
            yield
        finally:
            tracer.send_signal(signal.SIGINT)  # detaches from the process
            tracer.wait(10)
