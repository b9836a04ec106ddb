"""Draw the demo's dataset: ten classes of small JPEGs, five shapes times two textures, as an image folder.

    python examples/draw_dataset.py DEST [--train N] [--val N] [--size PIXELS] [--seed S]

A class is named by its shape and its texture: `cross-dots`, `ring-stripes`. Colours, place, size, rotation, contrast, background,
clutter and noise are drawn at random and alike for all classes, and both textures cover half of the shape: neither a colour nor a mean
tells a class, shape and texture together do. Every image is a pure function of (seed, split, index).
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

SHAPES = ("cross", "disk", "ring", "square", "triangle")
TEXTURES = ("dots", "stripes")
CLASSES = tuple(f"{shape}-{texture}" for shape in SHAPES for texture in TEXTURES)
SPLITS = ("train", "val")


def draw(size: int, seed: int, split: int, index: int) -> tuple[np.ndarray, int]:
    """One image, uint8 [size, size, 3], and its label: `index` modulo the number of classes."""
    random = np.random.Generator(np.random.Philox(key=np.array([seed, split << 48 | index], dtype=np.uint64)))
    label = index % len(CLASSES)
    shape, texture = SHAPES[label // len(TEXTURES)], TEXTURES[label % len(TEXTURES)]

    # Coordinates run from -1 to 1 over the image; drawn at twice the size, then averaged, so that edges are smooth.
    axis = (np.arange(2 * size) + 0.5) / size - 1
    image = _background(axis, random)
    radius = random.uniform(0.55, 0.75)
    centre = random.uniform(-1, 1, 2) * (0.95 - radius)
    x, y = _turned(axis, centre, random.uniform(0, 2 * np.pi))
    inside = _inside(shape, x / radius, y / radius)

    # The texture has a place and a direction of its own: its phase says nothing about the shape.
    u, v = _turned(axis, random.uniform(-1, 1, 2), random.uniform(0, 2 * np.pi))
    period = random.uniform(0.28, 0.36)
    wave = np.sin(2 * np.pi * u / period)
    if texture == "dots":
        wave = wave * np.sin(2 * np.pi * v / period)
    dark, light = _two_colours(random)
    image = np.where(inside[..., None], np.where(wave[..., None] > 0, light, dark), image)

    image = image.reshape(size, 2, size, 2, 3).mean(axis=(1, 3))
    image += random.normal(0, random.uniform(2, 12), image.shape)
    return image.clip(0, 255).round().astype(np.uint8), label


def _turned(axis: np.ndarray, centre: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Every pixel's coordinates in a frame at `centre`, turned by `angle` (radians)."""
    x, y = axis[None, :] - centre[0], axis[:, None] - centre[1]
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which pixels lie in the shape; all shapes fill about the unit circle."""
    if shape == "cross":
        return np.minimum(abs(x), abs(y)) < np.where(np.maximum(abs(x), abs(y)) < 1, 0.28, 0)
    if shape == "square":
        return np.maximum(abs(x), abs(y)) < 0.8
    if shape == "triangle":
        return (y > -0.55) & (y + abs(x) * 3**0.5 < 1.1)
    distance = x**2 + y**2
    return (distance < 0.81) & (distance > (0.3 if shape == "ring" else -1))


def _two_colours(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two colours of any hue, the second clearly brighter or clearly darker than the first."""
    middle = random.uniform(85, 170, 3)
    step = random.uniform(45, 75) * random.choice([-1, 1]) * random.uniform(0.7, 1.3, 3)
    return middle - step, middle + step


def _background(axis: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A slope between two colours, with a few bars and blobs lying about, too small to be taken for the shape. [2 size, 2 size, 3]"""
    first, second = random.uniform(30, 225, (2, 3))
    u, _ = _turned(axis, np.zeros(2), random.uniform(0, 2 * np.pi))
    image = first + (second - first) * (u[..., None] * 0.35 + 0.5)
    for _ in range(random.integers(2, 6)):
        u, v = _turned(axis, random.uniform(-1, 1, 2), random.uniform(0, 2 * np.pi))
        width, length = random.uniform(0.04, 0.12), random.uniform(0.1, 0.5)
        image[(abs(u) < length) & (abs(v) < width)] = random.uniform(0, 255, 3)
    return image


def draw_dataset(dest: Path, *, train: int, val: int, size: int, seed: int) -> bool:
    """Write `dest/{train,val}/<class>/<index>.jpg`; False if the same dataset is there already, complete.

    Raises ValueError where another dataset, or something else, is there.
    """
    wanted = {"train": train, "val": val, "size": size, "seed": seed, "classes": list(CLASSES)}
    complete = dest / "drawn.json"  # written last
    begun = dest / "drawing.json"
    for record in (complete, begun):
        if record.exists() and json.loads(record.read_text()) != wanted:
            raise ValueError(f"{dest} was drawn with other arguments: give another folder, or delete it.")
    if complete.exists():
        return False
    if dest.exists() and any(dest.iterdir()) and not begun.exists():
        raise ValueError(f"{dest} is not empty: give another folder, or delete it.")
    dest.mkdir(parents=True, exist_ok=True)
    begun.write_text(json.dumps(wanted))
    for number, (split, count) in enumerate(zip(SPLITS, (train, val), strict=True)):
        for name in CLASSES:
            (dest / split / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            pixels, label = draw(size, seed, number, index)
            Image.fromarray(pixels).save(dest / split / CLASSES[label] / f"{index:06d}.jpg", quality=92, subsampling=0)
    begun.rename(complete)
    return True


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Draw the demo's dataset: five shapes times two textures, as an image folder.")
    parser.add_argument("dest", metavar="DEST", type=Path)
    parser.add_argument("--train", type=int, default=6000, metavar="N", help="images (default: %(default)s)")
    parser.add_argument("--val", type=int, default=1000, metavar="N", help="images (default: %(default)s)")
    parser.add_argument("--size", type=int, default=32, metavar="PIXELS", help="width and height (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    options = parser.parse_args(arguments)
    try:
        fresh = draw_dataset(options.dest, train=options.train, val=options.val, size=options.size, seed=options.seed)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 78
    print(f"{options.dest} {'is drawn' if fresh else 'is already drawn'}: {options.train} train, {options.val} val, {len(CLASSES)} classes")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
