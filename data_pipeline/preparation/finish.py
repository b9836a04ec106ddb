"""The end of preparing and of indexing: join the shards' tables, and write the reports and the manifest."""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np

from data_pipeline.durable import publish, sha256_of
from data_pipeline.manifest import FILE_NAME, Manifest, write_manifest
from data_pipeline.preparation.ownership import WORK
from data_pipeline.preparation.pack import INDEX
from data_pipeline.split import (
    CATEGORY_IDS,
    IMAGES,
    LABEL_MAP,
    OBJECTS,
    RECORD,
    TABLES,
    Annotation,
    DataError,
    Shard,
    Split,
)

REPORT_NAME = "report.json"  # the arguments, and the number of images with each outcome
LIST_NAME = "report.jsonl"  # each image that was repaired, transcoded or excluded, with the reason


def files_beside(splits: Iterable[str], annotations: Iterable[str] = ()) -> list[str]:
    """The names of the files that `finish` writes for these splits, with these annotations."""
    endings = ["index", *(f"{name}.npy" for name in annotations)]
    return [FILE_NAME, REPORT_NAME, LIST_NAME, *(f"{split}.{ending}" for split in splits for ending in endings)]


def finish(
    dest: Path,
    classes: tuple[str, ...],
    files: dict[str, list[str]],
    report: dict,
    read: Callable[[str], tuple[dict, dict[str, np.ndarray]]],
    stale: Iterable[str] = (),
    category_ids: Sequence[int] | None = None,
    notes: Sequence[tuple[str, str, str, str]] = (),
) -> None:
    """Join the tables of each split's shards into its index and its annotations; then write the reports, and last the
    manifest.

    read: returns the header and tables of a shard (pack.read_done). stale: files of an earlier `index` to remove.
    category_ids: in detection, the source's number of each class. notes: see Listing.
    """
    made, splits, absent, first_excluded = {}, {}, {}, {}
    outcomes = {split: Counter(outcome for of, _, outcome, _ in notes if of == split) for split in files}

    def temporary(name: str) -> Path:
        """A temporary file that becomes `name`."""
        path = dest / WORK / f"{name}.{os.getpid()}.tmp"
        made[path] = dest / name
        return path

    with open(temporary(LIST_NAME), "w") as listed:
        for note in notes:
            _list(listed, *note)
        for split, names in files.items():
            index = temporary(f"{split}.index")
            joined = _join_shards(split, map(read, names), len(classes), index, listed)
            outcomes[split] += joined.outcomes
            if not joined.samples:
                raise DataError(
                    f"no image of {split} can be used: the first of {outcomes[split]['excluded']:,} is "
                    f"{joined.first_excluded}."
                )
            absent[split] = _absent(split, joined, classes)
            if joined.first_excluded:
                first_excluded[split] = joined.first_excluded
            if category_ids:
                _join_objects(split, joined.arrays)
                joined.arrays[CATEGORY_IDS] = np.array(category_ids, TABLES[CATEGORY_IDS])
            annotations = _write_annotations(split, joined.arrays, temporary)
            shards = tuple(joined.shards)
            splits[split] = Split(dest, split, joined.samples, sha256_of(index), shards, annotations=annotations)
    if any(absent.values()):
        report = {**report, "absent": absent}
    if first_excluded:
        report = {**report, "first_excluded": first_excluded}
    counts = {split: {"samples": splits[split].samples, **dict(sorted(outcomes[split].items()))} for split in splits}
    temporary(REPORT_NAME).write_text(json.dumps({**report, "splits": counts}, indent=1))
    for name in (FILE_NAME, *stale):  # the manifest of an earlier `index` must never exist beside new files
        (dest / name).unlink(missing_ok=True)
    for path, final in made.items():
        publish(path, final)
    write_manifest(Manifest(dest, classes, splits))


@dataclass
class _Joined:
    """What the shards of a split have together.

    arrays: the annotations. pixels: of each class in the label maps, or None if an earlier version of this program
    packed a shard without counting them. has_image: of each class, whether an image has it as its label.
    """

    shards: list[Shard]
    outcomes: Counter[str]
    first_excluded: str | None
    arrays: dict[str, np.ndarray]
    pixels: Counter[int] | None
    has_image: np.ndarray

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)


