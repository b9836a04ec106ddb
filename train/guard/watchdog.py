"""Watchdog: a run that hangs, or does not stop when asked to, is ended; with a sentence that says which rank the others wait for.

Standard library only, so that it can watch over a start from the first line on.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from train.guard.rank_store import Store

EXIT_HUNG, EXIT_STOPPED = 71, 75
SECTIONS = ("startup", "first_step", "step", "evaluation", "save")  # in the order of their places in a step
TICK = 0.5  # seconds between two looks at the main thread
HEARTBEAT = 1.0  # seconds
SILENT = 3.0  # seconds without a heartbeat after which a rank is called frozen or dead
FROZEN = 3.0  # seconds by which a tick is late where this process itself was stopped
WAKING = 10.0  # seconds after having been stopped in which a store that is gone means that the others have ended
JUDGING = 3 * SILENT  # seconds that the others give the one who reads all heartbeats, before another does
LINGER = 2.5  # seconds: the others find out and write their stacks before a launcher kills them
NAMED = 4  # ranks that a sentence lists


class Beat(NamedTuple):
    """A rank's sign of life. `inside`: seconds in the section. `place`: what its main thread executes. `waiting`: in a collective.

    completed: the last step that its device is known to have finished.
    """

    count: int
    section: str
    step: int
    inside: float
    place: str
    waiting: bool
    completed: int


class _Place(NamedTuple):
    section: str
    step: int
    since: float  # time.monotonic()
    limit: float  # seconds


class Watchdog:
    """Two threads beside the main one. The watch looks at this process only, never blocks, and ends it; the heart talks to the store.

    A second of a healthy run costs a rank one set and one check. Past a section's limit one heart, the judge's, reads the heartbeats of all
    ranks, twice, and puts a sentence under "hung", which ends all ranks with EXIT_HUNG; the judge is who comes first, and the next one
    where no sentence comes. Where rank 0, which keeps the store, is frozen or dead, each rank ends by its own limit. Each writes the stacks
    of its threads to `stacks/rank_<rank>.txt`.

    Time in which this process was stopped itself (SIGSTOP, `scontrol suspend`) does not count.
    """

    def __init__(self, rank: int, world: int, limits: dict[str, float], stacks: Path, grace: float):
        """`limits`: seconds by section. `grace`: seconds between a stop signal and `stop_by`'s deadline. Begins in "startup"."""
        self._rank, self._world, self._limits, self._stacks, self._grace = rank, world, limits, stacks, grace
        self._place = _Place("startup", 0, time.monotonic(), limits["startup"])  # replaced, never changed
        self._evaluates = False  # has begun to
        self.completed = 0  # the last step that the device is known to have finished: the main thread says so
        self._inside = 0.0
        self._stop_asked: float | None = None
        self._closed, self._has_beaten = threading.Event(), threading.Event()
        self._heart: threading.Thread | None = None
        self._send = None
        self._overdue: tuple[_Place, str] | None = None  # the watch asks the heart: who is it?
        self._verdict: str | None = None  # the heart answers
        self._answered, self._lost = time.monotonic(), False  # when the store last answered; it has broken the connection
        self._watch = threading.Thread(target=self._keep_watch, name="watchdog", daemon=True)
        self._watch.start()

    def connect(self, store: "Store") -> None:
        """From now on the ranks know of each other; every rank calls this. Until then a rank has only its own limit."""
        self._send = store.sender()
        self._answered = time.monotonic()
        self._heart = threading.Thread(target=self._beat, args=(store,), name="heartbeat", daemon=True)
        self._heart.start()
        self._has_beaten.wait()  # it has its connection: once rank 0 is frozen or dead, it could no longer get one

    def enter(self, section: str, step: int) -> None:
        """The main thread begins `section` of step `step`; a section entered anew has its whole limit again.

        The first batch that is evaluated compiles what evaluation needs: it has the first step's time for that.
        """
        limit = self._limits[section]
        if section == "evaluation" and not self._evaluates:
            self._evaluates, limit = True, max(limit, self._limits["first_step"])
        self._place = _Place(section, step, time.monotonic(), limit)

    def stop_by(self, deadline: float) -> None:
        """A stop was asked for: if this process still lives at `deadline` (time.monotonic()), it ends with EXIT_STOPPED as it is."""
        self._stop_asked = deadline - self._grace

    def settle(self) -> None:
        """An error has ended training: does not return where it comes from a hang, which ends this process with EXIT_HUNG.

        A rank that was frozen, and wakes up when the others have ended, sees broken connections before it sees anything else. So may a rank
        whose neighbours have just ended. Takes as long as it takes to know, 2 heartbeats and a tick.
        """
        time.sleep(2 * HEARTBEAT + TICK)
        if self._verdict is not None:
            threading.Event().wait()

    def close(self) -> None:
        """The run has ended."""
        self._closed.set()
        self._watch.join()
        if self._heart:
            self._heart.join(2 * HEARTBEAT)  # it may wait for rank 0

    def _keep_watch(self) -> None:
        inside, since_stop = _Stopwatch(), _Stopwatch()
        last, woke, frozen = time.monotonic(), float("-inf"), 0.0
        while not self._closed.wait(TICK):
            now = time.monotonic()
            gap, last = now - last, now
            if gap > FROZEN:
                woke, frozen = now, gap
            place = self._place
            self._inside = inside.read(place.since, now, gap)
            if self._stop_asked is not None and since_stop.read(self._stop_asked, now, gap) > self._grace:
                self._leave_without_save()
            if self._inside > place.limit:
                where = place.section if place.section == "startup" else f"{place.section} of step {place.step}"
                found = f"rank {self._rank} has been {self._inside:.0f} s in {where} (limit {place.limit:g} s)."
                if self._heart is None:
                    self._verdict = (
                        f"{found} The ranks have not found each other: a rank or its node is missing, or cannot reach the others."
                    )
                elif self._lost:
                    self._verdict = f"{found} Rank 0 is dead: it has left the store that it keeps."
                elif now - max(self._answered, woke) > SILENT:
                    self._verdict = f"{found} Silent, so frozen or dead: rank 0, which keeps the store and does not answer."
                self._overdue = place, found
            else:
                self._overdue = None
            if self._lost and now - woke < WAKING:
                self._verdict = f"rank {self._rank} was frozen for {frozen:.0f} s, and the others have ended meanwhile."
            if self._verdict is not None:
                self._leave_hung(self._verdict)

    def _beat(self, store: "Store") -> None:
        keys = [f"beat/{rank}" for rank in range(self._world)]
        count, reading, judge = 0, None, _Judge(store, str(self._rank))
        try:
            while not self._closed.is_set():
                count += 1
                place = self._place
                beat = Beat(count, place.section, place.step, round(self._inside, 1), *_main_thread_place(), self.completed)
                store.set(keys[self._rank], json.dumps(beat))
                self._verdict = self._verdict or store.get("hung")
                self._answered = now = time.monotonic()
                overdue = self._overdue
                if overdue is None or self._verdict or not judge.is_me(overdue[0], now):
                    reading = None
                # Read anew where it is another section, or where this thread was stopped in between.
                elif reading is None or reading[0] != overdue[0] or now - reading[1] > 2 * SILENT:
                    reading = overdue[0], now, _parse(store.get_all(keys))
                elif now - reading[1] >= SILENT:
                    self._verdict = store.set_once("hung", f"{overdue[1]} {blame(reading[2], _parse(store.get_all(keys)))}")
                self._has_beaten.set()
                self._closed.wait(HEARTBEAT)
        except ConnectionError:
            self._lost = True  # no reason to end by itself: rank 0 may just have finished before this rank
            self._has_beaten.set()

    def _leave_hung(self, sentence: str) -> None:
        # What this says may wait for a disk or a pipe that hangs, so another thread says it.
        threading.Thread(target=self._last_words, args=(sentence,), daemon=True).start()
        time.sleep(LINGER)
        os._exit(EXIT_HUNG)

    def _last_words(self, sentence: str) -> None:
        path = self._stacks / f"rank_{self._rank}.txt"
        if self._send:
            with suppress(ConnectionError):
                self._send("hung", sentence)  # for a rank 0 that was frozen and wakes up
        print(f"error: hung: {sentence} Stacks: {path}", file=sys.stderr, flush=True)
        try:
            self._stacks.mkdir(parents=True, exist_ok=True)
            with open(path, "a") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S %z')} {sentence}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            print(f"error: {path} cannot be written ({error.strerror}), so the stacks are here:", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(all_threads=True)

    def _leave_without_save(self) -> None:
        sentence = f"error: not stopped within guard.grace {self._grace:g} s: leaving without a save, the last checkpoint counts"
        say = threading.Thread(target=print, args=(sentence,), kwargs={"file": sys.stderr, "flush": True}, daemon=True)
        say.start()
        say.join(1)
        os._exit(EXIT_STOPPED)


