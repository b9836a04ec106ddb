"""What a person sees of a run: metrics.jsonl, TensorBoard, train.log, and a progress bar on a terminal.

Rank 0 writes.
"""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data_pipeline.durable import write_atomically
from train.config import Config, dump_config, flatten
from train.telemetry.appender import Alarm, Appender
from train.telemetry.formatting import clock, rate
from train.telemetry.goodput import CATEGORIES, ENDS, Ledger, read_lines
from train.telemetry.metrics import Metric, Scores

# Events that are counted from the run's first start on, and the curve that shows how many.
COUNTED = {
    "rollback": "rollbacks",
    "skipped_step": "skipped_steps",
    "bad_sample": "bad_samples",
    "slow_rank": "slow_ranks",
    "save_failed": "failed_saves",
    "save_slow": "slow_saves",
}


CLOCK_SET = 1.0  # seconds: a larger change of `booted()` means that the machine's clock was set


class Clock:
    """Time since the last reading, split into waiting for data and the rest; paused for evaluation and checkpoints."""

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        self._start, self._waited, self._steps = time.perf_counter(), 0.0, 0

    def waited(self, seconds: float) -> None:
        self._waited += seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time inside, which is neither training nor waiting for data."""
        began = time.perf_counter()
        yield
        self._start += time.perf_counter() - began

    def finish_step(self) -> None:
        self._steps += 1

    def read(self) -> tuple[float, float]:
        """(seconds per step, fraction of time waited for data) since the last reading; starts anew."""
        elapsed = time.perf_counter() - self._start
        result = elapsed / self._steps, self._waited / elapsed
        self.restart()
        return result


class Monitor:
    """Rank 0's voice; on other ranks every call does nothing, so the trainer need not ask who it is."""

    def __init__(
        self,
        output: Path,
        config: Config,
        metrics: tuple[Metric, ...],
        samples: str,
        is_main: bool,
        first: int,
        last: int,
        flops: tuple[float, float] | None,
    ):
        """metrics: of evaluations, the primary one first. samples: what is counted, such as "images". first, last:
        steps of this start.

        flops: of a sample, forward and backward, and of a device at its peak in a second; None if they are not known.
        """
        self.active, self.output, self.config, self.last = is_main, output, config, last
        self.metrics, self.samples = metrics, samples
        if not is_main:
            return
        from train.telemetry.tensorboard import Board

        self._ledger, self._goodput_due, self._booted = Ledger(), False, booted()
        self._counts = dict.fromkeys(COUNTED.values(), 0)
        if (output / "metrics.jsonl").exists():
            for line in read_lines(output / "metrics.jsonl"):
                self._count(line)
        alarm = Alarm()
        self._metrics = Appender(output / "metrics.jsonl", alarm)
        self._log = Appender(output / "train.log", alarm)
        self._board = Board(output / "tensorboard", alarm, first + 1, metrics)
        self._board.text("config", "```yaml\n" + dump_config(config) + "```", first)
        self._bar = progress_bar(last, "step", first)
        self._flops = flops

    def say(self, text: str) -> None:
        """A line for people: in train.log, and on the terminal."""
        if self.active:
            self._log.write(f"{clock(time.time())} {text}\n".encode())
            with contextlib.suppress(OSError):  # stdout may be a file on a full disk
                self._bar.write(text) if not self._bar.disable else print(text, flush=True)

    def event(self, name: str, step: int, text: str, **fields: object) -> None:
        """Something that happened: a line of metrics, and `text` for people."""
        self._write({"kind": "event", "event": name, "step": step, **fields})
        if self.active and name == "rollback":
            self._board.replace_from(fields["to"] + 1)
            self._bar.update(fields["to"] - self._bar.n)
        self.say(text)

    def train(
        self,
        step: int,
        epoch: float,
        losses: dict[str, float],
        lr: float,
        grad_norm: float,
        seconds: float,
        data_wait: float,
    ) -> None:
        """Metrics of the finished step `step`. losses: their sum, "loss", first; then its parts, if there are several.

        `seconds` per step and `data_wait` are means since the last line.
        """
        if not self.active:
            return
        loss = losses["loss"]
        speed = self.config.train.global_batch / seconds
        mfu = None
        if self._flops:
            per_sample, peak = self._flops
            mfu = per_sample * self.config.train.global_batch / seconds / peak / torch.distributed.get_world_size()
        learning = {**losses, "lr": lr, "grad_norm": grad_norm}
        pace = {"images_per_second": speed, "data_wait": data_wait, "step_ms": 1000 * seconds, "mfu": mfu}
        self._write({"kind": "train", "step": step, "epoch": round(epoch, 4), **learning, **pace})
        health = {"restarts": len(self._ledger.starts) - 1, **self._counts}
        for group, values in (("learning", learning), ("speed", pace), ("health", health)):
            for key, value in values.items():
                if value is not None:
                    self._board.scalar(f"{group}/{key}", value, step)
        pace_text = f"{rate(speed)} {'img' if self.samples == 'images' else self.samples}/s"
        self._bar.set_postfix_str(f"loss={loss:.3f}, lr={lr:.1e}, {pace_text}", refresh=False)
        if self._bar.disable:
            self.say(
                f"step {step}/{self.last}  epoch {epoch:.2f}  loss {loss:.4f}  lr {lr:.2e}  |grad| {grad_norm:.2f}"
                f"  {pace_text}  data wait {data_wait:.0%}"
            )
        else:
            words = f"step {step}  epoch {epoch:.2f}  loss {loss:.4f}  lr {lr:.2e}  {pace_text}"
            self._log.write(f"{clock(time.time())} {words}\n".encode())

    def advance(self) -> None:
        if self.active:
            self._bar.update()

    def evaluation(self, step: int, epoch: float, weights: str, scores: Scores, *, seconds: float) -> None:
        """Scores of the weights "model" or "ema" after `step` steps; `seconds` is what this evaluation took."""
        self._write(
            {
                "kind": "eval",
                "step": step,
                "weights": weights,
                **scores.values,
                "count": scores.count,
                "seconds": seconds,
            }
        )
        if self.active:
            for key, value in scores.values.items():
                self._board.scalar(f"evaluation/{weights}_{key}", value, step)
        name = "EMA" if weights == "ema" else "model"
        text = "  ".join(metric.text(scores.values[metric.name]) for metric in self.metrics)
        self.say(f"epoch {epoch:.4g}  {name}: {text}  ({scores.count} {self.samples})")

    def details(
        self, step: int, weights: str, picture: Callable[[], Tensor | None], text: Callable[[], str | None]
    ) -> None:
        """What a task shows of an evaluation in TensorBoard: a picture [3, H, W] in 0..1, and a text in Markdown."""
        if not self.active:
            return
        if self.config.monitor.images and (image := picture()) is not None:
            self._board.image(f"evaluation/{weights}", image, step)
        if (words := text()) is not None:
            self._board.text(f"evaluation/{weights}", words, step)

    def images(self, step: int, preview: Callable[[int], Tensor | None]) -> None:
        """A grid of what the model sees. preview: (largest number) → images [n, 3, H, W] in 0..1, or None."""
        count = self.config.monitor.images
        if self.active and count and (images := preview(count)) is not None:
            self._board.image("inputs", _grid(images), step)

    def finish(self, step: int, scores: dict[str, Scores]) -> None:
        """Hyper-parameters with the final scores, for TensorBoard's comparison of runs."""
        if self.active and scores:
            plain = {
                key: value if isinstance(value, int | float | str) else str(value)
                for key, value in flatten(self.config.model_dump()).items()
            }
            primary = self.metrics[0].name
            results = {f"final/{weights}_{primary}": result.values[primary] for weights, result in scores.items()}
            self._board.hyperparameters(plain, results, step)

    def close(self) -> None:
        if self.active:
            self._bar.close()
            self._board.close()
            self._metrics.close()
            self._log.close()

    def _write(self, line: dict) -> None:
        if not self.active:
            return
        event = line.get("event")
        due = line["kind"] == "eval" or event == "checkpoint"
        if self._goodput_due and not due:
            self._goodput()
        self._append(line)
        self._goodput_due = due
        if event in ENDS:
            self._goodput()

    def _append(self, line: dict) -> None:
        line = {**line, "time": round(time.time(), 3)}
        if abs(jump := booted() - self._booted) > CLOCK_SET:
            line["clock_set"] = round(jump, 3)
            self._booted += jump
        self._count(line)
        self._metrics.write(_strict_json(line))

    def _count(self, line: dict) -> None:
        self._ledger.add(line)
        if line.get("event") in COUNTED:
            self._counts[COUNTED[line["event"]]] += 1

    def _goodput(self) -> None:
        """Where the time went until now: one line after the last of several evaluations and checkpoints."""
        line = self._ledger.line()
        self._append(line)
        total = sum(line[category] for category in CATEGORIES) or 1.0  # in the first millisecond
        for category in CATEGORIES:
            self._board.scalar(f"goodput/{category}", line[category] / total, line["step"])


