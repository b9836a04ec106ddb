"""Steps that are skipped because their gradient is not finite; the host learns of them a step later."""

import collections

import torch

from train.guard.errors import REMEDY, TrainingFailed


class Skips:
    """Steps that changed nothing because their gradient was not finite. The same ones on all ranks."""

    def __init__(self, limit: int):
        """limit: so many in a row are too many."""
        self.limit, self.in_a_row = limit, []
        self._pending: collections.deque[tuple[int, torch.Tensor, torch.cuda.Event | None]] = collections.deque()
        self._gone_back_for: set[int] = set()

    @property
    def too_many(self) -> bool:
        return len(self.in_a_row) >= self.limit

    def add(self, done: int, skipped: torch.Tensor) -> None:
        """Step `done` has been given to the device; `skipped` will be 1 if it changes nothing. Does not wait for it."""
        event = torch.cuda.Event() if skipped.is_cuda else None
        flag = skipped.to("cpu", non_blocking=True)
        if event:
            event.record()
        self._pending.append((done, flag, event))

    def known(self, done: int) -> list[int]:
        """The skipped steps up to `done` that were not returned before. Waits for the device to finish step `done`.

        If `done` is the step before the last one queued, the GPU has a whole step to work on in the meantime.
        """
        skipped = []
        while self._pending and self._pending[0][0] <= done and not self.too_many:
            step, flag, event = self._pending.popleft()
            if event:
                event.synchronize()
            if flag.numpy():
                skipped.append(step)
            self.in_a_row = [*self.in_a_row, step] if flag.numpy() else []
        return skipped

    def go_back(self, refused: int | None) -> tuple[list[int], str]:
        """The run goes back to an earlier step; returns for which steps, and why.

        refused: the step whose state was not saved because it was not finite; None: steps in a row were skipped. Raises
        TrainingFailed if the run has gone back for these steps before.
        """
        self._pending.clear()
        steps, self.in_a_row = self.in_a_row, []
        if refused is None:
            sentence = f"steps {steps[0]} to {steps[-1]} had no finite gradient"
        else:
            steps, sentence = [refused], f"the state after step {refused} was not finite"
        if self._gone_back_for.intersection(steps):
            raise TrainingFailed(f"{sentence}, again after going back to a checkpoint; {REMEDY}")
        self._gone_back_for.update(steps)
        return steps, sentence
