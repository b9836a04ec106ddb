"""The table of an evaluation."""

import re

from train.tasks.segmentation.pictures import iou_table


def test_a_table_in_markdown():
    """The lowest IoU first, and names with markup."""
    details = {
        "classes": ["road", "a|b <i>", "moon"],
        "correct": [50, 10, 0],
        "labelled": [50, 2000, 0],
        "predicted": [100, 10, 0],
    }
    lines = iou_table(details).splitlines()
    assert lines[0] == "| class | IoU | accuracy | pixels |"
    assert lines[2:] == [
        r"| a\|b &lt;i&gt; | 0.5 % | 0.5 % | 2,000 |",
        "| road | 50.0 % | 100.0 % | 50 |",
        "| moon | – | – | 0 |",
    ]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {5}
