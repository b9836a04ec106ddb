"""Exponential moving average of the weights, in fp32, each rank averaging only its own share; and of running statistics, on all ranks."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from train.engine.deepspeed_engine import Engine


class Ema:
    """Averages of the engine's fragments: `average = decay · average + (1 - decay) · master`, at any ZeRO stage without a gather.

    `averages[i]` belongs to `engine.fragments()[i]`; those after them, also in `buffers` by name, to what batch norms keep beside weights.
    They start as the weights are at construction.
    """

    def __init__(self, engine: Engine, decay: float):
        self.engine = engine
        self.decay = decay
        self.fragments = engine.fragments()
        buffers = {name: buffer for name, buffer in engine.buffers().items() if buffer.is_floating_point()}
        self._masters = [*(fragment.master for fragment in self.fragments), *buffers.values()]
        self.averages = [master.clone() for master in self._masters]
        self.buffers = dict(zip(buffers, self.averages[len(self.fragments) :], strict=True))
        # One step of SGD at rate r on ½ |average - master|² takes the average r of the way to the master, and torch's fused SGD can be
        # told by the device to do nothing. Here |average|² is its weight decay, and -master, by `maximize`, its gradient.
        self._sgd = torch.optim.SGD(self.averages, lr=0.0, weight_decay=1.0, maximize=True, fused=True)
        for average, master in zip(self.averages, self._masters, strict=True):
            average.grad = master

    def update(self, step: int, skipped: Tensor) -> None:
        """Take in the weights after step `step` (counted from 0), unless `skipped` is 1 (a scalar on the device: nobody waits for it).

        Warmed up: early averages forget the initial weights quickly.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        self._sgd.param_groups[0]["lr"] = 1 - decay
        self._sgd.found_inf = skipped
        self._sgd.step()

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The model has the averaged weights inside this block, on all ranks, and its own again after it, to the last bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for master, average in zip(self._masters, self.averages, strict=True):
            kept = master.clone()
            master.copy_(average)
            average.copy_(kept)
        self.engine.publish()
