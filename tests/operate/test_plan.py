"""The planner's arithmetic, against published figures, by hand, and closed form against simulation."""

import json
from dataclasses import asdict, astuple, replace
from math import exp
from pathlib import Path

import numpy as np
import pytest

from operate.plan.calibrate import calibrate, read_run
from operate.plan.closed_form import best_every, daly, expected, per_step, slowdown, young
from operate.plan.cluster import Cluster
from operate.plan.plan import make_plan, scale
from operate.plan.simulate import simulate, simulate_mean
from operate.plan.step_time import STAGES, all_gather, all_reduce, step_time
from operate.plan.text import beside, three_digits
from operate.plan.timeline import Timeline
from operate.plan.workload import Workload, count_workload, memory_by_stage
from operate.task_model import task_of
from train.config import load_config
from train.engine.deepspeed_config import BUCKET_ELEMENTS

CLUSTER = Cluster(
    2, 4, images_per_second=100, decode_rate=50, link_within=100, link_between=10, latency_within=0, latency_between=0
)
WORKLOAD = Workload(
    parameters=1_000_000,
    element_bytes=2,
    images=100_000,
    validation_images=1000,
    global_batch=512,
    micro_batch=16,
    epochs=10,
    max_steps=None,
    zero_stage=1,
    checkpoint_every=None,
    evaluate_every=1,
    evaluated_weights=2,
)
# Three days of steps on a cluster on which something fails every few hours.
DAYS = Timeline(
    steps=200_000,
    step=1.0,
    every=600,
    evaluate_every=1251,
    evaluation=30,
    startup=120,
    stall=5,
    write=60,
    failure_rate=1 / 20_000,
    requeue=300,
    straggler_rate=1 / 5000,
    straggler_lasts=600,
    straggler_factor=1.5,
)


@pytest.mark.parametrize("mtbf, minutes", [(24 * 60, 117), (6 * 60, 57), (15, 9.1)])
def test_the_intervals_of_dalys_paper(mtbf, minutes):
    """Daly 2006, figures 3 to 5: a checkpoint takes 5 minutes."""
    assert daly(5, mtbf) == pytest.approx(minutes, rel=0.01)


def test_young_is_the_limit_of_daly_and_daly_ends_at_the_mtbf():
    assert young(1, 1e6) == pytest.approx(daly(1, 1e6), rel=2e-3)
    assert daly(20, 10) == 10


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"failure_rate": 0},
        {"failure_rate": 1 / 3000},
        {"failure_rate": 1 / 1000, "every": 100, "write": 10, "steps": 50_000},
        {"requeue": 3600, "startup": 600},
        {"straggler_rate": 1 / 300},
        {"every": 25, "straggler_rate": 0, "steps": 50_000},  # every save waits for the one before it
        {"steps": 700, "failure_rate": 1 / 3000, "straggler_rate": 0},  # two segments, of 600 and of 100 steps
    ],
    ids=lambda changes: ", ".join(changes) or "as it is",
)
def test_closed_form_and_simulation_agree_within_2_percent(changes):
    timeline = replace(DAYS, **changes)
    mean, error = simulate_mean(timeline, seed=1, runs=100 if timeline.steps > 1000 else 5000)
    closed = expected(timeline)
    assert error < 0.008 * mean.wall  # or the comparison would say little
    assert closed.wall == pytest.approx(mean.wall, rel=0.02)
    assert closed.failures == pytest.approx(mean.failures, rel=0.05, abs=0.1)
    for name, seconds in list(asdict(mean).items())[:-1]:
        assert getattr(closed, name) == pytest.approx(seconds, rel=0.06, abs=0.003 * mean.wall), name
    assert sum(astuple(closed)[:-1]) == pytest.approx(closed.wall) and min(astuple(closed)) >= 0


