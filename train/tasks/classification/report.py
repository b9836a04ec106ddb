"""Classification's sections of a report: accuracy of each class, and the mistakes of which the model was surest."""

from collections.abc import Sequence
from pathlib import Path

from train.tasks.classification.pictures import pictures
from train.tasks.report import (
    EvaluatedRun,
    Section,
    Table,
    bar,
    epochs,
    evaluations,
    extremes,
    long,
    numbers,
    templates,
    text,
    weights_name,
)

SHOWN_CLASSES = 40  # up to this many are all shown; of more, the LOWEST and the HIGHEST
LOWEST, HIGHEST = 20, 10
SHOWN_MISTAKES = 24  # of one run; half as many of each of several
SMALL = 100  # pixels: smaller images are enlarged without smoothing


def sections(runs: Sequence[EvaluatedRun]) -> list[Section]:
    """The sections "classes" and "mistakes"."""
    macros = templates(Path(__file__).parent).get_template("report.html.j2").module
    return [
        Section("classes", "Classes", macros.classes(_classes(runs))),
        Section("mistakes", "The most confident mistakes", macros.mistakes([_mistakes(run) for run in runs])),
    ]


def _classes(runs: Sequence[EvaluatedRun]) -> dict | None:
    """The classes, least accurate first. Columns: one run's EMA and model, or each of several runs."""
    shown = evaluations(runs)
    if not shown:
        return None
    tallies = [
        {name: (correct, count) for name, correct, count in zip(it["classes"], it["correct"], it["count"], strict=True)}
        for _, _, it in shown
    ]
    first = tallies[0]
    order = sorted(first, key=lambda name: (first[name][0] / first[name][1] if first[name][1] else 2, name))
    chosen, which = extremes(order, SHOWN_CLASSES, LOWEST, HIGHEST)
    rows = [
        ["…" if name is None else name, "" if name is None else f"{first[name][1]:,}"]
        + [bar(_percent(tally.get(name))) for tally in tallies]
        for name in chosen
    ]
    return {
        "which": which,
        "when": epochs(shown),
        "table": Table([*long("class"), *numbers("images"), *text(*(label for label, _, _ in shown))], rows),
    }


def _percent(tally: tuple[int, int] | None) -> float | None:
    """Of (correct, count)."""
    return 100 * tally[0] / tally[1] if tally and tally[1] else None


def _mistakes(run: EvaluatedRun) -> dict:
    """One run's part of the gallery, of its EMA if it has one."""
    heading = run.name if run.one_of_several else None
    weights = next((weights for weights in ("ema", "model") if weights in run.details), None)
    if weights is None:
        return {"heading": heading, "weights": None}
    details = run.details[weights]
    chosen = details["mistakes"][: SHOWN_MISTAKES // 2 if run.one_of_several else SHOWN_MISTAKES]
    images, problem = (
        pictures(run.config, details["split"], [mistake["id"] for mistake in chosen]) if chosen else ({}, "")
    )
    total, names = sum(details["count"]), details["classes"]
    cards = [
        {
            "id": mistake["id"],
            "true": names[mistake["label"]],
            "predicted": names[mistake["predicted"]],
            "percent": f"{100 * mistake['probability']:.1f}",
            "image": images.get(mistake["id"]),
        }
        for mistake in chosen
    ]
    return {
        "heading": heading,
        "weights": weights_name(weights),
        "epoch": run.epoch(details["step"]),
        "wrong": f"{total - sum(details['correct']):,}",
        "total": f"{total:,}",
        "problem": problem,
        "small": run.config["data.image_size"] <= SMALL,
        "cards": cards,
    }
