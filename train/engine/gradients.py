"""A step's gradient at ZeRO 0 to 2, summed in fp32 over micro-batches and ranks, in flat tensors."""

import torch.distributed as dist
from torch import Tensor

from train.engine.flat import FlatGroup, flattened


class Gradients:
    """The sum of the gradients of a step's micro-batches: one flat fp32 tensor of all parameter groups.

    At ZeRO 0 and 1 a rank sums its own micro-batches, and the ranks' sums are added once, at the end of the step: at
    ZeRO 1 each rank then gets its partition of each group only. At ZeRO 2 each micro-batch's gradient is reduced at
    once, and a rank keeps the sum of its partitions only.
    """

    def __init__(self, groups: list[FlatGroup], stage: int, world: int):
        self.groups, self._stage, self._world = groups, stage, world
        self._sizes = [group.size for group in groups]
        self._partitions = [size // world for size in self._sizes]
        self._sum: Tensor | None = None

    def flatten(self, gradients: tuple[Tensor, ...]) -> Tensor:
        """Gradients of all parameters, in the order of the groups, as one flat tensor."""
        return flattened(self.groups, gradients)

    def add(self, flat: Tensor) -> None:
        """Add a micro-batch's gradient. `flat` may be overwritten."""
        if self._stage == 2:
            flat = self._scattered(flat.float())
        self._sum = flat.float() if self._sum is None else self._sum.add_(flat)

    def take(self) -> Tensor:
        """The whole step's gradient, reduced over the ranks; at ZeRO 1 and 2 this rank's partitions of it."""
        total, self._sum = self._sum, None
        if self._stage == 1:
            return self._scattered(total)
        if self._stage == 0 and self._world > 1:
            for group in total.split(self._sizes):
                dist.all_reduce(group)
        return total

    def by_group(self, gradient: Tensor) -> tuple[Tensor, ...]:
        """The parts of what `take` returned that belong to each group."""
        return gradient.split(self._partitions if self._stage else self._sizes)

    def _scattered(self, whole: Tensor) -> Tensor:
        """This rank's partitions of the sum of all ranks' `whole`."""
        partitions = whole.new_empty(sum(self._partitions))
        for part, group in zip(partitions.split(self._partitions), whole.split(self._sizes), strict=True):
            dist.reduce_scatter_tensor(part, group)
        return partitions