@pytest.mark.parametrize(
    "changes", [{"stall": 60}, {"stall": 20, "failure_rate": 1 / 2000}, {"stall": 300, "failure_rate": 1 / 5000}]
)
def test_the_best_interval_beats_its_half_and_its_double_in_simulation(changes):
    timeline = replace(DAYS, write=0, straggler_rate=0, evaluate_every=0, **changes)
    best = best_every(timeline)
    half, at_best, double = (
        simulate_mean(replace(timeline, every=every), 1, 100)[0].wall for every in (best // 2, best, 2 * best)
    )
    assert at_best < half and at_best < double


def test_no_checkpoint_is_planned_while_the_last_is_being_written():
    slowly_written = replace(DAYS, stall=0.01, write=900, evaluate_every=0)
    assert best_every(slowly_written) * per_step(slowly_written) == pytest.approx(900, abs=1)


@pytest.mark.parametrize(
    ("stall", "evaluate_every", "best"), [(20, 1251, 1251), (40, 1251, 1251), (10, 700, 700), (5, 1251, 417)]
)
def test_checkpoints_divide_the_interval_of_evaluations(stall, evaluate_every, best):
    """Daly's intervals would be 861, 1,209, 600 and 433 steps."""
    timeline = replace(DAYS, write=0, straggler_rate=0, stall=stall, evaluate_every=evaluate_every)
    assert best_every(timeline) == best
    half, at_best, double = (
        simulate_mean(replace(timeline, every=every), 1, 100)[0].wall for every in (best // 2, best, 2 * best)
    )
    assert at_best < half and at_best <= double


def test_the_best_interval_is_at_most_that_of_evaluations():
    """Daly's would be 1,500 steps; evaluations save after 1,251 anyway, and what is saved between them only costs."""
    timeline = replace(DAYS, write=0, straggler_rate=0, stall=60)
    assert best_every(timeline) == best_every(replace(timeline, failure_rate=0)) == timeline.evaluate_every
    at_best, longer = (simulate_mean(replace(timeline, every=every), 1, 100)[0].wall for every in (1251, 1500))
    assert at_best < longer


def test_a_run_by_hand():
    """10 s to start, 1 s a step, every 20 steps a checkpoint that stalls for 2 s and is whole 5 s after its begin."""
    timeline = Timeline(steps=50, step=1, every=20, startup=10, stall=2, write=5, requeue=7)
    whole = simulate(timeline, 0)
    assert whole.wall == 10 + 50 + 3 * 2 + 3  # the last one is waited for
    # At 34 s: step 20's checkpoint, begun at 30 s, is not whole; at 36 s it is, and steps 21 to 24 are lost.
    early, late = simulate(timeline, 0, [34]), simulate(timeline, 0, [36])
    assert (early.wall, early.lost) == (34 + 7 + 69, 22) and (late.wall, late.lost) == (36 + 7 + 69 - 22, 4)
    # The second failure would strike while the job waits, the third strikes in its start-up.
    thrice = simulate(timeline, 0, [36, 40, 45])
    assert (thrice.failures, thrice.startup, thrice.waiting) == (2, 10 + 2 + 10, 14)


def test_an_evaluation_is_saved_by_hand():
    """A better evaluation's step is saved between the regular ones, after the evaluation."""
    timeline = Timeline(steps=50, step=1, every=20, evaluate_every=25, evaluation=3, startup=10, stall=2, write=5)
    assert timeline.saves() == [20, 25, 40, 50]
    assert simulate(timeline, 0).wall == 10 + 50 + 2 * 3 + 4 * 2 + 3
    slower = replace(timeline, step=3)
    found = simulate(slower, 0)
    assert (found.productive, found.evaluation, found.lost) == (50 * 3, 2 * 3, 0)
    assert astuple(expected(slower)) == pytest.approx(astuple(found))
    # Step 25's checkpoint, begun at 40 s, is whole at 45 s.
    assert simulate(timeline, 0, [44]).lost == 7 and simulate(timeline, 0, [46]).lost == 4


def test_a_run_of_a_year_ends():
    """The clock's resolution becomes coarser than the rest of a step."""
    assert simulate(replace(DAYS, step=91.3, evaluate_every=7), 0).wall > 200_000 * 91.3


def test_the_same_seed_is_the_same_run():
    assert simulate(DAYS, 3) == simulate(DAYS, 3) != simulate(DAYS, 4)


def test_four_times_the_runs_halve_the_error_of_their_mean():
    timeline = replace(DAYS, steps=2000)
    few, many = (simulate_mean(timeline, 1, runs)[1] for runs in (100, 400))
    assert few / many == pytest.approx(2, rel=0.2) and simulate_mean(timeline, 1, 1)[1] == float("inf")


def test_stragglers_by_hand():
    timeline = replace(DAYS, straggler_rate=1 / 600)  # one slow episode at a time, on average
    assert slowdown(timeline) == pytest.approx(1 / (exp(-1) + (1 - exp(-1)) / 1.5))


def test_collectives_by_hand():
    """8 MB round 8 GPUs, 10 GB/s between two nodes: seven eighths pass every link, and twice for an all-reduce."""
    assert all_gather(8e6, CLUSTER) == pytest.approx(0.7e-3)
    assert all_reduce(8e6, CLUSTER) == pytest.approx(1.4e-3)
    assert all_gather(8e6, replace(CLUSTER, nodes=1, gpus_per_node=8)) == pytest.approx(0.07e-3)
    slow = replace(CLUSTER, latency_within=1, latency_between=10)
    assert all_gather(0, slow) == pytest.approx((2 * 3 * 1 + 2 * 10) * 1e-6)
    assert all_reduce(0, replace(slow, nodes=1000)) < all_gather(0, replace(slow, nodes=1000))  # by a tree


def test_bytes_and_time_of_the_zero_stages():
    """Seven eighths of 1 M parameters are sent: gradients of 4 bytes, twice at stage 0; weights of 2 bytes."""
    steps = {stage: step_time(WORKLOAD, CLUSTER, stage) for stage in STAGES}
    assert [steps[stage].sent / 1.75e6 for stage in STAGES] == pytest.approx([2 * 2, 2 + 1, 4 * 2 + 1, 4 * (2 + 2)])
    assert all(one.compute == pytest.approx(64 / 100) for one in steps.values())
    assert steps[0].exposed == steps[0].communication == pytest.approx(0.7e-3)
    assert steps[1].exposed == steps[1].communication == pytest.approx(0.525e-3)
    one_node = step_time(WORKLOAD, replace(CLUSTER, nodes=1), 1)
    assert one_node.exposed == one_node.communication
    assert steps[3].exposed == 0
    assert step_time(WORKLOAD, replace(CLUSTER, nodes=1, gpus_per_node=1), 0).communication == 0


def test_too_few_cores_make_the_gpu_wait():
    """100 images/s need two cores of 50 images/s each."""
    assert step_time(WORKLOAD, replace(CLUSTER, cores_per_gpu=2), 0).data_wait == 0
    assert step_time(WORKLOAD, replace(CLUSTER, cores_per_gpu=1), 0).seconds == pytest.approx(2 * 64 / 100)


def test_from_1_to_10_000_gpus():
    plans = scale(replace(WORKLOAD, images=10_000_000), replace(CLUSTER, gpus_per_node=8), runs=2, seed=0)
    assert [plan.cluster.world for plan in plans] == [2**power for power in range(14)] + [10_000]
    assert plans[-1].cluster.nodes == 1250 and plans[-1].timeline.failure_rate == pytest.approx(
        1250 * plans[0].timeline.failure_rate
    )
    assert {plan.workload.global_batch for plan in plans[:6]} == {512} and plans[6].workload.global_batch == 1024


def test_a_timeline_by_hand():
    """Two nodes, each of which fails every 100 hours and has a slow episode every 50; 195 steps of 512 in an epoch."""
    cluster = replace(CLUSTER, node_mtbf=100, requeue=12, straggler_every=50, straggler_lasts=40, straggler_factor=1.25)
    cluster = replace(cluster, startup=11, checkpoint_stall=1.5, checkpoint_write=13, evaluation=30)
    workload = replace(WORKLOAD, checkpoint_every=70)
    plan = make_plan(workload, cluster, 2, 0)
    times = dict(steps=1950, every=70, evaluate_every=195, evaluation=30, startup=11, stall=1.5, write=13, requeue=12)
    slow = dict(straggler_rate=2 / 180_000, straggler_lasts=40, straggler_factor=1.25)
    assert plan.timeline == Timeline(step=plan.step.seconds, failure_rate=2 / 360_000, **times, **slow)
    assert (plan.simulated, plan.error) == simulate_mean(plan.timeline, 0, 2) and plan.expected == expected(
        plan.timeline
    )
    best = make_plan(workload, cluster, 2, 0, best=True).timeline.every
    assert best == best_every(plan.timeline) != 70
    unknown = [make_plan(workload, replace(cluster, evaluation=None, nodes=nodes), 2, 0) for nodes in (2, 4)]
    forward = 2 * 1000 / (8 * 100)  # seconds of training on the images that are evaluated, for both kinds of weights
    assert forward / 4 < unknown[0].timeline.evaluation == 2 * unknown[1].timeline.evaluation < forward / 2


def test_memory_falls_with_the_zero_stage_and_activations_grow_with_the_micro_batch(tiny_config):
    sizes = memory_by_stage(task_of(load_config(tiny_config)), 4)
    totals = [sum(sizes[stage].values()) for stage in STAGES]
    assert sizes[3]["weights"] == sizes[0]["weights"] / 4 and sizes[3]["gradients"] == sizes[1]["gradients"] / 4
    buckets = 4 * BUCKET_ELEMENTS  # of DeepSpeed's communication, which only ZeRO 3 uses; more than this model
    assert totals[2] < totals[1] and totals[3] - buckets < totals[2]
    double = memory_by_stage(task_of(load_config(tiny_config, ["train.micro_batch=16"])), 4)
    assert double[0]["activations"] == pytest.approx(2 * sizes[0]["activations"], rel=0.05)


# --- calibration ---


def event(at, name, step, **fields):
    return {"kind": "event", "event": name, "step": step, **fields, "time": at}


def steps(at, step, step_ms):
    return {"kind": "train", "step": step, "step_ms": step_ms, "data_wait": 0.2, "time": at}


# 1 s a step, of which 0.2 s are waiting for data; killed 4 s after its last train line, and started again 6 s later.
KILLED_ONCE = [
    event(1009, "start", 0, startup_seconds=9.0, world_size=8, lost_steps=0),
    steps(1010, 1, 1000),
    steps(1019, 10, 1000),
    event(1020, "checkpoint", 10, seconds=2.0, stall_seconds=1.0),
    steps(1030, 20, 1000),
    event(1049, "resume", 10, startup_seconds=9.0, world_size=8, lost_steps=10, down_seconds=6.0),
    steps(1050, 11, 1000),
    steps(1059, 20, 1000),
    {"kind": "eval", "step": 20, "weights": "model", "seconds": 1.5, "time": 1061},
    {"kind": "eval", "step": 20, "weights": "ema", "seconds": 1.5, "time": 1062},
    event(1063, "checkpoint", 20, seconds=3.0, stall_seconds=1.0),
    event(1063, "finished", 20),
]


@pytest.fixture
def killed_once(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in KILLED_ONCE))
    (tmp_path / "config.yaml").write_text(
        "{model: {name: cat_nano}, data: {path: nowhere, image_size: 32}, "
        "train: {global_batch: 512, micro_batch: 16, precision: fp32}}"
    )
    return str(tmp_path)


def test_what_a_run_measured_replaces_the_guesses(killed_once):
    measured = read_run(killed_once)
    assert measured.failures == (34.0,) and measured.steps == 20
    cluster = calibrate(replace(CLUSTER, node_mtbf=1.0), WORKLOAD, measured.config, measured)
    assert cluster.startup == pytest.approx(9) and cluster.requeue == pytest.approx(6)
    assert cluster.checkpoint_stall == pytest.approx(1) and cluster.checkpoint_write == pytest.approx(2.5)
    assert cluster.evaluation == pytest.approx(3)
    assert cluster.node_mtbf == pytest.approx(2 * (34 + 23) / 3600)  # two nodes, one failure in so many seconds
    assert step_time(WORKLOAD, cluster, 1).seconds == pytest.approx(1.0)  # the run's, communication included
    assert (
        cluster.origin("startup") == f"measured: {killed_once}"
        and cluster.origin("link_between") == "GUESSED (200 Gb/s a node)"
    )


def beside_reality(run):
    """The table of a plan that waits a tenth of a step, and takes 60 s: by row, its last cell."""
    measured = read_run(run)
    outcome = expected(Timeline(20, 3.0, 20, 20, 0, 0, 0, 0, 1e-9, 0, 1e-9, 1, 1))
    text = beside(measured, outcome, outcome, 0.1)
    assert max(map(len, text.splitlines())) <= 80
    return text, {line[:20].strip(): line.split()[-2] for line in text.splitlines() if line.endswith((" s", " %"))}


def test_starts_after_a_stop_are_not_predicted_and_not_compared(killed_once, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    killed, rows = beside_reality(killed_once)
    assert (rows["waiting"], rows["startup"], rows["wall time"], rows["off by"]) == ("6.0", "18.0", "63.0", "-4.8")
    path = Path(killed_once) / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines.insert(5, json.dumps(event(1034, "preempted", 20)))
    path.write_text("\n".join(lines) + "\n")
    stopped, rows = beside_reality(killed_once)
    assert (rows["waiting"], rows["startup"], rows["wall time"], rows["off by"]) == ("0.0", "9.0", "48.0", "+25.0")
    assert "1 start was asked to stop, which is no failure: the 15 s of waiting" in " ".join(stopped.split())
    assert "asked to stop" not in killed


def test_steps_of_the_run_that_it_began_from_are_not_its_own(killed_once):
    path = Path(killed_once) / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**line, "step": line["step"] + 100}) + "\n" for line in lines))
    assert read_run(killed_once).steps == 20


