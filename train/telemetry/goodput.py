"""Where a run's time went, over all its starts: a pure function of the lines of metrics.jsonl. Standard library only.

Every second from the first start until now is in one category:

productive        steps that count: `step_ms` of the train lines, without data wait and compilation
startup           from each start's process start (`startup_seconds` before its line) until its first step began
compilation       a start's first step beyond its usual step (or another start's, if it took no second step)
data_wait         the share `data_wait` of the time of steps that count: the network waited for data
checkpoint_stall  `stall_seconds` of checkpoints and `seconds` of save_slow: training stood still
evaluation        `seconds` of the eval lines
lost              steps that had to be taken again, data wait included; and a killed start's time from its last train
                  line to its last sign of life: its last line or, if later, what the next start's `down_seconds` gives
waiting           from a start's last sign of life to the next start, including a start that died before its first line
other             the rest of a start's wall time: writing metrics, leaving, and steps without a line yet

A train line stands for all steps since the previous one, each with the same share. Steps after the last train line that
count, because a later line or a resumed checkpoint proves that they were taken, get the usual time of a step, as far as
there is time.

Measured times are kept even if the step around them was lost: an evaluation stays an evaluation. Categories overlap
only by errors of measurement. If a start's categories exceed its wall time, all are scaled down to it, so `other` is
never negative.

Clocks may be wrong. A line's `clock_set` takes out a jump during a start. A start whose line is older than the previous
one's last sign of life has another clock: it counts as begun right after that. A clock that is ahead cannot be told
from a longer wait.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

CATEGORIES = (
    "productive",
    "startup",
    "compilation",
    "data_wait",
    "checkpoint_stall",
    "evaluation",
    "lost",
    "waiting",
    "other",
)
# Events after which a start had nothing left to do.
ENDS = ("finished", "preempted")


@dataclass
class Start:
    """One start of the run; times in Unix seconds, durations in seconds.

    shift: what is added to the times of its lines, so that they follow those of the start before it.
    """

    shift: float
    host: str | None
    began: float
    step: int
    world_size: int | None
    startup: float
    last: float  # its last line
    last_step: int  # the furthest in its lines
    reported: float  # its last train line, rollback or start
    reported_step: int
    ended: float | None = None  # its last sign of life, once another start has followed
    end: str | None = None  # the event that ended it, if any
    busy: float = 0.0  # steps that count and have a train line, without data_wait
    data_wait: float = 0.0
    checkpoint_stall: float = 0.0
    evaluation: float = 0.0
    lost: float = 0.0
    since_report: float = 0.0  # checkpoint_stall and evaluation since `reported`
    first_busy: float = 0.0  # `busy` of the first step
    first_lost: bool = False
    later_steps: int = 0  # all other steps, lost ones too
    later_busy: float = 0.0
    later_wait: float = 0.0


@dataclass(frozen=True)
class Steps:
    """Steps `first` + 1 to `last`, which start number `owner` took."""

    owner: int
    first: int
    last: int
    busy: float
    wait: float


class Ledger:
    """The account of a run's time. Add the lines of metrics.jsonl in their order.

    Lines before the first start that has a `time` are only counted.
    """

    def __init__(self):
        self.starts: list[Start] = []
        self.lost_steps = 0
        self.left_out = 0  # lines without a time, or before the first start that has one
        self.now = 0.0  # of the newest line, shifted
        self._taken: list[Steps] = []  # what counts so far, in the order of steps

    def add(self, line: dict) -> None:
        """Add one parsed line, in amortised constant time."""
        now, step, event = line.get("time"), line.get("step", 0), line.get("event")
        if now is None or not (self.starts or event in ("start", "resume")):
            self.left_out += 1
            return
        if event in ("start", "resume"):
            self._begin(line, now, step)
            return
        start = self.starts[-1]
        start.shift -= line.get("clock_set", 0.0)
        self.now = now = now + start.shift
        start.last = max(start.last, now)
        if event == "rollback":
            self._go_back(line["to"], now, crashed=True)
            self.lost_steps += step - line["to"]
            start.reported, start.reported_step, start.since_report, start.last_step = now, line["to"], 0.0, line["to"]
            return
        start.last_step = max(start.last_step, step)
        if line["kind"] == "train":
            self._train(start, line, now, step)
        elif line["kind"] == "eval":
            self._measured(start, "evaluation", line.get("seconds"))
        elif event == "checkpoint":  # one without stall_seconds was written while training waited
            self._measured(start, "checkpoint_stall", line.get("stall_seconds", line.get("seconds")))
        elif event == "save_slow":
            self._measured(start, "checkpoint_stall", line.get("seconds"))
        elif event in (*ENDS, "failed"):
            start.end = event

    def split(self, end: float | None = None) -> dict[str, float]:
        """Seconds by category, from the first start to the last line, or to `end` (Unix seconds) if that is later.

        Returns {} if there is no start.
        """
        if not self.starts:
            return {}
        total = dict.fromkeys(CATEGORIES, 0.0)
        for index, start in enumerate(self.starts):
            if start.ended is None:
                ended = max(start.last, (end or 0.0) + start.shift)
            else:
                ended = start.ended
                total["waiting"] += self.starts[index + 1].began - ended
            known = self._known(index)
            wall, known_seconds = ended - start.began, sum(known.values())
            scale = min(1.0, wall / known_seconds) if known_seconds else 1.0
            for category, seconds in known.items():
                total[category] += seconds * scale
            total["other"] += max(0.0, wall - known_seconds)
        return total

    def after_stops(self) -> tuple[float, float]:
        """Seconds between the starts that were asked to stop and those after them, and of the latter's start-up with
        compilation.
        """
        waiting = startup = 0.0
        for index, (before, start) in enumerate(pairwise(self.starts), 1):
            if before.end == "preempted":
                known = self._known(index)
                waiting += start.began - before.ended
                startup += known["startup"] + known["compilation"]
        return waiting, startup

    def line(self) -> dict:
        """The goodput line of metrics.jsonl: the share of productive time, 0..1, and the seconds by category."""
        split = self.split()
        share = {
            "goodput": round(goodput(split), 4),
            **{category: round(seconds, 3) for category, seconds in split.items()},
        }
        return {"kind": "goodput", "step": self.starts[-1].last_step, **share}

    def _begin(self, line: dict, now: float, step: int) -> None:
        startup, host, shift = line.get("startup_seconds") or 0.0, line.get("host"), 0.0
        began = now - startup
        if self.starts:
            before = self.starts[-1]
            down, previous = line.get("down_seconds"), line.get("previous_started")
            if previous is not None and previous + before.shift > before.last:
                down = None  # measured from a start in between, which died before it wrote a line
            before.ended = before.last if down is None else max(before.last, began - down + before.shift)
            shift = before.shift if host == before.host else 0.0
            if now + shift < before.ended:
                shift = before.ended - began
            began = max(began + shift, before.ended)  # the process may have begun while the one before it was ending
            self._go_back(step, before.ended, crashed=before.end not in ENDS)
            lost = line.get("lost_steps")
            self.lost_steps += max(0, before.last_step - step) if lost is None else lost
        self.now = now = now + shift
        self.starts.append(Start(shift, host, began, step, line.get("world_size"), now - began, now, step, now, step))

    def _train(self, start: Start, line: dict, now: float, step: int) -> None:
        count = step - start.reported_step
        seconds = count * line["step_ms"] / 1000
        wait = seconds * line["data_wait"]
        busy = seconds - wait
        self._taken.append(Steps(len(self.starts) - 1, start.reported_step, step, busy, wait))
        start.busy += busy
        start.data_wait += wait
        if step == start.step + 1 and not start.first_busy:
            start.first_busy = busy
            start.startup += max(0.0, now - start.reported - start.since_report - seconds)
        else:
            start.later_steps += count
            start.later_busy += busy
            start.later_wait += wait
        start.reported, start.reported_step, start.since_report = now, step, 0.0

    def _measured(self, start: Start, category: str, seconds: float | None) -> None:
        setattr(start, category, getattr(start, category) + (seconds or 0.0))
        start.since_report += seconds or 0.0

    def _go_back(self, step: int, now: float, *, crashed: bool) -> None:
        """Training goes on from `step`; the newest start took steps until `now`."""
        while self._taken and self._taken[-1].last > step:
            steps = self._taken.pop()
            owner = self.starts[steps.owner]
            share = min(1.0, (steps.last - step) / (steps.last - steps.first))
            busy, wait = steps.busy * share, steps.wait * share
            owner.busy -= busy
            owner.data_wait -= wait
            owner.lost += busy + wait
            if steps.first == owner.step and step <= owner.step:
                owner.first_lost = True
            if share < 1:
                self._taken.append(Steps(steps.owner, steps.first, step, steps.busy - busy, steps.wait - wait))
        start = self.starts[-1]
        busy, wait, rest = self._tail(len(self.starts) - 1, step, now)
        if busy + wait:
            start.busy += busy
            start.data_wait += wait
            self._taken.append(Steps(len(self.starts) - 1, start.reported_step, step, busy, wait))
        if crashed:
            start.lost += rest

    def _tail(self, index: int, step: int, now: float) -> tuple[float, float, float]:
        """Seconds of a start from its last train line to `now`: (busy, data wait, rest).

        The first two are of the steps up to `step`, at the usual pace.
        """
        start = self.starts[index]
        there = max(0.0, now - start.reported - start.since_report)
        busy, wait = (max(0, step - start.reported_step) * seconds for seconds in self._usual(index))
        scale = min(1.0, there / (busy + wait)) if busy + wait else 0.0
        return busy * scale, wait * scale, there - (busy + wait) * scale

    def _usual(self, index: int) -> tuple[float, float]:
        """Seconds (busy, data wait) of a start's usual step, or of the nearest start's that took a second step."""
        for start in (*self.starts[index::-1], *self.starts[index + 1 :]):
            if start.later_steps:
                return start.later_busy / start.later_steps, start.later_wait / start.later_steps
        return self.starts[index].first_busy, 0.0

    def _known(self, index: int) -> dict[str, float]:
        """Seconds of a start by category, without waiting and other."""
        start = self.starts[index]
        compilation = max(0.0, start.first_busy - self._usual(index)[0])
        busy, wait, _ = self._tail(index, start.last_step, start.last) if start.ended is None else (0.0, 0.0, 0.0)
        seconds = {
            "productive": start.busy + busy - compilation * (not start.first_lost),
            "startup": start.startup,
            "compilation": compilation,
            "data_wait": start.data_wait + wait,
            "checkpoint_stall": start.checkpoint_stall,
            "evaluation": start.evaluation,
            "lost": start.lost - compilation * start.first_lost,
        }
        return {category: max(0.0, value) for category, value in seconds.items()}  # subtraction leaves rounding errors


def goodput(split: dict[str, float]) -> float:
    """The productive share of all time, 0..1. split: as `Ledger.split` returns it."""
    total = sum(split.values())
    return split["productive"] / total if total else 0.0


def read_lines(path: Path) -> Iterator[dict]:
    """The lines of a metrics.jsonl."""
    with open(path, "rb") as file:
        yield from parse_lines(file)


def parse_lines(texts: Iterable[bytes]) -> Iterator[dict]:
    """Parse lines of a metrics.jsonl; skip lines that a kill or a full disk left incomplete."""
    for text in texts:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            yield line
