"""Labels beyond a record's one integer, and how a sample's labels become a task's targets."""

import dataclasses
from typing import Any, Protocol

import numpy as np
import torch

from .durable import publish, sha256_of
from .manifest import Manifest, write_manifest
from .split import Annotation, Split


class Targets(Protocol):
    """Reads what a task learns from beside the images. Its results are functions of the arguments alone."""

    def read(self, ids: np.ndarray, windows: np.ndarray) -> list[Any]:
        """The targets of samples `ids` (int64 [n]), one list entry each, cut like the images: `windows` int32 [n, 5]
        (crop.py).

        Called by the decoding threads.
        """

    def collate(self, targets: list[Any]) -> Any:
        """The targets of a micro-batch: any nested structure (dict, list, tuple) of tensors, from the entries that
        `read` returned.
        """


class Labels:
    """The integer label of each record: a micro-batch has int64 [m]."""

    def __init__(self, split: Split):
        self._labels = split.records["label"]

    def read(self, ids: np.ndarray, windows: np.ndarray) -> list[int]:
        return self._labels[ids].tolist()

    def collate(self, targets: list[int]) -> torch.Tensor:
        return torch.tensor(targets, dtype=torch.int64)


def add_annotation(manifest: Manifest, split: str, name: str, values: np.ndarray) -> Manifest:
    """Store `values` ([samples, …], numbers) as annotation `name` of a split; returns the new manifest, which is on the
    disk.

    ValueError if there is not one row per sample.
    """
    old = manifest.split(split)
    if len(values) != old.samples:
        raise ValueError(f"{len(values)} rows for the {old.samples} samples of split {split!r}")
    path = manifest.folder / f"{split}.{name}.npy"
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "wb") as file:
        np.save(file, values, allow_pickle=False)
    publish(temporary, path)
    annotation = Annotation(path.name, path.stat().st_size, sha256_of(path))
    new = dataclasses.replace(old, annotations={**old.annotations, name: annotation})
    manifest = dataclasses.replace(manifest, splits={**manifest.splits, split: new})
    write_manifest(manifest)
    return manifest