def _join_shards(
    split: str, found: Iterable[tuple[dict, dict[str, np.ndarray]]], classes: int, index: Path, listed: TextIO
) -> _Joined:
    """Join the headers and tables of a split's shards. Writes the index, and lists images in `listed`."""
    joined, tables = _Joined([], Counter(), None, {}, Counter(), np.zeros(classes, bool)), defaultdict(list)
    with open(index, "wb") as file:
        for number, (header, of_shard) in enumerate(found):
            for table in of_shard.values():
                if table.dtype == RECORD:
                    table["shard"] = number
            joined.has_image[of_shard[INDEX]["label"]] = True
            file.write(of_shard.pop(INDEX).tobytes())
            for annotation, table in of_shard.items():
                tables[annotation].append(table)
            joined.shards.append(Shard(**header["shard"]))
            joined.outcomes.update(header["outcomes"])
            if "pixels" not in header:
                joined.pixels = None
            elif joined.pixels is not None:
                joined.pixels.update({int(label): count for label, count in header["pixels"].items()})
            for image, outcome, why in header["listed"]:
                if outcome == "excluded":
                    joined.outcomes[outcome] += 1
                    joined.first_excluded = joined.first_excluded or f"{image}: {why}"
                _list(listed, split, image, outcome, why)
    joined.arrays = {annotation: np.concatenate(parts) for annotation, parts in tables.items()}
    return joined


def _list(listed: TextIO, split: str, image: str, outcome: str, why: str) -> None:
    listed.write(json.dumps({"split": split, "image": image, "outcome": outcome, "why": why}) + "\n")


def _absent(split: str, joined: _Joined, classes: tuple[str, ...]) -> list[str]:
    """The classes of which a split has no pixel, no object or no image. Raises DataError if it has hardly any class."""
    if LABEL_MAP in joined.arrays and joined.pixels is not None:
        _check_pixels(split, classes, joined.pixels)
        return [name for label, name in enumerate(classes) if not joined.pixels[label]]
    if OBJECTS in joined.arrays:
        objects = joined.arrays[OBJECTS]
        absent = np.setdiff1d(np.arange(len(classes)), objects["label"][objects["crowd"] == 0])
        return [classes[label] for label in absent]
    return [] if joined.arrays else [classes[label] for label in np.flatnonzero(~joined.has_image)]


def _write_annotations(
    split: str, arrays: dict[str, np.ndarray], temporary: Callable[[str], Path]
) -> dict[str, Annotation]:
    annotations = {}
    for name, array in arrays.items():
        final = f"{split}.{name}.npy"
        path = temporary(final)
        with open(path, "wb") as file:
            np.save(file, array, allow_pickle=False)
        annotations[name] = Annotation(final, path.stat().st_size, sha256_of(path))
    return annotations


def _check_pixels(split: str, classes: tuple[str, ...], pixels: Counter[int]) -> None:
    """Raise DataError if nothing can be learnt or measured. pixels: of each class in the split's label maps."""
    means = f"in a label map 0 to {len(classes) - 1} are the classes, and what is ignored counts for nothing"
    if not pixels:
        raise DataError(f"no pixel of the label maps of {split} has a class, because all are ignored: {means}.")
    if split == "train" and len(pixels) == 1:
        [only] = (classes[label] for label in pixels)
        raise DataError(f"all pixels of the label maps of train are of class {only!r}, or ignored: {means}.")


def _join_objects(split: str, arrays: dict[str, np.ndarray]) -> None:
    """Let the images of all shards refer to the objects of all shards. Raises DataError."""
    images = arrays[IMAGES]
    images["first"] = np.cumsum(images["count"], dtype=np.uint64) - images["count"]
    ids, counts = np.unique(images["image_id"], return_counts=True)
    if len(ids) < len(images):
        raise DataError(
            f"two images of {split} have the image_id {ids[np.argmax(counts)]}: give each an id of its own."
        )