def booted() -> float:
    """The time at which this machine was booted, in Unix seconds. Setting the machine's clock changes it."""
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


def progress_bar(total: int, unit: str, first: int = 0, *, shown: bool = True) -> tqdm:
    """On stderr if it is a terminal; else, or if not `shown`, it is silent."""
    hidden = not (shown and sys.stderr.isatty())
    return tqdm(total=total, initial=first, unit=unit, disable=hidden, dynamic_ncols=True, smoothing=0.05)


class SampleRecord:
    """`samples/rank_%d.jsonl`: the sample ids this rank took in every step (`monitor.record_samples`)."""

    def __init__(self, output: Path, rank: int, enabled: bool):
        self._file = Appender(output / "samples" / f"rank_{rank}.jsonl", Alarm()) if enabled else None

    def write(self, step: int, ids: list[int]) -> None:
        if self._file:
            self._file.write(_strict_json({"step": step, "ids": ids}))

    def close(self) -> None:
        if self._file:
            self._file.close()


def write_config(output: Path, config: Config) -> list[str]:
    """Write `output/config.yaml`, for people; returns a sentence for the log where the disk does not take it."""
    try:
        write_atomically(output / "config.yaml", dump_config(config).encode())
    except OSError as error:
        return [f"alarm: {output / 'config.yaml'} cannot be written ({error.strerror})"]
    return []


