"""The grouping of a stage's tokens into patches, and the padding that it needs.

Shape letters: B images, H W map, N tokens, n patches, P tokens per patch (size * size), C channels.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def padding_to(length: int, multiple: int) -> int:
    """Padding needed to reach a multiple."""
    # Not -length % multiple: torch.export simplifies length + padding only in this form.
    return -(-length // multiple) * multiple - length


def may_be_nonzero(*lengths: int) -> bool:
    """Whether any length is not 0, or is a symbol of torch.export, whose example must not decide for other sizes."""
    return any(not isinstance(length, int) or length != 0 for length in lengths)


@dataclass(frozen=True)
class Patches:
    """How the tokens of one stage are stored and grouped into patches.

    If the patches tile the map exactly, tokens are stored patch by patch: `split` and `join` are then views, and layers
    that act on single tokens (norm, MLP, residual) are unaffected. Otherwise tokens are stored row by row, and `split`
    pads the map with zeros on the right and at the bottom. The padding thus comes after the norm, as in the published
    model, and costs the MLP nothing.

    height, width: of the map, in tokens. size: side of a patch, in tokens. by_row: store tokens row by row in any case.
    kernels: use the Triton kernels for shapes that they support; they address a patch's tokens in the rows directly.
    """

    height: int
    width: int
    size: int
    by_row: bool = False
    kernels: bool = False

    @property
    def padding(self) -> tuple[int, int]:
        """Rows and columns of padding that complete the last patches."""
        return padding_to(self.height, self.size), padding_to(self.width, self.size)

    @property
    def count(self) -> int:
        """Number of patches, n."""
        rows, columns = self.padding
        return (self.height + rows) // self.size * ((self.width + columns) // self.size)

    @property
    def by_patch(self) -> bool:
        """Whether tokens are stored patch by patch."""
        return not may_be_nonzero(*self.padding) and not self.by_row

    @property
    def can_shift(self) -> bool:
        """Whether both sides hold more than one patch, so that a shift by half a patch regroups the tokens."""
        return min(self.height, self.width) > self.size

    def tokens_from_map(self, x_BHWC: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, N, C] in this stage's order."""
        return self._cut(x_BHWC).flatten(1, 2) if self.by_patch else x_BHWC.flatten(1, 2)

    def map_from_tokens(self, x_BNC: Tensor) -> Tensor:
        """[B, N, C] in this stage's order -> [B, H, W, C]."""
        if self.by_patch:
            return self._paste(x_BNC.unflatten(1, (-1, self.size**2)))
        return x_BNC.unflatten(1, (self.height, self.width))

    def split(self, x_BNC: Tensor, shift: int = 0) -> Tensor:
        """[B, N, C] -> patches [B, n, P, C]. A shift first rolls the map up and to the left by that many tokens."""
        if self.by_patch and not shift:
            return x_BNC.unflatten(1, (-1, self.size**2))
        x_BHWC = self.map_from_tokens(x_BNC)
        rows, columns = self.padding
        if may_be_nonzero(rows, columns):
            x_BHWC = F.pad(x_BHWC, (0, 0, 0, columns, 0, rows))
        return self._cut(x_BHWC.roll((-shift, -shift), dims=(1, 2)) if shift else x_BHWC)

    def join(self, x_BnPC: Tensor, shift: int = 0) -> Tensor:
        """The inverse of `split`: [B, n, P, C] -> [B, N, C]."""
        if self.by_patch and not shift:
            return x_BnPC.flatten(1, 2)
        x_BHWC = self._paste(x_BnPC)
        if shift:
            x_BHWC = x_BHWC.roll((shift, shift), dims=(1, 2))
        return self.tokens_from_map(x_BHWC[:, : self.height, : self.width])

    def pad(self, x_BNC: Tensor) -> tuple["Patches", Tensor]:
        """Pad the map, stored row by row, to whole patches. Returns the padded map's `Patches` and its tokens."""
        rows, columns = self.padding
        if not rows and not columns:
            return self, x_BNC
        padded = replace(self, height=self.height + rows, width=self.width + columns)
        return padded, F.pad(self.map_from_tokens(x_BNC), (0, 0, 0, columns, 0, rows)).flatten(1, 2)

    def crop(self, x_BNC: Tensor) -> Tensor:
        """The inverse of `pad`: the tokens of this map from those of the padded one."""
        rows, columns = self.padding
        if not rows and not columns:
            return x_BNC
        return x_BNC.unflatten(1, (self.height + rows, -1))[:, : self.height, : self.width].flatten(1, 2)

    def shift_mask(self, shift: int, device: torch.device) -> Tensor:
        """[n, P, P] bool: whether two tokens of a shifted patch were in one contiguous region before the roll.

        Only such tokens attend to each other (Swin, arXiv 2103.14030, section 3.2).
        """

        def region(length: int) -> Tensor:
            # After the roll the last patch of a side holds two regions: the side's end, and its start.
            position = torch.arange(length, device=device)
            return (position >= length - self.size).long() + (position >= length - shift).long()

        rows, columns = self.padding
        region_HW = 3 * region(self.height + rows)[:, None] + region(self.width + columns)
        region_nP = self._cut(region_HW[None, :, :, None])[0, :, :, 0]
        return region_nP[:, :, None] == region_nP[:, None, :]

    def _cut(self, x_BHWC: Tensor) -> Tensor:
        return rearrange(x_BHWC, "B (rows p) (columns q) C -> B (rows columns) (p q) C", p=self.size, q=self.size)

    def _paste(self, x_BnPC: Tensor) -> Tensor:
        columns = -(-self.width // self.size)
        return rearrange(x_BnPC, "B (rows columns) (p q) C -> B (rows p) (columns q) C", columns=columns, p=self.size)
