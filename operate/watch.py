"""The state, progress and alarms of a run, from its folder, on any node that sees it. Without torch.

Each look reads `.lock` and the new lines of metrics.jsonl.
"""

import json
import shutil
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from operate.run_folder import STARTS, MetricsTail, RunLog, continues_from, hangs, read_config
from train import exit_codes
from train.checkpoint.info import list_checkpoints
from train.guard.run_lock import WATCH
from train.telemetry.formatting import clock, duration, rate
from train.telemetry.goodput import goodput

WINDOW = 20  # lines whose median is compared with the best median of as many lines before
# The loss is rising if it exceeds the best median by RISEN x its window's interquartile range and LEAST_RISEN x itself.
RISEN = 2.0
LEAST_RISEN = 0.05
FALLEN = 0.75  # x the best median: throughput has fallen
SKIPPED, AMONG = 3, 100  # this many skipped steps among the newest AMONG are an alarm
# So is a pause without a line, of QUIET x the longest pause of this start, and of at least LEAST_QUIET seconds.
QUIET = 3.0
LEAST_QUIET = 60.0
FIRST_QUIET = 600.0  # seconds before a start's first train line: its first step may compile
ROOM = 2  # checkpoints that the disk should have room for
LEAST_ROOM = 1e9  # bytes

# Exit codes of `launch/watch.py --once`. A run that has ended gives its own: "failed" that of its event.
RUNNING, ALARMED, NOT_STARTED, GONE = 10, 11, 12, 13
CODES = {
    "not started": NOT_STARTED,
    "starting": RUNNING,
    "running": RUNNING,
    "finished": 0,
    "stopped": exit_codes.STOPPED,
    "hung": exit_codes.HUNG,
    "silent": GONE,
    "died": GONE,
}
FINAL = ("finished", "failed")  # states that another start would not change
AGAIN = "failed for now"
ENDED = {"finished": "finished", "preempted": "stopped", "failed": "failed"}


class Pulse:
    """Whether the process that holds a run's lock lives: its record in `.lock` changes then.

    Clocks of two nodes are compared only to answer at once if the record is young.
    """

    def __init__(self, run: Path):
        self._path = run / ".lock"
        self.record: dict | None = None
        self._seen: float | None = None  # when the record last changed (time.monotonic)
        self._since: float | None = None  # the first look

    def look(self) -> bool | None:
        """True or False; None if it is not known yet: that takes WATCH seconds at most."""
        try:
            record = json.loads(self._path.read_bytes())
        except FileNotFoundError:
            record = None
        except ValueError:  # it is being written
            record = self.record
        now = time.monotonic()
        if self._since is None:
            self._since = now
            if record and abs(time.time() - record["beat"]) < WATCH:
                self._seen = now
        elif record != self.record:
            self._seen = now
        self.record = record
        if record is None or record["ended"]:
            return False
        if self._seen is not None:
            return now - self._seen < WATCH
        return None if now - self._since < WATCH else False


class Level:
    """The newest WINDOW values of a curve, and the best of its windows, which follow each other without overlap."""

    def __init__(self, better: Callable):
        self._better, self._values, self._count = better, deque(maxlen=WINDOW), 0
        self.best: tuple[float, float] | None = None  # (median, interquartile range)

    def add(self, value: float) -> None:
        self._values.append(value)
        self._count += 1
        if self._count % WINDOW == 0:
            low, median, high = statistics.quantiles(self._values, n=4)
            self.best = self._better((median, high - low), self.best or (median, high - low))

    @property
    def newest(self) -> float | None:
        """The median of the newest values; None until there is another window to compare it with."""
        return statistics.median(self._values) if self._count >= 2 * WINDOW else None


