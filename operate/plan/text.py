"""Print a plan as a page of text. Tables fit in 80 columns; sentences are as wide as the terminal."""

from operate.plan.calibrate import Measured
from operate.plan.cluster import NUMBERS, Cluster
from operate.plan.plan import Plan, intervals
from operate.plan.step_time import STAGES, step_time
from operate.plan.timeline import ASSUMPTIONS, Outcome
from train.telemetry.formatting import counted, page_width, rate, table, wrapped

CATEGORIES = ("productive", "stragglers", "startup", "checkpoint_stall", "evaluation", "lost", "waiting")
ASSUMED = (17, 11, 12)  # least widths of the columns before an assumption's origin


def three_digits(seconds: float) -> str:
    """Such as "3.21 h" or "64.2 ms": up to three digits in one unit, unlike train.telemetry.formatting.duration."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.3g} {unit}"
    if seconds == 0 or seconds >= 0.9995:  # which would be "1e+03 ms"
        return f"{seconds:.3g} s"
    return f"{1000 * seconds:.3g} ms"


def headline(plan: Plan) -> dict[str, str]:
    """The most important numbers, by which plans are compared."""
    workload, cluster, timeline, expected = plan.workload, plan.cluster, plan.timeline, plan.expected
    rows = {
        "GPUs": f"{cluster.world:,} ({cluster.nodes} x {cluster.gpus_per_node})",
        "global batch": f"{workload.global_batch:,}",
        "ZeRO stage": str(workload.zero_stage),
        "step": three_digits(plan.step.seconds),
        "images per second": rate(workload.global_batch / plan.step.seconds),
        "cores per GPU to decode": f"{cluster.images_per_second / cluster.decode_rate:.2g}",
        "MTBF of the job": three_digits(1 / timeline.failure_rate),
        "checkpoint every": f"{timeline.every:,} steps, {three_digits(timeline.every * timeline.step)}",
        "failures expected": f"{expected.failures:,.3g}",
        "goodput expected": f"{100 * plan.goodput:.1f} %",
        "time, closed form": three_digits(expected.wall),
        "time, simulated": f"{three_digits(plan.simulated.wall)} ± {three_digits(plan.error)}",
        "GPU-hours": f"{plan.gpu_hours:,.0f}",
    }
    return rows | ({} if plan.price is None else {"price": f"{plan.price:,.0f}"})


def assumptions(cluster: Cluster, evaluation: float) -> str:
    """A table of all assumptions, their units and origins. evaluation: seconds, if the cluster has no number for it."""
    if cluster.evaluation is None:
        cluster = cluster.with_values({"evaluation": evaluation}, "GUESSED (a forward pass is a third of a step)")
    rows = [["assumed", "value", "unit", "where from"]]
    for name, entry in NUMBERS.items():
        value = getattr(cluster, name)
        if value is not None:
            origin, *more = wrapped(cluster.origin(name), page_width() - sum(ASSUMED) - 6).splitlines()
            rows.append([name.replace("_", " "), f"{value:,.6g}", entry.metadata["unit"], origin])
            rows += [["", "", "", line] for line in more]
    return table(rows, align="<><", widths=(*ASSUMED, 0))


def step_table(plan: Plan, memory: dict[int, dict[str, int]]) -> str:
    """Time, then memory of a rank, of a step at every ZeRO stage; the config's stage is marked with *."""
    own = plan.workload.zero_stage
    times = [["ZeRO", "sent/rank", "collectives", "not hidden", "data wait", "step"]]
    first, *others = memory[own]
    sizes = [["ZeRO", "memory/rank", f"= {first}", *(f"+ {part}" for part in others)]]
    for stage in STAGES:
        step, parts = step_time(plan.workload, plan.cluster, stage), memory[stage].values()
        name = f"{stage} *" if stage == own else f"{stage}"
        seconds = map(three_digits, (step.communication, step.exposed, step.data_wait, step.seconds))
        times.append([name, f"{step.sent / 1e6:,.1f} MB", *seconds])
        sizes.append([name, *(f"{value / 1e9:.2f} GB" for value in (sum(parts), *parts))])
    return "\n\n".join(table(rows, align="<>", widths=(4, 11)) for rows in (times, sizes))


def choice(own: Plan, best: Plan) -> str:
    """The config's checkpoint interval beside the best one."""
    heads = [headline(own), headline(best)]
    names = ("checkpoint every", "failures expected", "goodput expected", "time, closed form", "time, simulated")
    rows = [["", "as configured", "best interval"]]
    rows += [[name, *(head[name] for head in heads)] for name in (*names, "GPU-hours", "price") if name in heads[0]]
    differences = (100 * (plan.expected.wall / plan.simulated.wall - 1) for plan in (own, best))
    rows.append(["closed form - simulated", *(f"{difference:+.1f} %" for difference in differences)])
    found = intervals(own)
    about = (
        f"Young {three_digits(found['young'])}, Daly {three_digits(found['daly'])} of work between checkpoints; a "
        f"checkpoint is whole after {three_digits(own.timeline.write)}, and the next cannot begin before. A better "
        "evaluation is saved as well"
    )
    return f"{table(rows, widths=(23, 24))}\n{wrapped(about, page_width())}"


