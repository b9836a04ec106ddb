"""What a run's folder tells of the run, on any node that sees it: state, progress, alarms. Without torch.

A turn reads `.lock` and what is new in metrics.jsonl.
"""

import json
import shutil
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from train.guard.run_lock import WATCH
from train.telemetry.formatting import clock, duration
from train.telemetry.goodput import Ledger, goodput, hangs, parse_lines

WINDOW = 20  # lines whose median is compared with the best median of as many lines before
RISEN = 2.0  # x the spread of a window's losses, and at least LEAST_RISEN x the loss, above the best median: the loss is rising
LEAST_RISEN = 0.05
FALLEN = 0.75  # x the best median: throughput has fallen
SKIPPED, AMONG = 3, 100  # steps skipped among the last so many
QUIET = 3.0  # x the longest time between two lines of this start, and at least LEAST_QUIET seconds, without one
LEAST_QUIET = 60.0
FIRST_QUIET = 600.0  # seconds before a start's first train line, which may have to compile
ROOM = 2  # checkpoints that the disk should have room for
LEAST_ROOM = 1e9  # bytes

# Exit codes of `launch/watch.py --once`. What has ended has the code of the run itself, "failed" the one that its event says.
RUNNING, ALARMED, NOT_STARTED, DIED = 10, 11, 12, 13
CODES = {"not started": NOT_STARTED, "starting": RUNNING, "running": RUNNING, "finished": 0, "stopped": 75, "hung": 71, "died": DIED}
FINAL = ("finished", "failed")  # states that another start would not change
ENDED = {"finished": "finished", "preempted": "stopped", "failed": "failed"}


class Tail:
    """The lines of a metrics.jsonl as they come."""

    def __init__(self, path: Path):
        self.path, self._place = path, 0

    @property
    def replaced(self) -> bool:
        """The file is shorter than what was read of it: it is another run's."""
        return self._place > 0 and (not self.path.exists() or self.path.stat().st_size < self._place)

    def read(self) -> list[dict]:
        """Whole lines since the last call."""
        if not self.path.exists():
            return []
        with open(self.path, "rb") as file:
            file.seek(self._place)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._place += len(whole)
        return list(parse_lines(whole.splitlines()))


class Pulse:
    """Whether the process that holds a run's lock lives.

    Its record changes, then; nobody's clock is compared with another's, but to answer at once where a record is young.
    """

    def __init__(self, run: Path):
        self._path = run / ".lock"
        self.record: dict | None = None
        self._seen: float | None = None  # when the record last changed (time.monotonic)
        self._since: float | None = None  # when it was first looked at

    def look(self) -> bool | None:
        """True or False; None: not known before WATCH seconds of looking."""
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
    """The newest WINDOW values of a curve, and the best of all windows, one after the other."""

    def __init__(self, better: Callable):
        self._better, self._values, self._count = better, deque(maxlen=WINDOW), 0
        self.best: tuple[float, float] | None = None  # (median, distance of the quartiles)

    def add(self, value: float) -> None:
        self._values.append(value)
        self._count += 1
        if self._count % WINDOW == 0:
            low, median, high = statistics.quantiles(self._values, n=4)
            self.best = self._better((median, high - low), self.best or (median, high - low))

    @property
    def newest(self) -> float | None:
        """The median of the newest, once there is another window to compare it with."""
        return statistics.median(self._values) if self._count >= 2 * WINDOW else None


