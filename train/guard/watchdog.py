"""Watchdog: ends a run that hangs or does not stop when asked to, and reports which rank the others wait for.

Uses the standard library only, so that it can watch a start before torch is imported.

How a hang is found and reported:

1. The main thread announces each section of the run (`enter`). Each section has a time limit, with which the *watch*
   thread of every rank compares the time spent in it. The watch thread never blocks.
2. The *heartbeat* thread of every rank writes a `Beat` into the store that rank 0 keeps, once a second, and checks
   whether a hang has been reported.
3. If ranks are past a limit, one of their heartbeat threads, the judge, reads the heartbeats of all ranks twice, SILENT
   seconds apart. It writes a sentence that names the ranks to blame (`blame`) under the key "hung".
4. Every rank that reads the sentence prints it, writes the stacks of its threads to a file, and exits with HUNG.

If rank 0 is frozen or dead, there is no store, and each rank ends by its own limit.
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

from train import exit_codes

if TYPE_CHECKING:
    from train.guard.rank_store import Store

SECTIONS = ("startup", "first_step", "step", "evaluation", "save")  # in their order within a step
NAMED = 4  # ranks that a sentence lists at most

# In seconds.
TICK = 0.5  # interval of the watch thread
HEARTBEAT = 1.0  # interval of the heartbeat thread
SILENT = 3.0  # a rank without a heartbeat for this long is called frozen or dead
FROZEN = 3.0  # a longer interval between two ticks means that this process was stopped meanwhile
WAKING = 10.0  # if the store is lost this soon after this process was stopped, the other ranks have ended meanwhile
JUDGING = 3 * SILENT  # time for a judge to report, before another rank takes over
LINGER = 2.5  # wait before exiting: the other ranks need to read the sentence and write their stacks, too


class Beat(NamedTuple):
    """A rank's heartbeat. count: number of the beat. inside: seconds in the section so far.

    place: function and line that the main thread executes. waiting: whether it is in a collective. completed: the last
    step that the device is known to have finished.
    """

    count: int
    section: str
    step: int
    inside: float
    place: str
    waiting: bool
    completed: int


class _Place(NamedTuple):
    """Where in the run the main thread is, and for how long it may stay there."""

    section: str
    step: int
    since: float  # time.monotonic()
    limit: float  # seconds


class Watchdog:
    """The watch and heartbeat threads of one rank; see the module's description.

    In a healthy run they cost one `set` and one existence check in the store per rank and second. Stacks are written to
    `stacks/rank_<rank>.txt`. Time during which this process was stopped (SIGSTOP, `scontrol suspend`) does not count.
    """

    def __init__(self, rank: int, world: int, limits: dict[str, float], stacks: Path, grace: float):
        """Start watching, in section "startup".

        limits: seconds by section. stacks: folder for the stacks. grace: seconds from a stop signal to the deadline of
        `stop_by`.
        """
        self._rank, self._world, self._limits, self._stacks, self._grace = rank, world, limits, stacks, grace
        self._place = _Place("startup", 0, time.monotonic(), limits["startup"])  # shared: replaced as a whole
        self._evaluates = False  # whether an evaluation has begun in this start
        self.completed = 0  # the last step that the device is known to have finished; set by the main thread
        self._inside = 0.0  # seconds in the section
        self._stop_asked: float | None = None
        self._closed, self._has_beaten = threading.Event(), threading.Event()
        self._heartbeat: threading.Thread | None = None
        self._send = None
        # From the watch to the heartbeat thread: where this rank is past its limit, and a sentence about it.
        self._overdue: tuple[_Place, str] | None = None
        # The sentence about a hang. Once it is set, the watch thread ends this process.
        self._verdict: str | None = None
        self._answered = time.monotonic()  # when the store last answered
        self._lost = False  # whether the connection to the store is broken
        self._watch = threading.Thread(target=self._keep_watch, name="watchdog", daemon=True)
        self._watch.start()

    def connect(self, store: "Store") -> None:
        """Start the heartbeat, by which ranks know of each other.

        All ranks call this; until then each has only its own limit.
        """
        self._send = store.sender()
        self._answered = time.monotonic()
        self._heartbeat = threading.Thread(target=self._beat, args=(store,), name="heartbeat", daemon=True)
        self._heartbeat.start()
        self._has_beaten.wait()  # until it is connected to the store: a frozen or dead rank 0 would not accept it later

    def enter(self, section: str, step: int) -> None:
        """The main thread begins `section` of step `step`. Entering a section again restarts its limit.

        The first batch of a start's first evaluation has at least the first step's limit, because it may compile the
        network.
        """
        limit = self._limits[section]
        if section == "evaluation" and not self._evaluates:
            self._evaluates, limit = True, max(limit, self._limits["first_step"])
        self._place = _Place(section, step, time.monotonic(), limit)

    def stop_by(self, deadline: float) -> None:
        """A stop was requested: exit with STOPPED, without a save, at `deadline` (of time.monotonic())."""
        self._stop_asked = deadline - self._grace

    def settle(self) -> None:
        """After an error ended training: if a hang caused it, do not return; the watch thread exits with HUNG.

        A rank that was frozen until the others ended gets an error from a broken connection first. So may a rank whose
        neighbours have just ended. Waits 2 heartbeats and a tick, in which a hang becomes known.
        """
        time.sleep(2 * HEARTBEAT + TICK)
        if self._verdict is not None:
            threading.Event().wait()

    def close(self) -> None:
        """Stop both threads: the run has ended."""
        self._closed.set()
        self._watch.join()
        if self._heartbeat:
            self._heartbeat.join(2 * HEARTBEAT)  # not for ever: it may wait for a rank 0 that has ended

    def _keep_watch(self) -> None:
        """The watch thread.

        woke, frozen: when this process last resumed from being stopped, and for how long it was stopped.
        """
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
                if self._heartbeat is None:
                    self._verdict = (
                        f"{found} The ranks have not found each other: "
                        "a rank or its node is missing, or cannot reach the others."
                    )
                elif self._lost:
                    self._verdict = f"{found} Rank 0 is dead: the store that it keeps is gone."
                elif now - max(self._answered, woke) > SILENT:
                    self._verdict = (
                        f"{found} Silent, so frozen or dead: rank 0, which keeps the store and does not answer."
                    )
                self._overdue = place, found
            else:
                self._overdue = None
            if self._lost and now - woke < WAKING:
                self._verdict = f"rank {self._rank} was frozen for {frozen:.0f} s, and the others have ended meanwhile."
            if self._verdict is not None:
                self._leave_hung(self._verdict)

    def _beat(self, store: "Store") -> None:
        """The heartbeat thread. reading: the judge's first reading: (place, when, heartbeats)."""
        keys = [f"beat/{rank}" for rank in range(self._world)]
        count, reading, judge = 0, None, _Judge(store, str(self._rank))
        try:
            while not self._closed.is_set():
                count += 1
                place = self._place
                beat = Beat(
                    count, place.section, place.step, round(self._inside, 1), *_main_thread_place(), self.completed
                )
                store.set(keys[self._rank], json.dumps(beat))
                self._verdict = self._verdict or store.get("hung")
                self._answered = now = time.monotonic()
                overdue = self._overdue
                if overdue is None or self._verdict or not judge.is_me(overdue[0], now):
                    reading = None
                # Read anew if the section has changed, or if this thread was stopped since the first reading.
                elif reading is None or reading[0] != overdue[0] or now - reading[1] > 2 * SILENT:
                    reading = overdue[0], now, _parse(store.get_all(keys))
                elif now - reading[1] >= SILENT:
                    self._verdict = store.set_once(
                        "hung", f"{overdue[1]} {blame(reading[2], _parse(store.get_all(keys)))}"
                    )
                self._has_beaten.set()
                self._closed.wait(HEARTBEAT)
        except ConnectionError:
            self._lost = True  # by itself no hang: rank 0 may have finished before this rank
            self._has_beaten.set()

    def _leave_hung(self, sentence: str) -> None:
        # Report in another thread, because writing may block on a disk or pipe that hangs.
        threading.Thread(target=self._report_hang, args=(sentence,), daemon=True).start()
        time.sleep(LINGER)
        os._exit(exit_codes.HUNG)

    def _report_hang(self, sentence: str) -> None:
        path = self._stacks / f"rank_{self._rank}.txt"
        if self._send:
            with suppress(ConnectionError):
                self._send("hung", sentence)  # for a frozen rank 0, when it wakes up
        with suppress(OSError):  # stderr may be a file on a full disk, or a terminal that was closed
            print(f"error: hung: {sentence} Stacks: {path}", file=sys.stderr, flush=True)
        try:
            self._stacks.mkdir(parents=True, exist_ok=True)
            with open(path, "a") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S %z')} {sentence}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            print(
                f"error: {path} cannot be written ({error.strerror}), so the stacks are here:",
                file=sys.stderr,
                flush=True,
            )
            faulthandler.dump_traceback(all_threads=True)

    def _leave_without_save(self) -> None:
        sentence = (
            f"error: not stopped within guard.grace {self._grace:g} s: "
            "leaving without a save, the last checkpoint counts"
        )
        # Print in another thread, because stderr may be a pipe that hangs.
        printing = threading.Thread(
            target=print, args=(sentence,), kwargs={"file": sys.stderr, "flush": True}, daemon=True
        )
        printing.start()
        printing.join(1)
        os._exit(exit_codes.STOPPED)