@dataclass
class Progress:
    """How far a run is and what has happened to it. "This start" is the newest one; events are kept as lines."""

    log: RunLog = field(default_factory=lambda: RunLog(keep_train=False))
    start: dict | None = None
    end: dict | None = None  # the event that ended this start
    train: dict | None = None  # the newest train line of this start
    first: dict | None = None  # the train line from which the pace is measured; None after a rollback or clock_set
    step: int = 0
    time: float = 0.0  # of the newest line
    longest: float = 0.0  # seconds between two lines, after this start's first train line
    checkpoint: dict | None = None
    failed_save: dict | None = None  # the newest one, until a checkpoint is written
    slow: dict | None = None
    rollback: dict | None = None
    skipped: list[int] = field(default_factory=list)  # steps, over all starts, but for those taken again
    bad_samples: int = 0  # of this start
    losses: Level = field(default_factory=lambda: Level(min))
    speeds: Level = field(default_factory=lambda: Level(max))  # of this start: another one may have other ranks

    def add(self, line: dict) -> None:
        if not self.log.add(line):
            return
        if jump := line.get("clock_set", 0.0):
            self.first = None
        if self.train and line["kind"] != "goodput":
            self.longest = max(self.longest, line["time"] - jump - self.time)
        self.time = line["time"]
        if line["kind"] == "train":
            self._train(line)
        elif line["kind"] == "event":
            self._event(line, line["event"])

    def _train(self, line: dict) -> None:
        self.train, self.step = line, line["step"]
        self.first = self.first or line
        if line["loss"] is not None:
            self.losses.add(line["loss"])
        if line["step"] > self.start["step"] + 1:  # the first step may have had to compile
            self.speeds.add(line["images_per_second"])

    def _event(self, line: dict, event: str) -> None:
        if (back := continues_from(line)) is not None:
            self.skipped = [step for step in self.skipped if step <= back]
        if event in STARTS:
            self.start, self.step, self.end, self.first, self.train = line, line["step"], None, None, None
            self.bad_samples, self.longest, self.slow, self.speeds = 0, 0.0, None, Level(max)
        elif event == "rollback":
            self.rollback, self.step, self.first = line, line["to"], None
        elif event == "checkpoint":
            self.checkpoint, self.failed_save = line, None
        elif event == "save_failed":
            self.failed_save = line
        elif event == "slow_rank":
            self.slow = line
        elif event == "skipped_step":
            self.skipped.append(line["step"])
        elif event == "bad_sample":
            self.bad_samples += 1
        elif event in ENDED:
            self.end = line

    def scores(self) -> dict[str, tuple[float | None, float | None]]:
        """(newest, best) value of the primary metric, by weights: "model", "ema". None: not finite."""
        name = self.log.metrics[0].name
        newest = {line.values["weights"]: line.values[name] for line in self.log.scores()}
        best = {weights: self.log.best(weights) for weights in newest}
        return {weights: (newest[weights], line.values[name] if line else None) for weights, line in best.items()}

    @property
    def seconds_per_step(self) -> float | None:
        """The mean of this start, evaluations and saves included."""
        if self.train is None:
            return None
        steps = self.train["step"] - self.first["step"] if self.first else 0
        return (self.train["time"] - self.first["time"]) / steps if steps > 0 else self.train["step_ms"] / 1000

    @property
    def seconds_left(self) -> float | None:
        last, pace = self.log.last, self.seconds_per_step
        return None if pace is None or last is None else (last - self.step) * pace


@dataclass(frozen=True)
class Status:
    """One look at a run.

    why: how it ended, in a sentence, or "". ago: seconds since its last line by its own clock, while it lives.
    """

    state: str
    why: str
    code: int
    alarms: list[str]
    ago: float | None
    goodput: float | None
    lost_steps: int
    restarts: int


