"""Take a plan's assumptions from the folder of a run that measured them."""

from dataclasses import dataclass, replace
from pathlib import Path

from data_pipeline.split import DataError
from operate.plan.cluster import Cluster
from operate.plan.step_time import step_time
from operate.plan.workload import Workload
from operate.run_folder import last_beat
from train.config import Config, ConfigError, load_config
from train.telemetry.goodput import ENDS, Ledger, read_lines


@dataclass(frozen=True)
class Measured:
    """What a run's folder records: counts, and seconds by category of train/telemetry/goodput.py."""

    run: str
    config: Config
    world: int
    steps: int  # repeated ones counted once
    seconds: dict[str, float]
    starts: int
    stops: int  # starts that were asked to stop and followed by another one
    after_stops: tuple[float, float]  # see Ledger
    failures: tuple[float, ...]  # moments, in seconds from its first start
    checkpoints: int
    writing: float  # mean seconds of a checkpoint
    evaluations: int

    @property
    def wall(self) -> float:
        return sum(self.seconds.values())


def read_run(run: str) -> Measured:
    """Read a run's folder. Raises ConfigError or DataError if it records too little."""
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
        raise DataError(
            f"{run} has too few train lines to know the time of a step: let it run longer, or give a smaller "
            "train.log_every"
        )
    starts = ledger.starts
    return Measured(
        run=run,
        config=load_config(folder / "config.yaml"),
        world=starts[-1].world_size,
        steps=starts[-1].last_step - starts[0].step,  # the first start may have begun at another run's checkpoint
        seconds=ledger.split(last_beat(folder)),
        starts=len(starts),
        stops=sum(start.end == "preempted" for start in starts[:-1]),
        after_stops=ledger.after_stops(),
        failures=tuple(start.ended - starts[0].began for start in starts[:-1] if start.end not in ENDS),
        checkpoints=len(saves),
        writing=sum(saves) / len(saves) if saves else 0.0,
        evaluations=evaluations,
    )


def calibrate(cluster: Cluster, workload: Workload, config: Config, measured: Measured) -> Cluster:
    """Replace the cluster's guesses by what the run measured. Means, not medians, because sums are predicted.

    The rate of a GPU alone is computed from the run's step without the communication that the model predicts for the
    run's own ranks: on as many ranks, a planned step takes what the run's took. That includes the cost of slow nodes,
    so the plan has no other stragglers. Raises ConfigError if the run does not match the plan.
    """
    run_config, seconds, origin = measured.config, measured.seconds, f"measured: {measured.run}"
    for key, there, here in (
        ("task", run_config.task, config.task),
        ("model", run_config.model, config.model),
        ("data.image_size", run_config.data.image_size, config.data.image_size),
        ("train.precision", run_config.train.precision, config.train.precision),
    ):
        if there != here:
            raise ConfigError(
                f"{measured.run} cannot calibrate this plan, its {key} is another one: {there} there, {here} here"
            )
    run_cluster = replace(
        cluster,
        nodes=-(-measured.world // cluster.gpus_per_node),
        gpus_per_node=min(measured.world, cluster.gpus_per_node),
    )
    sizes = run_config.train
    micro_batch = workload.micro_batch if sizes.micro_batch == "auto" else sizes.micro_batch
    run_workload = replace(workload, global_batch=sizes.global_batch, micro_batch=micro_batch)
    busy = (seconds["productive"] + seconds["other"]) / measured.steps
    values = {
        "images_per_second": rate_alone(run_workload, run_cluster, run_config.zero.stage, busy),
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


def rate_alone(workload: Workload, cluster: Cluster, stage: int, busy: float) -> float:
    """Images per second of a GPU alone for which a planned step, without waiting for data, takes `busy` seconds."""
    images = workload.global_batch / cluster.world

    def seconds(compute: float) -> float:
        alone = replace(cluster, images_per_second=images / compute, cores_per_gpu=None, data_wait=0.0)
        step = step_time(workload, alone, stage)
        return step.compute + step.exposed

    low, high = busy / 1000, busy
    if seconds(low) > busy:
        raise ConfigError(
            f"the run's steps took {1000 * busy:.3g} ms, less than the {1000 * seconds(low):.3g} ms that their "
            "communication is assumed to take: give --link-within, --link-between, --latency-within or "
            "--latency-between as they are"
        )
    for _ in range(50):  # bisection
        middle = (low + high) / 2
        low, high = (middle, high) if seconds(middle) < busy else (low, middle)
    return images / high
