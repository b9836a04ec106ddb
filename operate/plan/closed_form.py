"""The expected run in closed form: checkpoint intervals (Young, Daly) and the mean wall time under failures.

Sources: Young 1974, "A first order approximation to the optimum checkpoint interval". Daly 2006, "A higher order estimate of the optimum
checkpoint interval for restart dumps". Bougeret, Casanova, Rabie, Robert, Vivien 2011, "Checkpointing strategies for parallel jobs".
"""

from math import exp, expm1, sqrt

from operate.plan.timeline import Outcome, Timeline


def young(stall: float, mtbf: float) -> float:
    """Seconds of work between checkpoints that each cost `stall`: √(2 δ M), right to first order in √(δ / M)."""
    return sqrt(2 * stall * mtbf)


def daly(stall: float, mtbf: float) -> float:
    """The same to higher order (Daly's equation 37), which matters where a checkpoint costs more than a hundredth of the MTBF."""
    if stall >= 2 * mtbf:
        return mtbf
    root = sqrt(stall / (2 * mtbf))
    return young(stall, mtbf) * (1 + root / 3 + root**2 / 9) - stall


def best_every(timeline: Timeline) -> int:
    """Steps between checkpoints by Daly's interval; no fewer than it takes to write one, as the next would wait, and at most all steps."""
    if not timeline.failure_rate:
        return timeline.steps
    work = per_step(timeline)
    interval = max(daly(timeline.stall, 1 / timeline.failure_rate), timeline.write - timeline.stall)
    return max(1, min(timeline.steps, round(interval / work)))


def slowdown(timeline: Timeline) -> float:
    """Mean time of a step / that of one without stragglers.

    Slow nodes are the customers of an M/G/∞ queue: none is there in exp(-rate · duration) of the time (Cox and Miller 1965), and
    the time of a step is the inverse of the mean speed.
    """
    nobody = exp(-timeline.straggler_rate * timeline.straggler_lasts)
    return 1 / (nobody + (1 - nobody) / timeline.straggler_factor)


def per_step(timeline: Timeline) -> float:
    """Seconds of work a step: its own, its share of an evaluation, and what stragglers add."""
    share = timeline.evaluation / timeline.evaluate_every if timeline.evaluate_every else 0.0
    return (timeline.step + share) * slowdown(timeline)


def expected(timeline: Timeline) -> Outcome:
    """The mean run. Exact under `timeline.ASSUMPTIONS`, but that evaluations and stragglers are spread evenly over the steps: it holds
    where a run has many checkpoints, lasts longer than a slow episode, and writes one in less than half of the interval.

    A run is a row of segments, each from the moment that a checkpoint is whole to the moment that the next is. Where training went on
    meanwhile, that takes the segment's length L; after a restart L and the V seconds for which it is written.
    """
    rate, stall, startup = timeline.failure_rate, timeline.stall, timeline.startup
    work = per_step(timeline)
    lag = max(0.0, timeline.write - stall)
    full, rest = divmod(timeline.steps, timeline.every)
    segments = [(count, max(steps * work, lag) + stall) for count, steps in ((full, timeline.every), (1, rest)) if count and steps]
    unbroken = sum(count * length for count, length in segments)
    if rate:
        # Seconds per exponential failure, its wait included; with the start-up after it, which may fail itself (Bougeret's equation 1).
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
    # While it runs it fails at `rate`, and waits for each (Wald's identity).
    running = wall / (1 + rate * timeline.requeue)
    failures = rate * running
    starting = (1 + failures) * (-expm1(-rate * startup) / rate if rate else startup)
    productive = timeline.steps * timeline.step
    # What remains is work, done once or again: split in proportion.
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
