"""Reading a run's folder: metrics.jsonl, config.yaml, .lock and stacks/. Without torch; nothing is written."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import yaml

from data_pipeline.config import has_secret, without_secrets
from train.config import flatten
from train.telemetry.goodput import Ledger, Start, parse_lines, read_lines
from train.telemetry.metrics import Metric

STARTS = ("start", "resume")
NO_RUN = "is no run's folder: it has no metrics.jsonl. Give what launch/train.py got as --output"
# The metrics of runs whose start lines have no field `metrics`: they are older than it, and all are classification.
CLASSIFICATION = (
    Metric("top1", "top-1", "%", "higher"),
    Metric("top5", "top-5", "%", "higher"),
    Metric("loss", "loss", "", "lower"),
)


class MetricsTail:
    """Reads a metrics.jsonl while it grows."""

    def __init__(self, path: Path):
        self.path, self._place = path, 0

    @property
    def replaced(self) -> bool:
        """Whether the file is shorter than what was read of it: it belongs to another run."""
        return self._place > 0 and (not self.path.exists() or self.path.stat().st_size < self._place)

    def read(self) -> list[dict]:
        """Complete lines since the last call."""
        if not self.path.exists():
            return []
        with open(self.path, "rb") as file:
            file.seek(self._place)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._place += len(whole)
        return list(parse_lines(whole.splitlines()))


@dataclass(eq=False)
class Line:
    """A line of metrics.jsonl.

    hours: since the run's first start.
    again: the step was taken again later, because a start was killed or training went back; that later line counts.
    """

    values: dict
    hours: float
    again: bool = False


class RunLog:
    """The lines of a metrics.jsonl. Add them in their order.

    Lines before the first start that has a `time` are only counted.
    train, evals, events: the lines of each kind; `train` stays empty if `keep_train` is false.
    """

    def __init__(self, *, keep_train: bool = True):
        self.ledger = Ledger()
        self.starts: list[dict] = []  # the `start` and `resume` lines
        self.train: list[Line] = []
        self.evals: list[Line] = []
        self.events: list[Line] = []
        self._keep_train = keep_train
        self._counting: dict[tuple, Line] = {}  # lines that no later one replaces, in the order of their steps

    def add(self, line: dict) -> bool:
        """Add one parsed line; returns whether it has a place in time."""
        self.ledger.add(line)
        if not self.ledger.starts or line.get("time") is None:
            return False
        placed = Line(line, (self.ledger.now - self.ledger.starts[0].began) / 3600)
        if line["kind"] == "event":
            self.events.append(placed)
            if line["event"] in STARTS:
                self.starts.append(line)
            if (step := continues_from(line)) is not None:
                self._replace_after(step)
        elif line["kind"] == "eval" or (line["kind"] == "train" and self._keep_train):
            (self.evals if line["kind"] == "eval" else self.train).append(placed)
            key = line["kind"], line["step"], line.get("weights")
            if key in self._counting:
                self._counting.pop(key).again = True
            self._counting[key] = placed
        return True

    def _replace_after(self, step: int) -> None:
        while self._counting and next(reversed(self._counting.values())).values["step"] > step:
            self._counting.popitem()[1].again = True

    @property
    def last(self) -> int | None:
        """The step at which the run ends; None in a run of an older version, which did not record it."""
        return self.starts[-1].get("last")

    @property
    def steps_per_epoch(self) -> int | None:
        """None in a run of an older version, which did not record it."""
        return self._newest("steps_per_epoch")

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics of an evaluation, the primary one first."""
        described = self._newest("metrics")
        if described is None:
            return CLASSIFICATION
        ordered = sorted(described, key=lambda metric: not metric["primary"])
        return tuple(Metric(*(metric[key] for key in ("name", "label", "unit", "better"))) for metric in ordered)

    @property
    def samples(self) -> str:
        """What the run counts, such as "images"."""
        return self._newest("samples") or "images"

    @property
    def speed_unit(self) -> str:
        return "img/s" if self.samples == "images" else f"{self.samples}/s"

    def scores(self, weights: str | None = None) -> list[Line]:
        """The evaluations that count, of "model", of "ema" or (None) of both, in the order of their steps."""
        return [line for line in self.evals if not line.again and weights in (None, line.values["weights"])]

    def best(self, weights: str | None = None) -> Line | None:
        """The evaluation with the best primary metric; the first of equals, and of one step the EMA's."""
        metric = self.metrics[0]
        sign = 1 if metric.better == "higher" else -1
        finite = [line for line in self.scores(weights) if line.values[metric.name] is not None]
        return max(
            finite,
            key=lambda line: (sign * line.values[metric.name], -line.values["step"], line.values["weights"] == "ema"),
            default=None,
        )

    def endings(self, folder: Path) -> list[str | None]:
        """How each start of the run in `folder` ended (see `ending`)."""
        times, starts = [when for when, _ in hangs(folder)], self.ledger.starts
        return [ending(start, after, times) for start, after in zip(starts, [*starts[1:], None], strict=True)]

    def _newest(self, key: str) -> object | None:
        return next((start[key] for start in reversed(self.starts) if key in start), None)