def blame(first: list[Beat | None], second: list[Beat | None]) -> str:
    """A sentence that names the ranks that the others wait for.

    first, second: two readings of all ranks' heartbeats, SILENT seconds apart. None: the rank has not sent any.

    Ranks without a heartbeat between the readings are named as silent. If there are none, the ranks furthest behind are
    named, by the first of these criteria in which ranks differ:

    - fewest steps completed by the device (hosts run ahead of their devices, and all of them may be waiting for
      theirs);
    - smallest step, then earliest section, of the main thread;
    - not waiting in a collective;
    - executing the line that the fewest ranks execute.
    """
    silent = [
        rank
        for rank, beat in enumerate(second)
        if beat is None or (first[rank] is not None and beat.count == first[rank].count)
    ]
    if silent:
        return f"Silent, so frozen or dead: {_list(silent, second)}."
    crowd = Counter(beat.place for beat in second)
    places = [
        (beat.completed, beat.step, SECTIONS.index(beat.section), beat.waiting, crowd[beat.place]) for beat in second
    ]
    behind = [rank for rank, place in enumerate(places) if place == min(places)]
    return f"All ranks live; furthest behind: {_list(behind, second)}."


def _list(ranks: list[int], beats: list[Beat | None]) -> str:
    more = f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else ""
    return "; ".join(f"rank {rank} ({_describe(beats[rank])})" for rank in ranks[:NAMED]) + more


