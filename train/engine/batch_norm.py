"""Batch norm whose running statistics do not depend on the number of ranks, and which works on bf16 and fp16 activations.

In training a norm normalises by its own micro-batch: that is the same on any number of ranks. Its running mean and variance are not:
PyTorch moves them at every call, so they depend on which micro-batches a rank takes, and in which order. Here an optimizer step moves
them once, by the module's own momentum, towards their average over all micro-batches of the step.

The models keep PyTorch's `nn.BatchNorm2d`: who trains them in a loop of their own gets what PyTorch does.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class RunningStatistics:
    """Moves the running statistics of `model`'s batch norms once a step, equally on all ranks. They stay in fp32, on the device.

    `begin()`, then `add()` after the backward pass of each micro-batch, then `finish(skipped)`. Norms that are in evaluation mode when
    this is made (frozen ones), or have no running statistics, are left alone. `enabled` is false where nothing is left to do.
    """

    def __init__(self, model: nn.Module):
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d) and module.training]
        norms = [norm for norm in norms if norm.track_running_stats]
        self.enabled = bool(norms)
        if not self.enabled:
            return
        self._calls = [norm.num_batches_tracked for norm in norms]
        self._statistics = [norm.running_mean for norm in norms] + [norm.running_var for norm in norms]
        self._sizes = [statistic.numel() for statistic in self._statistics]
        momenta = [norm.momentum for norm in norms] * 2
        self._momenta = torch.cat([torch.full_like(of, momentum) for of, momentum in zip(self._statistics, momenta, strict=True)])
        for norm in norms:
            norm.momentum = 1.0  # from now on a call leaves its micro-batch's own: recomputing activations does so a second time

    @torch.no_grad()
    def begin(self) -> None:
        """Before the first micro-batch of a step."""
        if self.enabled:
            self._before, self._calls_before, self._count = torch.cat(self._statistics), torch.stack(self._calls), 0
            self._sum = torch.zeros_like(self._before)

    @torch.no_grad()
    def add(self) -> None:
        """After each micro-batch of this rank."""
        if self.enabled:
            self._sum += torch.cat(self._statistics)
            self._count += 1

    @torch.no_grad()
    def finish(self, skipped: Tensor | bool) -> None:
        """After the optimizer's step; every rank calls. Where it was `skipped`, the statistics are those before it. Nobody waits for it.

        skipped: a scalar on the device, 0 or 1, or a bool.
        """
        if not self.enabled:
            return
        dist.all_reduce(self._sum)
        skipped = torch.as_tensor(skipped, device=self._sum.device).bool()
        after = torch.lerp(self._before, self._sum / (self._count * dist.get_world_size()), self._momenta)
        torch._foreach_copy_(self._statistics, torch.where(skipped, self._before, after).split(self._sizes))
        torch._foreach_copy_(self._calls, (self._calls_before + ~skipped).unbind())


class LowPrecisionBatchNorm2d(nn.BatchNorm2d):
    """Batch norm of bf16 or fp16 activations with weights of that type: computed in fp32, because its running statistics are."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        training = self.training or not self.track_running_stats
        statistics = self.running_mean, self.running_var
        return F.batch_norm(x_BCHW, *statistics, self.weight.float(), self.bias.float(), training, self.momentum, self.eps)


def accept_low_precision(model: nn.Module) -> None:
    """Make the batch norms of `model` work once its parameters, but not its buffers, have been cast to bf16 or fp16."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = LowPrecisionBatchNorm2d
