"""An order whose micro-batches have images of one orientation: landscape, or portrait.

Images of a micro-batch are padded to one shape, and images of both orientations would be padded to a square.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from .order import Order, permute
from .randomness import Stream, make_key
from .split import Split


@dataclass(frozen=True)
class GroupedOrder(Order):
    """portrait: bool [samples]; an image is landscape if it is not.

    In every epoch each group has a keyed permutation of its own and is cut into micro-batches. The T = NL // m + NP //
    m micro-batches of both, the landscape ones first, are permuted by a third key, and a step uses M of them. The last
    T mod M of them, and the samples that fill no micro-batch, are not used; they are different ones in each epoch. As
    with `Order`, all is a function of (seed, step), in constant time, and does not depend on the number of ranks; five
    bytes a sample are kept in memory. A sample that cannot be read is replaced by one of its group.

    `shuffle` and `repeats` are not used. Raises ValueError for sizes that do not fit together.
    """

    portrait: np.ndarray = field(kw_only=True, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        landscape, portrait = self.groups
        for name, size in (("landscape", landscape), ("portrait", portrait)):
            if 0 < size < self.micro_batch:
                raise ValueError(
                    f"the dataset's {size} {name} images fill no micro-batch of {self.micro_batch} of one orientation, "
                    "so they would never be trained on: set task.aspect_groups=false, or a smaller train.micro_batch"
                )
        if sum(self._counts) < self.micro_batches:
            raise ValueError(
                f"the dataset's {landscape} landscape and {portrait} portrait images fill {sum(self._counts)} "
                f"micro-batches of {self.micro_batch} of one orientation, fewer than the {self.micro_batches} of a "
                "step: set a smaller train.global_batch, or task.aspect_groups=false"
            )

    @classmethod
    def of(cls, split: Split, seed: int, global_batch: int, micro_batch: int) -> "GroupedOrder":
        """The order of a split's samples, with the sizes of its images in the index."""
        portrait = split.records["width"] < split.records["height"]
        return cls(seed, split.samples, global_batch, micro_batch, portrait=portrait)

    @property
    def groups(self) -> tuple[int, ...]:
        return tuple(map(len, self._members))

    @cached_property
    def _members(self) -> tuple[np.ndarray, np.ndarray]:
        """The ids of the landscape and of the portrait images, ascending."""
        return tuple(np.flatnonzero(group).astype(np.int32) for group in (~self.portrait, self.portrait))

    @property
    def _counts(self) -> tuple[int, int]:
        """Whole micro-batches of each group."""
        return tuple(size // self.micro_batch for size in self.groups)

    @property
    def steps_per_epoch(self) -> int:
        return sum(self._counts) // self.micro_batches

    def draws(self, step: int, indices: Sequence[int]) -> np.ndarray:
        rows, epoch = np.asarray(indices, np.int64), self.epoch_of(step)
        slots = (step % self.steps_per_epoch) * self.micro_batches + rows
        slots = permute(make_key(self.seed, Stream.ORDER, epoch, 0), sum(self._counts), slots)
        found = np.empty((len(slots), self.micro_batch), np.int64)
        for number, (ids, first) in enumerate(zip(self._members, (0, self._counts[0]), strict=True)):
            mine = (slots >= self._counts[0]) == number
            positions = (slots[mine] - first)[:, None] * self.micro_batch + np.arange(self.micro_batch)
            key = make_key(self.seed, Stream.ORDER, epoch, 1 + number)
            if positions.size:
                found[mine] = ids[permute(key, len(ids), positions.ravel())].reshape(positions.shape)
        return found

    def replacement(self, sample: int, attempt: int) -> int:
        ids = self._members[int(self.portrait[sample])]
        return int(ids[make_key(self.seed, Stream.REPLACEMENT, sample, attempt) % len(ids)])
