"""The benchmark of loading images with boxes: all of its ways run, on the images of one epoch."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import box_loading
from tests.data_pipeline.boxed_splits import SCALES, train, write


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.setattr(box_loading, "SCALE", (213, 128))
    return box_loading.Boxes(write(tmp_path))


@pytest.mark.parametrize("kind", ["pil", "tensor", "jpeg"])
def test_torchvision_s_ways_run(images, kind):
    images.torchvision(kind)()


def test_this_data_path_s_way_makes_the_loader_s_batches(images):
    views = replace(SCALES, scales=((213, 128),))
    batches = train(images.split, len(images.batches), views=views, batch=(2, 2))
    assert len(images.ids) == 10
    for (pixels, targets), batch in zip(images.ours(), batches, strict=True):
        assert np.array_equal(pixels, batch.images.permute(0, 2, 3, 1).numpy())
        assert all(torch.equal(targets[name], batch.targets[name]) for name in ("boxes", "labels", "inside"))
