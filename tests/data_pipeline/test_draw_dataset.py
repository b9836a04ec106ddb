"""The demo's drawn dataset is reproducible and complete, and mean colours do not reveal its classes."""

import sys

import numpy as np
from PIL import Image

from tests.data_pipeline.drawing import EXAMPLES, check_drawing, draw
from tests.data_pipeline.images import contents

PROGRAM = "draw_dataset.py"


def test_the_dataset_is_reproducible_and_not_drawn_twice(tmp_path):
    drawn = check_drawing(PROGRAM, tmp_path, "--train", 40, "--val", 20)
    for split, count in (("train", 4), ("val", 2)):
        classes = sorted(path.name for path in (tmp_path / "one" / split).iterdir())
        assert len(classes) == 10 and "ring-stripes" in classes
        assert all(len(list((tmp_path / "one" / split / name).iterdir())) == count for name in classes)
    assert len(set(drawn.values())) == len(drawn), "two images are the same"
    assert Image.open(next((tmp_path / "one/train/disk-checks").iterdir())).size == (32, 32)
    few = draw(PROGRAM, tmp_path / "three", "--val", 3)
    assert few.returncode == 78 and few.stderr.startswith("error: --val must be at least 10")


def test_an_interrupted_drawing_is_repeated(tmp_path):
    assert draw(PROGRAM, tmp_path / "one", "--train", 10, "--val", 10).returncode == 0
    whole = contents(tmp_path / "one")
    (tmp_path / "one/drawn.json").rename(tmp_path / "one/drawing.json")
    next((tmp_path / "one/val/cross-checks").iterdir()).unlink()
    assert draw(PROGRAM, tmp_path / "one", "--train", 10, "--val", 10).returncode == 0
    assert contents(tmp_path / "one") == whole


def test_mean_colours_do_not_reveal_the_class():
    """The mean colours of the classes are as close to each other as those of ten random groups of the same images."""
    sys.path.insert(0, str(EXAMPLES))
    import draw_dataset

    images, labels = zip(*(draw_dataset.draw(32, 0, 0, i) for i in range(1000)), strict=True)
    means = np.stack([image.mean(axis=(0, 1)) for image in images])
    labels = np.array(labels)

    def spread(groups):
        return np.std(
            [means[groups == group].mean(axis=0) for group in range(len(draw_dataset.CLASSES))], axis=0
        ).mean()

    random = np.random.default_rng(0)
    assert spread(labels) < max(spread(random.permutation(labels)) for _ in range(50)) * 1.2
