"""Draw a dataset for object detection: scenes of a few shapes, with their exact boxes and outlines, in COCO's layout.

    python examples/draw_boxes.py DEST [--train N] [--val N] [--seed S]

Written are `DEST/<split>/*.jpg` and `DEST/annotations/instances_<split>.json`, which launch/prepare.py reads. The
classes are the five shapes of draw_dataset.py, each with a texture of its own and any bright colour, about 14 to 140
pixels wide, small ones being as frequent as large ones. Shapes lie inside the image and hardly cover one another. An
outline has a shape's own corners, or 48 for a circle, in hundredths of a pixel; its extremes are the box, and the
pixels whose centres it holds are the area. Images are 160 pixels wide, high, or both. Every image is a pure function of
(seed, split, index).
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from draw_dataset import SHAPES, SPLITS, background, begin, command_line, exposed, finish, inside_of, turned
from draw_segments import texture
from PIL import Image

SIZES = ((160, 160), (160, 120), (120, 160))  # (width, height) in pixels
RADII = (8, 0.45)  # the smallest in pixels, the largest as a share of the shorter side
TURN = 0.5  # maximal rotation in radians
TRIES = 10  # places that are tried for a shape
OVERLAP = 0.1  # the share of the smaller of two boxes that may lie in the other


def draw(seed: int, split: int, index: int) -> tuple[np.ndarray, list[dict]]:
    """One scene, uint8 [h, w, 3], and its objects: {"category_id", "bbox", "area", "segmentation"}."""
    random = np.random.Generator(np.random.Philox(key=np.array([seed, 1 << 61 | split << 48 | index], dtype=np.uint64)))
    width, height = SIZES[random.integers(len(SIZES))]
    side = max(width, height)
    image = background((np.arange(side, dtype=np.float32) + 0.5) * 2 / side - 1, random)[:height, :width]
    objects, largest = [], RADII[1] * min(width, height)
    radii = np.exp(random.uniform(*np.log([RADII[0], largest]), random.integers(1, 7)))
    for radius in sorted(radii, reverse=True):  # large ones first, as they find no place later
        shape, angle = SHAPES[random.integers(len(SHAPES))], random.uniform(-TURN, TURN)
        corners = radius * outline(shape, angle)
        low, high = corners.min(axis=0), corners.max(axis=0)
        places = random.uniform(-low, np.array([width, height]) - high, (TRIES, 2))
        centre = next((place for place in places if _is_free([*(place + low), *(high - low)], objects)), None)
        if centre is None:
            continue
        x, y = turned(np.arange(side, dtype=np.float32) + 0.5, centre, angle)
        x, y = x[:height, :width], y[:height, :width]
        inside = inside_of(shape, x / np.float32(radius), y / np.float32(radius))
        colour = random.uniform(130, 255, 3)  # brighter than the background
        image[inside] = (colour * np.where(texture(shape, 2 * x, 2 * y), 1, 0.6)[..., None])[inside]
        points = np.round(centre + corners, 2)
        left, top = points.min(axis=0)
        right, bottom = points.max(axis=0)
        box = [round(float(value), 2) for value in (left, top, right - left, bottom - top)]
        objects.append(
            {
                "category_id": SHAPES.index(shape) + 1,
                "bbox": box,
                "area": float(inside.sum()),
                "segmentation": [points.ravel().tolist()],
            }
        )
    return exposed(image, random), objects


def outline(shape: str, angle: float) -> np.ndarray:
    """The corners of a shape of radius 1 (draw_dataset.inside_of) that is rotated by `angle`, [n, 2].

    That of a ring goes along its outer circle, and back along the inner one. Circles are not rotated.
    """
    if shape in ("disk", "ring"):
        turns = np.linspace(0, 2 * np.pi, 49)
        circle = np.stack([np.cos(turns), np.sin(turns)], axis=1)
        return 0.9 * circle[:-1] if shape == "disk" else np.concatenate([0.9 * circle, 0.3**0.5 * circle[::-1]])
    corners = {
        "square": [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
        "triangle": [(-1.65 / 3**0.5, -0.55), (1.65 / 3**0.5, -0.55), (0, 1.1)],
    }
    quarter = [(0.28, 1), (0.28, 0.28), (1, 0.28)]  # of a cross
    for _ in range(4):
        corners.setdefault("cross", []).extend(quarter)
        quarter = [(y, -x) for x, y in quarter]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array(corners[shape]) @ np.array([[cos, sin], [-sin, cos]])


def _is_free(box: list[float], objects: list[dict]) -> bool:
    x, y, width, height = box
    for each in objects:
        left, top, w, h = each["bbox"]
        shared = max(0, min(x + width, left + w) - max(x, left)) * max(0, min(y + height, top + h) - max(y, top))
        if shared > OVERLAP * min(width * height, w * h):
            return False
    return True


def draw_dataset(dest: Path, *, train: int, val: int, seed: int) -> bool:
    """Write the dataset. Returns False if it is complete already.

    Raises ValueError if `dest` contains another dataset or other files.
    """
    if not begin(dest, {"train": train, "val": val, "seed": seed, "classes": list(SHAPES), "boxes": True}):
        return False
    (dest / "annotations").mkdir(exist_ok=True)
    categories = [{"id": number, "name": name} for number, name in enumerate(SHAPES, start=1)]
    for number, (split, count) in enumerate(zip(SPLITS, (train, val), strict=True)):
        (dest / split).mkdir(exist_ok=True)
        images, annotations = [], []
        for index in range(count):
            pixels, objects = draw(seed, number, index)
            name, (height, width) = f"{index:06d}.jpg", pixels.shape[:2]
            Image.fromarray(pixels).save(dest / split / name, quality=92, subsampling=0)
            images.append({"id": index + 1, "file_name": name, "width": width, "height": height})
            for each in objects:
                annotations.append({"id": len(annotations) + 1, "image_id": index + 1, **each, "iscrowd": 0})
        document = {"images": images, "annotations": annotations, "categories": categories}
        (dest / f"annotations/instances_{split}.json").write_text(json.dumps(document))
    finish(dest)
    return True


def main(arguments: Sequence[str]) -> int:
    description = "Draw scenes of shapes with their boxes and outlines."
    return command_line(arguments, draw_dataset, description, SHAPES, train=1200, val=200)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
