"""A run as the report shows it. It may still go on, have been killed, or have been moved."""

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from data_pipeline.split import DataError
from operate.run_folder import NO_RUN, Line, RunLog, last_beat, read_config, read_lock, read_log
from train.config import ConfigError
from train.telemetry.goodput import Start, goodput

# A live process rewrites its sign of life every 3 seconds (train/guard/run_lock.py); clocks of two nodes may differ.
SILENT = 60.0
# Events that are no incident: they are in the table of starts, or are part of every run.
USUAL = ("start", "resume", "checkpoint", "finished")


@dataclass(frozen=True)
class Launch:
    """A start of the run: its part of the ledger, its line of metrics.jsonl, and how it ended ("" while it runs).

    began, ended: hours since the run's first start; `ended` is its last sign of life.
    """

    start: Start
    line: dict
    end: str
    began: float
    ended: float


@dataclass(frozen=True)
class ReportedRun:
    """All that the report shows of a run.

    details: by weights ("ema", "model"), the content of evaluations/<weights>.json.
    """

    folder: Path
    name: str
    state: str
    config: dict
    log: RunLog
    launches: list[Launch]
    seconds: dict[str, float]  # by category of train/telemetry/goodput.py
    last_step: int  # at which the run ends
    steps_per_epoch: int
    details: dict[str, dict]

    @property
    def task(self) -> str:
        """The task's name; configs that began before there were several have no section `task`."""
        return self.config.get("task.name", "classification")

    @property
    def step(self) -> int:
        return self.log.ledger.starts[-1].last_step

    @property
    def total(self) -> float:
        """Seconds from the first start until now, or until the run's end."""
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        return goodput(self.seconds)

    @property
    def restarts(self) -> int:
        return len(self.launches) - 1

    @property
    def speed(self) -> float | None:
        """Median samples per second of the newest start that has train lines."""
        for launch in reversed(self.launches):
            speeds = [line.values["images_per_second"] for line in self.log.train if line.hours >= launch.began]
            if speeds:
                return median(speeds)
        return None

    def epoch(self, line: Line) -> float:
        return line.values.get("step", 0) / self.steps_per_epoch

    def bad_samples(self) -> dict[tuple[str, int], Line]:
        """(split, id) → the first line about it: every start reports them again."""
        found: dict[tuple[str, int], Line] = {}
        for line in self.log.events:
            if line.values["event"] == "bad_sample":
                found.setdefault((line.values["split"], line.values["id"]), line)
        return found

    def incidents(self) -> list[Line]:
        """Events that need attention, in the order they happened; a bad sample once."""
        first = set(self.bad_samples().values())
        return [
            line
            for line in self.log.events
            if line.values["event"] not in USUAL and (line.values["event"] != "bad_sample" or line in first)
        ]

    def count(self, event: str) -> int:
        return sum(line.values["event"] == event for line in self.log.events)


def read_reported_run(folder: Path) -> ReportedRun:
    """Read a run's folder. Raises ConfigError if it is none, DataError if the run has not begun."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise ConfigError(f"{folder} {NO_RUN}")
    log = read_log(folder)
    ledger = log.ledger
    if not log.starts:
        raise DataError(f"{path} has no start with a time: the run has not begun yet")
    config = read_config(folder)
    if log.steps_per_epoch is None:
        problem = f"{path} does not say how many steps an epoch has"
        raise DataError(f"{problem}: the run was made by an older program, and must be run anew")
    ends = log.endings(folder)
    state = _state(folder, ends[-1])
    ends[-1] = ends[-1] or ("" if state == "running" else state)
    seconds = ledger.split(last_beat(folder))
    began = ledger.starts[0].began
    until = began + sum(seconds.values())
    spans = [
        ((start.began - began) / 3600, ((until if start.ended is None else start.ended) - began) / 3600)
        for start in ledger.starts
    ]
    return ReportedRun(
        folder=folder,
        name=folder.resolve().name,
        state=state,
        config=config,
        log=log,
        launches=[
            Launch(start, line, end, *span)
            for start, line, end, span in zip(ledger.starts, log.starts, ends, spans, strict=True)
        ],
        seconds=seconds,
        last_step=log.last or log.steps_per_epoch * config["train.epochs"],
        steps_per_epoch=log.steps_per_epoch,
        details={path.stem: json.loads(path.read_text()) for path in sorted((folder / "evaluations").glob("*.json"))},
    )


def names(runs: Iterable[ReportedRun]) -> list[str]:
    """A name for each run: its folder's, with more of the path if two have the same."""
    runs = list(runs)
    same = [[other.name for other in runs].count(run.name) > 1 for run in runs]
    return [str(run.folder) if several else run.name for run, several in zip(runs, same, strict=True)]


def _state(folder: Path, end: str | None) -> str:
    """The run's state now: running, finished, stopped, failed, hung, killed, or silent: killed or suspended."""
    lock = read_lock(folder) or {}
    alive = not lock.get("ended", True)
    if alive and time.time() - lock["beat"] < SILENT:
        return "running"
    return end or ("silent" if alive else "killed")
