"""Classification's sections of a report: accuracy of each class, and the mistakes of which the model was surest."""

from collections.abc import Sequence
from pathlib import Path

from train.tasks.classification.pictures import pictures
from train.tasks.report import ClassRow, EvaluatedRun, Section, class_section, newest, templates

SHOWN_CLASSES = (40, 20, 10)  # see class_section
SHOWN_MISTAKES = 24  # of one run; half as many of each of several
SMALL = 100  # pixels: smaller images are enlarged without smoothing


def sections(runs: Sequence[EvaluatedRun]) -> list[Section]:
    """The sections "classes" and "mistakes"."""
    macros = templates(Path(__file__).parent).get_template("report.html.j2").module
    return [
        class_section(runs, _classes, "images", "{}", "top-1", size=SHOWN_CLASSES),
        Section("mistakes", "The most confident mistakes", macros.mistakes(newest(runs, _mistakes))),
    ]


def _classes(details: dict) -> list[ClassRow]:
    columns = (details[key] for key in ("classes", "count", "correct"))
    return [
        ClassRow(name, count, 100 * correct / count if count else None)
        for name, count, correct in zip(*columns, strict=True)
    ]


def _mistakes(run: EvaluatedRun, details: dict) -> dict:
    """One run's part of the gallery."""
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
        "wrong": f"{total - sum(details['correct']):,}",
        "total": f"{total:,}",
        "problem": problem,
        "small": run.config["data.image_size"] <= SMALL,
        "cards": cards,
    }
