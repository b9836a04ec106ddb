"""The table of classes, which the tasks' sections of a report share."""

import re

import pytest

from train.task_registry import find
from train.tasks.report import EvaluatedRun

NAMES = ["cell", "cell", "ring"]
DETAILS = {
    "classification": {"step": 8, "split": "", "correct": [9, 1, 5], "count": [10, 10, 10], "mistakes": []},
    "segmentation": {"step": 8, "correct": [9, 1, 5], "labelled": [10] * 3, "predicted": [9, 1, 5], "pictures": []},
}


@pytest.mark.parametrize("task", DETAILS)
def test_classes_of_one_name_have_a_row_each(task):
    """Earlier versions prepared such datasets. Runs are compared by the name and its place among equal ones."""
    first = {**DETAILS[task], "classes": NAMES}
    second = {**first, "classes": ["ring", "cell", "cell"]}
    config = {"data.image_size": 32}
    runs = [EvaluatedRun(name, config, {"ema": found}, 4, True) for name, found in (("a", first), ("b", second))]
    rows = str(find(task).report_sections(runs)[0].html).split("</tr>")
    found = [re.findall(r"cell|ring|[\d.]+ %", re.sub("<[^>]*>", " ", row)) for row in rows]
    expected = [["cell", "10.0 %", "50.0 %"], ["ring", "50.0 %", "90.0 %"], ["cell", "90.0 %", "10.0 %"]]
    assert [row[:3] for row in found if row] == expected
