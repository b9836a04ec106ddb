"""The trainer's interface to everything that watches over a run.

The loop reports what it does, and asks whether to stop or to go back to a checkpoint.
"""

import signal
import time
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from train.config_sections import GuardConfig
from train.exit_codes import exit_code_of
from train.guard.agreement import Agreed, Agreement
from train.guard.bad_samples import BadSamples
from train.guard.rank_store import Store
from train.guard.signals import stop_signals
from train.guard.skips import Skips
from train.guard.watchdog import Watchdog
from train.telemetry.monitor import Monitor

StopRequest = tuple[int, signal.Signals]  # a rank, and the signal that it got


class Guard:
    """Watchdog (hangs), stop signals, agreement of the ranks, skipped steps and bad samples of one process.

    The watchdog runs from the construction on; `connect` connects the ranks.
    """

    def __init__(self, settings: GuardConfig, rank: int, world: int, stacks: Path):
        """stacks: the folder for the stack traces of a process that hangs."""
        self._settings = settings
        self.watchdog = Watchdog(rank, world, settings.timeout.model_dump(), stacks, settings.grace)
        stop_signals.call(lambda: self.watchdog.stop_by(time.monotonic() + settings.grace))

    def connect(self, device: torch.device) -> Store:
        """Every rank calls this, once there is a process group. Returns the ranks' store."""
        store = Store()
        self.watchdog.connect(store)
        self._agreement = Agreement(device, self._settings.agree_every)
        self._skips = Skips(self._settings.max_skipped)
        return store

    def report_to(self, monitor: Monitor, data_path: str, rank: int) -> None:
        """Write events to `monitor` from now on. data_path: the dataset's, for messages."""
        self._monitor = monitor
        self.bad_samples = BadSamples(self._settings.bad_samples, data_path, rank)

    def enter(self, section: str, step: int) -> None:
        """The main thread begins a section of step `step`; see guard.timeout."""
        self.watchdog.enter(section, step)

    def local_work(self, enabled: bool = True) -> AbstractContextManager[None]:
        """A block that needs no other rank: its time counts as this rank's own. Not if `enabled` is false."""
        return self._agreement.local_work(enabled)

    def waited(self, seconds: float) -> None:
        """This rank has waited for its loader: that counts as its own time."""
        self._agreement.waited(seconds)

    def agree(self, step: int) -> StopRequest | None:
        """A step, or a batch of an evaluation, is over.

        Returns the first request to stop that all ranks know of, if any.
        """
        return self._handle(self._agreement.round(stop_signals.received), step)

    def collect_pending(self, step: int) -> StopRequest | None:
        """As `agree`, but only for the answer that is still to come, if any.

        Call it before the pace of the calls of `agree` changes.
        """
        return self._handle(self._agreement.collect_pending(), step)

    def _handle(self, agreed: Agreed, step: int) -> StopRequest | None:
        for rank, own, median in agreed.slow:
            text = f"rank {rank} is slow: {own:.2f} s of its own a step, the median rank {median:.2f} s"
            self._monitor.event("slow_rank", step, text, rank=rank, seconds=own, median=median)
        return agreed.stop[0] if agreed.stop else None

    def step_queued(self, step: int, skipped: torch.Tensor) -> None:
        """Step `step` has been given to the device; `skipped` will be 1 if it changes nothing. Does not wait for it."""
        self._skips.add(step, skipped)

    def wait_for(self, step: int) -> None:
        """Wait for the device to finish `step`, and report which steps were skipped."""
        for skipped in self._skips.known(step):
            text = f"step {skipped} skipped: its gradient is not finite (or overflowed in fp16)"
            self._monitor.event("skipped_step", skipped, text)
        self.watchdog.completed = step

    @property
    def skipped_too_often(self) -> bool:
        """Whether so many steps in a row were skipped that the run must go back to a checkpoint."""
        return self._skips.too_many

    def go_back(self, refused: int | None) -> tuple[list[int], str]:
        """Forget the steps that were skipped; returns for which steps the run goes back, and why: see Skips.go_back."""
        return self._skips.go_back(refused)

    def close(self, error: BaseException | None = None) -> None:
        """The run has ended.

        error: why. One without an exit code of its own may be due to a hang; this process ends then. After a
        KeyboardInterrupt the process is left alone, because a Python program that called the run may continue.
        """
        if isinstance(error, Exception) and exit_code_of(error) is None:
            self.watchdog.settle()
        else:
            self.watchdog.close()
