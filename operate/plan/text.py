"""A plan as a page of text."""

from operate.plan.calibrate import Measured
from operate.plan.cluster import NUMBERS, Cluster
from operate.plan.plan import Plan, intervals
from operate.plan.step import STAGES, step
from operate.plan.timeline import ASSUMPTIONS, Outcome

CATEGORIES = ("productive", "stragglers", "startup", "checkpoint_stall", "evaluation", "lost", "waiting")


def duration(seconds: float) -> str:
    """Such as "3.2 h": two or three digits, in the unit that suits."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.3g} {unit}"
    if not seconds:
        return "0 s"
    return f"{1000 * seconds:.3g} ms"


def headline(plan: Plan) -> dict[str, str]:
    """What one wants to know first; also what plans are compared by."""
    job, cluster, timeline, expected = plan.job, plan.cluster, plan.timeline, plan.expected
    rows = {
        "GPUs": f"{cluster.world:,} ({cluster.nodes} x {cluster.gpus_per_node})",
        "global batch": f"{job.global_batch:,}",
        "ZeRO stage": str(job.zero_stage),
        "step": duration(plan.step.seconds),
        "images per second": f"{job.global_batch / plan.step.seconds:,.0f}",
        "cores per GPU to decode": f"{cluster.images_per_second / cluster.decode_rate:.2g}",
        "MTBF of the job": duration(1 / timeline.failure_rate),
        "checkpoint every": f"{timeline.every:,} steps, {duration(timeline.every * timeline.step)}",
        "failures expected": f"{expected.failures:,.3g}",
        "goodput expected": f"{100 * plan.goodput:.1f} %",
        "time, closed form": duration(expected.wall),
        "time, simulated": f"{duration(plan.simulated.wall)} ± {duration(plan.error)}",
        "GPU-hours": f"{plan.gpu_hours:,.0f}",
    }
    return rows | ({} if plan.price is None else {"price": f"{plan.price:,.0f}"})


def assumptions(cluster: Cluster, evaluation: float) -> str:
    """Every number with its unit and where it came from. `evaluation`: seconds, where nobody said how many."""
    if cluster.evaluation is None:
        cluster = cluster.with_values({"evaluation": evaluation}, "GUESSED (a forward pass is a third of a step)")
    lines = ["assumed" + " " * 25 + "value  unit            where from"]
    for name, entry in NUMBERS.items():
        value = getattr(cluster, name)
        if value is not None:
            lines.append(f"{name.replace('_', ' '):<24}{value:>13,.6g}  {entry.metadata['unit']:<16}{cluster.origin(name)}")
    return "\n".join(lines)


def step_table(plan: Plan, memory: dict[int, dict[str, int]]) -> str:
    """Step and memory at every ZeRO stage; the one of the config is marked."""
    heads = "".join(f"{name:>13}" for name in ("collectives", "not hidden", "data wait", "step"))
    lines = [f"ZeRO{'sent/rank':>14}{heads}{'memory/rank':>15}   = {' + '.join(memory[plan.job.zero_stage])}"]
    for stage in STAGES:
        one = step(plan.job, plan.cluster, stage)
        parts = memory[stage]
        times = "".join(f"{duration(value):>13}" for value in (one.communication, one.exposed, one.data_wait, one.seconds))
        sizes = " + ".join(f"{value / 1e9:.2f}" for value in parts.values())
        mark = "*" if stage == plan.job.zero_stage else " "
        lines.append(f"{stage} {mark}{one.sent / 1e6:>12,.1f} MB{times}{sum(parts.values()) / 1e9:>12.2f} GB   = {sizes}")
    return "\n".join(lines)


def choice(own: Plan, best: Plan) -> str:
    """The config's checkpoint interval beside the best one."""
    found = intervals(own)
    rows = [headline(own), headline(best)]
    names = ("checkpoint every", "failures expected", "goodput expected", "time, closed form", "time, simulated", "GPU-hours", "price")
    lines = [f"{'':<24}{'as configured':>28}{'best interval':>28}"]
    lines += [f"{name:<24}" + "".join(f"{row[name]:>28}" for row in rows) for name in names if name in rows[0]]
    differences = "".join(f"{100 * (plan.expected.wall / plan.simulated.wall - 1):>+26.1f} %" for plan in (own, best))
    lines += [f"{'closed form - simulated':<24}{differences}"]
    lines += [
        f"Young {duration(found['young'])}, Daly {duration(found['daly'])} of work between checkpoints; a checkpoint is whole after "
        f"{duration(own.timeline.write)}, and the next cannot begin before"
    ]
    return "\n".join(lines)


