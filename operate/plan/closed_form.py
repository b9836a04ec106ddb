"""The expected run in closed form: checkpoint intervals (Young, Daly) and the mean wall time under failures.

Sources: Young 1974, "A first order approximation to the optimum checkpoint interval". Daly 2006, "A higher order
estimate of the optimum checkpoint interval for restart dumps". Bougeret, Casanova, Rabie, Robert, Vivien 2011,
"Checkpointing strategies for parallel jobs".
"""

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from math import ceil, exp, expm1, sqrt

from operate.plan.timeline import Outcome, Timeline


def young(stall: float, mtbf: float) -> float:
    """Seconds of work between checkpoints that each cost `stall`: √(2 δ M), right to first order in √(δ / M)."""
    return sqrt(2 * stall * mtbf)


def daly(stall: float, mtbf: float) -> float:
    """The same to higher order (Daly's equation 37): it differs if a checkpoint costs more than 1 % of the MTBF."""
    if stall >= 2 * mtbf:
        return mtbf
    root = sqrt(stall / (2 * mtbf))
    return young(stall, mtbf) * (1 + root / 3 + root**2 / 9) - stall


def best_every(timeline: Timeline) -> int:
    """Steps between checkpoints by Daly's interval, at least the time to write one, because the next waits for it.

    Evaluations save, too. So the best interval is at most theirs, and may be one that divides theirs evenly: otherwise
    some saves of both kinds would come soon after each other. The fastest of these by `expected`.
    """
    longest = min(timeline.steps, timeline.evaluate_every or timeline.steps)
    if not timeline.failure_rate:
        return longest
    work = per_step(timeline)
    lag = timeline.write - timeline.stall
    by_daly = max(1, min(longest, round(max(daly(timeline.stall, 1 / timeline.failure_rate), lag) / work)))
    parts = longest // by_daly
    even = [ceil(longest / count) for count in (parts, parts + 1)] if timeline.evaluate_every else []
    choices = [by_daly, *(every for every in even if every * work >= lag)]
    return min(choices, key=lambda every: expected(replace(timeline, every=every)).wall)


def slowdown(timeline: Timeline) -> float:
    """Mean time of a step, relative to one without stragglers.

    Slow episodes form an M/G/∞ queue: no node is slow in exp(-rate · duration) of the time (Cox and Miller 1965), and
    the time of a step is the inverse of the mean speed.
    """
    none_slow = exp(-timeline.straggler_rate * timeline.straggler_lasts)
    return 1 / (none_slow + (1 - none_slow) / timeline.straggler_factor)


def per_step(timeline: Timeline) -> float:
    """Seconds of work per step: the step, its share of the run's evaluations, and the delay by stragglers."""
    evaluations = timeline.steps // timeline.evaluate_every if timeline.evaluate_every else 0
    return (timeline.step + timeline.evaluation * evaluations / timeline.steps) * slowdown(timeline)


def expected(timeline: Timeline) -> Outcome:
    """The mean run under `timeline.ASSUMPTIONS`.

    One approximation is made: evaluations and stragglers are spread evenly over the steps. It holds for a run that has
    many checkpoints, lasts longer than a slow episode, and writes a checkpoint in less than half of the interval.

    A run is a sequence of segments, each from the completion of one checkpoint to that of the next. A segment takes its
    length L if training went on during the write before it, and L plus the V seconds of its own write after a restart.
    """
    rate, stall, startup = timeline.failure_rate, timeline.stall, timeline.startup
    work = per_step(timeline)
    lag = max(0.0, timeline.write - stall)
    counts = Counter(after - before for before, after in pairwise([0, *timeline.saves()]))
    segments = [(count, max(steps * work, lag) + stall) for steps, count in counts.items()]  # the run's first one first
    unbroken = sum(count * length for count, length in segments)
    if rate:
        # Seconds between failures, with the wait after one; then the start-up, which may fail (Bougeret's equation 1).
        between = 1 / rate + timeline.requeue
        recovery = timeline.requeue + expm1(rate * startup) * between

        def from_restart(length: float) -> float:
            return expm1(rate * (length + lag)) * (1 / rate + recovery)

        def from_training(length: float) -> float:
            return -expm1(-rate * length) * (1 / rate + recovery + from_restart(length))

        first = segments[0][1]
        wall = expm1(rate * startup) * between + from_restart(first) - from_training(first)
        wall += sum(count * from_training(length) for count, length in segments)
    else:
        wall = startup + unbroken + lag
    # The job fails at `rate` while it runs, and waits after each failure (Wald's identity).
    running = wall / (1 + rate * timeline.requeue)
    failures = rate * running
    starting = (1 + failures) * (-expm1(-rate * startup) / rate if rate else startup)
    productive = timeline.steps * timeline.step
    # The rest is work, done once or repeated: split in proportion.
    saving = unbroken - timeline.steps * work + lag
    slow = slowdown(timeline)
    again = max(0.0, running - starting - saving - timeline.steps * work)
    share = timeline.step * slow / work
    evaluation = (timeline.steps * work + again) * (1 - share) / slow
    lost = again * share / slow
    return Outcome(
        productive=productive,
        stragglers=(timeline.steps * work + again) * (1 - 1 / slow),
        startup=starting,
        checkpoint_stall=saving,
        evaluation=evaluation,
        lost=lost,
        waiting=wall - running,
        failures=failures,
    )
