"""docs/results/models.json is up to date with the models."""

import json

import pytest

import catmodel
from benchmarks.families import PUBLISHED, counted
from tests.runs import ROOT


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return json.loads((ROOT / "docs/results/models.json").read_text())["counts"]


def test_every_model_has_a_line(rows):
    assert [(row["model"], row["size"]) for row in rows] == [line[:2] for line in PUBLISHED]
    assert {row["model"] for row in rows} == set(catmodel.list_models())


@pytest.mark.parametrize("name", ["cat_nano", "pvt_tiny", "cotnet50"])
def test_counts_are_still_those_of_the_models(rows, name):
    row = next(row for row in rows if row["model"] == name)
    assert counted(name, 32 if name == "cat_nano" else 224).items() <= row.items()
