"""TensorBoard curves, written with `Appender`. torch's SummaryWriter stops for good when the disk is full once."""

import os
import socket
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard import summary

from train.telemetry.appender import Alarm, Appender
from train.telemetry.metrics import Metric

# Charts of TensorBoard's page "Custom scalars". It takes tags as regular expressions; a chart without curves stays
# empty.
LAYOUT = {
    "learning": {
        "loss": ["Multiline", ["^learning/loss$", "^evaluation/model_loss$", "^evaluation/ema_loss$"]],
        "learning rate": ["Multiline", ["^learning/lr$"]],
        "norm of the gradient": ["Multiline", ["^learning/grad_norm$"]],
    },
    "speed": {
        "images per second": ["Multiline", ["^speed/images_per_second$"]],
        "milliseconds per step": ["Multiline", ["^speed/step_ms$"]],
        "share of time waiting for data; MFU": ["Multiline", ["^speed/data_wait$", "^speed/mfu$"]],
        "where all time went, over all starts": ["Multiline", ["^goodput/"]],
    },
    "health": {
        "restarts, rollbacks": ["Multiline", ["^health/restarts$", "^health/rollbacks$"]],
        "skipped steps": ["Multiline", ["^health/skipped_steps$"]],
        "bad samples": ["Multiline", ["^health/bad_samples$"]],
        "slow ranks, failed and slow saves": ["Multiline", ["^health/(slow_ranks|failed_saves|slow_saves)$"]],
    },
}


class Board:
    """Writes the event file of one start of a run. Its curves replace those of earlier starts from step `first` on."""

    def __init__(self, folder: Path, alarm: Alarm, first: int, metrics: tuple[Metric, ...]):
        # TensorBoard reads the files of a folder in the order of their names, so they begin with the time.
        self._file = Appender(
            folder / f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}", alarm
        )
        self._records = RecordWriter(self._file)
        self._add(file_version="brain.Event:2")
        self._add(summary=summary.custom_scalars(_layout(metrics[0])))
        self.replace_from(first)

    def replace_from(self, first: int) -> None:
        """What follows replaces the curves from step `first` on."""
        self._add(step=first, session_log=SessionLog(status=SessionLog.START))

    def scalar(self, tag: str, value: float, step: int) -> None:
        self._add(step=step, summary=summary.scalar(tag, value))

    def text(self, tag: str, text: str, step: int) -> None:
        self._add(step=step, summary=summary.text(tag, text))

    def image(self, tag: str, image: Tensor, step: int) -> None:
        """Show an image [3, H, W] with values in 0..1."""
        self._add(step=step, summary=summary.image(tag, image, dataformats="CHW"))

    def hyperparameters(self, values: dict, results: dict[str, float], step: int) -> None:
        """Write hyper-parameters (bool, int, float or str) and their results, for TensorBoard's comparison of runs."""
        for part in summary.hparams(values, results):
            self._add(step=step, summary=part)
        for tag, value in results.items():
            self.scalar(tag, value, step)

    def close(self) -> None:
        self._file.close()

    def _add(self, **fields: object) -> None:
        self._records.write(Event(wall_time=time.time(), **fields).SerializeToString())


def _layout(primary: Metric) -> dict[str, dict]:
    """LAYOUT, with a chart of the task's primary metric."""
    title = f"{primary.label} of model and EMA" + (f", {primary.unit}" if primary.unit else "")
    chart = {title: ["Multiline", [f"^evaluation/model_{primary.name}$", f"^evaluation/ema_{primary.name}$"]]}
    return {**LAYOUT, "learning": {"loss": LAYOUT["learning"]["loss"], **chart, **LAYOUT["learning"]}}