def write_details(path: Path, document: dict) -> None:
    """Write what is kept of an evaluation after `document["step"]` steps to `path`, in place of the one before it.

    A full disk does not end training: a sentence on stderr reports it.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(exist_ok=True)
        temporary.write_text(json.dumps(document))
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # stderr may be a file on the same full disk
            sentence = (
                f"alarm: {path} cannot be written ({error.strerror}): a report will not show the evaluation of "
                f"step {document['step']}"
            )
            print(sentence, file=sys.stderr, flush=True)


def _strict_json(line: dict) -> bytes:
    """One line of JSON, which has no NaN and no infinity: they become null."""
    try:
        text = json.dumps(line, allow_nan=False)
    except ValueError:
        text = json.dumps(finite(line))
    return text.encode() + b"\n"


def finite(value: object) -> object:
    """`value`, of dicts and lists, with None in place of numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _grid(images: Tensor, gap: int = 2) -> Tensor:
    """Images [n, 3, h, w] side by side in rows of eight, as one [3, H, W]."""
    columns = min(8, len(images))
    rows = -(-len(images) // columns)
    height, width = (side + gap for side in images.shape[-2:])
    grid = images.new_ones(3, rows * height - gap, columns * width - gap)
    for index, image in enumerate(images):
        top, left = index // columns * height, index % columns * width
        grid[:, top : top + height - gap, left : left + width - gap] = image
    return grid
