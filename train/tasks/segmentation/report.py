"""Segmentation's sections of a report: IoU of each class, and images beside their labels and predictions."""

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from train.tasks.drawing import palette, percent
from train.tasks.report import ClassRow, EvaluatedRun, Section, class_section, newest, templates
from train.tasks.segmentation.pictures import class_scores


def sections(runs: Sequence[EvaluatedRun]) -> list[Section]:
    """The sections "classes" and "pictures"."""
    macros = templates(Path(__file__).parent).get_template("report.html.j2").module
    pictures = newest(runs, lambda _, details: {"rows": details["pictures"]})
    return [
        class_section(runs, _classes, "pixels", "IoU, {}", "IoU", ["accuracy"]),
        Section("pictures", "Images, labels, predictions", macros.pictures(pictures)),
    ]


def _classes(details: dict) -> list[ClassRow]:
    colours = palette(len(details["classes"])).tolist()
    return [
        ClassRow(_named(score.name, colour), score.pixels, score.iou, [percent(score.accuracy)])
        for score, colour in zip(class_scores(details), colours, strict=True)
    ]


def _named(name: str, colour: Sequence[int]) -> Markup:
    """A class's name, after a square of its colour."""
    square = '<span style="display:inline-block;width:.8em;height:.8em;background:rgb({},{},{})"></span> {}'
    return Markup(square).format(*colour, name)
