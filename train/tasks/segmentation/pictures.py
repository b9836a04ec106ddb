"""What TensorBoard shows of an evaluation, and the numbers of each class. Without torch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from train.tasks.drawing import from_base64, percent, side_by_side
from train.telemetry.formatting import markdown_table


@dataclass(frozen=True)
class ClassScore:
    """A class's intersection over union and accuracy, in percent; None where no pixel has or gets it. pixels: that are
    labelled as it.
    """

    name: str
    iou: float | None
    accuracy: float | None
    pixels: int


def class_scores(details: dict) -> list[ClassScore]:
    """The scores of all classes, from what an evaluation kept (scores.SegmentationTally), in the order of labels."""
    found = []
    columns = (details[key] for key in ("classes", "correct", "labelled", "predicted"))
    for name, correct, labelled, predicted in zip(*columns, strict=True):
        union = labelled + predicted - correct
        iou = 100 * correct / union if union else None
        found.append(ClassScore(name, iou, 100 * correct / labelled if labelled else None, labelled))
    return found


def iou_table(details: dict) -> str:
    """The scores of all classes in Markdown, the lowest IoU first."""
    scores = sorted(class_scores(details), key=lambda score: (101.0 if score.iou is None else score.iou, score.name))
    rows = [[score.name, percent(score.iou), percent(score.accuracy), f"{score.pixels:,}"] for score in scores]
    return markdown_table(["class", "IoU", "accuracy", "pixels"], rows)


def evaluation_picture(pictures: Sequence[dict]) -> np.ndarray:
    """A row for each picture of an evaluation's details: image, labels, prediction."""
    return side_by_side(
        [[from_base64(picture[part]) for part in ("image", "labels", "prediction")] for picture in pictures]
    )