def _describe(beat: Beat | None) -> str:
    if beat is None:
        return "no heartbeat so far"
    return f"{beat.inside:.0f} s in {beat.section} of step {beat.step}, at {beat.place}, step {beat.completed} complete"


def _parse(values: list[str | None]) -> list[Beat | None]:
    return [value and Beat(*json.loads(value)) for value in values]


def _main_thread_place() -> tuple[str, bool]:
    """Function and line that the main thread executes, and whether a collective is among its callers."""
    frame = sys._current_frames()[threading.main_thread().ident]
    place, waiting = f"{frame.f_code.co_name} ({os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno})", False
    while frame is not None and not waiting:
        waiting = "/torch/distributed/" in frame.f_code.co_filename
        frame = frame.f_back
    return place, waiting


class _Judge:
    """Decides which of the ranks past a limit reads all heartbeats.

    If all of them did, rank 0 would have to answer a number of requests that grows with the square of the number of
    ranks. The first to claim a key of the store for a place in the run is the judge; if it reports nothing for JUDGING
    seconds, the next one may claim the key of the next turn.
    """

    def __init__(self, store: "Store", me: str):
        self._store, self._me = store, me
        self._place: _Place | None = None
        self._turn, self._mine, self._since = 0, False, 0.0

    def is_me(self, place: _Place, now: float) -> bool:
        """Whether this rank, which is past the limit of `place`, is the judge. Called once per heartbeat."""
        if place != self._place or (not self._mine and now - self._since > JUDGING):
            self._turn = self._turn + 1 if self._place and self._place[:2] == place[:2] else 0
            self._place, self._since = place, now
            self._mine = self._store.set_once(f"judge/{place.section}/{place.step}/{self._turn}", self._me) == self._me
        return self._mine


class _Stopwatch:
    """Seconds since a moment, without the time during which this process was stopped."""

    def __init__(self):
        self._since, self._left_out = float("nan"), 0.0

    def read(self, since: float, now: float, gap: float) -> float:
        """Seconds from `since` to `now`, both of time.monotonic(), without the time stopped.

        gap: seconds since the last reading; a gap above FROZEN counts as time stopped. A thread that holds the GIL for
        that long looks the same here; the other ranks then miss this one's heartbeat.
        """
        if since != self._since:
            self._since, self._left_out = since, 0.0
        if gap > FROZEN:
            self._left_out += min(gap, now - since)
        return now - since - self._left_out
