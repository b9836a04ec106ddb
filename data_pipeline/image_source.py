"""What a source of images is, and what a listing of it holds. Listing and reading are in listing.py and torchvision_source.py."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SPLITS = ("train", "val")


@dataclass(frozen=True)
class Source:
    """Where to read: `kind` is "folder", "tar" or "torchvision"; `path` the folder, the plain tar, or the torchvision dataset's root."""

    kind: str
    path: Path
    dataset: str = ""  # torchvision only: the class's name


@dataclass(frozen=True)
class Items:
    """Images of one split, parallel columns, [n]. `sizes` are bytes (an estimate for torchvision); `offsets` are bytes into a tar."""

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
    """All images of a source. Labels index `classes`; `ignored` counts the files that are no images of any split."""

    classes: tuple[str, ...]
    splits: dict[str, Items]
    ignored: int = 0

    def digest(self) -> str:
        """SHA-256 of every class, name, label, offset and size: equal exactly if a resumed run would read the same source."""
        digest = hashlib.sha256(repr(self.classes).encode("utf-8", "surrogateescape"))
        for split, items in self.splits.items():
            digest.update(f"\0{split}\0".encode())
            for name in items.names:
                digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
            for column in (items.labels, items.offsets, items.sizes):
                digest.update(column.astype("<i8").tobytes())
        return digest.hexdigest()
