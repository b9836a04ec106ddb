"""What a run's folder tells of the run: of one that goes on, was killed, or has been moved, too. Reads files, and never writes any."""

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import yaml

from data_pipeline.config import has_secret, without_secrets
from data_pipeline.manifest import DataError
from train.config import ConfigError
from train.telemetry.goodput import Ledger, Start, ending, goodput, hang_times, last_beat, read_lines

# A process that runs rewrites its sign of life every 3 seconds (lock.py); clocks of two nodes may differ.
SILENT = 60.0
# Events that are no incident: they are in the table of starts, or happen all the time.
USUAL = ("start", "resume", "checkpoint", "finished")


@dataclass(frozen=True)
class Line:
    """A line of metrics.jsonl: hours since the run's first start, epochs done, the line itself.

    `again`: the step was taken again later, because a start was killed or training went back; that line counts instead.
    """

    hours: float
    epoch: float
    values: dict
    again: bool = False


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
class History:
    """All that is known of a run. `evaluations`: of the newest one, by weights ("ema", "model"), what evaluate.write_details wrote."""

    folder: Path
    name: str
    state: str
    config: dict
    train: list[Line]
    evals: list[Line]
    events: list[Line]
    launches: list[Launch]
    seconds: dict[str, float]  # by category, goodput.py
    lost_steps: int
    step: int
    last_step: int  # at which the run ends
    steps_per_epoch: int
    evaluations: dict[str, dict]

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
        """Median images per second of the newest start that has lines of steps."""
        for launch in reversed(self.launches):
            speeds = [line.values["images_per_second"] for line in self.train if line.hours >= launch.began]
            if speeds:
                return median(speeds)
        return None

    def scores(self, weights: str) -> list[Line]:
        """The evaluations that count, of "ema" or "model", in the order of their steps."""
        return [line for line in self.evals if not line.again and line.values["weights"] == weights]

    def best(self) -> Line | None:
        """The best evaluation by top-1, of whichever weights; the first of equals, and of one step the EMA's."""
        counted = [line for line in self.evals if not line.again]
        return max(counted, key=lambda line: (line.values["top1"], -line.values["step"], line.values["weights"] == "ema"), default=None)

    def bad_samples(self) -> dict[tuple[str, int], Line]:
        """(split, id) → the first line about it: every start names them anew."""
        found: dict[tuple[str, int], Line] = {}
        for line in self.events:
            if line.values["event"] == "bad_sample":
                found.setdefault((line.values["split"], line.values["id"]), line)
        return found

    def incidents(self) -> list[Line]:
        """What a person should know of, in the order it happened; a bad sample once."""
        bad = self.bad_samples()
        return [
            line
            for line in self.events
            if line.values["event"] not in USUAL
            and (line.values["event"] != "bad_sample" or bad[line.values["split"], line.values["id"]] is line)
        ]

    def count(self, event: str) -> int:
        return sum(line.values["event"] == event for line in self.events)


def read_history(folder: Path) -> History:
    """Read a run's folder. Raises ConfigError where it is none, DataError where the run has not begun."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise ConfigError(f"{folder} is no run's folder: it has no metrics.jsonl. Give what launch/train.py got as --output")
    lines = [line for line in read_lines(path) if line.get("time") is not None]
    while lines and lines[0].get("event") not in ("start", "resume"):
        lines.pop(0)
    if not lines:
        raise DataError(f"{path} has no start with a time: the run has not begun yet")
    ledger = Ledger()
    for line in lines:
        ledger.add(line)
    config = _read_config(folder)
    steps_per_epoch = next((line["steps_per_epoch"] for line in reversed(lines) if "steps_per_epoch" in line), None)
    if steps_per_epoch is None:
        raise DataError(f"{path} does not say how many steps an epoch has: the run was made by an older program, and must be run anew")
    began = ledger.starts[0].began
    placed = _place(lines, began, steps_per_epoch)
    starts = [line for line in lines if line.get("event") in ("start", "resume")]
    hangs = hang_times(folder)
    ends = [ending(start, after, hangs) for start, after in zip(ledger.starts, [*ledger.starts[1:], None], strict=True)]
    state = _state(folder, ends[-1])
    seconds = ledger.split(last_beat(folder))
    until = began + sum(seconds.values())
    spans = [((each.began - began) / 3600, ((until if each.ended is None else each.ended) - began) / 3600) for each in ledger.starts]
    ends[-1] = ends[-1] or ("" if state == "running" else "killed")
    return History(
        folder=folder,
        name=folder.resolve().name,
        state=state,
        config=config,
        train=[line for line in placed if line.values["kind"] == "train"],
        evals=[line for line in placed if line.values["kind"] == "eval"],
        events=[line for line in placed if line.values["kind"] == "event"],
        launches=[Launch(start, line, end, *span) for start, line, end, span in zip(ledger.starts, starts, ends, spans, strict=True)],
        seconds=seconds,
        lost_steps=ledger.lost_steps,
        step=ledger.starts[-1].last_step,
        last_step=starts[-1].get("last") or steps_per_epoch * config["train.epochs"],
        steps_per_epoch=steps_per_epoch,
        evaluations={path.stem: json.loads(path.read_text()) for path in sorted((folder / "evaluations").glob("*.json"))},
    )


def names(runs: Iterable[History]) -> list[str]:
    """What to call the runs: their folders' names, with more of the path where two have the same."""
    runs = list(runs)
    same = [[other.name for other in runs].count(run.name) > 1 for run in runs]
    return [str(run.folder) if several else run.name for run, several in zip(runs, same, strict=True)]


def _read_config(folder: Path) -> dict:
    """The resolved config, flat: {"train.epochs": 300, …}. As it was written: a newer program may know other keys."""
    from train.config import flatten

    try:
        config = flatten(yaml.safe_load((folder / "config.yaml").read_text()))
    except (OSError, yaml.YAMLError, AttributeError) as error:
        raise DataError(f"{folder / 'config.yaml'} cannot be read ({type(error).__name__}): copy it from where the run was made") from error
    if has_secret(config.get("data.path", "")):  # as runs of before November 2026 may have it
        config["data.path"] = without_secrets(config["data.path"])
    return config


def _place(lines: list[dict], began: float, steps_per_epoch: int) -> list[Line]:
    """Every line in its place, and those marked that a later line replaces. Backwards: what follows decides."""
    placed, seen, limit = [], set(), float("inf")
    for line in reversed(lines):
        step, event = line.get("step", 0), line.get("event")
        key = line["kind"], step, line.get("weights")
        again = line["kind"] in ("train", "eval") and (step > limit or key in seen)
        seen.add(key)
        placed.append(Line((line["time"] - began) / 3600, step / steps_per_epoch, line, again))
        if event in ("start", "resume", "rollback"):  # what was done after the step that this goes on from, was done again
            limit = min(limit, line["to"] if event == "rollback" else step)
    return placed[::-1]


def _state(folder: Path, end: str | None) -> str:
    """Of the run now: running, finished, stopped (preempted), failed, hung or killed."""
    try:
        lock = json.loads((folder / ".lock").read_text())
    except (OSError, ValueError):
        lock = {"ended": True}
    if not lock.get("ended", True) and time.time() - lock["beat"] < SILENT:
        return "running"
    return {None: "killed", "preempted": "stopped"}.get(end, end)
