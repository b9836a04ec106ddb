"""Boxes drawn on photographs, the tables, and the sections of a report."""

import re

import numpy as np
import pytest

from train.tasks.detection.pictures import (
    KIND_NAMES,
    MISTAKEN,
    draw_boxes,
    drawn,
    drawn_mistake,
    evaluation_picture,
    evaluation_tables,
)
from train.tasks.detection.report import sections
from train.tasks.drawing import as_base64, palette
from train.tasks.report import EvaluatedRun

CLASSES = ("cat & dog", "bird", "fish")
GRAY = np.full((240, 320, 3), 128, np.uint8)


def near(picture: np.ndarray, colour, tolerance: int = 0) -> np.ndarray:
    return (np.abs(picture.astype(int) - np.array(colour)) <= tolerance).all(axis=2)


def test_a_box_has_its_place_and_its_colour():
    red, green = (250, 10, 10), (10, 250, 10)
    picture = draw_boxes(GRAY, np.array([[100.0, 80, 60, 40], [200, 150, 30, 30]]), ["one", "two"], [red, green])
    assert picture.shape == GRAY.shape and near(GRAY, (128, 128, 128)).all()  # the photograph is not drawn on
    for colour, (left, top, right, bottom) in ((red, (100, 80, 160, 120)), (green, (200, 150, 230, 180))):
        rows, columns = np.nonzero(near(picture, colour))
        assert (columns.min(), rows.max()) == (left, bottom)
        assert near(picture[top + 5 : bottom - 5, [left, right]], colour).all()  # both upright edges
        inside = picture[top + 6 : bottom - 6, left + 6 : right - 6]
        assert near(inside, (128, 128, 128)).all()
    tag = picture[60:79, 100:130]
    assert near(tag, red).sum() > 200 and near(tag, (255, 255, 255), 60).any()  # a name above the box


def test_the_first_box_is_on_top_and_names_do_not_cover_each_other():
    box = np.array([[50.0, 60, 100, 80]])
    colours = palette(4).tolist()
    picture = draw_boxes(GRAY, np.repeat(box, 4, axis=0), ["aaaa", "bbbb", "cccc", "dddd"], colours)
    assert near(picture[100, 50:51][None], colours[0]).all()
    tags = [np.argwhere(near(picture, colour)) for colour in colours]
    assert all(len(tag) > 300 for tag in tags)  # of each a tag is seen


@pytest.mark.parametrize(
    "box", [[-40, -30, 60, 50], [300, 220, 90, 90], [0, 0, 320, 240], [5, 5, 0.2, 0.1], [400, 300, 20, 20]]
)
def test_boxes_at_and_beyond_the_edges(box):
    name = "a name that is longer than the picture is wide " * 2
    picture = draw_boxes(GRAY, np.array([box], float), [name], [MISTAKEN])
    assert near(picture, MISTAKEN).any()


def test_no_boxes():
    assert np.array_equal(draw_boxes(GRAY, np.zeros((0, 4)), [], []), GRAY)


def shown(number: int, size: tuple[int, int], found: list) -> dict:
    picture = np.full((*size, 3), 90, np.uint8)
    return {
        "id": number,
        "image": as_base64(picture, "JPEG"),
        "truth": [[20.0, 30.0, 50.0, 40.0, 1, 0], [60.0, 50.0, 30.0, 30.0, 0, 1]],
        "found": found,
    }


@pytest.fixture
def details() -> dict:
    """As DetectionTally.finish gives them; class "fish" has no objects, and there are no small ones."""
    detection = [22.0, 31.0, 50.0, 40.0, 2, 0.87]
    names = ("ap", "ap50", "ap75", "aps", "apm", "apl", "ar1", "ar10", "ar100", "ars", "arm", "arl")
    return {
        "step": 8,
        "split": "0" * 64,
        "classes": list(CLASSES),
        "ap": [61.25, 12.5, None],
        "ap50": [80.0, 33.0, None],
        "objects": [5, 1234, 0],
        "sizes": {"s": 0, "m": 100, "l": 1139},
        "scores": dict.fromkeys(names, 25.0) | {"aps": None, "ars": None},
        "errors": {kind: [10 + i, 0.5 * i] for i, kind in enumerate(KIND_NAMES)},
        "pictures": [shown(3, (120, 160), [detection]), shown(9, (160, 100), [])],
        "mistakes": [
            {"shown": shown(9, (160, 100), [detection]), "kind": "class", "other": 1, "iou": 0.911},
            {"shown": shown(3, (120, 160), [detection]), "kind": "background", "other": None, "iou": 0.0},
        ],
    }


