"""Detection's sections of a report: AP by class and by size, errors by kind, and photographs with boxes."""

from collections.abc import Sequence
from pathlib import Path

from train.tasks.detection.pictures import (
    KIND_NAMES,
    class_scores,
    drawn,
    drawn_mistake,
    error_rows,
    size_rows,
)
from train.tasks.drawing import as_base64, percent
from train.tasks.report import (
    ClassRow,
    EvaluatedRun,
    Section,
    Table,
    class_section,
    newest,
    numbers,
    templates,
    text,
)


def sections(runs: Sequence[EvaluatedRun]) -> list[Section]:
    """The sections "classes", "errors", "pictures" and "mistakes"."""
    macros = templates(Path(__file__).parent).get_template("report.html.j2").module
    return [
        class_section(runs, _classes, "objects", "AP, {}", "AP; a class without objects has none", ["AP50"]),
        Section("errors", "Sizes and errors", macros.errors(newest(runs, _errors))),
        Section("pictures", "Objects and detections", macros.pictures(newest(runs, _pictures))),
        Section("mistakes", "The most confident mistakes", macros.mistakes(newest(runs, _mistakes))),
    ]


def _classes(details: dict) -> list[ClassRow]:
    return [ClassRow(score.name, score.objects, score.ap, [percent(score.ap50)]) for score in class_scores(details)]


def _errors(_: EvaluatedRun, details: dict) -> dict:
    return {
        "sizes": Table([*text("objects"), *numbers("number", "AP", "recall")], size_rows(details)),
        "errors": Table([*text("error"), *numbers("number", "AP50 without it")], error_rows(details)),
    }


def _pictures(_: EvaluatedRun, details: dict) -> dict:
    rows = [
        {"id": shown["id"]}
        | {part: as_base64(drawn(shown, part, details["classes"]), "JPEG") for part in ("truth", "found")}
        for shown in details["pictures"]
    ]
    return {"rows": rows}


def _mistakes(_: EvaluatedRun, details: dict) -> dict:
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
    return {"cards": cards}
