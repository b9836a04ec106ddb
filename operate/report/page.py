"""The page: one HTML file that needs nothing else, no script, and no network. Numbers first, then plots.

Whatever comes from a file goes through `text`, which escapes it.
"""

import base64
import json
from collections.abc import Sequence
from pathlib import Path

from operate.report.figures import Picture
from operate.report.history import History, Launch
from operate.report.html import Raw, percent, table, text
from operate.report.pictures import pictures
from train.telemetry.formatting import clock, duration
from train.telemetry.goodput import CATEGORIES

# What goodput.py counts as what, in short.
MEANS = {
    "productive": "steps that count",
    "startup": "from a process's start until its first step began",
    "compilation": "what a start's first step took beyond a usual one",
    "data_wait": "the network waited for data",
    "checkpoint_stall": "training stood still for a checkpoint",
    "evaluation": "on the val split",
    "lost": "steps that had to be taken again, and a killed start's last seconds",
    "waiting": "from a start's last sign of life to the next start: the queue, a launcher's pause",
    "other": "writing metrics, leaving, steps that no line tells of yet",
}
SHOWN_CLASSES = 40  # in full; of more classes the LOWEST and the HIGHEST
LOWEST, HIGHEST = 20, 10
SHOWN_MISTAKES = 24  # of one run; half as many of each of several
SHOWN_INCIDENTS = 50
SMALL = 100  # pixels: the side of images that are shown enlarged, pixel by pixel


def page(runs: Sequence[History], names: Sequence[str], plots: dict[str, Picture], now: float) -> str:
    """The whole HTML document about `runs`, whose short names are `names`. `now`: Unix seconds."""
    named = list(zip(runs, names, strict=True))
    title = names[0] if len(runs) == 1 else f"{len(runs)} runs: {', '.join(names)}"
    sections = [
        ("summary", "Summary", summary(named)),
        ("learning", "Learning", plot(plots["learning"]) + evaluations(named)),
        ("speed", "Speed", plot(plots["speed"])),
        ("time", "Time", where_time_went(named) + plot(plots["time"])),
        ("starts", "Starts", starts(named)),
        ("incidents", "Incidents", incidents(named)),
        ("classes", "Classes", classes(named)),
        ("mistakes", "The most confident mistakes", mistakes(named)),
        ("config", "Config", config(named)),
        ("versions", "Versions and hardware", versions(named)),
    ]
    links = "".join(f'<a href="#{key}">{text(heading)}</a>' for key, heading, _ in sections[1:])
    body = "".join(f'<section id="{key}"><h2>{text(heading)}</h2>{content}</section>\n' for key, heading, content in sections)
    folders = ", ".join(str(run.folder) for run in runs)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<style>{(Path(__file__).parent / "style.css").read_text()}</style></head><body>
<h1>{text(title)}</h1>
<p class="quiet">{text(folders)} as of {text(clock(now))}</p>
<nav>{links}</nav>
{body}</body></html>
"""


def summary(named: list[tuple[History, str]]) -> str:
    head = [
        "~run",
        "state",
        "#epoch",
        "#best\ntop-1",
        "of",
        "#newest\ntop-1",
        "#wall clock",
        "#images\nper second",
        "#goodput",
        "#restarts",
    ]
    rows = [_summary(run, name) for run, name in named]
    return table([*head, "#steps\nlost", "#skipped\nsteps", "#bad\nsamples"], rows)


def _summary(run: History, name: str) -> list[str]:
    best = run.best()
    newest = run.scores("ema") or run.scores("model")
    return [
        name,
        run.state,
        f"{epochs(run.step, run)} of {epochs(run.last_step, run)}",
        f"{best.values['top1']:.2f} %" if best else "none yet",
        f"{_weights(best.values['weights'])}, epoch {epochs(best.values['step'], run)}" if best else "",
        f"{newest[-1].values['top1']:.2f} %" if newest else "–",
        duration(run.total),
        "–" if run.speed is None else f"{run.speed:,.0f}",
        percent(run.goodput),
        *(f"{count:,}" for count in (run.restarts, run.lost_steps, run.count("skipped_step"), len(run.bad_samples()))),
    ]


def evaluations(named: list[tuple[History, str]]) -> str:
    """The best and the newest evaluation of each run's weights; the plot has the others."""
    rows = []
    for run, name in named:
        for weights in ("ema", "model"):
            if scores := run.scores(weights):
                best = max(scores, key=lambda line: (line.values["top1"], -line.values["step"]))
                chosen = {"best, newest": best} if best is scores[-1] else {"best": best, "newest": scores[-1]}
                for which, line in chosen.items():
                    values = line.values
                    loss = "not finite" if values["loss"] is None else f"{values['loss']:.4f}"
                    accuracy = [f"{values[key]:.2f} %" for key in ("top1", "top5")]
                    rows.append(
                        [*_of(name, named), _weights(weights), which, epochs(values["step"], run), *accuracy, loss, f"{values['count']:,}"]
                    )
    if not rows:
        return "<p>Not evaluated yet.</p>"
    return table([*_of("run", named), "weights", "evaluation", "#epoch", "#top-1", "#top-5", "#loss", "#images"], rows)


