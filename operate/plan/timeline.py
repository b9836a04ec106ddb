"""The input and the result that the closed form and the simulation share."""

from dataclasses import dataclass

ASSUMPTIONS = (
    "Failures are a Poisson process: every node fails at the same constant rate, independently, and one failed node "
    "ends the whole job.",
    "Failures strike while the job runs: in start-up, steps, evaluations and saves; not while it waits to be started "
    "again.",
    "After a failure the job waits (exponentially distributed, with the mean given), starts up (always equally long), "
    "and goes on from the newest checkpoint that was whole when it failed.",
    "A checkpoint stops training while it is copied to host memory; a thread writes it while training goes on, and "
    "until it is written a failure goes back to the one before. The next save waits for it.",
    "Every evaluation is better than all before it, so its step is saved too, as that of the best weights so far.",
    "Stragglers: every node has slow episodes, a Poisson process, each equally long; while any node is in one, every "
    "step and evaluation takes longer by the factor given.",
    "Steps, evaluations, stalls and writes otherwise take equally long each. Evaluation comes before the save of the "
    "same step.",
)


@dataclass(frozen=True)
class Timeline:
    """Durations are in seconds, rates per second and of the whole job."""

    steps: int
    step: float  # one optimizer step without stragglers
    every: int  # steps between checkpoints, besides those of evaluations and of the last step
    evaluate_every: int = 0  # steps; 0: never
    evaluation: float = 0.0
    startup: float = 0.0  # from a process's start until its first step begins
    stall: float = 0.0  # training stands still for a checkpoint
    write: float = 0.0  # from a checkpoint's begin until it is whole, including the stall
    failure_rate: float = 0.0
    requeue: float = 0.0  # from a failure until the next start, mean
    straggler_rate: float = 0.0
    straggler_lasts: float = 0.0
    straggler_factor: float = 1.0  # a step's time while a node is slow / a usual step's

    def saves(self) -> list[int]:
        """The steps after which there is a checkpoint, in rising order."""
        evaluated = range(self.evaluate_every, self.steps, self.evaluate_every) if self.evaluate_every else ()
        return sorted({*range(self.every, self.steps, self.every), *evaluated, self.steps})


@dataclass(frozen=True)
class Outcome:
    """The wall time in seconds, by the categories of train/telemetry/goodput.py (`other` is not modelled)."""

    productive: float  # steps that count, without stragglers
    stragglers: float  # delay of steps and evaluations, lost ones included
    startup: float
    checkpoint_stall: float
    evaluation: float  # lost ones included
    lost: float  # repeated steps, without stragglers
    waiting: float
    failures: float  # a count

    @property
    def wall(self) -> float:
        busy = (self.productive, self.stragglers, self.startup, self.checkpoint_stall, self.evaluation, self.lost)
        return sum((*busy, self.waiting))

    @property
    def running(self) -> float:
        """Seconds in which the job has its GPUs."""
        return self.wall - self.waiting

    @property
    def goodput(self) -> float:
        """0..1"""
        return self.productive / self.wall