class Watched:
    """A run's folder; `look` may be called again and again."""

    def __init__(self, run: Path):
        self.run = run
        self._begin()

    def _begin(self) -> None:
        self.progress, self.guard = Progress(), {}
        self._tail, self._pulse = MetricsTail(self.run / "metrics.jsonl"), Pulse(self.run)
        self._size: tuple[Path | None, int] = None, 0

    def look(self, *, patient: bool = False) -> Status:
        """The run's state now. While it is not known whether the run lives, it counts as alive.

        patient: wait until it is known, at most WATCH seconds.
        """
        if self._tail.replaced:
            self._begin()
        alive = self._pulse.look()
        while patient and alive is None:
            time.sleep(0.5)
            alive = self._pulse.look()
        progress, ledger = self.progress, self.progress.log.ledger
        starts = len(ledger.starts)
        for line in self._tail.read():
            progress.add(line)
        if len(ledger.starts) > starts:
            config = read_config(self.run)
            self.guard = {key: config[f"guard.{key}"] for key in ("bad_samples", "max_skipped")}
        alive = alive is not False
        beat = self._pulse.record["beat"] if self._pulse.record else progress.time
        ago = max(0.0, beat - progress.time) if alive and progress.start else None
        state, why = self._state(alive)
        alarms = self._alarms(state, ago)
        if state in ("failed", AGAIN):
            code = progress.end["code"]
        else:
            code = ALARMED if CODES[state] == RUNNING and alarms else CODES[state]
        split = ledger.split(beat)
        share = goodput(split) if split else None
        return Status(state, why, code, alarms, ago, share, ledger.lost_steps, max(0, len(ledger.starts) - 1))

    def _state(self, alive: bool) -> tuple[str, str]:
        progress, record = self.progress, self._pulse.record
        if progress.start is None and record is None:
            return "not started", "nothing has been written yet"
        if record and record["started"] > progress.time:  # a start that has no line yet
            if alive:
                return "starting", f"since {clock(record['started'])}, on {record['host']}"
            if record["ended"]:
                start = f"the start of {clock(record['started'])}"
                return "died", f"{start} ended before its first step: {self._output()} shows why"
            return "silent", self._silence()
        if progress.end:
            state = ENDED[progress.end["event"]]
            again = state == "failed" and progress.end["code"] not in exit_codes.FINAL
            return AGAIN if again else state, self._last_words()
        if alive:
            return "running", ""
        hang = self._hang()
        if hang:
            return "hung", hang
        if record and record["ended"]:
            return "died", f"{self._output()} shows why; started again, it goes on"
        return "silent", f"{self._silence()}; started again, it goes on"

    def _silence(self) -> str:
        """Why there is no sign of life, as far as it can be told from the folder."""
        record, when = self._pulse.record, "there is no sign of life"
        if record:
            when = f"last sign of life {clock(record['beat'])} on {record['host']}"
        return f"killed, suspended, or its node is lost ({when}): {self._output()} may show why"

    def _hang(self) -> str | None:
        """The watchdog's first sentence in `stacks/` since this start; its times are whole seconds."""
        return next((sentence for when, sentence in hangs(self.run) if when > self.progress.start["time"] - 1), None)

    def _alarms(self, state: str, ago: float | None) -> list[str]:
        progress, alarms = self.progress, []
        if state in FINAL or state == "not started":
            return alarms
        if ago is not None and state == "running":
            limit = max(LEAST_QUIET, QUIET * progress.longest) if progress.train else FIRST_QUIET
            if ago > limit:
                alarms.append(
                    f"no line for {duration(ago)}, though the process lives: it hangs, or waits (see guard.timeout)"
                )
        if progress.start:
            alarms += self._step_alarms(progress.step)
            if state == "running" and (hang := self._hang()):
                alarms.append(f"the watchdog has written stacks/: {hang}")
        free, size = shutil.disk_usage(self.run).free, self._checkpoint_size()
        if free < max(ROOM * size, LEAST_ROOM):
            needs = f", a checkpoint takes {size / 1e9:.2g} GB" if size else ""
            alarms.append(f"disk almost full: {free / 1e9:.2g} GB free{needs}")
        return alarms

    def _step_alarms(self, step: int) -> list[str]:
        progress, alarms, budget = self.progress, [], self.guard["bad_samples"]
        epoch_ago = step - progress.start.get("steps_per_epoch", step)
        if progress.train and progress.train["loss"] is None:
            alarms.append(f"the loss of step {progress.train['step']} is not finite")
        skipped = sum(number > step - AMONG for number in progress.skipped)
        if skipped >= SKIPPED:
            limit = f"{self.guard['max_skipped']} in a row make the run go back to a checkpoint (guard.max_skipped)"
            alarms.append(f"{skipped} of the last {AMONG} steps were skipped, their gradients not finite; {limit}")
        if progress.rollback and (back := progress.rollback["to"]) > epoch_ago:
            alarms.append(
                f"went back from step {progress.rollback['step']} to {back}: gradients or the state were not finite"
            )
        if progress.bad_samples > budget / 2:
            alarms.append(
                f"{progress.bad_samples} samples cannot be read; more than {budget} end the run (guard.bad_samples)"
            )
        medians = f"(medians of {WINDOW} lines)"
        if (loss := progress.losses.newest) is not None:
            best, spread = progress.losses.best
            if loss > best + max(RISEN * spread, LEAST_RISEN * abs(best)):
                alarms.append(f"loss rising: {loss:.4g}, it was {best:.4g} {medians}")
        if (speed := progress.speeds.newest) is not None and speed < FALLEN * progress.speeds.best[0]:
            unit, best = progress.log.speed_unit, progress.speeds.best[0]
            alarms.append(f"throughput fallen: {rate(speed)} {unit}, it was {rate(best)} {medians}")
        if progress.slow and progress.slow["step"] > epoch_ago:
            rank, own, median = (progress.slow[key] for key in ("rank", "seconds", "median"))
            where = f"rank {rank} is slow (step {progress.slow['step']})"
            alarms.append(f"{where}: {own:.2f} s of its own a step, the median {median:.2f} s")
        if progress.failed_save:
            alarms.append(
                f"checkpoint of step {progress.failed_save['step']} not saved: {progress.failed_save['reason']}"
            )
        return alarms

    def _checkpoint_size(self) -> int:
        """Bytes of the newest checkpoint, counted once for each."""
        newest = next(iter(list_checkpoints(self.run / "checkpoints")), None)
        if newest != self._size[0]:
            self._size = newest, sum(path.stat().st_size for path in newest.glob("*")) if newest else 0
        return self._size[1]

    def _last_words(self) -> str:
        """The last line of train.log, without its time; "" if there is none."""
        try:
            with open(self.run / "train.log", "rb") as file:
                file.seek(max(0, file.seek(0, 2) - 4096))
                lines = file.read().decode(errors="replace").splitlines()
        except FileNotFoundError:
            return ""
        return lines[-1].split(" ", 2)[-1] if lines else ""

    def _output(self) -> str:
        log = self.run / "logs" / "rank_0.log"
        return str(log) if log.exists() else "what it printed"