def where_time_went(named: list[tuple[History, str]]) -> str:
    rows = []
    for key in CATEGORIES:
        shares = [[duration(run.seconds[key]), percent(run.seconds[key] / (run.total or 1))] for run, _ in named]
        rows.append([key.replace("_", " "), *(cell for pair in shares for cell in pair), MEANS[key]])
    whole = [cell for run, _ in named for cell in (duration(run.total), "")]
    head = [cell for _, name in named for cell in (f"#{name}" if len(named) > 1 else "#time", "#share")]
    return table(["", *head, "~"], [*rows, ["since the first start", *whole, ""]])


def starts(named: list[tuple[History, str]]) -> str:
    head = [*_of("run", named), "#start", "began", "#lasted", "#ranks", "#ZeRO", "#from step", "#to step", "#taken again", "ended"]
    rows = []
    for run, name in named:
        for number, launch in enumerate(run.launches, 1):
            line, start = launch.line, launch.start
            steps = [str(start.step), str(start.last_step), str(line.get("lost_steps") or 0)]
            about = [clock(start.began), duration(3600 * (launch.ended - launch.began)), str(line["world_size"]), str(line["zero_stage"])]
            rows.append([*_of(name, named), str(number), *about, *steps, launch.end or "it runs"])
    return table(head, rows)


def incidents(named: list[tuple[History, str]]) -> str:
    parts = []
    for run, name in named:
        found = run.incidents()
        parts.append(f"<h3>{text(name)}</h3>" if len(named) > 1 else "")
        if not found:
            parts.append("<p>None: no step was skipped, no sample was bad, no save failed.</p>")
            continue
        rows = [[clock(line.values["time"]), str(line.values["step"]), *_incident(line.values)] for line in found[-SHOWN_INCIDENTS:]]
        left = len(found) - len(rows)
        parts.append(f"<p>The newest {len(rows)}; {left:,} earlier ones are in metrics.jsonl.</p>" if left else "")
        parts.append(table(["when", "#step", "what", "~"], rows))
    return "".join(parts)


def _incident(line: dict) -> tuple[str, str]:
    """What happened, and the rest of what the line says of it."""
    event = line["event"]
    if event == "skipped_step":
        return "step skipped", "its gradient was not finite"
    if event == "bad_sample":
        instead = "left out of the score" if line["replaced_by"] is None else f"sample {line['replaced_by']} is used instead"
        return "bad sample", f"{line['split']} {line['id']}: {line['reason']} ({instead})"
    if event == "rollback":
        return "went back", f"to step {line['to']}: too many steps in a row were skipped"
    if event == "save_failed":
        return "save failed", str(line["reason"])
    if event == "save_slow":
        return "slow save", f"training waited {line['seconds']:.1f} s for the one before it"
    if event == "slow_rank":
        return "slow rank", f"rank {line['rank']}: {line['seconds']:.2f} s of its own a step, the median rank {line['median']:.2f} s"
    if event == "preempted":
        return "stopped on request", f"rank {line['rank']} got {line['signal']}"
    rest = {key: value for key, value in line.items() if key not in ("kind", "event", "step", "time")}
    return event.replace("_", " "), ", ".join(f"{key} {value}" for key, value in rest.items())


def classes(named: list[tuple[History, str]]) -> str:
    """Accuracy of each class, the lowest first: of one run's EMA and model, or of several runs."""
    shown = []
    for run, name in named:
        found = [(weights, run.evaluations[weights]) for weights in ("ema", "model") if weights in run.evaluations]
        for weights, evaluation in found if len(named) == 1 else found[:1]:
            shown.append((f"{name}, {_weights(weights)}" if len(named) > 1 else _weights(weights), run, evaluation))
    if not shown:
        return "<p>No evaluation has been recorded yet.</p>"
    tallies = [dict(zip(e["classes"], zip(e["correct"], e["count"], strict=True), strict=True)) for _, _, e in shown]
    first = tallies[0]
    order = sorted(first, key=lambda name: (first[name][0] / first[name][1] if first[name][1] else 2, name))
    whole = len(order) <= SHOWN_CLASSES
    chosen = order if whole else [*order[:LOWEST], None, *order[-HIGHEST:]]
    rows = [["…" if name is None else name, "" if name is None else f"{first[name][1]:,}", *(_share(each.get(name)) for each in tallies)]
            for name in chosen]  # fmt: skip
    after = "; ".join(f"{label}: epoch {epochs(evaluation['step'], run)}" for label, run, evaluation in shown)
    which = f"All {len(order)} classes" if whole else f"The {LOWEST} lowest and the {HIGHEST} highest of {len(order):,} classes"
    note = f"<p>{which}, by the first column's top-1. Newest evaluation of each ({text(after)}).</p>"
    return note + table(["~class", "#images", *(label for label, _, _ in shown)], rows)


