"""Colours of classes, and label maps as pictures. Without torch.

A picture is uint8 [height, width, 3], RGB; a label map [height, width], of any integer type.
"""

import base64
import colorsys
from io import BytesIO

import numpy as np
from PIL import Image

UNLABELLED = (235, 235, 235)  # colour of ignored pixels
GOLDEN = 0.618033988749895  # steps of this length round a circle never come close to where they have been
FIRST = 0.58  # hue of class 0, a blue: it is often the background
TONES = ((0.45, 0.65), (0.85, 0.95), (0.55, 0.85), (0.95, 0.60))  # saturation and value, in turn


def palette(classes: int) -> np.ndarray:
    """A colour for each class, uint8 [classes, 3]. The first ones are the same for any number of classes."""
    colours = [colorsys.hsv_to_rgb((FIRST + GOLDEN * i) % 1, *TONES[i % len(TONES)]) for i in range(classes)]
    return np.rint(255 * np.array(colours)).astype(np.uint8).reshape(classes, 3)


def paint(labels: np.ndarray, classes: int) -> np.ndarray:
    """The picture of a label map. Labels that are no class are UNLABELLED."""
    colours = np.concatenate([palette(classes), np.array([UNLABELLED], np.uint8)])
    return colours[np.minimum(labels, classes)]


def lay_over(image: np.ndarray, labels: np.ndarray, classes: int, opacity: float = 0.5) -> np.ndarray:
    """A picture with the classes' colours over it, at the same size; nothing where a label is no class."""
    mixed = (1 - opacity) * image + opacity * paint(labels, classes)
    return np.where((labels < classes)[..., None], np.rint(mixed), image).astype(np.uint8)


def reduced(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A label map at another size (height, width), by nearest neighbour."""
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(np.int64) for new, old in zip(size, labels.shape, strict=True)
    )
    return labels[rows][:, columns]


def as_base64(picture: np.ndarray, kind: str) -> str:
    """The file of a picture as text; kind: "JPEG" or "PNG"."""
    file = BytesIO()
    options = {"quality": 88} if kind == "JPEG" else {"optimize": True}
    Image.fromarray(picture).save(file, kind, **options)
    return base64.b64encode(file.getvalue()).decode()


def from_base64(text: str) -> np.ndarray:
    """The picture that `as_base64` stored."""
    return np.asarray(Image.open(BytesIO(base64.b64decode(text))).convert("RGB"))