@dataclass
class History:
    """What the lines of metrics.jsonl say; those of events are kept as they are. "This start": the newest."""

    ledger: Ledger = field(default_factory=Ledger)
    start: dict | None = None
    end: dict | None = None  # the event that ended this start
    train: dict | None = None  # the newest
    first: dict | None = None  # of the lines that the pace is taken from
    step: int = 0
    time: float = 0.0  # of the newest line
    longest: float = 0.0  # seconds between two lines, after this start's first train line
    evaluations: list[dict] = field(default_factory=list)  # of steps that count
    checkpoint: dict | None = None
    failed_save: dict | None = None  # none has been written since
    slow: dict | None = None
    rollback: dict | None = None
    skipped: list[int] = field(default_factory=list)  # over all starts
    bad_samples: int = 0  # since this start
    losses: Level = field(default_factory=lambda: Level(min))
    speeds: Level = field(default_factory=lambda: Level(max))  # since this start: another one may have other ranks

    def add(self, line: dict) -> None:
        self.ledger.add(line)
        if self.train and line["kind"] != "goodput":
            self.longest = max(self.longest, line["time"] - self.time)
        self.time = line["time"]
        if line["kind"] == "train":
            self._train(line)
        elif line["kind"] == "eval":
            self.evaluations.append(line)
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
        if event in ("start", "resume"):
            self.start, self.step, self.end, self.first, self.train = line, line["step"], None, None, None
            self.bad_samples, self.longest, self.slow, self.speeds = 0, 0.0, None, Level(max)
            self.skipped = [step for step in self.skipped if step <= line["step"]]
            self._forget_after(line["step"])
        elif event == "rollback":
            self.rollback, self.step, self.first = line, line["to"], None
            self._forget_after(line["to"])
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

    def _forget_after(self, step: int) -> None:
        """Steps after this one are taken again."""
        self.evaluations = [line for line in self.evaluations if line["step"] <= step]

    def scores(self) -> dict[str, tuple[float, float]]:
        """(newest, best) top-1 in percent, by weights: "model", "ema"."""
        found: dict[str, list[float]] = {}
        for line in self.evaluations:
            found.setdefault(line["weights"], []).append(line["top1"])
        return {weights: (top1[-1], max(top1)) for weights, top1 in found.items()}

    @property
    def seconds_per_step(self) -> float | None:
        """Of this start, evaluations and saves included."""
        if self.train is None:
            return None
        steps = self.train["step"] - self.first["step"]
        return (self.train["time"] - self.first["time"]) / steps if steps > 0 else self.train["step_ms"] / 1000

    @property
    def seconds_left(self) -> float | None:
        last, pace = self.start.get("last"), self.seconds_per_step  # an older version's start does not say where it ends
        return None if pace is None or last is None else (last - self.step) * pace


@dataclass(frozen=True)
class Status:
    """One look at a run. `why`: how it ended, in a sentence, or "". `ago`: seconds of its own clock since its last line, while it lives."""

    state: str
    why: str
    code: int
    alarms: list[str]
    ago: float | None
    goodput: float | None
    lost_steps: int
    restarts: int


