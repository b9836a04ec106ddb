"""Detection's sections of a report: AP by class and by size, errors by kind, and photographs with boxes."""

from collections.abc import Sequence
from pathlib import Path

from train.tasks.detection.pictures import (
    KIND_NAMES,
    class_scores,
    drawn,
    drawn_mistake,
    error_rows,
    percent,
    size_rows,
)
from train.tasks.drawing import as_base64
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

SHOWN_CLASSES = 60  # up to this many are all shown; of more, the LOWEST and the HIGHEST
LOWEST, HIGHEST = 30, 15


def sections(runs: Sequence[EvaluatedRun]) -> list[Section]:
    """The sections "classes", "errors", "pictures" and "mistakes"."""
    macros = templates(Path(__file__).parent).get_template("report.html.j2").module
    newest = [_newest(run) for run in runs]
    return [
        Section("classes", "Classes", macros.classes(_classes(runs))),
        Section("errors", "Sizes and errors", macros.errors([_errors(*pair) for pair in newest])),
        Section("pictures", "Objects and detections", macros.pictures([_pictures(*pair) for pair in newest])),
        Section("mistakes", "The most confident mistakes", macros.mistakes([_mistakes(*pair) for pair in newest])),
    ]


def _classes(runs: Sequence[EvaluatedRun]) -> dict | None:
    """The classes, lowest AP first. Columns: one run's EMA and model, or each of several runs."""
    shown = evaluations(runs)
    if not shown:
        return None
    tables = [{score.key: score for score in class_scores(details)} for _, _, details in shown]
    chosen, which = extremes([*tables[0].values()], SHOWN_CLASSES, LOWEST, HIGHEST)
    rows = []
    for score in chosen:
        if score is None:
            rows.append(["…", "", *("" for _ in shown), ""])
            continue
        cells = [bar(table[score.key].ap if score.key in table else None) for table in tables]
        rows.append([score.name, f"{score.objects:,}", *cells, percent(score.ap50)])
    labels = [label for label, _, _ in shown]
    columns = [*long("class"), *numbers("objects"), *text(*(f"AP, {label}" for label in labels))]
    return {"which": which, "when": epochs(shown), "table": Table([*columns, *numbers(f"AP50, {labels[0]}")], rows)}


def _newest(run: EvaluatedRun) -> tuple[dict, dict | None]:
    """What the sections say of a run, and the details of its newest evaluation, of its EMA if it has one."""
    heading = run.name if run.one_of_several else None
    weights = next((weights for weights in ("ema", "model") if weights in run.details), None)
    if weights is None:
        return {"heading": heading, "weights": None}, None
    details = run.details[weights]
    return {"heading": heading, "weights": weights_name(weights), "epoch": run.epoch(details["step"])}, details


def _errors(about: dict, details: dict | None) -> dict:
    if details is None:
        return about
    return {
        **about,
        "sizes": Table([*text("objects"), *numbers("number", "AP", "recall")], size_rows(details)),
        "errors": Table([*text("error"), *numbers("number", "AP50 without it")], error_rows(details)),
    }


def _pictures(about: dict, details: dict | None) -> dict:
    if details is None:
        return about
    rows = [
        {"id": shown["id"]}
        | {part: as_base64(drawn(shown, part, details["classes"]), "JPEG") for part in ("truth", "found")}
        for shown in details["pictures"]
    ]
    return {**about, "rows": rows}


def _mistakes(about: dict, details: dict | None) -> dict:
    if details is None:
        return about
    classes, cards = details["classes"], []
    for mistake in details["mistakes"]:
        *_, label, score = mistake["shown"]["found"][0]
        near = "" if mistake["other"] is None else f"{classes[mistake['other']]}, IoU {mistake['iou']:.2f}"
        cards.append(
            {
                "id": mistake["shown"]["id"],
                "class": classes[label],
                "percent": f"{100 * score:.1f}",
                "kind": KIND_NAMES[mistake["kind"]],
                "near": near,
                "image": as_base64(drawn_mistake(mistake, classes), "JPEG"),
            }
        )
    return {**about, "cards": cards}
