"""Batch norm with running statistics that do not depend on the number of ranks, and for bf16 and fp16 activations.

In training, batch norm normalises each micro-batch by its own statistics, which are the same on any number of ranks.
The running mean and variance are not: PyTorch updates them at every call, so they depend on which micro-batches a rank
processes, and in which order. Here they are updated once per optimizer step, with the module's own momentum, towards
their average over all micro-batches of the step.

The models use PyTorch's `nn.BatchNorm2d`, which behaves as usual in other training loops.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class RunningStatistics:
    """Updates the running statistics of `model`'s batch norms once per step, equally on all ranks.

    The statistics stay in fp32 on the device.

    In each step call `begin()`, then `add()` after the backward pass of each micro-batch, then `finish(skipped)`. Norms
    in evaluation mode when this object is created (frozen norms) are ignored. `enabled` is False if no norms remain;
    the methods then do nothing.
    """

    def __init__(self, model: nn.Module):
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d) and module.training]
        self.enabled = bool(norms)
        if not self.enabled:
            return
        self._calls = [norm.num_batches_tracked for norm in norms]
        self._statistics = [norm.running_mean for norm in norms] + [norm.running_var for norm in norms]
        self._sizes = [statistic.numel() for statistic in self._statistics]
        momenta = [norm.momentum for norm in norms] * 2
        self._momenta = torch.cat(
            [torch.full_like(of, momentum) for of, momentum in zip(self._statistics, momenta, strict=True)]
        )
        for norm in norms:
            # A forward call then stores its own statistics, and activation checkpointing may repeat the call.
            norm.momentum = 1.0

    @torch.no_grad()
    def begin(self) -> None:
        """Begin a step; call it before the first micro-batch."""
        if self.enabled:
            self._before, self._calls_before, self._count = torch.cat(self._statistics), torch.stack(self._calls), 0
            self._sum = torch.zeros_like(self._before)

    @torch.no_grad()
    def add(self) -> None:
        """Add the statistics of a micro-batch; call it after the backward pass of each micro-batch of this rank."""
        if self.enabled:
            self._sum += torch.cat(self._statistics)
            self._count += 1

    @torch.no_grad()
    def finish(self, skipped: Tensor | bool) -> None:
        """Update the running statistics after the optimizer's step, without synchronising. All ranks call this.

        skipped: whether to restore the statistics of before the step; a scalar on the device, 0 or 1, or a bool.
        """
        if not self.enabled:
            return
        dist.all_reduce(self._sum)
        skipped = torch.as_tensor(skipped, device=self._sum.device).bool()
        after = torch.lerp(self._before, self._sum / (self._count * dist.get_world_size()), self._momenta)
        torch._foreach_copy_(self._statistics, torch.where(skipped, self._before, after).split(self._sizes))
        torch._foreach_copy_(self._calls, (self._calls_before + ~skipped).unbind())


class LowPrecisionBatchNorm2d(nn.BatchNorm2d):
    """Batch norm with bf16 or fp16 weights and activations, computed in fp32, the type of its running statistics."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        statistics, weights = (self.running_mean, self.running_var), (self.weight.float(), self.bias.float())
        return F.batch_norm(x_BCHW, *statistics, *weights, self.training, self.momentum, self.eps)


def accept_low_precision(model: nn.Module) -> None:
    """Make `model`'s batch norms work after its parameters, but not its buffers, are cast to bf16 or fp16."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = LowPrecisionBatchNorm2d