class Watched:
    """A run's folder, looked at again and again."""

    def __init__(self, run: Path):
        self.run = run
        self._begin()

    def _begin(self) -> None:
        self.history, self.guard = History(), {}
        self._tail, self._pulse = Tail(self.run / "metrics.jsonl"), Pulse(self.run)
        self._size: tuple[Path | None, int] = None, 0

    def look(self, *, patient: bool = False) -> Status:
        """patient: wait until it is known whether the run lives, at most WATCH seconds; otherwise it is taken to live until it is known."""
        if self._tail.replaced:
            self._begin()
        alive = self._pulse.look()
        while patient and alive is None:
            time.sleep(0.5)
            alive = self._pulse.look()
        history = self.history
        starts = len(history.ledger.starts)
        for line in self._tail.read():
            history.add(line)
        if len(history.ledger.starts) > starts:
            self.guard = yaml.safe_load((self.run / "config.yaml").read_text())["guard"]
        alive = alive is not False
        beat = self._pulse.record["beat"] if self._pulse.record else history.time
        ago = max(0.0, beat - history.time) if alive and history.start else None
        state, why = self._state(alive)
        alarms = self._alarms(state, ago)
        code = history.end["code"] if state == "failed" else ALARMED if CODES[state] == RUNNING and alarms else CODES[state]
        split = history.ledger.split(beat)
        share = goodput(split) if split else None
        return Status(state, why, code, alarms, ago, share, history.ledger.lost_steps, max(0, len(history.ledger.starts) - 1))

    def _state(self, alive: bool) -> tuple[str, str]:
        history, record = self.history, self._pulse.record
        if history.start is None and record is None:
            return "not started", "nothing has been written yet"
        if record and record["started"] > history.time:  # a start that has no line yet
            if alive:
                return "starting", f"since {clock(record['started'])}, on {record['host']}"
            return "died", f"the start of {clock(record['started'])} ended before its first step: {self._output()} says why"
        if history.end:
            return ENDED[history.end["event"]], self._last_words()
        if alive:
            return "running", ""
        hang = self._hang()
        if hang:
            return "hung", hang
        when = f"last sign of life {clock(record['beat'])} on {record['host']}" if record else "there is no sign of life"
        return "died", f"killed, crashed, or its node is lost ({when}): {self._output()} may say why; started again, it goes on"

    def _hang(self) -> str | None:
        """What the watchdog said in `stacks/` since this start; its times are whole seconds."""
        return next((sentence for when, sentence in hangs(self.run) if when > self.history.start["time"] - 1), None)

    def _alarms(self, state: str, ago: float | None) -> list[str]:
        history, step, alarms = self.history, self.history.step, []
        if state in FINAL or state == "not started":
            return alarms
        if ago is not None and state == "running":
            limit = max(LEAST_QUIET, QUIET * history.longest) if history.train else FIRST_QUIET
            if ago > limit:
                alarms.append(f"no line for {duration(ago)}, though the process lives: it hangs, or waits (see guard.timeout)")
        if history.start:
            alarms += self._step_alarms(step)
            if state == "running" and (hang := self._hang()):
                alarms.append(f"the watchdog has written stacks/: {hang}")
        free, size = shutil.disk_usage(self.run).free, self._checkpoint_size()
        if free < max(ROOM * size, LEAST_ROOM):
            needs = f", a checkpoint takes {size / 1e9:.2g} GB" if size else ""
            alarms.append(f"disk almost full: {free / 1e9:.2g} GB free{needs}")
        return alarms

    def _step_alarms(self, step: int) -> list[str]:
        history, alarms, budget = self.history, [], self.guard["bad_samples"]
        epoch_ago = step - history.start.get("steps_per_epoch", step)
        if history.train and history.train["loss"] is None:
            alarms.append(f"the loss of step {history.train['step']} is not finite")
        skipped = sum(number > step - AMONG for number in history.skipped)
        if skipped >= SKIPPED:
            limit = f"{self.guard['max_skipped']} in a row make the run go back to a checkpoint (guard.max_skipped)"
            alarms.append(f"{skipped} of the last {AMONG} steps were skipped, their gradients not finite; {limit}")
        if history.rollback and history.rollback["to"] > epoch_ago:
            alarms.append(f"went back from step {history.rollback['step']} to {history.rollback['to']}: gradients were not finite")
        if history.bad_samples > budget / 2:
            alarms.append(f"{history.bad_samples} samples cannot be read; more than {budget} end the run (guard.bad_samples)")
        losses, speeds = history.losses, history.speeds
        if losses.newest is not None and losses.newest > losses.best[0] + max(RISEN * losses.best[1], LEAST_RISEN * abs(losses.best[0])):
            alarms.append(f"loss rising: {losses.newest:.4g}, it was {losses.best[0]:.4g} (medians of {WINDOW} lines)")
        if speeds.newest is not None and speeds.newest < FALLEN * speeds.best[0]:
            alarms.append(f"throughput fallen: {speeds.newest:,.0f} img/s, it was {speeds.best[0]:,.0f} (medians of {WINDOW} lines)")
        if history.slow and history.slow["step"] > epoch_ago:
            rank, own, median = (history.slow[key] for key in ("rank", "seconds", "median"))
            alarms.append(f"rank {rank} is slow (step {history.slow['step']}): {own:.2f} s of its own a step, the median {median:.2f} s")
        if history.failed_save:
            alarms.append(f"checkpoint of step {history.failed_save['step']} not saved: {history.failed_save['reason']}")
        return alarms

    def _checkpoint_size(self) -> int:
        """Bytes of the newest checkpoint; its files are looked at once."""
        folder = self.run / "checkpoints"
        newest = max(folder.glob("step_*"), default=None, key=lambda path: path.name)
        if newest != self._size[0]:
            self._size = newest, sum(path.stat().st_size for path in newest.iterdir()) if newest else 0
        return self._size[1]

    def _last_words(self) -> str:
        """The sentence that train.log ends with, without its time."""
        with open(self.run / "train.log", "rb") as file:
            file.seek(max(0, file.seek(0, 2) - 4096))
            line = file.read().decode(errors="replace").splitlines()[-1]
        return line.split(" ", 2)[-1]

    def _output(self) -> str:
        log = self.run / "logs" / "rank_0.log"
        return str(log) if log.exists() else "what it printed"
