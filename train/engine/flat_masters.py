"""The fp32 weights at ZeRO 0, which DeepSpeed leaves to the optimizer."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.engine.deepspeed_internals import Partition, Place
from train.engine.flat import FlatGroup, flattened


class FlatMasters:
    """The fp32 weights (the *masters*) of all parameter groups as one flat tensor, and the network's as another.

    In fp32 the two are the same tensor. The network's parameters become views of the second, and `optimizer` updates
    the first, group by group; Muon's matrices are updated one by one. Every rank has all masters, and a share of each
    group's, for which it writes checkpoints and averages.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, rank: int, world: int):
        self._optimizer, self._rank, self._world = optimizer, rank, world
        self.groups = [FlatGroup.aligned(list(group["params"])) for group in optimizer.param_groups]
        self._weights = flattened(
            self.groups, [parameter.data for group in self.groups for parameter in group.parameters]
        )
        self._master = self._weights.float()
        sizes = [group.size for group in self.groups]
        self._masters = self._master.split(sizes)
        for optimized, group, weights, master in zip(
            optimizer.param_groups, self.groups, self._weights.split(sizes), self._masters, strict=True
        ):
            for parameter, view in zip(group.parameters, group.views(weights), strict=True):
                parameter.data = view
            parts = group.views(master) if optimized.get("matrices") else [master]
            optimized["params"] = [nn.Parameter(part) for part in parts]

    def partitions(self) -> Iterator[Partition]:
        """The tensors that the optimizer updates, each with its parameters and their places in it."""
        for optimized, group, places in zip(self._optimizer.param_groups, self.groups, self.places(), strict=True):
            if optimized.get("matrices"):
                for parameter, master in zip(group.parameters, optimized["params"], strict=True):
                    yield [parameter], master, [Place(0, 0, parameter.numel())]
            else:
                yield group.parameters, optimized["params"][0], places

    def places(self) -> list[list[Place]]:
        """Where the parameters of each group lie in its flat tensors."""
        return [
            [
                Place(0, offset, parameter.numel())
                for parameter, offset in zip(group.parameters, group.offsets, strict=True)
            ]
            for group in self.groups
        ]

    def share(self, numel: int) -> range:
        """The elements of a flat tensor that belong to this rank's share."""
        width = -(-numel // self._world)
        return range(min(self._rank * width, numel), min((self._rank + 1) * width, numel))

    def set_gradient(self, gradient: Tensor) -> None:
        """Give the optimizer the step's gradient, flat."""
        for optimized in self._optimizer.param_groups:
            for master in optimized["params"]:
                start = master.storage_offset()
                master.grad = gradient[start : start + master.numel()].view(master.shape)

    def finish_step(self) -> None:
        """After the optimizer's step: round the masters to the network's weights, and drop the gradients."""
        self._optimizer.zero_grad()
        if self._weights is not self._master:
            self._weights.copy_(self._master)

    def publish(self) -> None:
        """Set masters and weights on all ranks from the masters, of which each rank contributes its share."""
        for master in self._masters:
            share = self.share(master.numel())
            mine = master.new_zeros(-(-master.numel() // self._world))
            mine[: len(share)] = master[share.start : share.stop]
            whole = master.new_empty(len(mine) * self._world)
            dist.all_gather_into_tensor(whole, mine)
            master.copy_(whole[: master.numel()])
        self.finish_step()