def blame(first: list[Beat | None], second: list[Beat | None]) -> str:
    """A sentence about the rank that the others wait for, from two readings of all ranks' heartbeats SILENT seconds apart.

    Those who have not beaten in between; or, where all live, whose device has completed the fewest steps: the hosts run ahead, and all
    wait for their devices; then whoever has the smallest step or an earlier section; among equals who is not in a collective, then who
    is where the fewest are.
    """
    silent = [rank for rank, beat in enumerate(second) if beat is None or (first[rank] is not None and beat.count == first[rank].count)]
    if silent:
        return f"Silent, so frozen or dead: {_list(silent, second)}."
    crowd = Counter(beat.place for beat in second)
    places = [(beat.completed, beat.step, SECTIONS.index(beat.section), beat.waiting, crowd[beat.place]) for beat in second]
    behind = [rank for rank, place in enumerate(places) if place == min(places)]
    return f"All ranks live; furthest behind: {_list(behind, second)}."


def _list(ranks: list[int], beats: list[Beat | None]) -> str:
    more = f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else ""
    return "; ".join(f"rank {rank} ({_describe(beats[rank])})" for rank in ranks[:NAMED]) + more


def _describe(beat: Beat | None) -> str:
    if beat is None:
        return "never heard of"
    return f"{beat.inside:.0f} s in {beat.section} of step {beat.step}, at {beat.place}, step {beat.completed} complete"