def continues_from(line: dict) -> int | None:
    """The step that training goes on from after this event; None for other lines. Later steps are taken again."""
    event = line.get("event")
    return line["to"] if event == "rollback" else line["step"] if event in STARTS else None


def read_log(folder: Path) -> RunLog:
    """Read the whole metrics.jsonl of a run. Raises OSError."""
    log = RunLog()
    for line in read_lines(folder / "metrics.jsonl"):
        log.add(line)
    return log


def read_config(folder: Path) -> dict:
    """The resolved config, flat: {"train.epochs": 300, …}. Not validated: an older program may have known other keys.

    Raises DataError.
    """
    try:
        config = flatten(yaml.safe_load((folder / "config.yaml").read_text()))
    except (OSError, yaml.YAMLError, AttributeError) as error:
        from data_pipeline.manifest import DataError  # imports numpy

        problem = f"{folder / 'config.yaml'} cannot be read ({type(error).__name__})"
        raise DataError(f"{problem}: copy it from where the run was made") from error
    if has_secret(config.get("data.path", "")):  # runs of before November 2026 may have one
        config["data.path"] = without_secrets(config["data.path"])
    return config


def read_lock(folder: Path) -> dict | None:
    """The record that the run's process rewrites every few seconds; None if it is missing or just being written."""
    try:
        return json.loads((folder / ".lock").read_bytes())
    except (OSError, ValueError):
        return None


def last_beat(folder: Path) -> float | None:
    """The last sign of life that the process holding the run's lock has left there, in Unix seconds."""
    return (read_lock(folder) or {}).get("beat")


def hangs(folder: Path) -> Iterator[tuple[float, str]]:
    """(Unix seconds, sentence) of each hang: the first line of the watchdog's records in `stacks/` has both."""
    for path in sorted((folder / "stacks").glob("rank_*.txt")):
        for text in path.read_text(errors="replace").splitlines():
            words = text.split(maxsplit=3)
            try:
                when = datetime.strptime(" ".join(words[:3]), "%Y-%m-%d %H:%M:%S %z").timestamp()
            except ValueError:
                continue
            yield when, " ".join(words[3:])


def ending(start: Start, after: Start | None, hung: list[float]) -> str | None:
    """How a start ended: "finished", "stopped", "failed", "hung", "killed", or None: it runs, or was killed.

    after: the next start. hung: times of the run's hangs, in whole seconds.
    """
    end = "stopped" if start.end == "preempted" else start.end or (after and "killed")
    until = after.began if after else float("inf")
    if end != "finished" and any(start.last - 1 < hang + start.shift <= until for hang in hung):
        return "hung"
    return end


def amount(metric: Metric, value: float | None) -> str:
    """A metric's value without its unit: two decimals of a percentage, four of other numbers.

    None: the number was not finite; a percentage is that of nothing, such as AP where there is no object.
    """
    if value is None:
        return "–" if metric.unit == "%" else "not finite"
    return f"{value:.2f}" if metric.unit == "%" else f"{value:.4f}"


def quantity(metric: Metric, value: float | None) -> str:
    """A metric's value with its unit."""
    return amount(metric, value) if value is None else f"{amount(metric, value)} {metric.unit}".rstrip()
