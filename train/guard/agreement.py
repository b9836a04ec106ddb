"""What the ranks tell each other about once a second: which were asked to stop, and how long each was busy with its own
work.
"""

import contextlib
import signal
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from train.config_sections import TimeoutConfig

MARGIN = 120.0  # seconds after a section's limit in which the watchdog finds the rank that hangs, and ends the run

# A rank is slow if its own time was above FACTOR x the median rank's, and LEAST seconds above it, in IN_A_ROW rounds.
FACTOR, LEAST, IN_A_ROW = 2.0, 0.05, 5


def patience(limits: TimeoutConfig) -> float:
    """Seconds that a collective may take: longer than any section of a run, so that the watchdog acts first and names
    the rank.
    """
    return max(limits.model_dump().values()) + MARGIN


@dataclass(frozen=True)
class Agreed:
    """What all ranks know. stop: (rank, signal) of ranks that were asked to stop. slow: (rank, its seconds, the median
    rank's).
    """

    stop: list[tuple[int, signal.Signals]]
    slow: list[tuple[int, float, float]]


class Agreement:
    """A small sum over all ranks at some of the calls of `round`.

    All ranks make the same calls, and know which of them make a sum.

    The sum is asynchronous and its result is read at the next call, so no rank waits for it. It has a gloo group of its
    own: it neither waits for a GPU nor interferes with the gradients' communication.
    """

    def __init__(self, device: torch.device, every: float):
        """every: seconds between two sums, estimated from the pace of the last calls (0: a sum at every call)."""
        self.rank, self.world, self.every = dist.get_rank(), dist.get_world_size(), every
        self._device = device
        self._group = dist.new_group(backend="gloo")
        self._values = torch.zeros(
            3, self.world, dtype=torch.float64
        )  # signals, own time, time per call; each rank fills its column
        self._pending: dist.Work | None = None
        self._local: list = []
        self._waited = 0.0
        self._calls, self._pass_over, self._since = 0, 0, time.perf_counter()
        self._late = [0] * self.world

    @contextlib.contextmanager
    def local_work(self, enabled: bool = True) -> Iterator[None]:
        """A block that needs no other rank: its time counts as this rank's own. Not if `enabled` is false."""
        began = self._now()
        yield
        if enabled:
            self._local.append((began, self._now()))

    def waited(self, seconds: float) -> None:
        """This rank has waited for its loader: that counts as its own time."""
        self._waited += seconds

    def round(self, received: signal.Signals | None) -> Agreed:
        """A step, or a batch of an evaluation, is over. received: the signal by which this rank was asked to stop, if
        it was.
        """
        agreed = self._answer()
        self._calls += 1
        if self._pass_over:
            self._pass_over -= 1
            return agreed
        now = time.perf_counter()
        mine = [
            received or 0,
            (self._waited + sum(self._seconds(*pair) for pair in self._local)) / self._calls,
            (now - self._since) / self._calls,
        ]
        self._local, self._waited, self._calls, self._since = [], 0.0, 0, now
        self._values.zero_()
        self._values[:, self.rank] = torch.tensor(mine, dtype=torch.float64)
        self._pending = dist.all_reduce(self._values, group=self._group, async_op=True)
        return agreed

    def collect_pending(self) -> Agreed:
        """The result that is still to come, if any.

        The next call of `round` makes a sum, because the pace may change.
        """
        agreed, self._pass_over = self._answer(), 0
        return agreed

    def _answer(self) -> Agreed:
        if self._pending is None:
            return Agreed([], [])
        self._pending.wait()
        self._pending = None
        signals, own, pace = self._values.tolist()
        self._pass_over = int(self.every / max(pace))
        stop = [(rank, signal.Signals(int(number))) for rank, number in enumerate(signals) if number]
        return Agreed(stop, self._slow(own))

    def _slow(self, seconds: list[float]) -> list[tuple[int, float, float]]:
        if not all(seconds):  # not a training step
            return []
        median, slow = statistics.median_low(seconds), []
        for rank, own in enumerate(seconds):
            self._late[rank] = self._late[rank] + 1 if own > max(FACTOR * median, median + LEAST) else 0
            if self._late[rank] == IN_A_ROW:  # once, until it has caught up
                slow.append((rank, own, median))
        return slow

    def _now(self) -> float | torch.cuda.Event:
        if self._device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, began, ended) -> float:
        if self._device.type == "cpu":
            return ended - began
        # Waits at most for the last forward pass, once in `every` seconds; its backward pass is queued already.
        ended.synchronize()
        return began.elapsed_time(ended) / 1000