def _parse(values: list[str | None]) -> list[Beat | None]:
    return [value and Beat(*json.loads(value)) for value in values]


def _main_thread_place() -> tuple[str, bool]:
    """Function and line that the main thread executes, and whether it is in a collective."""
    frame = sys._current_frames()[threading.main_thread().ident]
    place, waiting = f"{frame.f_code.co_name} ({os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno})", False
    while frame is not None and not waiting:
        waiting = "/torch/distributed/" in frame.f_code.co_filename
        frame = frame.f_back
    return place, waiting


class _Judge:
    """Who of those that are past a limit reads all heartbeats: if all did, rank 0 would answer the square of their number."""

    def __init__(self, store: "Store", me: str):
        self._store, self._me = store, me
        self._place: _Place | None = None
        self._turn, self._mine, self._since = 0, False, 0.0

    def is_me(self, place: _Place, now: float) -> bool:
        """Whether this rank, which is past the limit of `place`, is to judge; asked once a heartbeat."""
        if place != self._place or (not self._mine and now - self._since > JUDGING):
            self._turn = self._turn + 1 if self._place and self._place[:2] == place[:2] else 0
            self._place, self._since = place, now
            self._mine = self._store.set_once(f"judge/{place.section}/{place.step}/{self._turn}", self._me) == self._me
        return self._mine


class _Stopwatch:
    """Seconds since a moment, those left out in which this process was stopped."""

    def __init__(self):
        self._since, self._left_out = float("nan"), 0.0

    def read(self, since: float, now: float, gap: float) -> float:
        """`gap`: seconds since the last reading. A thread that holds the GIL so long looks the same: then the others miss a heartbeat."""
        if since != self._since:
            self._since, self._left_out = since, 0.0
        if gap > FROZEN:
            self._left_out += min(gap, now - since)
        return now - since - self._left_out