def split(outcome: Outcome) -> str:
    shares = (f"{name.replace('_', ' ')} {100 * getattr(outcome, name) / outcome.wall:.1f} %" for name in CATEGORIES)
    return wrapped("where the time goes: " + ", ".join(shares), page_width())


def scale_table(plans: list[Plan], own: int) -> str:
    """Two tables with a line for each number of GPUs. own: the config's global batch."""
    steps, totals = [], []
    for plan in plans:
        head, gpus = headline(plan), {"GPUs": f"{plan.cluster.world:,}"}
        step = gpus | {
            "global batch": head["global batch"] + ("*" if plan.workload.global_batch != own else " "),
            "step": head["step"],
            "job's MTBF": head["MTBF of the job"],
            "interval": three_digits(plan.timeline.every * plan.timeline.step),
            "goodput": head["goodput expected"],
        }
        total = gpus | {
            "closed form": head["time, closed form"],
            "simulated": three_digits(plan.simulated.wall),
            "GPU-hours": head["GPU-hours"],
        }
        total |= {"price": head["price"]} if "price" in head else {}
        for rows, cells in ((steps, step), (totals, total)):
            rows += [list(cells.values())] if rows else [list(cells), list(cells.values())]
    text = [table(rows, align=">", widths=(9,)) for rows in (steps, totals)]
    if any(plan.workload.global_batch != own for plan in plans):
        larger = (
            "* so many GPUs cannot share the config's global batch: a larger one, which is another recipe and may "
            "learn otherwise"
        )
        text.insert(1, wrapped(larger, page_width()))
    return "\n".join([*text[:-1], "", text[-1]])


def beside(measured: Measured, closed: Outcome, replayed: Outcome, wait: float) -> str:
    """Prediction and reality of one run. wait: the planned share of a step that is spent waiting for data."""
    real, predictions = dict(measured.seconds), (closed, replayed)
    waiting, startup = measured.after_stops
    real["waiting"] -= waiting
    real["startup"] -= startup
    seconds = {
        "steps": [*(outcome.productive * (1 - wait) for outcome in predictions), real["productive"] + real["other"]],
        "data wait": [*(outcome.productive * wait for outcome in predictions), real["data_wait"]],
        "startup": [closed.startup, replayed.startup, real["startup"] + real["compilation"]],
    }
    for name in CATEGORIES[3:]:
        seconds[name.replace("_", " ")] = [*(getattr(outcome, name) for outcome in predictions), real[name]]
    wall = measured.wall - waiting - startup
    seconds["wall time"] = [closed.wall, replayed.wall, wall]
    rows = [["", "closed form", "its failures", "reality"]]
    rows += [[name, *(f"{value:,.1f} s" for value in values)] for name, values in seconds.items()]
    rows.append(["failures", f"{closed.failures:.1f}", f"{replayed.failures:.0f}", f"{len(measured.failures)}"])
    rows.append(["off by", *(f"{100 * (outcome.wall / wall - 1):+.1f} %" for outcome in predictions)])
    notes = [
        f"reality: {measured.run}, {counted(measured.steps, 'step')}",
        "its failures: the simulation, told when the run failed and nothing else of it",
    ]
    if measured.stops:
        notes.append(
            f"{counted(measured.stops, 'start')} {'was' if measured.stops == 1 else 'were'} asked to stop, which is no "
            f"failure: the {three_digits(waiting + startup)} of waiting and start-up after that are not predicted, and "
            "left out here"
        )
    return "\n".join([table(rows, align="<>", widths=(20, 12)), *(wrapped(note, page_width()) for note in notes)])


def page(title: str, own: Plan, best: Plan, memory: dict[int, dict[str, int]], plans: list[Plan]) -> str:
    """The page. own, best: with the config's and the best checkpoint interval. plans: on other numbers of GPUs."""
    workload, cluster = own.workload, own.cluster
    share = workload.accumulation(cluster.world)
    batches = f"{share} micro-batch{'es' * (share > 1)} of {workload.micro_batch} a rank"
    steps = f"{workload.steps:,} steps"
    if workload.epochs is not None:
        steps += f", {workload.epochs} epochs"
    if workload.steps < workload.whole_steps:
        steps += " at most"
    gpus = f"{cluster.world} GPUs ({cluster.nodes} x {cluster.gpus_per_node})"
    model = f"{workload.parameters / 1e6:.1f} M parameters, ZeRO {workload.zero_stage}"
    cores = cluster.images_per_second / cluster.decode_rate
    return "\n\n".join(
        [
            wrapped(
                f"{title}: {gpus}, {model}; a step: {workload.global_batch:,} images, {batches}; {steps}", page_width()
            ),
            assumptions(cluster, own.timeline.evaluation),
            step_table(own, memory),
            f"decoding: {cores:.2g} cores per GPU, {cores * cluster.gpus_per_node:.2g} per node",
            choice(own, best),
            split(best.expected),
            "from 1 to 10,000 GPUs, the best interval each\n" + scale_table(plans, workload.global_batch),
            "what closed form and simulation assume\n"
            + "\n".join(f"- {wrapped(sentence, page_width(), '  ').lstrip()}" for sentence in ASSUMPTIONS),
        ]
    )
