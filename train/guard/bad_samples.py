"""Samples that cannot be read, limited by `guard.bad_samples`, and reads that had to be repeated."""

import torch.distributed as dist

from data_pipeline.loader import MicroBatch
from data_pipeline.split import DataError
from train.telemetry.monitor import Monitor


class BadSamples:
    """Collects and reports samples that could not be read since this start of the run, and temporary read faults.

    A rank notes what it meets (`meet`); the ranks exchange and report it in `agree`. Each sample of a split is reported
    once, faults once per rank, kind and call of `agree`.
    """

    def __init__(self, budget: int, path: str, rank: int):
        """budget: guard.bad_samples. path: of the dataset, for the error's advice."""
        self._budget, self._path, self._rank = budget, path, rank
        self._known: set[tuple[str, int]] = set()
        self._new: dict[tuple[str, int], dict] = {}
        self._faults: dict[str, dict] = {}

    @property
    def new(self) -> int:
        """Number of samples and kinds of faults that this rank has met since the last `agree`."""
        return len(self._new) + len(self._faults)

    def meet(self, split: str, step: int, batch: MicroBatch) -> None:
        """Note the bad samples and faults of a micro-batch of `step`."""
        for fault in batch.faults:
            fields = {"step": step, "rank": self._rank, "file": fault.file, "error": fault.error, "count": 0}
            self._faults.setdefault(fault.error, fields)["count"] += fault.count
        for sample in batch.bad:
            key = split, sample.id
            if key not in self._known and key not in self._new:
                fields = {"split": split, "id": sample.id, "replaced_by": sample.replaced_by, "rank": self._rank}
                self._new[key] = {"step": step, **fields, "reason": sample.sentence}

    def agree(self, monitor: Monitor) -> None:
        """Report what any rank has met. All ranks call this, and all raise DataError if the budget is exceeded."""
        found: list = [None] * dist.get_world_size()
        dist.all_gather_object(found, (self._new, self._faults))
        self._new, self._faults, last = {}, {}, ""
        for fields in [fault for _, faults in found for fault in faults.values()]:
            attempts = "1 attempt" if fields["count"] == 1 else f"{fields['count']} attempts"
            text = f"rank {fields['rank']} reads {fields['file']} again: {attempts} failed ({fields['error']})"
            monitor.event("io_retry", fields.pop("step"), text, **fields)
        for key, fields in [item for samples, _ in found for item in samples.items()]:
            if key not in self._known:
                self._known.add(key)
                last, used = fields["reason"], fields["replaced_by"]
                instead = "It is left out of the score." if used is None else f"Sample {used} is used instead."
                monitor.event("bad_sample", fields.pop("step"), f"{last} {instead}", **fields)
        if len(self._known) > self._budget:
            raise DataError(
                f"{last} That makes {len(self._known)} samples that cannot be read, "
                f"and guard.bad_samples allows {self._budget}. "
                f"Check the dataset with: python launch/prepare.py verify {self._path}"
            )
