"""Label maps as pictures. Without torch.

A picture is uint8 [height, width, 3], RGB; a label map [height, width], of any integer type.
"""

import numpy as np

from train.tasks.drawing import palette

UNLABELLED = (235, 235, 235)  # colour of ignored pixels


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
