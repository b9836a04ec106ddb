"""The parameters of an optimizer's group, or their gradients, as one flat tensor.

A step then takes few operations on large tensors, where it would take some for each of hundreds of parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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

    def pieces(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """`tensors`, one for each parameter and of its shape, flat and with zeros between them: `size` elements."""
        pieces, end = [], 0
        for tensor, offset in zip(tensors, self.offsets, strict=True):
            pieces += [tensor.new_zeros(offset - end)] if offset > end else []
            pieces.append(tensor.reshape(-1))
            end = offset + tensor.numel()
        pieces += [pieces[-1].new_zeros(self.size - end)] if self.size > end else []
        return pieces

    def views(self, flat: Tensor) -> list[Tensor]:
        """The parts of `flat` [size] that belong to the parameters, in their shapes."""
        return [
            flat[offset : offset + parameter.numel()].view(parameter.shape)
            for parameter, offset in zip(self.parameters, self.offsets, strict=True)
        ]