def test_on_more_gpus_a_calibrated_step_has_more_communication(killed_once):
    measured = read_run(killed_once)
    more = replace(WORKLOAD, global_batch=1024)
    cluster = calibrate(replace(CLUSTER, nodes=4), more, measured.config, measured)
    there = step_time(WORKLOAD, replace(cluster, nodes=2), 1)
    here = step_time(more, cluster, 1)
    assert there.seconds == pytest.approx(1.0) and here.compute == there.compute and here.seconds > there.seconds


def test_another_model_cannot_calibrate(killed_once):
    measured = read_run(killed_once)
    config = measured.config.model_copy(update={"data": measured.config.data.model_copy(update={"image_size": 64})})
    with pytest.raises(Exception, match="its data.image_size is another one: 32 there, 64 here"):
        calibrate(CLUSTER, WORKLOAD, config, measured)


def test_a_workloads_counts(tiny_config):
    config = load_config(tiny_config)
    workload = count_workload(task_of(config), 260, 101)
    assert (workload.steps_per_epoch, workload.steps, workload.accumulation(2)) == (8, 16, 2)
    assert workload.checkpoint_interval == workload.evaluation_interval == 8
    assert workload.element_bytes == 4 and workload.parameters > 10_000
    assert replace(workload, max_steps=5).steps == 5


