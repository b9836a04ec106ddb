"""The JSON of a sample of detection, `<key>.json` beside `<key>.jpg`:

    {"image_id", "file_name", "width", "height",
     "objects": [{"id", "label", "bbox": [x, y, width, height], "area", "iscrowd", "segmentation"}]}

Boxes are in pixels of the image, labels count from 0. `file_name` and `segmentation` (polygons, or runs as COCO encodes
them) are kept as the source has them, and may be absent.
"""

import json

from data_pipeline.validate import BadImage, errors_as_bad_image, shortened

LARGEST = 1e15  # pixels; a number beyond it is damage, and its sums might not be finite


def write_objects(image: dict, objects: list[dict]) -> bytes:
    """The JSON of an image with these objects."""
    return json.dumps({**image, "objects": objects}, separators=(",", ":")).encode()


def read_objects(data: bytes, size: tuple[int, int]) -> tuple[int, list[tuple]]:
    """The image's id, and its objects as rows of split.OBJECT.

    size: (width, height) of the image. Raises BadImage for another form, another size, or a box that cannot be right.
    """
    with errors_as_bad_image("its boxes cannot be read: "):
        document = json.loads(data)
        image_id, found = document["image_id"], (document["width"], document["height"])
        if not is_whole(image_id):
            raise _bad(f"its image_id {image_id!r} is not a whole number")
        if found != size:
            raise _bad("its boxes are those of {}x{} pixels, and it has {}x{}".format(*found, *size))
        return image_id, [_row(each, size) for each in document["objects"]]


def _row(each: dict, size: tuple[int, int]) -> tuple:
    box, area, label, crowd, number = (each[name] for name in ("bbox", "area", "label", "iscrowd", "id"))
    if not is_whole(number):
        raise _bad(f"the id {number!r} of an object is not a whole number")
    if not (is_whole(label) and 0 <= label < 2**32):
        raise _bad(f"object {number} has the label {label!r}, no class")
    if crowd not in (0, 1):
        raise _bad(f"object {number} has iscrowd {crowd!r}, neither 0 nor 1")
    if fault := fault_of_box(box, area, *size):
        raise _bad(f"object {number}: {fault}")
    return (*box, area, label, crowd, number)


def _bad(reason: str) -> BadImage:
    return BadImage(shortened(reason))


def is_whole(value: object) -> bool:
    """Whether `value` is an integer that the tables can hold."""
    return type(value) is int and abs(value) < 2**63


def fault_of_box(box: object, area: object, width: int, height: int) -> str | None:
    """Why the box of an object in an image of this size cannot be right, or None."""
    if not (isinstance(box, list) and len(box) == 4 and all(map(_is_finite, box))):
        return f"its box {box!r:.100} is not four finite numbers"
    x, y, w, h = box
    if w <= 0 or h <= 0:
        return f"its box is {'inverted' if min(w, h) < 0 else 'empty'}: width {w}, height {h}"
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        return f"its box {box} lies outside of the image of {width}x{height} pixels"
    if not _is_finite(area) or area < 0:
        return f"its area {area!r:.100} is not a finite number of pixels"
    return None


def is_partly_outside(box: list, width: int, height: int) -> bool:
    x, y, w, h = box
    return x < 0 or y < 0 or x + w > width or y + h > height


def is_learnt(box: list, area: float, width: int, height: int) -> bool:
    """Whether training uses an object that is no crowd: see object_targets.ObjectTargets."""
    x, y, w, h = box
    return area > 0 and min(x + w, width) - max(x, 0) >= 1 and min(y + h, height) - max(y, 0) >= 1


def _is_finite(value: object) -> bool:
    return type(value) in (int, float) and abs(value) <= LARGEST
