"""The drawn scenes are reproducible, and their labels are the shapes that one sees."""

import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


def call(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "examples/draw_segments.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
    )


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_scenes_are_reproducible_and_not_drawn_twice(tmp_path):
    small = ("--train", 12, "--val", 4)
    for dest in ("one", "two"):
        assert call(tmp_path / dest, *small).returncode == 0
    drawn = files(tmp_path / "one")
    assert drawn == files(tmp_path / "two")
    assert len(drawn) == 2 * (12 + 4) + 2
    assert drawn["classes.txt"].decode().split() == ["background", "cross", "disk", "ring", "square", "triangle"]
    again = call(tmp_path / "one", *small)
    assert again.returncode == 0 and "already drawn" in again.stdout
    other = call(tmp_path / "one", *small, "--seed", 1)
    assert other.returncode == 78 and "drawn with other arguments" in other.stderr


def test_labels_fit_their_images(tmp_path):
    """Labels have their image's size, and shapes are brighter than what surrounds them."""
    assert call(tmp_path, "--train", 40, "--val", 1).returncode == 0
    brighter, values = [], set()
    for path in sorted((tmp_path / "images/train").iterdir()):
        image = np.asarray(Image.open(path)).astype(float).mean(axis=2)
        labels = np.asarray(Image.open(tmp_path / "annotations/train" / f"{path.stem}.png"))
        assert labels.dtype == np.uint8 and labels.shape == image.shape
        values |= set(np.unique(labels).tolist())
        shapes = (labels > 0) & (labels < 255)
        brighter.append(image[shapes].mean() - image[labels == 0].mean())
    assert values == {0, 1, 2, 3, 4, 5, 255}
    assert np.mean(np.array(brighter) > 20) > 0.9
