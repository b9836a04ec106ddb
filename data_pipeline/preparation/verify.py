"""Check every byte of a prepared dataset against its manifest."""

import hashlib
import zlib
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import numpy as np

from data_pipeline.durable import sha256_of
from data_pipeline.faults import retried
from data_pipeline.label_png import check_label, stored_coding
from data_pipeline.manifest import check_sizes, read_manifest
from data_pipeline.object_json import read_objects
from data_pipeline.objects import ObjectTable
from data_pipeline.preparation.beton import check_beton
from data_pipeline.preparation.progress import Progress
from data_pipeline.split import LABEL_MAP, OBJECT, OBJECT_JSON, OBJECTS, Split
from data_pipeline.validate import BadImage

LABEL, OBJECTS_OF = "label map", "JSON"  # of a sample, in sentences


def verify(folder: Path, workers: int | None = None) -> list[str]:
    """Read every shard, FFCV file and index, and return one sentence per fault (an empty list if the dataset is sound).

    workers: threads; hashing releases the GIL. Raises DataError if the manifest or a file that it names is missing,
    StorageError if one cannot be read at present.
    """
    manifest = read_manifest(folder)
    check_sizes(manifest)
    splits = manifest.splits.values()
    checks, sizes = [], {}  # sizes: of each check's file, in bytes
    with ThreadPoolExecutor(workers) as pool:
        for split in splits:
            tables = {split.index_path: split.fingerprint}
            tables |= {split.folder / each.file: each.sha256 for each in split.annotations.values()}
            damaged = [
                path for path, sha256 in tables.items() if retried(partial(sha256_of, path), str(path)) != sha256
            ]
            for path in damaged:
                sentence = f"{path} is damaged: its SHA-256 is not the manifest's."
                checks.append(pool.submit(lambda sentence=sentence: [sentence]))
                sizes[checks[-1]] = 0
            # Opened once, and not in the threads: NumPy parses a header by Python's `ast`, of which CPython 3.11 allows
            # one thread at a time (python/cpython#106905).
            samples = None if damaged else _tables(split)
            objects = ObjectTable(split) if samples and OBJECTS in split.annotations else None
            for number, shard in enumerate(split.shards):
                check = partial(_check_shard, split, number, len(manifest.classes), samples, objects)
                checks.append(pool.submit(retried, check, str(split.folder / shard.file)))
                sizes[checks[-1]] = shard.bytes
            if split.beton:
                checks.append(pool.submit(retried, partial(check_beton, split), str(split.folder / split.beton.file)))
                sizes[checks[-1]] = split.beton.bytes
        with Progress("bytes", "verifying", sum(sizes.values())) as progress:
            done = 0
            for check in as_completed(checks):
                done += sizes[check]
                progress.show(done)
    return [fault for check in checks for fault in check.result()]


def _check_shard(
    split: Split, number: int, classes: int, tables: dict[str, np.ndarray] | None, objects: ObjectTable | None
) -> list[str]:
    """The faults of one shard.

    tables: see `_tables`. None, if the index or an annotation is damaged: then samples are not checked one by one.
    """
    shard = split.shards[number]
    path = split.folder / shard.file
    first = sum(earlier.samples for earlier in split.shards[:number])
    digest, faults = hashlib.sha256(), []
    with open(path, "rb") as file:
        if tables is not None:
            for sample, what, record in _members(tables, first, first + shard.samples):
                digest.update(file.read(int(record["offset"]) - file.tell()))
                data = file.read(int(record["size"]))
                digest.update(data)
                place = f"the {what} of sample {sample} (byte {record['offset']})"
                if zlib.crc32(data) != record["checksum"]:
                    faults.append(f"{path} is damaged: {place} fails its checksum.")
                    continue
                fault = None
                if what == LABEL:
                    fault = _fault_of_label(data, classes, record)
                elif what == OBJECTS_OF:
                    fault = _fault_of_objects(data, objects, sample, record)
                if fault:
                    faults.append(f"{path}: {place} cannot be used: {fault}. Prepare the dataset again.")
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if not faults and digest.hexdigest() != shard.sha256:
        faults.append(
            f"{path} is damaged: its SHA-256 is not the manifest's"
            + (", though its images are whole." if tables is not None else ".")
        )
    return faults


def _tables(split: Split) -> dict[str, np.ndarray]:
    """The RECORDs, [samples], of what a sample has in the shards: "image", LABEL and OBJECTS_OF."""
    tables = {"image": split.records}
    if LABEL_MAP in split.annotations:
        tables[LABEL] = split.annotation(LABEL_MAP)
    if OBJECT_JSON in split.annotations:
        tables[OBJECTS_OF] = split.annotation(OBJECT_JSON)
    return tables


def _members(tables: dict[str, np.ndarray], first: int, last: int) -> list[tuple[int, str, np.void]]:
    """(sample, key of `tables`, RECORD) of the samples first … last - 1, in the order of the bytes."""
    members = [(i, what, table[i]) for i in range(first, last) for what, table in tables.items()]
    return sorted(members, key=lambda member: member[2]["offset"])


def _fault_of_label(data: bytes, classes: int, record: np.void) -> str | None:
    """Why a label map of a shard is not as it should be stored, or None."""
    size = int(record["width"]), int(record["height"])
    try:
        return check_label(data, stored_coding(classes), size, size).why or None
    except BadImage as error:
        return str(error)


def _fault_of_objects(data: bytes, table: ObjectTable, sample: int, record: np.void) -> str | None:
    """Why the JSON of a sample does not say what the tables say, or None."""
    try:
        image_id, objects = read_objects(data, (int(record["width"]), int(record["height"])))
    except BadImage as error:
        return str(error)
    if image_id != table.image_id(sample) or np.array(objects, OBJECT).tobytes() != table.of(sample).tobytes():
        return "it does not say what the split's tables say"
    return None
