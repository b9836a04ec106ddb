"""Micro-batches on their way from the loader to the model: on a GPU, copied and augmented beside the model's own work."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from data_pipeline.loader import Loader, MicroBatch


class Feed(AbstractContextManager):
    """Iterator over (micro-batch, images, targets): what `inputs` makes of the loader's micro-batches.

    On a GPU `prepare` makes those of the next micro-batch, on a side stream; call it when the present one's work has been given to the
    device, and before the host waits for any of it. On the CPU it does nothing: there is no other device to be kept busy.
    `waited` is told the seconds spent waiting for the loader.
    """

    def __init__(
        self,
        batches: Loader,
        inputs: Callable[[MicroBatch], tuple[Tensor, Tensor]],
        device: torch.device,
        waited: Callable[[float], None],
    ):
        self._batches, self._inputs, self._waited = batches, inputs, waited
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._prepared: tuple[MicroBatch, Tensor, Tensor] | None = None

    def __next__(self) -> tuple[MicroBatch, Tensor, Tensor]:
        if self._stream is None:
            batch = self._take()
            return batch, *self._inputs(batch)
        if self._prepared is None:
            self.prepare()
        (batch, images, targets), self._prepared = self._prepared, None
        model = torch.cuda.current_stream()
        model.wait_stream(self._stream)
        for tensor in (images, targets):
            tensor.record_stream(model)  # or its memory would be the side stream's again while the model still reads it
        return batch, images, targets

    def prepare(self) -> None:
        """On a GPU: begin the next micro-batch's copy and augmentation. Waits for the loader, not for the device."""
        if self._stream is not None:
            batch = self._take()
            with torch.cuda.stream(self._stream):
                self._prepared = batch, *self._inputs(batch)

    def __exit__(self, *_: object) -> None:
        self._batches.close()

    def _take(self) -> MicroBatch:
        began = time.perf_counter()
        batch = next(self._batches)
        self._waited(time.perf_counter() - began)
        return batch