def split(outcome: Outcome) -> str:
    shares = (f"{name.replace('_', ' ')} {100 * getattr(outcome, name) / outcome.wall:.1f} %" for name in CATEGORIES)
    return "where the time goes: " + ", ".join(shares)


def scale_table(plans: list[Plan], own: int) -> str:
    """One line a number of GPUs. `own`: the config's global batch."""
    lines = []
    for plan in plans:
        rows = headline(plan)
        cells = {
            "GPUs": f"{plan.cluster.world:,}",
            "global batch": rows["global batch"] + ("*" if plan.job.global_batch != own else " "),
            "step": rows["step"],
            "job's MTBF": rows["MTBF of the job"],
            "interval": duration(plan.timeline.every * plan.timeline.step),
            "goodput": rows["goodput expected"],
            "closed form": rows["time, closed form"],
            "simulated": duration(plan.simulated.wall),
            "GPU-hours": rows["GPU-hours"],
        }
        cells |= {"price": rows["price"]} if "price" in rows else {}
        if not lines:
            lines.append("".join(f"{name:>{max(11, len(name) + 2)}}" for name in cells))
        lines.append("".join(f"{cell:>{max(11, len(name) + 2)}}" for name, cell in cells.items()))
    if any(plan.job.global_batch != own for plan in plans):
        lines.append("* so many GPUs cannot share the config's global batch: a larger one, which is another recipe and may learn otherwise")
    return "\n".join(lines)


def beside(measured: Measured, closed: Outcome, replayed: Outcome, wait: float) -> str:
    """Prediction and reality of one run. `wait`: the share of a step that the plan has for waiting for data."""
    real = measured.seconds
    rows = [
        ("steps", [*(outcome.productive * (1 - wait) for outcome in (closed, replayed)), real["productive"] + real["other"]]),
        ("data wait", [*(outcome.productive * wait for outcome in (closed, replayed)), real["data_wait"]]),
        ("startup", [closed.startup, replayed.startup, real["startup"] + real["compilation"]]),
        *((name.replace("_", " "), [getattr(closed, name), getattr(replayed, name), real[name]]) for name in CATEGORIES[3:]),
        ("wall time", [closed.wall, replayed.wall, measured.wall]),
    ]
    lines = [f"{'':<20}{'closed form':>14}{'its failures':>14}{'reality':>12}   of {measured.run}, {measured.steps:,} steps"]
    lines += [
        f"{name:<20}" + "".join(f"{value:>{width - 2},.1f} s" for value, width in zip(values, (14, 14, 12), strict=True))
        for name, values in rows
    ]
    lines.append(f"{'failures':<20}{closed.failures:>14.1f}{replayed.failures:>14.0f}{len(measured.failures):>12}")
    off = "".join(f"{100 * (outcome.wall / measured.wall - 1):>+12.1f} %" for outcome in (closed, replayed))
    lines.append(f"{'off by':<20}{off}")
    lines.append("its failures: the simulation, told when the run failed and nothing else of it")
    if measured.stops:
        lines.append(f"{measured.stops} starts were asked to stop, which is no failure: these starts and waits are not predicted")
    return "\n".join(lines)


def page(own: Plan, best: Plan, memory: dict[int, dict[str, int]], plans: list[Plan]) -> str:
    job, cluster = own.job, own.cluster
    share = job.accumulation(cluster.world)
    a_step = f"{job.global_batch:,} images, {share} micro-batch{'es' * (share > 1)} of {job.micro_batch} a rank"
    steps = f"{job.steps:,} steps, {job.epochs} epochs{' at most' * (job.steps < job.epochs * job.steps_per_epoch)}"
    ranks = (
        f"{cluster.world} GPUs ({cluster.nodes} x {cluster.gpus_per_node}), {job.parameters / 1e6:.1f} M parameters, ZeRO {job.zero_stage}"
    )
    first = f"{ranks}; a step: {a_step}; {steps}"
    cores = cluster.images_per_second / cluster.decode_rate
    return "\n\n".join(
        [
            first,
            assumptions(cluster, own.timeline.evaluation),
            step_table(own, memory),
            f"decoding: {cores:.2g} cores per GPU, {cores * cluster.gpus_per_node:.2g} per node",
            choice(own, best),
            split(best.expected),
            "from 1 to 10,000 GPUs, the best interval each\n" + scale_table(plans, job.global_batch),
            "what closed form and simulation assume\n" + "\n".join(f"- {sentence}" for sentence in ASSUMPTIONS),
        ]
    )
