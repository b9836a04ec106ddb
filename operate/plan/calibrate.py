"""What a run's folder measured, in place of guesses; and what became of a run, beside what was predicted for it."""

from dataclasses import dataclass, replace
from pathlib import Path

from data_pipeline.manifest import DataError
from operate.plan.cluster import Cluster
from operate.plan.job import Job
from operate.plan.step import step
from operate.run_folder import last_beat
from train.config import Config, ConfigError, load_config
from train.telemetry.goodput import ENDS, Ledger, read_lines


@dataclass(frozen=True)
class Measured:
    """A run as its folder tells of it: counts, and seconds by category of train/telemetry/goodput.py."""

    run: str
    config: Config
    world: int
    steps: int  # those that count
    seconds: dict[str, float]
    starts: int
    stops: int  # starts that were asked to stop
    failures: tuple[float, ...]  # when it failed, in seconds from its first start
    checkpoints: int
    writing: float  # mean seconds of a checkpoint
    evaluations: int

    @property
    def wall(self) -> float:
        return sum(self.seconds.values())


def read_run(run: str) -> Measured:
    """Raises ConfigError or DataError where the folder tells too little."""
    folder = Path(run)
    if not folder.is_dir():
        raise ConfigError(f"{run} is not a run's folder")
    ledger, saves, evaluations = Ledger(), [], 0
    try:
        for line in read_lines(folder / "metrics.jsonl"):
            ledger.add(line)
            if line.get("event") == "checkpoint":
                saves.append(line["seconds"])
            evaluations += line["kind"] == "eval" and line["weights"] == "model"
    except OSError as error:
        raise DataError(
            f"{folder / 'metrics.jsonl'} cannot be read ({error.strerror}): give the folder of a run that has started"
        ) from error
    if not ledger.starts or not any(start.later_steps for start in ledger.starts):
        raise DataError(f"{run} has too few train lines to know the time of a step: let it run longer, or give a smaller train.log_every")
    starts = ledger.starts
    return Measured(
        run=run,
        config=load_config(folder / "config.yaml"),
        world=starts[-1].world_size,
        steps=starts[-1].last_step,
        seconds=ledger.split(last_beat(folder)),
        starts=len(starts),
        stops=sum(start.end == "preempted" for start in starts[:-1]),
        failures=tuple(start.ended - starts[0].began for start in starts[:-1] if start.end not in ENDS),
        checkpoints=len(saves),
        writing=sum(saves) / len(saves) if saves else 0.0,
        evaluations=evaluations,
    )


def calibrate(cluster: Cluster, job: Job, config: Config, measured: Measured) -> Cluster:
    """`cluster` with what the run measured in place of guesses. Means and not medians, because it is sums that are predicted.

    The rate of a GPU alone is the run's step less the communication that the model has for that run's own ranks: on as many ranks as that
    run had, the plan's step takes what it took. What slow nodes cost is in that, too, so the plan has no other stragglers. Raises
    ConfigError where run and plan do not go together.
    """
    of, seconds, origin = measured.config, measured.seconds, f"measured: {measured.run}"
    for key, there, here in (
        ("model", of.model, config.model),
        ("data.image_size", of.data.image_size, config.data.image_size),
        ("train.precision", of.train.precision, config.train.precision),
    ):
        if there != here:
            raise ConfigError(f"{measured.run} cannot calibrate this plan, its {key} is another one: {there} there, {here} here")
    run_cluster = replace(
        cluster, nodes=-(-measured.world // cluster.gpus_per_node), gpus_per_node=min(measured.world, cluster.gpus_per_node)
    )
    run_job = replace(
        job, global_batch=of.train.global_batch, micro_batch=job.micro_batch if of.train.micro_batch == "auto" else of.train.micro_batch
    )
    busy = (seconds["productive"] + seconds["other"]) / measured.steps
    values = {
        "images_per_second": rate_alone(run_job, run_cluster, of.zero.stage, busy),
        "data_wait": 100 * seconds["data_wait"] / (busy * measured.steps + seconds["data_wait"]),
        "startup": (seconds["startup"] + seconds["compilation"]) / measured.starts,
        "straggler_factor": 1.0,
    }
    if measured.checkpoints:
        values["checkpoint_stall"] = seconds["checkpoint_stall"] / measured.checkpoints
        values["checkpoint_write"] = measured.writing
    if measured.evaluations:
        values["evaluation"] = seconds["evaluation"] / measured.evaluations * measured.world / cluster.world
    if measured.starts > 1:
        values["requeue"] = seconds["waiting"] / (measured.starts - 1)
    if measured.failures:
        running = measured.wall - seconds["waiting"]
        values["node_mtbf"] = running * run_cluster.nodes / len(measured.failures) / 3600
    return cluster.with_values(values, origin)


def rate_alone(job: Job, cluster: Cluster, stage: int, busy: float) -> float:
    """Images per second of a GPU alone, with which the model's step without waiting for data takes `busy` seconds; by bisection."""
    images = job.global_batch / cluster.world

    def seconds(compute: float) -> float:
        of_step = step(job, replace(cluster, images_per_second=images / compute, cores_per_gpu=None, data_wait=0.0), stage)
        return of_step.compute + of_step.exposed

    low, high = busy / 1000, busy
    if seconds(low) > busy:
        raise ConfigError(
            f"the run's steps took {1000 * busy:.3g} ms, less than the {1000 * seconds(low):.3g} ms that their communication is assumed to "
            "take: give --link-within, --link-between, --latency-within or --latency-between as they are"
        )
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if seconds(middle) < busy else (low, middle)
    return images / high
