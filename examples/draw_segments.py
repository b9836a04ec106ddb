"""Draw a dataset for semantic segmentation: scenes of a few shapes, with the exact class of every pixel.

    python examples/draw_segments.py DEST [--train N] [--val N] [--seed S]

Written are `DEST/images/<split>/*.jpg`, `DEST/annotations/<split>/*.png` and `DEST/classes.txt`, which
launch/prepare.py reads. The classes are the background and the five shapes of draw_dataset.py, each with a texture
of its own and any bright colour. Shapes may cover one another and reach over the border; in one image of four the
pixels at edges are ignored (255). Images have different sizes. Every image is a pure function of (seed, split, index).
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from draw_dataset import SHAPES, SPLITS, background, begin, command_line, exposed, finish, inside_of, turned
from PIL import Image

CLASSES = ("background", *SHAPES)
IGNORED = 255
SIDES = (96, 112, 128)  # pixels
TURN = 0.5  # maximal rotation in radians


def draw(seed: int, split: int, index: int) -> tuple[np.ndarray, np.ndarray]:
    """One scene, uint8 [h, w, 3], and the class of each pixel, uint8 [h, w]."""
    random = np.random.Generator(np.random.Philox(key=np.array([seed, 1 << 60 | split << 48 | index], dtype=np.uint64)))
    height, width = random.choice(SIDES, 2)
    side = max(height, width)
    axis = (np.arange(side, dtype=np.float32) + 0.5) * 2 / side - 1
    image = background(axis, random)
    labels = np.zeros((side, side), np.uint8)
    ignore_edges = random.random() < 0.25
    for _ in range(random.integers(2, 6)):
        number = int(random.integers(len(SHAPES)))
        radius = np.float32(random.uniform(36, 64) / side)
        centre = random.uniform(-0.9, 0.9, 2) * (width / side, height / side)
        x, y = (values / radius for values in turned(axis, centre, random.uniform(-TURN, TURN)))
        inside = inside_of(SHAPES[number], x, y)
        colour = random.uniform(130, 255, 3)  # brighter than the background
        bright = texture(SHAPES[number], x * radius * side, y * radius * side)
        image = np.where(inside[..., None], colour * np.where(bright, 1, 0.6)[..., None], image)
        labels[inside] = 1 + number
        if ignore_edges:
            labels[_near_edge(inside)] = IGNORED
    top, left = (side - height) // 2, (side - width) // 2
    part = np.s_[top : top + height, left : left + width]
    return exposed(image, random)[part], labels[part]


def texture(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether each place of a shape is bright; x, y: in units of half a pixel."""
    across, down = np.sin(x * 0.4) > 0, np.sin(y * 0.4) > 0
    if shape == "ring":
        return np.ones_like(across)
    return {"cross": across, "square": down, "disk": across ^ down, "triangle": across & down}[shape]


def _near_edge(inside: np.ndarray) -> np.ndarray:
    """Whether a pixel of the other kind is among the eight around each pixel."""
    padded = np.pad(inside, 1, mode="edge")
    height, width = inside.shape
    around = [padded[y : y + height, x : x + width] for y in range(3) for x in range(3)]
    return np.logical_or.reduce(around) & ~np.logical_and.reduce(around)


def draw_dataset(dest: Path, *, train: int, val: int, seed: int) -> bool:
    """Write the dataset. Returns False if it is complete already.

    Raises ValueError if `dest` contains another dataset or other files.
    """
    if not begin(dest, {"train": train, "val": val, "seed": seed, "classes": list(CLASSES)}):
        return False
    for number, (split, count) in enumerate(zip(SPLITS, (train, val), strict=True)):
        images, annotations = dest / "images" / split, dest / "annotations" / split
        images.mkdir(parents=True, exist_ok=True)
        annotations.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            pixels, labels = draw(seed, number, index)
            Image.fromarray(pixels).save(images / f"{index:06d}.jpg", quality=92, subsampling=0)
            Image.fromarray(labels).save(annotations / f"{index:06d}.png")
    (dest / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    finish(dest)
    return True


def main(arguments: Sequence[str]) -> int:
    description = "Draw scenes of shapes with the exact class of every pixel."
    return command_line(arguments, draw_dataset, description, CLASSES, train=2000, val=200)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
