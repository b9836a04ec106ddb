"""Labels beyond a record's one integer, and how a sample's labels become a task's targets."""

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from .durable import publish, sha256_of
from .manifest import Manifest, write_manifest
from .split import CATEGORY_IDS, OBJECTS, Annotation, Split

if TYPE_CHECKING:
    from .backends.stored import StoredSamples


@dataclass(frozen=True)
class Cut:
    """The windows that were chosen for n samples, and their targets.

    windows: int32 [n, 5] (crop.py), by which the images are cut. targets: one entry for each sample.
    failures: {row: a sentence that names the file} of targets that cannot be read. In training another sample is used
    instead; in evaluation the sample is not counted, and its entry of `targets` only fills the place.
    """

    windows: np.ndarray
    targets: list[Any]
    failures: dict[int, str] = field(default_factory=dict)


class Targets(Protocol):
    """Reads what a task learns from beside the images. Its results are functions of the arguments alone.

    stored: where it has the bytes of samples from, or None. The loader stages and closes it, so an object serves one
    loader.
    """

    stored: "StoredSamples | None"

    def read(self, ids: np.ndarray, candidates: np.ndarray, shape: tuple[int, int]) -> Cut:
        """Choose a window for each of the samples `ids` (int64 [n]) among its `candidates` (int32 [n, K, 5]), and cut
        the targets by it. shape: the (height, width) to which the images' windows are resized.

        Called by the decoding threads, before the images are decoded.
        """

    def collate(self, targets: list[Any]) -> Any:
        """The targets of a micro-batch: any nested structure (dict, list, tuple) of tensors, from the entries that
        `read` returned.
        """


class Labels:
    """The integer label of each record: a micro-batch has int64 [m]."""

    stored = None

    def __init__(self, split: Split):
        self._labels = split.records["label"]

    def read(self, ids: np.ndarray, candidates: np.ndarray, shape: tuple[int, int]) -> Cut:
        return Cut(candidates[:, 0], self._labels[ids].tolist())

    def collate(self, targets: list[int]) -> torch.Tensor:
        return torch.tensor(targets, dtype=torch.int64)


def add_annotation(manifest: Manifest, split: str, name: str, values: np.ndarray) -> Manifest:
    """Store `values` ([samples, …], numbers) as annotation `name` of a split; returns the new manifest, which is on the
    disk.

    ValueError if there is not one row per sample, except for `objects` and `category_ids`.
    """
    old = manifest.split(split)
    if name not in (OBJECTS, CATEGORY_IDS) and len(values) != old.samples:
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
