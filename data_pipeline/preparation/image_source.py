"""The data types of a source of labelled images and of its listing.

In classification every image has one class, in segmentation it has a label map, in detection it has objects.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipeline.label_png import LabelCoding
from data_pipeline.split import LABEL_MAP, OBJECTS

SPLITS = ("train", "val")
# Names of folders and shards, in lower case, and their split.
SPLIT_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}


@dataclass(frozen=True)
class Source:
    """A place to read images from.

    kind: "folder", "tar" or "torchvision". path: the folder, plain tar or dataset's root.
    """

    kind: str
    path: Path
    dataset: str = ""  # torchvision only: the name of the dataset's class


@dataclass(frozen=True)
class Files:
    """The images of a folder or tar as parallel columns, [n], sorted by name. others: the number of other files.

    texts: the contents of the files that may name classes or hold boxes, by name; each is read when it is asked for.
    unread: files that look as if they held boxes, and whose names are in no known layout. folders: names of folders,
    with a slash at the end; all that have no images are among them. beside: the first other file whose name ends as
    those of annotations do, or "".
    """

    source: Source
    names: list[str]
    offsets: np.ndarray
    sizes: np.ndarray
    others: int
    texts: Mapping[str, bytes]
    unread: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    beside: str = ""


class Annotations(NamedTuple):
    """The boxes of one split in a source.

    where: the file that lists them, for sentences. folders: that may hold the images. read: returns them as COCO's
    dict. files: the number of files that hold them.
    """

    split: str
    where: str
    folders: list[str]
    read: Callable[[], dict]
    files: int


@dataclass(frozen=True)
class Objects:
    """The objects of n images. documents: their JSON as it will be stored (object_json.py). counts: int64 [n], the
    number of objects of each that are no crowds.
    """

    documents: list[bytes]
    counts: np.ndarray

    def take(self, positions: np.ndarray) -> "Objects":
        return Objects([self.documents[i] for i in positions], self.counts[positions])


@dataclass(frozen=True)
class Items:
    """Images of one split as parallel columns, [n].

    sizes: in bytes (estimated for torchvision). offsets: bytes into a tar. maps: in segmentation, the PNG files of the
    images' label maps. objects: in detection. With either, `labels` are 0.
    """

    source: Source
    names: list[str]
    labels: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    maps: "Items | None" = None
    objects: Objects | None = None

    def take(self, positions: np.ndarray) -> "Items":
        names = [self.names[i] for i in positions]
        columns = (column[positions] for column in (self.labels, self.offsets, self.sizes))
        maps, objects = (each and each.take(positions) for each in (self.maps, self.objects))
        return Items(self.source, names, *columns, maps, objects)


@dataclass(frozen=True)
class Listing:
    """All images of a source. Labels index `classes`. ignored: the number of files that are not images of a split.

    coding: in segmentation, what the pixels of the label maps mean. lone_maps: the number of label maps of a split that
    have no image. category_ids: in detection, the source's number of each class. notes: what the report says of images
    of the listing: (split of the source, image, outcome, reason).
    """

    classes: tuple[str, ...]
    splits: dict[str, Items]
    ignored: int = 0
    coding: LabelCoding | None = None
    lone_maps: int = 0
    category_ids: tuple[int, ...] | None = None
    notes: tuple[tuple[str, str, str, str], ...] = ()

    def digest(self) -> str:
        """SHA-256 of every class, name, label, offset and size, and of the label maps and their coding, or of the
        objects and the source's numbers of the classes.

        Equal if and only if a resumed run reads the same source.
        """
        digest = hashlib.sha256(repr(self.classes).encode("utf-8", "surrogateescape"))
        parts = dict(self.splits)
        if self.coding:
            digest.update(repr(self.coding).encode())
            parts |= {f"{split} {LABEL_MAP}": items.maps for split, items in self.splits.items()}
        for part, items in parts.items():
            digest.update(f"\0{part}\0".encode())
            for name in items.names:
                digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
            for column in (items.labels, items.offsets, items.sizes):
                digest.update(column.astype("<i8").tobytes())
        if self.category_ids:
            digest.update(repr(self.category_ids).encode())
            for split, items in self.splits.items():
                digest.update(f"\0{split} {OBJECTS}\0".encode())
                for document in items.objects.documents:
                    digest.update(document + b"\0")
        return digest.hexdigest()
