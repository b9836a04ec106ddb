"""docs/results/segmenters.json is up to date with the networks, and these are the papers'."""

import json

import pytest
import torch

import catmodel
from benchmarks.dense import kept_megabytes, training_step
from benchmarks.segmenters import PUBLISHED, counted, loss
from tests.runs import ROOT


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return json.loads((ROOT / "docs/results/segmenters.json").read_text())["counts"]


def test_every_segmenter_has_a_line(rows):
    assert [row["model"] for row in rows] == [line[0] for line in PUBLISHED]


@pytest.mark.parametrize("name", ["cat_small", "cat_base", "pvt_tiny"])
def test_counts_are_the_networks_and_the_papers(rows, name):
    row = next(row for row in rows if row["model"] == name)
    found = counted(name)
    assert found.items() <= row.items()
    class_token = 512 if name.startswith("pvt") else 0
    assert found["parameters"] == row["paper_parameters"] - class_token
    assert row["paper_gflops"] is None or found["gflops"] == pytest.approx(row["paper_gflops"], rel=0.005)


def test_what_a_step_keeps_is_counted():
    """Twice the images: twice the activations, and the weights once."""
    model = catmodel.create_segmenter("cat_nano", 3, embed_patch_size=4, neck_channels=8, channels=8)
    one, two, three = (kept_megabytes(training_step(model, batch, loss, 64)) for batch in (1, 2, 3))
    assert two - one == pytest.approx(three - two, rel=0.01)
    assert one > 64 * 64 * 3 * 4 / 1e6, "at least logits of the image's size"
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
