"""The demo's drawn dataset is reproducible and complete, and mean colours do not reveal its classes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


def call(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "examples/draw_dataset.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
    )


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_dataset_is_reproducible_and_not_drawn_twice(tmp_path):
    small = ("--train", 40, "--val", 20)
    for dest in ("one", "two"):
        assert call(tmp_path / dest, *small).returncode == 0
    drawn = files(tmp_path / "one")
    assert drawn == files(tmp_path / "two")
    for split, count in (("train", 4), ("val", 2)):
        classes = sorted(path.name for path in (tmp_path / "one" / split).iterdir())
        assert len(classes) == 10 and "ring-stripes" in classes
        assert all(len(list((tmp_path / "one" / split / name).iterdir())) == count for name in classes)
    assert len(set(drawn.values())) == len(drawn), "two images are the same"
    assert Image.open(next((tmp_path / "one/train/disk-checks").iterdir())).size == (32, 32)

    again = call(tmp_path / "one", *small)
    assert again.returncode == 0 and "already drawn" in again.stdout
    other = call(tmp_path / "one", *small, "--seed", 1)
    assert other.returncode == 78 and "drawn with other arguments" in other.stderr
    few = call(tmp_path / "three", "--val", 3)
    assert few.returncode == 78 and few.stderr.startswith("error: --val must be at least 10")


def test_an_interrupted_drawing_is_repeated(tmp_path):
    assert call(tmp_path / "one", "--train", 10, "--val", 10).returncode == 0
    whole = files(tmp_path / "one")
    (tmp_path / "one/drawn.json").rename(tmp_path / "one/drawing.json")
    next((tmp_path / "one/val/cross-checks").iterdir()).unlink()
    assert call(tmp_path / "one", "--train", 10, "--val", 10).returncode == 0
    assert files(tmp_path / "one") == whole


def test_mean_colours_do_not_reveal_the_class():
    """The mean colours of the classes are as close to each other as those of ten random groups of the same images."""
    sys.path.insert(0, str(ROOT / "examples"))
    from draw_dataset import CLASSES, draw

    images, labels = zip(*(draw(32, 0, 0, i) for i in range(1000)), strict=True)
    means = np.stack([image.mean(axis=(0, 1)) for image in images])
    labels = np.array(labels)

    def spread(groups):
        return np.std([means[groups == group].mean(axis=0) for group in range(len(CLASSES))], axis=0).mean()

    random = np.random.default_rng(0)
    assert spread(labels) < max(spread(random.permutation(labels)) for _ in range(50)) * 1.2
