"""The parameters of an optimizer's group, or their gradients, as one flat tensor.

A step then takes few operations on large tensors, where it would take some for each of hundreds of parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ALIGNMENT = 64  # elements: matrix products are fast for addresses that are multiples of 16 bytes


@dataclass(frozen=True)
class FlatGroup:
    """Parameters, and where each begins in a flat tensor of `size` elements. Elements between them are zero."""

    parameters: list[nn.Parameter]
    offsets: list[int]
    size: int

    @classmethod
    def aligned(cls, parameters: list[nn.Parameter]) -> "FlatGroup":
        """Parameters one after the other, each at a multiple of ALIGNMENT."""
        offsets, size = [], 0
        for parameter in parameters:
            offsets.append(size)
            size += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
        return cls(parameters, offsets, size)

    def gaps(self, flat: Tensor) -> list[Tensor]:
        """The parts of `flat` [size] between the parameters."""
        ends = [offset + parameter.numel() for parameter, offset in zip(self.parameters, self.offsets, strict=True)]
        places = zip([0, *ends], [*self.offsets, self.size], strict=True)
        return [flat[end:start] for end, start in places if start > end]

    def views(self, flat: Tensor) -> list[Tensor]:
        """The parts of `flat` [size] that belong to the parameters, in their shapes."""
        return [
            flat[offset : offset + parameter.numel()].view(parameter.shape)
            for parameter, offset in zip(self.parameters, self.offsets, strict=True)
        ]


@torch.no_grad()
def flattened(groups: Sequence[FlatGroup], tensors: Sequence[Tensor]) -> Tensor:
    """`tensors`, one for each parameter of the groups and of its shape, as one flat tensor, group after group.

    All have one dtype.
    """
    sizes = [group.size for group in groups]
    flat = tensors[0].new_empty(sum(sizes))
    parts = list(zip(groups, flat.split(sizes), strict=True))
    # Not torch.cat: for the gradients of CAT-B, of very different sizes, it took 1.1 ms on an H200, of which the memory
    # needs 0.05.
    if gaps := [gap for group, part in parts for gap in group.gaps(part)]:
        torch._foreach_zero_(gaps)
    torch._foreach_copy_(
        [view for group, part in parts for view in group.views(part)],
        [tensor.contiguous() for tensor in tensors],  # another layout would make a copy of each tensor by itself
    )
    return flat
