"""Segmentation's sections of a report: IoU of each class, and images beside their labels and predictions."""

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from train.tasks.drawing import palette
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
from train.tasks.segmentation.pictures import by_iou, class_scores

SHOWN_CLASSES = 60  # up to this many are all shown; of more, the LOWEST and the HIGHEST
LOWEST, HIGHEST = 30, 15


def sections(runs: Sequence[EvaluatedRun]) -> list[Section]:
    """The sections "classes" and "pictures"."""
    macros = templates(Path(__file__).parent).get_template("report.html.j2").module
    return [
        Section("classes", "Classes", macros.classes(_classes(runs))),
        Section("pictures", "Images, labels, predictions", macros.pictures([_pictures(run) for run in runs])),
    ]


def _classes(runs: Sequence[EvaluatedRun]) -> dict | None:
    """The classes, lowest IoU first. Columns: one run's EMA and model, or each of several runs."""
    shown = evaluations(runs)
    if not shown:
        return None
    tables = [{score.name: score for score in class_scores(details)} for _, _, details in shown]
    first = shown[0][2]["classes"]
    colours = dict(zip(first, palette(len(first)).tolist(), strict=True))
    chosen, which = extremes(by_iou(tables[0].values()), SHOWN_CLASSES, LOWEST, HIGHEST)
    rows = []
    for score in chosen:
        if score is None:
            rows.append(["…", "", *("" for _ in shown), ""])
            continue
        cells = [bar(table[score.name].iou if score.name in table else None) for table in tables]
        accuracy = "–" if score.accuracy is None else f"{score.accuracy:.1f} %"
        rows.append([_named(score.name, colours[score.name]), f"{score.pixels:,}", *cells, accuracy])
    labels = [label for label, _, _ in shown]
    columns = [
        *long("class"),
        *numbers("pixels"),
        *text(*(f"IoU, {label}" for label in labels)),
        *numbers(f"accuracy, {labels[0]}"),
    ]
    return {
        "which": which,
        "when": epochs(shown),
        "table": Table(columns, rows),
    }


def _named(name: str, colour: Sequence[int]) -> Markup:
    """A class's name, after a square of its colour."""
    square = '<span style="display:inline-block;width:.8em;height:.8em;background:rgb({},{},{})"></span> {}'
    return Markup(square).format(*colour, name)


def _pictures(run: EvaluatedRun) -> dict:
    """One run's pictures, of its EMA if it has one."""
    heading = run.name if run.one_of_several else None
    weights = next((weights for weights in ("ema", "model") if weights in run.details), None)
    if weights is None:
        return {"heading": heading, "weights": None}
    details = run.details[weights]
    return {
        "heading": heading,
        "weights": weights_name(weights),
        "epoch": run.epoch(details["step"]),
        "rows": details["pictures"],
    }
