"""Draw the demo's dataset: ten classes of small JPEGs, five shapes times two textures, as an image folder.

    python examples/draw_dataset.py DEST [--train N] [--val N] [--size PIXELS] [--seed S]

A class is named after its shape and texture: `cross-checks`, `ring-stripes`. Colours, mean colour, place, size, small
rotations, background, clutter and noise are random with the same distributions for all classes, and both textures cover
half of the shape. So mean colours do not reveal the class; only shape and texture do. Every image is a pure function of
(seed, split, index).
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SHAPES = ("cross", "disk", "ring", "square", "triangle")
TEXTURES = ("checks", "stripes")
CLASSES = tuple(f"{shape}-{texture}" for shape in SHAPES for texture in TEXTURES)
SPLITS = ("train", "val")
TURN = 0.2  # maximal rotation in radians; with arbitrary rotations, a small transformer needs far more training


def draw(size: int, seed: int, split: int, index: int) -> tuple[np.ndarray, int]:
    """One image, uint8 [size, size, 3], and its label: `index` modulo the number of classes."""
    random = np.random.Generator(np.random.Philox(key=np.array([seed, split << 48 | index], dtype=np.uint64)))
    label = index % len(CLASSES)
    shape, texture = SHAPES[label // len(TEXTURES)], TEXTURES[label % len(TEXTURES)]

    # Coordinates run from -1 to 1 over the image. The shape is drawn at twice the size and averaged, for smooth edges.
    axis = (np.arange(2 * size, dtype=np.float32) + 0.5) / size - 1
    radius = random.uniform(0.7, 0.9)
    centre = random.uniform(-1, 1, 2) * (1 - radius)
    x, y = turned(axis, centre, random.uniform(-TURN, TURN))
    inside = inside_of(shape, x / np.float32(radius), y / np.float32(radius))

    # The texture has an independent place and direction, so its phase does not reveal the shape.
    u, v = turned(axis, random.uniform(-1, 1, 2), random.uniform(-TURN, TURN))
    frequency = np.float32(2 * np.pi / random.uniform(0.38, 0.46))
    wave = np.sin(frequency * u)
    if texture == "checks":
        wave *= np.sin(frequency * v)
    dark, light = _two_colours(random)
    alpha, bright = _halved(inside), _halved(inside & (wave > 0))

    image = background(axis[::2], random) * (1 - alpha) + bright * light + (alpha - bright) * dark
    return exposed(image, random), label


def _halved(mask: np.ndarray) -> np.ndarray:
    """The share of each 2x2 pixels that is in the mask, [2n, 2n] -> [n, n, 1]."""
    counts = mask.view(np.uint8)
    return (counts[::2, ::2] + counts[1::2, ::2] + counts[::2, 1::2] + counts[1::2, 1::2])[..., None] / np.float32(4)


def turned(axis: np.ndarray, centre: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """The coordinates of every pixel in a frame at `centre`, rotated by `angle` (radians)."""
    x, y = axis[None, :] - np.float32(centre[0]), axis[:, None] - np.float32(centre[1])
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return x * cos + y * sin, y * cos - x * sin


def inside_of(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether each pixel lies in the shape; all shapes approximately fill the unit circle."""
    if shape == "cross":
        return np.minimum(abs(x), abs(y)) < np.where(np.maximum(abs(x), abs(y)) < 1, 0.28, 0)
    if shape == "square":
        return np.maximum(abs(x), abs(y)) < 0.8
    if shape == "triangle":
        return (y > -0.55) & (y + abs(x) * 3**0.5 < 1.1)
    distance = x**2 + y**2
    return (distance < 0.81) & (distance > (0.3 if shape == "ring" else -1))


