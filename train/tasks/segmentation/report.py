"""Segmentation's sections of a report: IoU of each class, and images beside their labels and predictions."""

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from train.tasks.report import EvaluatedRun, Section, Table, long, numbers, templates, text, weights_name
from train.tasks.segmentation.colours import palette
from train.tasks.segmentation.pictures import ClassScore, by_iou, class_scores

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
    shown = []
    for run in runs:
        found = [(weights, run.details[weights]) for weights in ("ema", "model") if weights in run.details]
        for weights, details in found[:1] if run.one_of_several else found:
            name = weights_name(weights)
            shown.append((f"{run.name}, {name}" if run.one_of_several else name, run, details))
    if not shown:
        return None
    tables = [{score.name: score for score in class_scores(details)} for _, _, details in shown]
    first = shown[0][2]["classes"]
    colours = dict(zip(first, palette(len(first)).tolist(), strict=True))
    order = by_iou(tables[0].values())
    whole = len(order) <= SHOWN_CLASSES
    chosen = order if whole else [*order[:LOWEST], None, *order[-HIGHEST:]]
    rows = []
    for score in chosen:
        if score is None:
            rows.append(["…", "", *("" for _ in shown), ""])
            continue
        cells = [_share(table.get(score.name)) for table in tables]
        accuracy = "–" if score.accuracy is None else f"{score.accuracy:.1f} %"
        rows.append([_named(score.name, colours[score.name]), f"{score.pixels:,}", *cells, accuracy])
    which = f"All {len(order)} classes"
    if not whole:
        which = f"The {LOWEST} lowest and the {HIGHEST} highest of {len(order):,} classes"
    labels = [label for label, _, _ in shown]
    columns = [
        *long("class"),
        *numbers("pixels"),
        *text(*(f"IoU, {label}" for label in labels)),
        *numbers(f"accuracy, {labels[0]}"),
    ]
    return {
        "which": which,
        "when": "; ".join(f"{label}: epoch {run.epoch(details['step'])}" for label, run, details in shown),
        "table": Table(columns, rows),
    }


def _named(name: str, colour: Sequence[int]) -> Markup:
    """A class's name, after a square of its colour."""
    square = '<span style="display:inline-block;width:.8em;height:.8em;background:rgb({},{},{})"></span> {}'
    return Markup(square).format(*colour, name)


def _share(score: ClassScore | None) -> str:
    """A bar and a percentage."""
    if score is None or score.iou is None:
        return "–"
    return Markup('<span class="share"><i style="width:{0}%"></i></span>{0} %').format(f"{score.iou:.1f}")


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
