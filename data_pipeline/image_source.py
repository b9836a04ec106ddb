"""The data types of a source of labelled images and of its listing. listing.py and torchvision_source.py use them.

Sources are those of classification: every image has one class.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SPLITS = ("train", "val")


@dataclass(frozen=True)
class Source:
    """A place to read images from.

    kind: "folder", "tar" or "torchvision". path: the folder, plain tar or dataset's root.
    """

    kind: str
    path: Path
    dataset: str = ""  # torchvision only: the name of the dataset's class


@dataclass(frozen=True)
class Items:
    """Images of one split as parallel columns, [n].

    sizes: in bytes (estimated for torchvision). offsets: bytes into a tar.
    """

    source: Source
    names: list[str]
    labels: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray

    def take(self, positions: np.ndarray) -> "Items":
        names = [self.names[i] for i in positions]
        return Items(self.source, names, self.labels[positions], self.offsets[positions], self.sizes[positions])


@dataclass(frozen=True)
class Listing:
    """All images of a source. Labels index `classes`. ignored: the number of files that are not images of a split."""

    classes: tuple[str, ...]
    splits: dict[str, Items]
    ignored: int = 0

    def digest(self) -> str:
        """SHA-256 of every class, name, label, offset and size.

        Equal if and only if a resumed run reads the same source.
        """
        digest = hashlib.sha256(repr(self.classes).encode("utf-8", "surrogateescape"))
        for split, items in self.splits.items():
            digest.update(f"\0{split}\0".encode())
            for name in items.names:
                digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
            for column in (items.labels, items.offsets, items.sizes):
                digest.update(column.astype("<i8").tobytes())
        return digest.hexdigest()
