"""The drawn scenes are reproducible, and their labels are the shapes that one sees."""

import numpy as np
from PIL import Image

from tests.data_pipeline.drawing import check_drawing, draw

PROGRAM = "draw_segments.py"


def test_scenes_are_reproducible_and_not_drawn_twice(tmp_path):
    drawn = check_drawing(PROGRAM, tmp_path, "--train", 12, "--val", 4)
    assert len(drawn) == 2 * (12 + 4) + 2
    assert (tmp_path / "one/classes.txt").read_text().split() == [
        "background",
        "cross",
        "disk",
        "ring",
        "square",
        "triangle",
    ]


def test_labels_fit_their_images(tmp_path):
    """Labels have their image's size, and shapes are brighter than what surrounds them."""
    assert draw(PROGRAM, tmp_path, "--train", 40, "--val", 1).returncode == 0
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