def test_steps_of_an_epoch_are_those_of_the_task_s_order(tiny_config, tiny_dataset, monkeypatch):
    """A task may make micro-batches of groups of images, each with a rest of its own."""
    from data_pipeline.grouped_order import GroupedOrder
    from data_pipeline.manifest import open_manifest
    from train.checks import checked_order
    from train.config import ConfigError

    config, manifest = (
        load_config(tiny_config, ["train.global_batch=40", "train.micro_batch=10"]),
        open_manifest(tiny_dataset),
    )
    assert (
        checked_order(config, manifest).groups == (260,) and config.order(manifest.split("train")).steps_per_epoch == 6
    )

    def order(config, split, *sizes):
        return GroupedOrder(sizes[0], split.samples, *sizes[1:], portrait=np.arange(split.samples) < 109)

    monkeypatch.setattr("train.tasks.classification.order", order, raising=False)
    groups, grouped = checked_order(config, manifest).groups, config.order(manifest.split("train"))
    workload = count_workload(task_of(config), 260, 101, groups)
    assert groups == (151, 109) and workload.steps_per_epoch == grouped.steps_per_epoch == 6
    other = replace(workload, micro_batch=40, global_batch=40)
    assert other.steps_per_epoch == config.order(manifest.split("train"), micro_batch=40).steps_per_epoch == 5
    config = load_config(tiny_config, ["train.global_batch=260", "train.micro_batch=20"])
    with pytest.raises(ConfigError, match="151 landscape and 109 portrait images fill 12 micro-batches of 20"):
        checked_order(config, manifest)


def test_a_run_that_is_counted_in_steps(tiny_config):
    keys = ["train.epochs=null", "train.steps=20", "train.evaluate_every_steps=3", "checkpoint.every_steps=7"]
    workload = count_workload(task_of(load_config(tiny_config, [*keys, "schedule.warmup_steps=2"])), 260, 101)
    assert (workload.steps, workload.evaluation_interval, workload.checkpoint_interval) == (20, 3, 7)
    assert workload.fitted(64).steps == 20  # whatever the global batch


def test_times_have_three_digits_of_the_unit_that_fits():
    seconds = (0, 0.000_12, 0.0642, 0.9994, 0.9996, 1.18, 89, 90, 11_556)
    assert [three_digits(each) for each in seconds] == [
        *("0 s", "0.12 ms", "64.2 ms", "999 ms", "1 s", "1.18 s", "89 s", "1.5 min", "3.21 h"),
    ]
