"""Boxes drawn on photographs, and the tables of an evaluation. Without torch.

A picture is uint8 [height, width, 3], RGB. Boxes are [n, 4]: left, top, width, height in its pixels.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from train.telemetry.formatting import printable

GAP = 4  # pixels between pictures
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
    thickness, size = max(2, min(width, height) // 160), max(11, min(width, height) // 36)
    font = ImageFont.load_default(size)
    edges = [
        (left, top, left + w, top + h) for left, top, w, h in np.asarray(boxes, np.float64).reshape(-1, 4).tolist()
    ]
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
