"""Boxes drawn on photographs, and the tables of an evaluation. Without torch.

A picture is uint8 [height, width, 3], RGB. Boxes are [n, 4]: left, top, width, height in its pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from train.tasks.drawing import from_base64, palette, percent, side_by_side
from train.telemetry.formatting import markdown_table, printable

DARK = 140  # luminance below which text on a colour is white
MISTAKEN = (230, 0, 0)  # colour of a mistake
QUIET = (255, 255, 255)  # colour of the objects around it

KIND_NAMES = {
    "class": "wrong class",
    "place": "wrong place",
    "both": "wrong class and place",
    "duplicate": "found twice",
    "background": "nothing there",
    "missed": "missed",
}
SIZES = {"s": "small, to 32 x 32 pixels", "m": "medium, to 96 x 96", "l": "large"}


def draw_boxes(
    picture: np.ndarray, boxes: np.ndarray, names: Sequence[str], colours: Sequence[Sequence[int]]
) -> np.ndarray:
    """A picture with boxes, each with its name on its colour. The first ones are drawn over the others.

    A name stands above its box, or below or inside, where it covers no name that is drawn already.
    """
    canvas = Image.fromarray(picture)
    draw, (width, height) = ImageDraw.Draw(canvas), canvas.size
    thickness, size = max(3, min(width, height) // 140), max(11, min(width, height) // 36)
    font = ImageFont.load_default(size)
    edges = [(left, top, left + w, top + h) for left, top, w, h in np.reshape(boxes, (-1, 4)).tolist()]
    for edge, colour in reversed([*zip(edges, colours, strict=True)]):
        # A thin dark line around it is seen on any background.
        draw.rectangle(_grown(edge, 1, width, height), outline=(0, 0, 0), width=thickness + 2)
        draw.rectangle(_grown(edge, 0, width, height), outline=tuple(colour), width=thickness)
    taken: list[tuple[float, float, float, float]] = []
    tags = []
    for (left, top, _, bottom), name in zip(edges, names, strict=True):
        tag_width, tag_height = font.getlength(printable(name)) + 6, size + 4
        x = min(max(left, 0), max(width - tag_width, 0))
        places = [
            (x, y, x + tag_width, y + tag_height)
            for y in (top - tag_height, bottom, top, bottom - tag_height)
            if 0 <= y <= height - tag_height
        ] or [(x, 0.0, x + tag_width, float(tag_height))]
        place = next((place for place in places if not any(_overlap(place, other) for other in taken)), places[0])
        taken.append(place)
        tags.append(place)
    for place, name, colour in reversed([*zip(tags, names, colours, strict=True)]):
        draw.rectangle(place, fill=tuple(colour))
        luminance = np.dot(colour, (0.299, 0.587, 0.114))
        centre = (place[1] + place[3]) / 2
        draw.text((place[0] + 3, centre), printable(name), "white" if luminance < DARK else "black", font, anchor="lm")
    return np.asarray(canvas)


def _grown(edges: tuple, by: int, width: int, height: int) -> tuple:
    """A rectangle grown by some pixels, inside the picture."""
    left, top, right, bottom = edges
    left, top = min(max(left - by, 0), width - 1), min(max(top - by, 0), height - 1)
    return left, top, max(min(right + by, width - 1), left), max(min(bottom + by, height - 1), top)


def _overlap(a: tuple, b: tuple) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def drawn(shown: dict, part: str, classes: Sequence[str]) -> np.ndarray:
    """The photograph of an evaluation's details (scores.Shown) with the boxes of `part`: "truth" or "found"."""
    rows, colours = shown[part], palette(len(classes)).tolist()
    name = _object_name if part == "truth" else found_name
    names = [name(classes[label], value) for *_, label, value in rows]
    return draw_boxes(from_base64(shown["image"]), [row[:4] for row in rows], names, [colours[row[4]] for row in rows])


def drawn_mistake(mistake: dict, classes: Sequence[str]) -> np.ndarray:
    """A mistake (scores.ShownMistake) in red, and the objects that its box touches in white."""
    shown = mistake["shown"]
    found, (left, top, width, height) = shown["found"], shown["found"][0][:4]
    edges = left, top, left + width, top + height
    objects = [row for row in shown["truth"] if _overlap(edges, (row[0], row[1], row[0] + row[2], row[1] + row[3]))]
    names = [found_name(classes[label], score) for *_, label, score in found]
    names += [_object_name(classes[label], crowd) for *_, label, crowd in objects]
    colours = [MISTAKEN] * len(found) + [QUIET] * len(objects)
    return draw_boxes(from_base64(shown["image"]), [row[:4] for row in (*found, *objects)], names, colours)


def found_name(name: str, score: float) -> str:
    return f"{name} {100 * score:.0f} %"


def _object_name(name: str, crowd: int) -> str:
    return f"{name} (crowd)" if crowd else name


def evaluation_picture(details: dict) -> np.ndarray:
    """A row for each picture of an evaluation's details: its objects, and what was found."""
    classes = details["classes"]
    return side_by_side([[drawn(shown, part, classes) for part in ("truth", "found")] for shown in details["pictures"]])


# --------------------------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class ClassScore:
    """A class's AP and AP50 in percent, None if it has no objects; and the number of its objects."""

    name: str
    ap: float | None
    ap50: float | None
    objects: int


def class_scores(details: dict) -> list[ClassScore]:
    """The scores of all classes, from an evaluation's details, in the order of labels."""
    columns = (details[key] for key in ("classes", "ap", "ap50", "objects"))
    return [ClassScore(*row) for row in zip(*columns, strict=True)]


def size_rows(details: dict) -> list[list[str]]:
    """By size of the objects: how many, AP, and recall with 100 detections of a class in an image."""
    scores, sizes = details["scores"], details["sizes"]
    return [[SIZES[key], f"{sizes[key]:,}", *(percent(scores[name + key]) for name in ("ap", "ar"))] for key in sizes]


def error_rows(details: dict) -> list[list[str]]:
    """By kind of error: how many, and what AP50 would gain without them."""
    return [[KIND_NAMES[kind], f"{count:,}", f"{gain:+.1f}"] for kind, (count, gain) in details["errors"].items()]


def evaluation_tables(details: dict) -> str:
    """AP by class, the lowest first, by size, and the errors, in Markdown."""
    scores = sorted(class_scores(details), key=lambda score: (101.0 if score.ap is None else score.ap, score.name))
    classes = [[score.name, percent(score.ap), percent(score.ap50), f"{score.objects:,}"] for score in scores]
    return "\n\n".join(
        [
            markdown_table(["class", "AP", "AP50", "objects"], classes),
            markdown_table(["size of the object", "objects", "AP", "recall"], size_rows(details)),
            markdown_table(["error", "detections or objects", "AP50 without it"], error_rows(details)),
        ]
    )
