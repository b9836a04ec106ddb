"""Simulate a run event by event: failures, waits, stragglers, evaluations, checkpoints. See `timeline.ASSUMPTIONS`."""

import heapq
import statistics
from collections.abc import Sequence
from dataclasses import astuple

import numpy as np

from operate.plan.timeline import Outcome, Timeline


def simulate(timeline: Timeline, seed: int, failures: Sequence[float] | None = None) -> Outcome:
    """Simulate one run.

    failures: moments at which it fails, in seconds from its first start, in place of random ones; every wait then has
    the mean length.
    """
    return _Simulation(timeline, seed, failures).run()


def simulate_mean(timeline: Timeline, seed: int, runs: int) -> tuple[Outcome, float]:
    """The mean of `runs` runs, and the standard error of its wall time in seconds."""
    outcomes = [simulate(timeline, seed + number) for number in range(runs)]
    mean = Outcome(*(statistics.fmean(column) for column in zip(*map(astuple, outcomes), strict=True)))
    error = statistics.stdev(outcome.wall for outcome in outcomes) / runs**0.5 if runs > 1 else float("inf")
    return mean, error


class _Failure(Exception):
    """The job has just failed."""


class _Simulation:
    """clock: seconds since the first start. position: completed steps. saved: steps of the newest whole checkpoint."""

    def __init__(self, timeline: Timeline, seed: int, failures: Sequence[float] | None):
        self.timeline, self.random = timeline, np.random.default_rng(seed)
        self.planned = None if failures is None else sorted(failures)
        self.clock, self.position, self.saved = 0.0, 0.0, 0
        self.writing: tuple[float, int] | None = None  # the moment at which it will be whole, and its step
        # A heap of the present slow episodes' ends. The run begins in the stationary state.
        under_way = self.random.poisson(timeline.straggler_rate * timeline.straggler_lasts)
        self.slow_until = sorted(self.random.uniform(0, timeline.straggler_lasts, under_way).tolist())
        self.next_slow = self.draw(timeline.straggler_rate)
        kinds = ("stepping", "stragglers", "startup", "checkpoint_stall", "evaluation", "waiting")
        self.spent = dict.fromkeys(kinds, 0.0)
        self.failed = 0

    def run(self) -> Outcome:
        while True:
            try:
                self.one_start()
                break
            except _Failure:
                self.fail()
        productive = self.timeline.steps * self.timeline.step
        lost = self.spent.pop("stepping") - productive
        return Outcome(productive=productive, lost=lost, failures=self.failed, **self.spent)

    def one_start(self) -> None:
        """From start-up to the last step; raises _Failure at a failure."""
        timeline = self.timeline
        self.fails_at = self.next_failure()
        self.rest(timeline.startup, "startup")
        self.position = self.saved
        while self.position < timeline.steps:
            due = min(self.following(timeline.every), self.following(timeline.evaluate_every), timeline.steps)
            self.work((due - self.position) * timeline.step, "stepping")
            self.position = due
            if timeline.evaluate_every and due % timeline.evaluate_every == 0:
                self.work(timeline.evaluation, "evaluation")
            self.save()
        self.wait_for_write()

    def following(self, every: int) -> int:
        """The next step after `position` that is a multiple of `every`."""
        return (int(self.position) // every + 1) * every if every else self.timeline.steps

    def save(self) -> None:
        self.wait_for_write()
        begun = self.clock
        self.rest(self.timeline.stall, "checkpoint_stall")
        self.writing = begun + max(self.timeline.write, self.timeline.stall), int(self.position)

    def wait_for_write(self) -> None:
        if self.writing:
            self.rest(max(0.0, self.writing[0] - self.clock), "checkpoint_stall")
            self.saved, self.writing = self.writing[1], None

    def work(self, seconds: float, kind: str) -> None:
        """Let work pass that takes `seconds` without stragglers."""
        while True:
            while self.slow_until and self.slow_until[0] <= self.clock:
                heapq.heappop(self.slow_until)
            while self.next_slow <= self.clock:
                heapq.heappush(self.slow_until, self.next_slow + self.timeline.straggler_lasts)
                self.next_slow += self.draw(self.timeline.straggler_rate)
            if self.slow_until and self.slow_until[0] <= self.clock:
                continue  # an episode that began and ended while the job waited
            factor = self.timeline.straggler_factor if self.slow_until else 1.0
            end = self.clock + seconds * factor
            until = min(end, self.next_slow, *self.slow_until[:1])
            done = (min(until, self.fails_at) - self.clock) / factor
            self.spent[kind] += done
            self.spent["stragglers"] += done * (factor - 1)
            self.go_to(until)
            if until == end:
                return
            seconds -= done

    def rest(self, seconds: float, kind: str) -> None:
        """Let `seconds` pass that stragglers do not extend."""
        self.spent[kind] += min(seconds, self.fails_at - self.clock)
        self.go_to(self.clock + seconds)

    def go_to(self, moment: float) -> None:
        if moment >= self.fails_at:
            self.clock = self.fails_at
            raise _Failure
        self.clock = moment

    def fail(self) -> None:
        self.failed += 1
        if self.writing and self.writing[0] <= self.clock:
            self.saved = self.writing[1]
        self.writing = None
        wait = self.timeline.requeue
        if self.planned is None and wait:
            wait = self.random.exponential(wait)
        self.spent["waiting"] += wait
        self.clock += wait

    def next_failure(self) -> float:
        """When this start fails, unless it ends first. Failures are memoryless, so each start draws its own."""
        if self.planned is None:
            return self.clock + self.draw(self.timeline.failure_rate)
        return next((moment for moment in self.planned if moment > self.clock), float("inf"))

    def draw(self, rate: float) -> float:
        """Seconds until the next event of a Poisson process."""
        return self.random.exponential(1 / rate) if rate else float("inf")
