"""A plan: a job on a cluster, its step, its best checkpoint interval, and its time by the closed form and by simulation."""

from dataclasses import dataclass, replace

from operate.plan.closed_form import best_every, daly, expected, young
from operate.plan.cluster import Cluster
from operate.plan.job import Job
from operate.plan.simulate import simulate_mean
from operate.plan.step import Step, step
from operate.plan.timeline import Outcome, Timeline

FORWARD = 1 / 3  # of a training step's arithmetic, for evaluations that were not measured


@dataclass(frozen=True)
class Plan:
    """`error`: the standard error of the simulated wall time, in seconds."""

    job: Job
    cluster: Cluster
    step: Step
    timeline: Timeline
    expected: Outcome
    simulated: Outcome
    error: float

    @property
    def goodput(self) -> float:
        """0..1, without waiting for data, as train/telemetry/goodput.py has it."""
        return self.expected.goodput * (1 - self.step.data_wait / self.step.seconds)

    @property
    def gpu_hours(self) -> float:
        return self.expected.running * self.cluster.world / 3600

    @property
    def price(self) -> float | None:
        return None if self.cluster.price is None else self.gpu_hours * self.cluster.price


def timeline(job: Job, cluster: Cluster, every: int, of_step: Step) -> Timeline:
    hours = 3600.0
    evaluation = cluster.evaluation
    if evaluation is None:
        evaluation = job.evaluated_weights * job.validation_images * FORWARD / cluster.images_per_second / cluster.world
    return Timeline(
        steps=job.steps,
        step=of_step.seconds,
        every=every,
        evaluate_every=job.evaluate_every * job.steps_per_epoch,
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


def make_plan(job: Job, cluster: Cluster, runs: int, seed: int, *, best: bool = False) -> Plan:
    """With the job's own checkpoint interval, or with the best. `runs`: how many are simulated for the mean."""
    of_step = step(job, cluster, job.zero_stage)
    of_run = timeline(job, cluster, job.every, of_step)
    if best:
        of_run = replace(of_run, every=best_every(of_run))
    simulated, error = simulate_mean(of_run, seed, runs)
    return Plan(job, cluster, of_step, of_run, expected(of_run), simulated, error)


def intervals(plan: Plan) -> dict[str, float]:
    """Seconds of work between checkpoints: Young's, Daly's, and the best that is possible (no save before the last is written)."""
    mtbf = 1 / plan.timeline.failure_rate
    return {"young": young(plan.timeline.stall, mtbf), "daly": daly(plan.timeline.stall, mtbf), "mtbf": mtbf}


def scale(job: Job, cluster: Cluster, runs: int, seed: int, most: int = 10_000) -> list[Plan]:
    """The same job on 1 to `most` GPUs, each with the best checkpoint interval, and a larger global batch where its own is too small."""
    plans, world = [], 1
    while world <= most:
        within = min(world, cluster.gpus_per_node)
        size = replace(cluster, nodes=-(-world // within), gpus_per_node=within)
        if cluster.evaluation is not None:
            size = replace(size, evaluation=cluster.evaluation * cluster.world / size.world)
        of_size = job.fitted(size.world)
        if of_size.steps_per_epoch:
            plans.append(make_plan(of_size, size, runs, seed, best=True))
        world = most if world < most < 2 * world else 2 * world
    return plans
