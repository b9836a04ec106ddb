"""Samples that cannot be read: named once, and no more of them than `guard.bad_samples`."""

from collections.abc import Iterable

import torch.distributed as dist

from data_pipeline.loader import BadSample
from data_pipeline.manifest import DataError
from train.config import Config
from train.monitor import Monitor


class BadSamples:
    """The samples that could not be read since this start of the run, in training and in evaluation, on any rank: each is named once.

    A rank collects what it meets; the ranks tell each other in `agree`.
    """

    def __init__(self, config: Config, rank: int):
        self._budget, self._path, self._rank = config.guard.bad_samples, config.data.path, rank
        self._known: set[tuple[str, int]] = set()
        self._new: dict[tuple[str, int], dict] = {}

    @property
    def new(self) -> int:
        """Samples this rank has met since the last `agree`."""
        return len(self._new)

    def meet(self, split: str, step: int, samples: Iterable[BadSample]) -> None:
        """Note what a micro-batch of `step` says."""
        for sample in samples:
            key = split, sample.id
            if key not in self._known and key not in self._new:
                fields = {"split": split, "id": sample.id, "replaced_by": sample.replaced_by, "rank": self._rank}
                self._new[key] = {"step": step, **fields, "reason": sample.sentence}

    def agree(self, monitor: Monitor) -> None:
        """Name what any rank has met; every rank calls. Raises DataError, on all ranks alike, where there are more than the budget."""
        found: list = [None] * dist.get_world_size()
        dist.all_gather_object(found, self._new)
        self._new, last = {}, ""
        for key, fields in [item for samples in found for item in samples.items()]:
            if key not in self._known:
                self._known.add(key)
                last, used = fields["reason"], fields["replaced_by"]
                instead = "It is left out of the score." if used is None else f"Sample {used} is used instead."
                monitor.event("bad_sample", fields.pop("step"), f"{last} {instead}", **fields)
        if len(self._known) > self._budget:
            raise DataError(
                f"{last} That makes {len(self._known)} samples that cannot be read, and guard.bad_samples allows {self._budget}. "
                f"Check the dataset with: python launch/prepare.py verify {self._path}"
            )
