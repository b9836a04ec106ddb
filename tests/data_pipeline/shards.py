"""Write tiny prepared datasets for the tests of the data path without `prepare`."""

import io
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from data_pipeline.annotations import add_annotation
from data_pipeline.durable import sha256_of
from data_pipeline.manifest import Manifest, write_manifest
from data_pipeline.split import LABEL_MAP, RECORD, Beton, Shard, Split


def picture(number: int, width: int, height: int) -> np.ndarray:
    """A smooth RGB picture, which JPEG keeps well, different for every `number`: uint8 [height, width, 3]."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    phase = np.random.default_rng(number).uniform(0, 6, 6)
    channels = [np.sin(6 * x + phase[c]) * np.cos(5 * y + phase[c + 3]) for c in range(3)]
    return (127.5 + 120 * np.stack(channels, -1)).astype(np.uint8)


def jpeg(number: int, width: int, height: int) -> bytes:
    return simplejpeg.encode_jpeg(picture(number, width, height), quality=95, colorsubsampling="444")


def write_split(
    folder: Path,
    images: Sequence[bytes],
    *,
    labels: Sequence[int] | None = None,
    sizes: Sequence[tuple[int, int]] | None = None,
    name: str = "train",
    per_shard: int = 16,
    label_maps: Sequence[bytes] = (),
    classes: int = 0,
) -> Split:
    """Write JPEGs as a split of WebDataset shards with index and manifest; labels default to id modulo 10.

    sizes: the (width, height) to write into the index, for images that are not JPEGs. label_maps: PNGs that are written
    in place of labels, with annotation `label_map`; the manifest then has so many `classes`.
    """
    if label_maps:
        labels = [0] * len(images)
    labels = [number % 10 for number in range(len(images))] if labels is None else labels
    sizes = [simplejpeg.decode_jpeg_header(image)[1::-1] for image in images] if sizes is None else sizes
    folder.mkdir(parents=True, exist_ok=True)
    records = np.zeros(len(images), RECORD)
    maps = np.zeros(len(images), RECORD)
    shards = []
    for start in range(0, len(images), per_shard):
        file = f"{name}-{len(shards):05d}.tar"
        numbers = range(start, min(start + per_shard, len(images)))
        with tarfile.open(folder / file, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in numbers:
                if not label_maps:
                    _add(tar, f"{number:08d}.cls", str(labels[number]).encode())
                offset = _add(tar, f"{number:08d}.jpg", images[number])
                checksum = zlib.crc32(images[number])
                records[number] = (offset, len(images[number]), len(shards), labels[number], checksum, *sizes[number])
                if label_maps:
                    data = label_maps[number]
                    offset = _add(tar, f"{number:08d}.png", data)
                    maps[number] = (offset, len(data), len(shards), 0, zlib.crc32(data), *sizes[number])
        shards.append(Shard(file, len(numbers), (folder / file).stat().st_size, sha256_of(folder / file)))
    split = Split(folder, name, len(images), "", tuple(shards))
    records.tofile(split.index_path)
    split = Split(folder, name, len(images), sha256_of(split.index_path), tuple(shards))
    names = tuple(f"class{number}" for number in range(classes or max(labels) + 1))
    manifest = Manifest(folder, names, {name: split})
    write_manifest(manifest)
    return add_annotation(manifest, name, LABEL_MAP, maps).split(name) if label_maps else split


def png(labels: np.ndarray) -> bytes:
    """A gray PNG of uint8 or uint16 labels."""
    buffer = io.BytesIO()
    Image.fromarray(labels).save(buffer, "PNG")
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Append a member and return the offset of its data."""
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    offset = tar.fileobj.tell() + 512
    tar.addfile(entry, io.BytesIO(data))
    return offset


def add_beton(split: Split, stored: Sequence[bytes], mode: str) -> Split:
    """Add an FFCV file with the contents `stored` to the split, as our backend reads it.

    It is written without FFCV, which refuses bad images.
    """
    records = np.array(split.records)
    records["shard"] = 0
    records["size"] = [len(data) for data in stored]
    records["offset"] = np.cumsum(records["size"]) - records["size"]
    records["checksum"] = [zlib.crc32(data) for data in stored]
    path = split.folder / f"{split.name}.beton"
    path.write_bytes(b"".join(stored))
    index = split.folder / f"{path.name}.index"
    records.tofile(index)
    return replace(split, beton=Beton(path.name, path.stat().st_size, sha256_of(path), mode, sha256_of(index)))