def test_tables_in_markdown(details):
    text = evaluation_tables(details)
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert rows.index("| bird | 12.5 % | 33.0 % | 1,234 |") < rows.index("| cat &amp; dog | 61.2 % | 80.0 % | 5 |")
    assert rows.index("| cat &amp; dog | 61.2 % | 80.0 % | 5 |") < rows.index("| fish | – | – | 0 |")
    assert "| small, to 32 x 32 pixels | 0 | – | – |" in rows and "| large | 1,139 | 25.0 % | 25.0 % |" in rows
    assert "| wrong place | 11 | +0.5 |" in rows and "| missed | 15 | +2.5 |" in rows


def test_names_do_not_change_a_tables_columns(details):
    text = evaluation_tables({**details, "classes": ["a|b <i>", "bird", "fish"]})
    assert r"| a\|b &lt;i&gt; | 61.2 % | 80.0 % | 5 |" in text
    lines = text.partition("\n\n")[0].splitlines()
    assert len(lines) == 5 and {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {5}


def test_truth_and_detections_side_by_side(details):
    page = evaluation_picture(details)
    assert page.shape == (120 + 4 + 160, 2 * 160 + 4, 3)
    colours = palette(3).tolist()
    left, right = page[:120, :160], page[:120, 164:]
    assert near(left, colours[1], 12).sum() > 50 > near(right, colours[1], 12).sum()
    assert near(right, colours[2], 12).sum() > 50
    assert np.array_equal(drawn(details["pictures"][0], "found", CLASSES), right)


def test_a_mistake_is_red(details):
    picture = drawn_mistake(details["mistakes"][0], CLASSES)
    assert near(picture, MISTAKEN, 12).sum() > 100 and near(picture, (255, 255, 255), 12).sum() > 50


def test_sections_of_a_report(details):
    run = EvaluatedRun("a", {}, {"ema": details, "model": {**details, "ap": [1.0, 2.0, None]}}, 4, False)
    found = {section.key: str(section.html) for section in sections([run])}
    assert list(found) == ["classes", "errors", "pictures", "mistakes"]
    classes = re.sub(r"<[^>]*>", " ", found["classes"])
    assert "cat &amp; dog" in classes and classes.index("bird") < classes.index("cat") < classes.index("fish")
    assert "61.2 %" in classes and "1.0 %" in classes and "1,234" in classes and "epoch 2" in classes
    assert "small, to 32 x 32 pixels" in found["errors"] and "+2.5" in found["errors"]
    for row in details["pictures"]:
        for part in ("truth", "found"):
            assert as_base64(drawn(row, part, CLASSES), "JPEG") in found["pictures"]
    assert "wrong class (bird, IoU 0.91)" in found["mistakes"] and "nothing there" in found["mistakes"]


def test_classes_of_one_name_have_a_row_each(details):
    """Earlier versions prepared such datasets. Runs are compared by the name and its place among equal ones."""
    names = ["cell", "cell", "ring"]
    first = {**details, "classes": names, "ap": [90.0, 10.0, 50.0], "objects": [7, 400, 3]}
    second = {**details, "classes": [*names, "cell"], "ap": [91.0, 11.0, 51.0, 1.0], "ap50": [0.0] * 4}
    second["objects"] = [7, 400, 3, 1]
    runs = [EvaluatedRun(name, {}, {"ema": found}, 4, True) for name, found in (("a", first), ("b", second))]
    rows = re.sub(r"<[^>]*>", " ", str(sections(runs)[0].html).replace("</tr>", ";")).split(";")
    found = [" ".join(row.split()) for row in rows if "%" in row]
    assert found == ["cell 400 10.0 % 11.0 % 33.0 %", "ring 3 50.0 % 51.0 % –", "cell 7 90.0 % 91.0 % 80.0 %"]


def test_sections_of_runs_of_which_one_was_not_evaluated(details):
    other = {**details, "classes": ["bird", "bee"], "ap": [9.9, 8.8], "ap50": [1.0, 1.0], "objects": [1, 1]}
    runs = [
        EvaluatedRun("a", {}, {"model": details}, 4, True),
        EvaluatedRun("b", {}, {"ema": {**other, "pictures": [], "mistakes": []}}, 4, True),
        EvaluatedRun("c", {}, {}, 4, True),
    ]
    found = {section.key: str(section.html) for section in sections(runs)}
    assert "AP, a, model" in found["classes"] and "AP, b, EMA" in found["classes"] and "9.9 %" in found["classes"]
    for key in ("errors", "pictures", "mistakes"):
        assert found[key].count("<h3>") == 3 and found[key].count("No evaluation has been recorded yet.") == 1
    assert "No evaluation" in str(sections(runs[2:])[0].html)
