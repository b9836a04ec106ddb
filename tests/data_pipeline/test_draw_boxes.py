"""The drawn scenes are reproducible, and their boxes and outlines are the shapes that one sees."""

import json

import numpy as np
from PIL import Image, ImageDraw

from tests.data_pipeline.drawing import check_drawing, draw

PROGRAM = "draw_boxes.py"
CLASSES = ("cross", "disk", "ring", "square", "triangle")


def test_scenes_are_reproducible_and_not_drawn_twice(tmp_path):
    drawn = check_drawing(PROGRAM, tmp_path, "--train", 12, "--val", 4)
    assert len(drawn) == 12 + 4 + 2 + 1


def test_boxes_and_outlines_fit_their_shapes(tmp_path):
    """Inside an outline it is brighter than around it; its extremes are the box; its pixels are the area."""
    assert draw(PROGRAM, tmp_path, "--train", 60, "--val", 1).returncode == 0
    document = json.loads((tmp_path / "annotations/instances_train.json").read_text())
    assert [each["name"] for each in document["categories"]] == list(CLASSES)
    sizes, brighter = set(), []
    for image in document["images"]:
        pixels = np.asarray(Image.open(tmp_path / "train" / image["file_name"])).astype(float).mean(axis=2)
        height, width = pixels.shape
        assert (image["width"], image["height"]) == (width, height) and max(width, height) == 160
        sizes.add((width, height))
        found = [each for each in document["annotations"] if each["image_id"] == image["id"]]
        assert found
        shapes = Image.new("L", (width, height))
        for each in found:
            x, y, w, h = each["bbox"]
            [corners] = each["segmentation"]
            points = np.array(corners).reshape(-1, 2)
            assert np.allclose([*points.min(axis=0), *np.ptp(points, axis=0)], [x, y, w, h], atol=1e-6)
            assert 0 <= x and 0 <= y and x + w <= width and y + h <= height and min(w, h) > 10
            following = np.roll(points, -1, axis=0)
            enclosed = abs(np.sum(points[:, 0] * following[:, 1] - points[:, 1] * following[:, 0])) / 2
            assert abs(enclosed - each["area"]) < 3 + 0.06 * each["area"]
            ImageDraw.Draw(shapes).polygon([tuple(point) for point in points], fill=255)
        inside = np.asarray(shapes) > 0
        brighter.append(pixels[inside].mean() - pixels[~inside].mean())
    assert len(sizes) == 3 and np.mean(np.array(brighter) > 20) > 0.9
    assert {each["category_id"] for each in document["annotations"]} == {1, 2, 3, 4, 5}
    areas = np.array([each["area"] for each in document["annotations"]])
    assert (areas < 32**2).any() and (areas > 96**2).any()
