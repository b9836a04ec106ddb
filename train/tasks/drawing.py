"""What tasks draw with: colours of classes, legends, pictures side by side and as text. Without torch.

A picture is uint8 [height, width, 3], RGB.
"""

import base64
import colorsys
from collections.abc import Sequence
from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from train.telemetry.formatting import printable

GOLDEN = 0.618033988749895  # steps of this length round a circle never come close to where they have been
FIRST = 0.58  # hue of class 0, a blue: it is often the background
TONES = ((0.45, 0.65), (0.85, 0.95), (0.55, 0.85), (0.95, 0.60))  # saturation and value, in turn
GAP = 4  # pixels between pictures


def palette(classes: int) -> np.ndarray:
    """A colour for each class, uint8 [classes, 3]. The first ones are the same for any number of classes."""
    colours = [colorsys.hsv_to_rgb((FIRST + GOLDEN * i) % 1, *TONES[i % len(TONES)]) for i in range(classes)]
    return np.rint(255 * np.array(colours)).astype(np.uint8).reshape(classes, 3)


def as_base64(picture: np.ndarray, kind: str) -> str:
    """The file of a picture as text; kind: "JPEG" or "PNG"."""
    file = BytesIO()
    options = {"quality": 88} if kind == "JPEG" else {"optimize": True}
    Image.fromarray(picture).save(file, kind, **options)
    return base64.b64encode(file.getvalue()).decode()


def from_base64(text: str) -> np.ndarray:
    """The picture that `as_base64` stored."""
    return np.asarray(Image.open(BytesIO(base64.b64decode(text))).convert("RGB"))


def with_legend(picture: np.ndarray, found: Sequence[int], classes: Sequence[str]) -> np.ndarray:
    """A picture with the colours and names of the classes `found` in lines below it."""
    height, width = picture.shape[:2]
    size = max(11, min(height, width) // 28)
    font, gap = ImageFont.load_default(size), size // 2
    x, y, places = gap, height + gap, []
    for number in found:
        name = printable(classes[number])
        length = size + gap + int(font.getlength(name)) + 2 * gap
        if x > gap and x + length > width:
            x, y = gap, y + size + gap
        places.append((x, y, number, name))
        x += length
    canvas = Image.new("RGB", (width, y + size + gap), "white")
    canvas.paste(Image.fromarray(picture))
    draw, colours = ImageDraw.Draw(canvas), palette(len(classes))
    for x, y, number, name in places:
        draw.rectangle((x, y, x + size, y + size), fill=tuple(colours[number].tolist()))
        draw.text((x + size + gap, y + size / 2), name, fill="black", font=font, anchor="lm")
    return np.asarray(canvas)


def side_by_side(rows: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Rows of equally many pictures as one picture, on white. The pictures of a row are equally high."""
    width = max(picture.shape[1] for row in rows for picture in row)
    page = []
    for row in rows:
        line = np.full((row[0].shape[0] + GAP, len(row) * (width + GAP), 3), 255, np.uint8)
        for column, picture in enumerate(row):
            left = column * (width + GAP)
            line[: picture.shape[0], left : left + picture.shape[1]] = picture
        page.append(line)
    return np.concatenate(page)[:-GAP, :-GAP]


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f} %"
