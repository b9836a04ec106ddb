"""Exponential moving average (EMA) of the weights and of batch norm's running statistics, in fp32.

Each rank averages only its own share of the weights, and all running statistics.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from train.engine.deepspeed_engine import Engine


class Ema:
    """Averages of the engine's fragments: `average = decay · average + (1 - decay) · master`, without communication.

    `averages[i]` is the average of `engine.fragments()[i]`. After those follow the averages of the model's
    floating-point buffers (running statistics), which `buffers` also holds by name. All start as copies of the current
    values.
    """

    def __init__(self, engine: Engine, decay: float):
        self.engine = engine
        self.decay = decay
        buffers = {name: buffer for name, buffer in engine.buffers().items() if buffer.is_floating_point()}
        self.buffers = {name: buffer.clone() for name, buffer in buffers.items()}
        # The shares are averaged whole, in a few operations.
        shares = [(share, share.clone(), fragments) for share, fragments in engine.shares()]
        self.fragments = [fragment for _, _, fragments in shares for fragment in fragments]
        self.averages = [_same_part(average, share, of.master) for share, average, part in shares for of in part]
        self.averages += self.buffers.values()
        self._masters = [*(share for share, _, _ in shares), *buffers.values()]
        self._averages = [*(average for _, average, _ in shares), *self.buffers.values()]
        # A step of SGD with learning rate r on ½ |average - master|² moves the average by r of the way to the master.
        # torch's fused SGD can be skipped by a flag on the device (found_inf). The loss's gradient, average - master,
        # is made of SGD's weight decay (1 · average) and of the gradient `master`, which `maximize` negates.
        self._sgd = torch.optim.SGD(self._averages, lr=0.0, weight_decay=1.0, maximize=True, fused=True)
        for average, master in zip(self._averages, self._masters, strict=True):
            average.grad = master

    def update(self, step: int, skipped: Tensor) -> None:
        """Update the averages after step `step` (counted from 0), unless `skipped`, a scalar on the device, is 1.

        The decay is warmed up, min(decay, (1 + step) / (10 + step)), so that early averages forget the initial weights
        quickly.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        self._sgd.param_groups[0]["lr"] = 1 - decay
        self._sgd.found_inf = skipped
        self._sgd.step()

    @contextlib.contextmanager
    def swapped_in(self, agreed: type[Exception]) -> Iterator[None]:
        """Context manager: the model has the averaged weights on all ranks.

        Its own weights are restored bitwise afterwards, also if the block raises `agreed`, which all ranks raise
        together. After any other error they are not: this rank would wait for ranks that have met none.
        """
        self._swap()
        try:
            yield
        except agreed:
            self._swap()
            raise
        self._swap()

    def _swap(self) -> None:
        for master, average in zip(self._masters, self._averages, strict=True):
            kept = master.clone()
            master.copy_(average)
            average.copy_(kept)
        self.engine.publish()


def _same_part(average: Tensor, share: Tensor, part: Tensor) -> Tensor:
    """The part of `average` that lies where `part` lies in `share`."""
    start = part.storage_offset() - share.storage_offset()
    return average[start : start + part.numel()]
