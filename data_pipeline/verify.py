"""Check a prepared dataset against its manifest, byte by byte."""

import hashlib
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data_pipeline.manifest import Split, open_manifest, sha256_of


def verify(folder: Path, workers: int | None = None) -> list[str]:
    """Read every shard and index, and return one sentence per fault found (none: the dataset is whole).

    Raises DataError where the manifest or a file it names is missing. Hashing releases the GIL: `workers` are threads.
    """
    manifest = open_manifest(folder)
    faults = []
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for split in manifest.splits.values():
            index_is_whole = sha256_of(split.index_path) == split.fingerprint
            if not index_is_whole:
                faults.append(f"{split.index_path} is damaged: its SHA-256 is not the manifest's.")
            checks = pool.map(lambda number, s=split, whole=index_is_whole: _check_shard(s, number, whole), range(len(split.shards)))
            faults += [fault for found in checks for fault in found]
    return faults


def _check_shard(split: Split, number: int, index_is_whole: bool) -> list[str]:
    """The faults of one shard. Its samples can be told apart only by an index that is whole."""
    shard = split.shards[number]
    path = split.folder / shard.file
    first = sum(earlier.samples for earlier in split.shards[:number])
    digest, faults = hashlib.sha256(), []
    with open(path, "rb") as file:
        if index_is_whole:
            for sample, record in enumerate(split.records[first : first + shard.samples], start=first):
                digest.update(file.read(int(record["offset"]) - file.tell()))
                data = file.read(int(record["size"]))
                digest.update(data)
                if zlib.crc32(data) != record["checksum"]:
                    faults.append(f"{path} is damaged: the image of sample {sample} (byte {record['offset']}) fails its checksum.")
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if not faults and digest.hexdigest() != shard.sha256:
        faults.append(
            f"{path} is damaged: its SHA-256 is not the manifest's" + (", though its images are whole." if index_is_whole else ".")
        )
    return faults
