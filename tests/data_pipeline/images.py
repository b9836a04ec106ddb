"""Sources of images for the tests of preparation, and helpers that read prepared datasets."""

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.manifest import open_manifest
from data_pipeline.preparation.prepare import prepare

CLASSES = ("bird", "cat", "dog")
SAMPLE = Path(__file__).resolve().parents[3] / "shared/data/imagenet_sample.tar"  # 800 photographs; may be missing


def picture(number: int, mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    random = np.random.default_rng(number)
    small = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def make_folder(root: Path, train: int = 5, val: int = 2) -> Path:
    """An image folder of small JPEGs, `train` and `val` per class."""
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(CLASSES if count else ()):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                data = encoded(picture(1000 * label + 100 * len(split) + i), quality=90, progressive=i % 2 == 0)
                (root / split / name / f"{i}.jpg").write_bytes(data)
    return root


def make_tar(folder: Path, path: Path, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        tar.add(folder, arcname=folder.name)
    return path


def run(source, dest: Path, **changes) -> bool:
    return prepare(
        str(source), dest, **{"workers": 2, "shard_bytes": 1 << 20, "val_fraction": 0.0, "seed": 0, **changes}
    )


def contents(dest: Path, leave_out: tuple[str, ...] = ()) -> dict[str, str]:
    """SHA-256 of every file of a dataset."""
    paths = (path for path in dest.rglob("*") if path.is_file() and path.name not in leave_out)
    return {str(path.relative_to(dest)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def without_manifest(dataset: Path, dest: Path, classes: Sequence[str] = ()) -> Path:
    """A copy of a dataset's shards, with a file of its classes if they are given, but without manifest and tables."""
    dest.mkdir()
    for path in dataset.glob("*.tar"):
        shutil.copy(path, dest)
    if classes:
        (dest / "classes.txt").write_text("\n".join(classes))
    return dest


def stored(dest: Path, split: str) -> list[tuple[bytes, int]]:
    """(image bytes, label) of every sample by its id, through the index."""
    split = open_manifest(dest).split(split)
    shards = [(dest / shard.file).read_bytes() for shard in split.shards]
    return [
        (shards[r["shard"]][int(r["offset"]) : int(r["offset"]) + int(r["size"])], int(r["label"]))
        for r in split.records
    ]


def originals(folder: Path, split: str) -> set[tuple[bytes, int]]:
    """(image bytes, label) of every image of an image folder's split."""
    return {
        (path.read_bytes(), label) for label, name in enumerate(CLASSES) for path in (folder / split / name).iterdir()
    }


def listed(dest: Path) -> dict[str, tuple[str, str]]:
    """{image: (outcome, reason)} of the images in the report."""
    lines = [json.loads(line) for line in (dest / "report.jsonl").read_text().splitlines()]
    return {line["image"]: (line["outcome"], line["why"]) for line in lines}
