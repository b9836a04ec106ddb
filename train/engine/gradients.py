"""A step's gradient at ZeRO 0 to 2, summed in fp32 over micro-batches and ranks, in flat tensors."""

import torch
import torch.distributed as dist
from torch import Tensor

from train.engine.flat import FlatGroup


class Gradients:
    """The sum of the gradients of a step's micro-batches: one flat fp32 tensor per parameter group.

    At ZeRO 0 and 1 a rank sums its own micro-batches, and the ranks' sums are added once, at the end of the step: at
    ZeRO 1 each rank then gets its partition only. At ZeRO 2 each micro-batch's gradient is reduced at once, and a rank
    keeps the sum of its partition only.
    """

    def __init__(self, groups: list[FlatGroup], stage: int, world: int):
        self.groups, self._stage, self._world = groups, stage, world
        self._sums: list[Tensor] | None = None

    def flatten(self, gradients: tuple[Tensor, ...]) -> list[Tensor]:
        """Gradients of all parameters, in the order of the groups, as a flat tensor per group."""
        flat, start = [], 0
        for group in self.groups:
            flat.append(group.flatten(gradients[start : start + len(group.parameters)]))
            start += len(group.parameters)
        return flat

    def add(self, flat: list[Tensor]) -> None:
        """Add a micro-batch's gradient. `flat` may be overwritten."""
        if self._stage == 2:
            flat = [self._scattered(gradient.float()) for gradient in flat]
        if self._sums is None:
            self._sums = [gradient.float() for gradient in flat]
        else:
            torch._foreach_add_(self._sums, flat)

    def take(self) -> list[Tensor]:
        """The whole step's gradient, reduced over the ranks; at ZeRO 1 and 2 this rank's partition of it."""
        sums, self._sums = self._sums, None
        if self._stage == 1:
            return [self._scattered(total) for total in sums]
        if self._stage == 0 and self._world > 1:
            for total in sums:
                dist.all_reduce(total)
        return sums

    def _scattered(self, whole: Tensor) -> Tensor:
        """This rank's partition of the sum of all ranks' `whole`."""
        part = whole.new_empty(len(whole) // self._world)
        dist.reduce_scatter_tensor(part, whole)
        return part
