"""The page: one HTML file that needs nothing else, no script, and no network. Numbers first, then plots.

This module makes the tables; page.html.j2 lays them out and escapes their cells. A task adds sections of its own.
"""

import base64
import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from markupsafe import Markup

from operate.report.figures import Picture
from operate.report.run import Launch, ReportedRun
from operate.run_folder import quantity
from train.task_registry import UnknownTask, find
from train.tasks.report import Column, EvaluatedRun, Section, Table, long, numbers, templates, text, weights_name
from train.telemetry.formatting import clock, duration, rate
from train.telemetry.goodput import CATEGORIES

# The categories of train/telemetry/goodput.py in short.
MEANS = {
    "productive": "steps that count",
    "startup": "from a process's start until its first step began",
    "compilation": "what a start's first step took beyond a usual one",
    "data_wait": "the network waited for data",
    "checkpoint_stall": "training stood still for a checkpoint",
    "evaluation": "on the val split",
    "lost": "steps that had to be taken again, and a killed start's last seconds",
    "waiting": "from a start's last sign of life to the next start: the queue, a launcher's pause",
    "other": "writing metrics, leaving, steps without a line yet",
}
SHOWN_INCIDENTS = 50

Named = list[tuple[ReportedRun, str]]


def page(runs: Sequence[ReportedRun], names: Sequence[str], plots: dict[str, Picture], now: float) -> str:
    """The whole HTML document about `runs`, whose short names are `names`. now: Unix seconds."""
    named, here = list(zip(runs, names, strict=True)), Path(__file__).parent
    return (
        templates(here)
        .get_template("page.html.j2")
        .render(
            title=names[0] if len(runs) == 1 else f"{len(runs)} runs: {', '.join(names)}",
            style=Markup((here / "style.css").read_text("utf-8")),
            folders=", ".join(str(run.folder) for run in runs),
            now=clock(now),
            plots={name: (data_uri(plot.svg), plot.caption) for name, plot in plots.items()},
            summary=summary(named),
            evaluations=evaluations(named),
            time=where_time_went(named),
            starts=starts(named),
            incidents=incidents(named),
            task_sections=task_sections(named),
            differences=differences(named),
            config=[(key, _value(runs[0].config, key)) for key in runs[0].config],
            config_of=names[0],
            versions=versions(named),
        )
    )


def summary(named: Named) -> Table:
    labels = {run.log.metrics[0].label for run, _ in named}
    label = labels.pop() if len(labels) == 1 else "score"
    columns = [
        *long("run"),
        *text("state"),
        *numbers("epoch", f"best\n{label}"),
        *text("of"),
        *numbers(f"newest\n{label}", "wall clock", f"{_samples(named)}\nper second", "goodput", "restarts"),
        *numbers("steps\nlost", "skipped\nsteps", "bad\nsamples"),
    ]
    return Table(columns, [_summary(run, name) for run, name in named])


def _summary(run: ReportedRun, name: str) -> list[str]:
    metric, best = run.log.metrics[0], run.log.best()
    newest = run.log.scores("ema") or run.log.scores("model")
    return [
        name,
        run.state,
        f"{epochs(run.step, run)} of {epochs(run.last_step, run)}",
        quantity(metric, best.values[metric.name]) if best else "none yet",
        f"{weights_name(best.values['weights'])}, epoch {epochs(best.values['step'], run)}" if best else "",
        quantity(metric, newest[-1].values[metric.name]) if newest else "–",
        duration(run.total),
        "–" if run.speed is None else rate(run.speed),
        percent(run.goodput),
        *(f"{count:,}" for count in (run.restarts, run.log.ledger.lost_steps)),
        *(f"{count:,}" for count in (run.count("skipped_step"), len(run.bad_samples()))),
    ]


def evaluations(named: Named) -> Table | None:
    """The best and the newest evaluation of each run's weights; the plot has the others."""
    metrics = {metric.name: metric for run, _ in named for metric in run.log.metrics}
    rows = []
    for run, name in named:
        for weights in ("ema", "model"):
            if scores := run.log.scores(weights):
                newest, best = scores[-1], run.log.best(weights)
                chosen = {"best, newest": newest} if best is newest else {"best": best, "newest": newest}
                for which, line in chosen.items():
                    if line:  # there is no best one if none is finite
                        values = line.values
                        cells = [quantity(it, values[it.name]) if it.name in values else "–" for it in metrics.values()]
                        about = [weights_name(weights), which, epochs(values["step"], run)]
                        rows.append([*_of(name, named), *about, *cells, f"{values['count']:,}"])
    labels = [metric.label for metric in metrics.values()]
    columns = [*_run(named), *text("weights", "evaluation"), *numbers("epoch", *labels, _samples(named))]
    return Table(columns, rows) if rows else None


def where_time_went(named: Named) -> Table:
    rows = []
    for key in CATEGORIES:
        shares = [[duration(run.seconds[key]), percent(run.seconds[key] / (run.total or 1))] for run, _ in named]
        rows.append([key.replace("_", " "), *(cell for pair in shares for cell in pair), MEANS[key]])
    whole = [cell for run, _ in named for cell in (duration(run.total), "")]
    times = [column for _, name in named for column in numbers(name if len(named) > 1 else "time", "share")]
    return Table([*text(""), *times, *long("")], [*rows, ["since the first start", *whole, ""]])


