"""Sources with label maps for the tests of preparation, and helpers that read what was prepared."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.manifest import open_manifest
from data_pipeline.split import LABEL_MAP
from tests.data_pipeline.images import encoded, picture

CLASSES = ("sky", "road", "tree")
SIZE = (40, 30)  # width, height


def labels(number: int, classes: int = len(CLASSES), ignored: int = 255, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A map with every class and ignored pixels, different for every `number`: uint8 or uint16 [height, width]."""
    values = np.random.default_rng(number).integers(0, classes + 1, (size[1], size[0]))
    values[0, : classes + 1] = np.arange(classes + 1)[: size[0]]
    return np.where(values == classes, ignored, values).astype(np.uint16 if classes > 255 else np.uint8)


def png(values: np.ndarray, **options) -> bytes:
    return encoded(Image.fromarray(values), "PNG", **options)


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def make_folder(root: Path, train: int = 6, val: int = 3) -> Path:
    """The usual layout, with label maps as they are stored."""
    for split, count in (("train", train), ("val", val)):
        for i in range(count):
            number = 100 * len(split) + i
            write(root / f"images/{split}/{i}.jpg", encoded(picture(number, size=SIZE)))
            write(root / f"annotations/{split}/{i}.png", png(labels(number)))
    write(root / "classes.txt", "\n".join(CLASSES).encode())
    return root


def stored_pairs(dest: Path, split: str) -> list[tuple[bytes, bytes]]:
    """(JPEG, PNG) of every sample by its id, through the index and the annotation."""
    split = open_manifest(dest).split(split)
    shards = [(dest / shard.file).read_bytes() for shard in split.shards]

    def read(record) -> bytes:
        return shards[record["shard"]][int(record["offset"]) : int(record["offset"]) + int(record["size"])]

    return [(read(image), read(label)) for image, label in zip(split.records, split.annotation(LABEL_MAP), strict=True)]


def original_pairs(root: Path, split: str) -> set[tuple[bytes, bytes]]:
    """(JPEG, PNG) of every sample of a folder's split."""
    names = [path.stem for path in (root / "images" / split).iterdir()]
    return {
        ((root / f"images/{split}/{name}.jpg").read_bytes(), (root / f"annotations/{split}/{name}.png").read_bytes())
        for name in names
    }


def ade20k(root: Path, values: np.ndarray) -> Path:
    """ADE20K's own layout, with the same map for each of two images."""
    for split, name in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        write(root / f"images/{split}/{name}.jpg", encoded(picture(1, size=SIZE)))
        write(root / f"annotations/{split}/{name}.png", png(values))
    rows = ("wall", "building, edifice", "pool table, billiard table, snooker table")
    table = "Idx\tRatio\tTrain\tVal\tName\n" + "".join(f"{i}\t0.1\t20\t2\t{name}\n" for i, name in enumerate(rows, 1))
    write(root / "objectInfo150.txt", table.encode())
    write(root / "sceneCategories.txt", b"ADE_train_00000001 airport_terminal\n")
    return root


def cityscapes(root: Path, kind: str, values: np.ndarray) -> Path:
    """Cityscapes' own layout. kind: of the maps, "labelIds" or "labelTrainIds"."""
    for split in ("train", "val"):
        name = f"{split}/ulm/ulm_000000_000019"
        write(root / f"leftImg8bit/{name}_leftImg8bit.png", encoded(picture(1, size=SIZE), "PNG"))
        write(root / f"gtFine/{name}_gtFine_{kind}.png", png(values))
        write(root / f"gtFine/{name}_gtFine_color.png", encoded(picture(2, size=SIZE), "PNG"))
        write(root / f"gtFine/{name}_gtFine_polygons.json", b"{}")
    write(root / "leftImg8bit/test/bonn/bonn_1_leftImg8bit.png", b"")
    return root
