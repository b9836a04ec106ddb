"""A plan: a workload on a cluster, with its step, checkpoint interval, and time by closed form and by simulation."""

from dataclasses import dataclass, replace

from operate.plan.closed_form import best_every, daly, expected, young
from operate.plan.cluster import Cluster
from operate.plan.simulate import simulate_mean
from operate.plan.step_time import StepTime, step_time
from operate.plan.timeline import Outcome, Timeline
from operate.plan.workload import Workload

FORWARD = 1 / 3  # share of the forward pass in a training step's arithmetic, for evaluations that were not measured


@dataclass(frozen=True)
class Plan:
    """A planned run. error: standard error of the simulated wall time, in seconds."""

    workload: Workload
    cluster: Cluster
    step: StepTime
    timeline: Timeline
    expected: Outcome
    simulated: Outcome
    error: float

    @property
    def goodput(self) -> float:
        """0..1, as train/telemetry/goodput.py defines it: waiting for data does not count as productive."""
        return self.expected.goodput * (1 - self.step.data_wait / self.step.seconds)

    @property
    def gpu_hours(self) -> float:
        return self.expected.running * self.cluster.world / 3600

    @property
    def price(self) -> float | None:
        return None if self.cluster.price is None else self.gpu_hours * self.cluster.price


def make_timeline(workload: Workload, cluster: Cluster, checkpoint_interval: int, step: StepTime) -> Timeline:
    hours = 3600.0
    evaluation = cluster.evaluation
    if evaluation is None:
        evaluation = (
            workload.evaluated_weights
            * workload.validation_images
            * FORWARD
            / cluster.images_per_second
            / cluster.world
        )
    return Timeline(
        steps=workload.steps,
        step=step.seconds,
        every=checkpoint_interval,
        evaluate_every=workload.evaluation_interval,
        evaluation=evaluation,
        startup=cluster.startup,
        stall=cluster.checkpoint_stall,
        write=cluster.checkpoint_write,
        failure_rate=cluster.nodes / (cluster.node_mtbf * hours),
        requeue=cluster.requeue,
        straggler_rate=cluster.nodes / (cluster.straggler_every * hours),
        straggler_lasts=cluster.straggler_lasts,
        straggler_factor=cluster.straggler_factor,
    )


def make_plan(workload: Workload, cluster: Cluster, runs: int, seed: int, *, best: bool = False) -> Plan:
    """Plan with the workload's own checkpoint interval, or with the best one. runs: number of simulated runs."""
    step = step_time(workload, cluster, workload.zero_stage)
    timeline = make_timeline(workload, cluster, workload.checkpoint_interval, step)
    if best:
        timeline = replace(timeline, every=best_every(timeline))
    simulated, error = simulate_mean(timeline, seed, runs)
    return Plan(workload, cluster, step, timeline, expected(timeline), simulated, error)


def intervals(plan: Plan) -> dict[str, float]:
    """Seconds of work between checkpoints, Young's and Daly's, and the job's mean time between failures."""
    mtbf = 1 / plan.timeline.failure_rate
    return {"young": young(plan.timeline.stall, mtbf), "daly": daly(plan.timeline.stall, mtbf), "mtbf": mtbf}


def scale(workload: Workload, cluster: Cluster, runs: int, seed: int, most: int = 10_000) -> list[Plan]:
    """Plans on 1 to `most` GPUs, each with its best checkpoint interval and a global batch by `Workload.fitted`."""
    plans, world = [], 1
    while world <= most:
        within = min(world, cluster.gpus_per_node)
        size = replace(cluster, nodes=-(-world // within), gpus_per_node=within)
        if cluster.evaluation is not None:
            size = replace(size, evaluation=cluster.evaluation * cluster.world / size.world)
        fitted = workload.fitted(size.world)
        if fitted.steps_per_epoch:
            plans.append(make_plan(fitted, size, runs, seed, best=True))
        world = most if world < most < 2 * world else 2 * world
    return plans
