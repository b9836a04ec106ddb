"""Check every byte of a prepared dataset against its manifest."""

import hashlib
import os
import zlib
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from data_pipeline.beton import check_beton
from data_pipeline.durable import sha256_of
from data_pipeline.manifest import check_sizes, read_manifest
from data_pipeline.progress import Progress
from data_pipeline.split import Split


def verify(folder: Path, workers: int | None = None) -> list[str]:
    """Read every shard, FFCV file and index, and return one sentence per fault (an empty list if the dataset is sound).

    workers: threads; hashing releases the GIL. Raises DataError if the manifest or a file that it names is missing.
    """
    manifest = read_manifest(folder)
    check_sizes(manifest)
    splits = manifest.splits.values()
    checks, sizes = [], {}  # sizes: of each check's file, in bytes
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for split in splits:
            index_is_whole = sha256_of(split.index_path) == split.fingerprint
            if not index_is_whole:
                sentence = f"{split.index_path} is damaged: its SHA-256 is not the manifest's."
                checks.append(pool.submit(lambda sentence=sentence: [sentence]))
                sizes[checks[-1]] = 0
            for number, shard in enumerate(split.shards):
                checks.append(pool.submit(_check_shard, split, number, index_is_whole))
                sizes[checks[-1]] = shard.bytes
            if split.beton:
                checks.append(pool.submit(check_beton, split))
                sizes[checks[-1]] = split.beton.bytes
        with Progress("bytes", "verifying", sum(sizes.values())) as progress:
            done = 0
            for check in as_completed(checks):
                done += sizes[check]
                progress.show(done)
    return [fault for check in checks for fault in check.result()]


def _check_shard(split: Split, number: int, index_is_whole: bool) -> list[str]:
    """The faults of one shard. Samples are checked one by one only if the index is sound."""
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
                    place = f"the image of sample {sample} (byte {record['offset']})"
                    faults.append(f"{path} is damaged: {place} fails its checksum.")
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if not faults and digest.hexdigest() != shard.sha256:
        faults.append(
            f"{path} is damaged: its SHA-256 is not the manifest's"
            + (", though its images are whole." if index_is_whole else ".")
        )
    return faults
