"""Text for people."""

import pytest

from data_pipeline.formatting import counted


@pytest.mark.parametrize(
    ("number", "name", "text"),
    [
        (1, "class", "1 class"),
        (2, "class", "2 classes"),
        (0, "box", "0 boxes"),
        (1, "image", "1 image"),
        (1200, "image", "1,200 images"),
    ],
)
def test_a_noun_agrees_with_its_number(number, name, text):
    assert counted(number, name) == text