def _two_colours(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The two colours of the texture, with very different brightness; the dark one is often close to the background."""
    return random.uniform(30, 90, 3), random.uniform(215, 255, 3)


def background(axis: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A gradient between two colours with a few bars that are much smaller than the shapes, [size, size, 3]."""
    first = random.uniform(0, 60, 3).astype(np.float32)
    second = first + random.uniform(0, 40, 3).astype(np.float32)
    u, _ = turned(axis, np.zeros(2), random.uniform(0, 2 * np.pi))
    image = first + (second - first) * (u[..., None] * 0.35 + 0.5)
    for _ in range(random.integers(0, 3)):
        u, v = turned(axis, random.uniform(-1, 1, 2), random.uniform(0, 2 * np.pi))
        width, length = random.uniform(0.04, 0.12), random.uniform(0.1, 0.3)
        image[(abs(u) < length) & (abs(v) < width)] = random.uniform(0, 200, 3)
    return image


def exposed(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """An image [h, w, 3] as uint8, with a random contrast, a random mean colour and noise.

    The mean is random because brightness would reveal the area of the shapes otherwise.
    """
    image = (image - image.mean(axis=(0, 1))) * random.uniform(0.55, 0.85) + random.uniform(85, 130, 3)
    image += random.uniform(2, 10) * random.standard_normal(image.shape, dtype=np.float32)
    return image.clip(0, 255).round().astype(np.uint8)


def begin(dest: Path, wanted: dict) -> bool:
    """Make the folder `dest` for the drawn dataset that `wanted` describes. Returns False if it is complete already.

    Raises ValueError if `dest` contains another dataset or other files.
    """
    complete, begun = dest / "drawn.json", dest / "drawing.json"
    for record in (complete, begun):
        if record.exists() and json.loads(record.read_text()) != wanted:
            raise ValueError(f"{dest} was drawn with other arguments: give another folder, or delete it.")
    if complete.exists():
        return False
    if dest.exists() and any(dest.iterdir()) and not begun.exists():
        raise ValueError(f"{dest} is not empty: give another folder, or delete it.")
    dest.mkdir(parents=True, exist_ok=True)
    begun.write_text(json.dumps(wanted))
    return True


def finish(dest: Path) -> None:
    """Mark the dataset as complete; call it last."""
    (dest / "drawing.json").rename(dest / "drawn.json")


def draw_dataset(dest: Path, *, train: int, val: int, size: int, seed: int) -> bool:
    """Write `dest/{train,val}/<class>/<index>.jpg`. Returns False if the complete dataset exists already.

    Raises ValueError if `dest` contains another dataset or other files.
    """
    if not begin(dest, {"train": train, "val": val, "size": size, "seed": seed, "classes": list(CLASSES)}):
        return False
    for number, (split, count) in enumerate(zip(SPLITS, (train, val), strict=True)):
        for name in CLASSES:
            (dest / split / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            pixels, label = draw(size, seed, number, index)
            Image.fromarray(pixels).save(dest / split / CLASSES[label] / f"{index:06d}.jpg", quality=92, subsampling=0)
    finish(dest)
    return True


def command_line(
    arguments: Sequence[str],
    write: Callable[..., bool],
    description: str,
    classes: Sequence[str],
    *,
    train: int,
    val: int,
    least: int = 1,
    size: int | None = None,
) -> int:
    """The program around `write`, a `draw_dataset`; returns the exit code.

    train, val, and size if that is a choice: defaults. least: images of a split.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("dest", metavar="DEST", type=Path)
    parser.add_argument("--train", type=int, default=train, metavar="N", help="images (default: %(default)s)")
    parser.add_argument("--val", type=int, default=val, metavar="N", help="images (default: %(default)s)")
    if size:
        parser.add_argument(
            "--size", type=int, default=size, metavar="PIXELS", help="width and height (default: %(default)s)"
        )
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    options = parser.parse_args(arguments)
    lowest = {"train": least, "val": least, "seed": 0} | ({"size": 8} if size else {})
    for name, limit in lowest.items():
        if getattr(options, name) < limit:
            print(f"error: --{name} must be at least {limit}", file=sys.stderr)
            return 78
    try:
        fresh = write(**vars(options))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 78
    state = "is drawn" if fresh else "is already drawn"
    print(f"{options.dest} {state}: {options.train} train, {options.val} val, {len(classes)} classes")
    return 0


def main(arguments: Sequence[str]) -> int:
    description = "Draw the demo's dataset: five shapes times two textures, as an image folder."
    sizes = dict(train=6000, val=1000, least=len(CLASSES), size=32)
    return command_line(arguments, draw_dataset, description, CLASSES, **sizes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
