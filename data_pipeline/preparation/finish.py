"""The end of preparing and of indexing: join the shards' tables, and write the reports and the manifest."""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from data_pipeline.durable import publish, sha256_of
from data_pipeline.manifest import FILE_NAME, Manifest, write_manifest
from data_pipeline.preparation.ownership import WORK
from data_pipeline.preparation.pack import INDEX
from data_pipeline.split import CATEGORY_IDS, IMAGES, LABEL_MAP, RECORD, TABLES, Annotation, DataError, Shard, Split

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
    notes: Iterable[tuple[str, str, str, str]] = (),
) -> None:
    """Join the tables of each split's shards into its index and its annotations; then write the reports, and last the
    manifest.

    read: returns the header and tables of a shard (pack.read_done). stale: files of an earlier `index` to remove.
    category_ids: in detection, the source's number of each class. notes: see Listing.
    """
    splits, made, counts, absent = {}, {}, {split: Counter() for split in files}, {}

    def temporary(name: str) -> Path:
        """A temporary file that becomes `name`."""
        path = dest / WORK / f"{name}.{os.getpid()}.tmp"
        made[path] = dest / name
        return path

    with open(temporary(LIST_NAME), "w") as listed:

        def list_it(split: str, name: str, outcome: str, why: str) -> None:
            listed.write(json.dumps({"split": split, "image": name, "outcome": outcome, "why": why}) + "\n")

        for split, name, outcome, why in notes:
            counts[split][outcome] += 1
            list_it(split, name, outcome, why)
        for split, names in files.items():
            shards, outcomes, first_excluded, tables = [], counts[split], None, defaultdict(list)
            pixels, counted, has_image = Counter(), True, np.zeros(len(classes), bool)
            index_path = temporary(f"{split}.index")
            with open(index_path, "wb") as index:
                for number, file in enumerate(names):
                    header, found = read(file)
                    for table in found.values():
                        if table.dtype == RECORD:
                            table["shard"] = number
                    has_image[found[INDEX]["label"]] = True
                    index.write(found.pop(INDEX).tobytes())
                    for name, table in found.items():
                        tables[name].append(table)
                    shards.append(Shard(**header["shard"]))
                    outcomes.update(header["outcomes"])
                    counted = counted and "pixels" in header  # not by an earlier version
                    pixels.update({int(label): count for label, count in header.get("pixels", {}).items()})
                    for name, outcome, why in header["listed"]:
                        outcomes["excluded"] += outcome == "excluded"
                        if outcome == "excluded" and first_excluded is None:
                            first_excluded = f"{name}: {why}"
                        list_it(split, name, outcome, why)
            samples = sum(shard.samples for shard in shards)
            if not samples:
                raise DataError(
                    f"none of the {outcomes['excluded']} images of {split} can be used; the first is {first_excluded}."
                )
            arrays = {name: np.concatenate(parts) for name, parts in tables.items()}
            if LABEL_MAP in arrays and counted:
                _check_pixels(split, classes, pixels)
                absent[split] = [name for label, name in enumerate(classes) if not pixels[label]]
            elif not arrays:
                absent[split] = [classes[label] for label in np.flatnonzero(~has_image)]
            if category_ids:
                _join_objects(split, arrays)
                arrays[CATEGORY_IDS] = np.array(category_ids, TABLES[CATEGORY_IDS])
            annotations = {}
            for name, array in arrays.items():
                path = temporary(f"{split}.{name}.npy")
                with open(path, "wb") as file:
                    np.save(file, array, allow_pickle=False)
                annotations[name] = Annotation(made[path].name, path.stat().st_size, sha256_of(path))
            splits[split] = Split(dest, split, samples, sha256_of(index_path), tuple(shards), annotations=annotations)
    of_splits = {
        name: {"samples": split.samples, **{outcome: count for outcome, count in sorted(counts[name].items()) if count}}
        for name, split in splits.items()
    }
    if any(absent.values()):
        report = {**report, "absent": absent}
    temporary(REPORT_NAME).write_text(json.dumps({**report, "splits": of_splits}, indent=1))
    for name in (FILE_NAME, *stale):  # the manifest of an earlier `index` must never exist beside new files
        (dest / name).unlink(missing_ok=True)
    for path, final in made.items():
        publish(path, final)
    write_manifest(Manifest(dest, classes, splits))


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