def _share(tally: tuple[int, int] | None) -> str:
    if tally is None or not tally[1]:
        return "–"
    share = 100 * tally[0] / tally[1]
    return Raw(f'<span class="share"><i style="width:{share:.1f}%"></i></span>{share:.1f} %')


def mistakes(named: list[tuple[History, str]]) -> str:
    parts = []
    for run, name in named:
        parts.append(f"<h3>{text(name)}</h3>" if len(named) > 1 else "")
        weights = next((weights for weights in ("ema", "model") if weights in run.evaluations), None)
        if weights is None:
            parts.append("<p>No evaluation has been recorded yet.</p>")
            continue
        evaluation = run.evaluations[weights]
        wrong = sum(evaluation["count"]) - sum(evaluation["correct"])
        chosen = evaluation["mistakes"][: SHOWN_MISTAKES if len(named) == 1 else SHOWN_MISTAKES // 2]
        which = f"{_weights(weights)}, epoch {epochs(evaluation['step'], run)}"
        parts.append(f"<p>{which}: {len(chosen)} of {wrong:,} mistakes among {sum(evaluation['count']):,} images, those first of which ")
        parts.append("the model was surest; cut and scaled as the model saw them.</p>")
        if chosen:
            images, why = pictures(run.config, evaluation["split"], [mistake["id"] for mistake in chosen])
            parts.append(f"<p>{text(why)}</p>" if why else "")
            small = run.config["data.image_size"] <= SMALL
            cards = (_mistake(mistake, evaluation["classes"], images.get(mistake["id"]), small) for mistake in chosen)
            parts.append(f'<div class="gallery">{"".join(cards)}</div>')
    return "".join(parts)


def _mistake(mistake: dict, names: list[str], image: str | None, small: bool) -> str:
    true, predicted = names[mistake["label"]], names[mistake["predicted"]]
    alt = text(f"sample {mistake['id']}: {true}, taken for {predicted}")
    picture = f'<img{" class=small" * small} src="{image}" alt="{alt}">' if image else '<div class="none">no picture</div>'
    said = f"<b>{text(predicted)}</b> {100 * mistake['probability']:.1f} %<br>is {text(true)}"
    return f'<figure>{picture}<figcaption>{said}<br><span class="quiet">val {mistake["id"]}</span></figcaption></figure>'


def config(named: list[tuple[History, str]]) -> str:
    parts, (first, name) = [], named[0]
    if len(named) > 1:
        keys = list(dict.fromkeys(key for run, _ in named for key in run.config))
        differing = [key for key in keys if len({_value(run.config, key) for run, _ in named}) > 1]
        rows = [[Raw(f'<span class="config">{text(key)}</span>'), *(_value(run.config, key) for run, _ in named)] for key in differing]
        parts.append("<h3>Where the runs differ</h3>")
        parts.append(table(["key", *(f"~{other}" for _, other in named)], rows) if rows else "<p>Nowhere.</p>")
        parts.append(f"<h3>All of {text(name)}</h3>")
    parts.append('<div class="config">')
    parts += [f"<div>{text(key)}: {text(_value(first.config, key))}</div>" for key in first.config]
    return "".join([*parts, "</div>"])


def _value(flat: dict, key: str) -> str:
    return json.dumps(flat[key], ensure_ascii=False) if key in flat else "–"


def versions(named: list[tuple[History, str]]) -> str:
    """A row for each machine and set of versions that a run was started with."""
    rows: list[list[str]] = []
    for run, name in named:
        numbers: dict[tuple[str, ...], list[str]] = {}
        for number, launch in enumerate(run.launches, 1):
            numbers.setdefault(_machine(launch), []).append(str(number))
        rows += [[*_of(name, named), ", ".join(its), *machine] for machine, its in numbers.items()]
    return table([*_of("run", named), "~starts", "~host of rank 0", "~devices", "python", "torch", "deepspeed", "git commit"], rows)


def _machine(launch: Launch) -> tuple[str, ...]:
    line = launch.line
    if "versions" not in line:  # an older program began the run
        return "not recorded", f"{line['world_size']} ranks", "", "", "", ""
    known = line["versions"]
    commit = known["git"].partition("-")
    git = commit[0][:10] + commit[1] + commit[2] or "no checkout"
    return line["host"], f"{line['world_size']} × {line['device']}", known["python"], known["torch"], known["deepspeed"], git


def _of(name: str, named: list[tuple[History, str]]) -> list[str]:
    """The cell that says which run a row is of, where there are several."""
    return [name] if len(named) > 1 else []


def plot(picture: Picture) -> str:
    source = base64.b64encode(picture.svg).decode()
    return f'<img class="plot" src="data:image/svg+xml;base64,{source}" alt="{text(picture.caption)}">'


def epochs(step: int, run: History) -> str:
    return f"{round(step / run.steps_per_epoch, 2):g}"


def _weights(weights: str) -> str:
    return "EMA" if weights == "ema" else weights