def starts(named: Named) -> Table:
    columns = [
        *_run(named),
        *numbers("start"),
        *text("began"),
        *numbers("lasted", "ranks", "ZeRO", "from step", "to step", "taken again"),
        *text("ended"),
    ]
    rows = []
    for run, name in named:
        for number, launch in enumerate(run.launches, 1):
            line, start = launch.line, launch.start
            about = [clock(start.began), duration(3600 * (launch.ended - launch.began))]
            ranks = [str(line["world_size"]), str(line["zero_stage"])]
            steps = [str(start.step), str(start.last_step), str(line.get("lost_steps") or 0)]
            rows.append([*_of(name, named), str(number), *about, *ranks, *steps, launch.end or "it runs"])
    return Table(columns, rows)


def incidents(named: Named) -> list[dict]:
    """For each run its name (if there are several), its newest incidents, and the number of earlier ones."""
    parts = []
    for run, name in named:
        found = run.incidents()
        rows = [
            [clock(line.values["time"]), str(line.values["step"]), *_incident(line.values)]
            for line in found[-SHOWN_INCIDENTS:]
        ]
        table = Table([*text("when"), *numbers("step"), *text("event"), *long("details")], rows)
        heading = name if len(named) > 1 else None
        parts.append({"heading": heading, "table": table, "earlier": len(found) - len(rows)})
    return parts


def _incident(line: dict) -> tuple[str, str]:
    """The event's name for people, and the other fields of its line."""
    event = line["event"]
    if event == "skipped_step":
        return "step skipped", "its gradient was not finite"
    if event == "bad_sample":
        instead = "left out of the score"
        if line["replaced_by"] is not None:
            instead = f"sample {line['replaced_by']} is used instead"
        return "bad sample", f"{line['split']} {line['id']}: {line['reason']} ({instead})"
    if event == "rollback":
        return "went back", f"to step {line['to']}: too many steps in a row were skipped, or the state was not finite"
    if event == "save_failed":
        return "save failed", str(line["reason"])
    if event == "save_slow":
        return "slow save", f"training waited {line['seconds']:.1f} s for the one before it"
    if event == "slow_rank":
        own, median = line["seconds"], line["median"]
        return "slow rank", f"rank {line['rank']}: {own:.2f} s of its own a step, the median rank {median:.2f} s"
    if event == "preempted":
        return "stopped on request", f"rank {line['rank']} got {line['signal']}"
    rest = {key: value for key, value in line.items() if key not in ("kind", "event", "step", "time")}
    return event.replace("_", " "), ", ".join(f"{key} {value}" for key, value in rest.items())


def task_sections(named: Named) -> list[Section]:
    """The sections that the runs' tasks add. With several tasks on the page, each has its own."""
    several = len({run.task for run, _ in named}) > 1
    sections = []
    for task, members in groupby(sorted(named, key=lambda pair: pair[0].task), key=lambda pair: pair[0].task):
        try:
            make = getattr(find(task), "report_sections", None)
        except UnknownTask:  # its package is elsewhere, and nothing has registered it here
            continue
        evaluated = [
            EvaluatedRun(name, run.config, run.details, run.steps_per_epoch, len(named) > 1) for run, name in members
        ]
        for each in make(evaluated) if make else []:
            sections.append(Section(f"{task}-{each.key}", f"{task}: {each.title}", each.html) if several else each)
    return sections


def differences(named: Named) -> Table | None:
    """The keys of the config in which several runs differ."""
    if len(named) == 1:
        return None
    keys = list(dict.fromkeys(key for run, _ in named for key in run.config))
    differing = [key for key in keys if len({_value(run.config, key) for run, _ in named}) > 1]
    rows = [
        [Markup('<span class="config">{}</span>').format(key), *(_value(run.config, key) for run, _ in named)]
        for key in differing
    ]
    return Table([*text("key"), *long(*(name for _, name in named))], rows)


def _value(flat: dict, key: str) -> str:
    return json.dumps(flat[key], ensure_ascii=False) if key in flat else "–"


def versions(named: Named) -> Table:
    """A row for each machine and set of versions that a run was started with."""
    rows: list[list[str]] = []
    for run, name in named:
        starts_of: dict[tuple[str, ...], list[str]] = {}
        for number, launch in enumerate(run.launches, 1):
            starts_of.setdefault(_machine(launch), []).append(str(number))
        rows += [[*_of(name, named), ", ".join(its), *machine] for machine, its in starts_of.items()]
    columns = [*long("starts", "host of rank 0", "devices"), *text("python", "torch", "deepspeed", "git commit")]
    return Table([*_run(named), *columns], rows)


def _machine(launch: Launch) -> tuple[str, ...]:
    line = launch.line
    if "versions" not in line:  # an older program began the run
        return "not recorded", f"{line['world_size']} ranks", "", "", "", ""
    known = line["versions"]
    commit = known["git"].partition("-")
    git = commit[0][:10] + commit[1] + commit[2] or "no checkout"
    return (
        line["host"],
        f"{line['world_size']} × {line['device']}",
        known["python"],
        known["torch"],
        known["deepspeed"],
        git,
    )


def _run(named: Named) -> list[Column]:
    """The column of the runs' names, if there are several runs."""
    return text("run") if len(named) > 1 else []


def _of(name: str, named: Named) -> list[str]:
    """A row's cell in that column."""
    return [name] if len(named) > 1 else []


def _samples(named: Named) -> str:
    """What the runs count."""
    counted = {run.log.samples for run, _ in named}
    return counted.pop() if len(counted) == 1 else "samples"


def data_uri(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


def epochs(step: int, run: ReportedRun) -> str:
    return f"{round(step / run.steps_per_epoch, 2):g}"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"
