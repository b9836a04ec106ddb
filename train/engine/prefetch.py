"""Micro-batches on their way from the loader to the model: on a GPU, copied and augmented beside the model's own
work.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from data_pipeline.loader import Loader, MicroBatch


class Prefetcher(AbstractContextManager):
    """Iterator over (micro-batch, what `inputs` makes of it): any nested structure of tensors on the device.

    On a GPU `prepare` starts the copy and augmentation of the next micro-batch on a side stream. Call it after the
    current micro-batch's work has been queued on the device, and before the host waits for any of it. On the CPU it
    does nothing. Each of `waited` is called with the seconds spent waiting for the loader.
    """

    def __init__(
        self,
        batches: Loader,
        inputs: Callable[[MicroBatch], Any],
        device: torch.device,
        *waited: Callable[[float], None],
    ):
        self._batches, self._inputs, self._waited = batches, inputs, waited
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._prepared: tuple[MicroBatch, Any] | None = None

    def __next__(self) -> tuple[MicroBatch, Any]:
        if self._stream is None:
            batch = self._take()
            return batch, self._inputs(batch)
        if self._prepared is None:
            self.prepare()
        (batch, inputs), self._prepared = self._prepared, None
        model = torch.cuda.current_stream()
        model.wait_stream(self._stream)
        for leaf in tree_leaves(inputs):
            if isinstance(leaf, torch.Tensor):
                leaf.record_stream(model)  # else the side stream could reuse its memory while the model still reads it
        return batch, inputs

    def prepare(self) -> None:
        """On a GPU: start the next micro-batch's copy and augmentation. Waits for the loader, not for the device."""
        if self._stream is not None:
            batch = self._take()
            with torch.cuda.stream(self._stream):
                self._prepared = batch, self._inputs(batch)

    def __exit__(self, *_: object) -> None:
        self._batches.close()

    def _take(self) -> MicroBatch:
        began = time.perf_counter()
        batch = next(self._batches)
        seconds = time.perf_counter() - began
        for waited in self._waited:
            waited(seconds)
        return batch
