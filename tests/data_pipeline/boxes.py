"""Sources with boxes for the tests of preparation, in COCO's layout and in Pascal VOC's."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from data_pipeline.preparation.listing import list_source, open_source
from data_pipeline.preparation.object_listing import ObjectOptions
from tests.data_pipeline.images import encoded, picture
from tests.data_pipeline.label_maps import write

CATEGORIES = {7: "wolf", 3: "bear", 90: "fox"}  # number → name, not in the order of the numbers
CLASSES = ("bear", "wolf", "fox")
SIZES = ((40, 30), (30, 40), (33, 57))  # (width, height) of the images in turn


def coco(split: str, images: int, per_image: int = 3, seed: int = 0) -> dict:
    """COCO's dict: random boxes of random classes, crowds with runs, others with polygons; every fifth image: none."""
    random = np.random.default_rng([seed, len(split)])
    document = {
        "images": [],
        "annotations": [],
        "categories": [{"id": number, "name": name} for number, name in CATEGORIES.items()],
    }
    for i in range(images):
        width, height = SIZES[i % len(SIZES)]
        # Ids are neither in the order of the names nor contiguous.
        image = {"id": 1000 - 7 * i, "file_name": f"{i:03d}.jpg", "width": width, "height": height}
        document["images"].append({**image, "license": 1})
        for k in range(0 if i % 5 == 4 else per_image):
            x, y = random.uniform(0, width * 0.7), random.uniform(0, height * 0.7)
            w, h = random.uniform(1, width - x), random.uniform(1, height - y)
            crowd = k == 2 and i % 3 == 0
            corners = [x, y, x + w, y, x + w, y + h]
            document["annotations"].append(
                {
                    "id": 5 * len(document["annotations"]) + 11,
                    "image_id": image["id"],
                    "category_id": int(random.choice(list(CATEGORIES))),
                    "bbox": [x, y, w, h],
                    "area": w * h * random.uniform(0.3, 1),
                    "iscrowd": int(crowd),
                    "segmentation": {"size": [height, width], "counts": "me;4j75"} if crowd else [corners],
                }
            )
    random.shuffle(document["annotations"])
    return document


def make_coco(root: Path, train: int = 6, val: int = 5, folders: str = "{}", names: str = "{}") -> Path:
    """A folder in COCO's layout. folders: where a split's images lie. names: the split in the annotations' names."""
    for split, count in (("train", train), ("val", val)):
        if count:
            document = coco(split, count)
            write(root / f"annotations/instances_{names.format(split)}.json", json.dumps(document).encode())
            for i, image in enumerate(document["images"]):
                data = encoded(picture(100 * len(split) + i, size=(image["width"], image["height"])))
                write(root / folders.format(split) / image["file_name"], data)
    return root


def document_of(root: Path, split: str) -> dict:
    return json.loads((root / f"annotations/instances_{split}.json").read_text())


def change(root: Path, split: str, document: dict) -> None:
    (root / f"annotations/instances_{split}.json").write_text(json.dumps(document))


def voc_xml(size: tuple[int, int], objects: Iterable[tuple]) -> bytes:
    """objects: (class, xmin, ymin, xmax, ymax, difficult) of each."""
    parts = [
        f"<object><name>{name}</name><difficult>{difficult}</difficult>"
        f"<bndbox><ymin>{top}</ymin><xmin>{left}</xmin><xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox>"
        "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
        "</object>"
        for name, left, top, right, bottom, difficult in objects
    ]
    width, height = size
    shape = f"<size><width>{width}</width><height>{height}</height></size>"
    return f"<annotation>{shape}{''.join(parts)}</annotation>".encode()


def make_voc(root: Path, lists: dict[str, Iterable[str]], objects: dict[str, Iterable[tuple]]) -> Path:
    """A folder in Pascal VOC's layout. lists: images of each list. objects: of each image (`voc_xml`), of 40x30."""
    for name, images in lists.items():
        write(root / f"ImageSets/Main/{name}.txt", "".join(f"{image}\n" for image in images).encode())
        write(root / f"ImageSets/Main/bear_{name}.txt", "".join(f"{image} -1\n" for image in images).encode())
    for number, (image, found) in enumerate(objects.items()):
        write(root / f"JPEGImages/{image}.jpg", encoded(picture(number, size=SIZES[0])))
        write(root / f"Annotations/{image}.xml", voc_xml(SIZES[0], found))
    return root


def listing_of(root: Path, **options):
    return list_source(open_source(str(root), root.parent), object_options=ObjectOptions(**options))


def stored_objects(items) -> list[dict]:
    return [json.loads(document) for document in items.objects.documents]
