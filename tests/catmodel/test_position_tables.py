"""Position tables of published checkpoints: tables for another image size are refused, or interpolated on request."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import catmodel
from tests.catmodel.small import assert_loaded, nano, small_pvt
from tests.interpolation import resized


@pytest.mark.parametrize("features_only", [False, True])
@pytest.mark.parametrize(("size", "other"), [(32, 48), (32, 16)])
def test_cat_at_another_resolution_only_on_request(features_only: bool, size: int, other: int):
    two_stages = {"depths": (1, 1), "num_heads": (2, 4)}
    published = nano(seed=1, img_size=size, **two_stages).state_dict()
    model = nano(img_size=other, features_only=features_only, **two_stages)
    with pytest.raises(ValueError, match="ape: shape .*resize_positions=True"):
        catmodel.load_published(model, published)
    with pytest.raises(ValueError, match="ape: shape"):  # CAT has no class token
        catmodel.load_published(
            model, {**published, "ape": torch.zeros(1, size**2 // 4 + 1, 32)}, resize_positions=True
        )
    report = catmodel.load_published(model, published, resize_positions=True)
    side = size // 2
    ours = model.ape.permute(0, 2, 3, 1) if features_only else model.ape.unflatten(1, model.grid_size)
    expected = resized(published["ape"].unflatten(1, (side, side))[0].numpy(), *model.grid_size, "bicubic")
    np.testing.assert_allclose(ours[0].detach().numpy(), expected, rtol=0, atol=1e-6)
    assert report.resized == [f"ape {side} x {side} -> {other // 2} x {other // 2}"]


def wide(**overrides) -> nn.Module:
    """A cat_nano of one stage for images of 32 x 128 pixels: 16 x 64 tokens, as many as for 64 x 64 pixels."""
    return nano(**{"img_size": (32, 128), "depths": (1,), "num_heads": (2,), **overrides})


@pytest.mark.parametrize("through", ["state dict", "file", "exported"])
def test_equally_many_positions_of_another_grid_are_refused_or_interpolated(tmp_path: Path, through: str):
    """From 16 x 64 to 32 x 32 tokens and back: refused, or interpolated on request."""
    published, square = wide(seed=1), wide(img_size=64)
    source = published.state_dict()
    if through == "file":
        torch.save({"model": source}, tmp_path / "wide.pth")
        source = tmp_path / "wide.pth"
    elif through == "exported":
        about = {"model": {"name": "cat_nano", "img_size": [32, 128]}, "classes": []}
        save_file(source, tmp_path / "wide.safetensors", {"catmodel": json.dumps(about)})
        source = tmp_path / "wide.safetensors"
    with pytest.raises(
        ValueError, match=r"ape: shape \[1, 1024, 32\] of 16 x 64 positions, .* of 32 x 32 \(resize_positions=True"
    ):
        catmodel.load_published(square, source)
    assert catmodel.load_published(square, source, resize_positions=True).resized == ["ape 16 x 64 -> 32 x 32"]
    expected = resized(published.ape.detach().unflatten(1, (16, 64))[0].numpy(), 32, 32, "bicubic")
    np.testing.assert_allclose(square.ape.detach().unflatten(1, (32, 32))[0].numpy(), expected, rtol=0, atol=1e-6)
    again = wide()
    assert catmodel.load_published(again, source).resized == []
    assert_loaded(again, published.state_dict())

    released = dict(
        wide(seed=1, img_size=64).state_dict()
    )  # records no size, like a released file: assumed to be square
    with pytest.raises(ValueError, match="ape: .* of 32 x 32 positions, .* of 16 x 64"):
        catmodel.load_published(wide(), released)
    assert catmodel.load_published(wide(), released, resize_positions=True).resized == ["ape 32 x 32 -> 16 x 64"]


def test_positions_of_an_unknown_grid_are_refused_with_a_working_remedy():
    published = dict(wide(seed=1, img_size=(32, 96)).state_dict())  # 16 x 48 is no square number
    same, other = wide(img_size=(32, 96)), wide(img_size=64)
    catmodel.load_published(same, published)  # no square, but as many as the model's: assumed to be the model's
    assert_loaded(same, published)
    for resize in (False, True):
        with pytest.raises(ValueError, match=r"ape: shape \[1, 768, 32\], which is no square grid, .*: load it"):
            catmodel.load_published(other, published, resize_positions=resize)
    same.load_state_dict(published)  # the remedy
    assert catmodel.load_published(other, same.state_dict(), resize_positions=True).resized == [
        "ape 16 x 48 -> 32 x 32"
    ]


def test_pvt_positions_of_another_shape():
    """Also in the last table, whose length with the class token happens to be a square: 6 x 8 + 1 = 7 x 7."""
    published = small_pvt(seed=1, img_size=(192, 256))
    model = small_pvt(img_size=224)
    report = catmodel.load_published(model, published.state_dict(), resize_positions=True)
    assert report.resized[-1] == "pos_embed4 6 x 8 -> 7 x 7"
    assert torch.equal(model.pos_embed4[:, 0], published.pos_embed4[:, 0])
    expected = resized(published.pos_embed4[0, 1:].detach().unflatten(0, (6, 8)).numpy(), 7, 7, "bilinear")
    np.testing.assert_allclose(
        model.pos_embed4[0, 1:].detach().unflatten(0, (7, 7)).numpy(), expected, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("features_only", [False, True])
def test_pvt_at_another_resolution(features_only: bool):
    """Four tables, bilinearly. The class token's entry is kept, or left out if the model has no class token."""
    published = small_pvt(seed=1).state_dict()
    model = small_pvt(img_size=96, features_only=features_only)
    with pytest.raises(ValueError, match="pos_embed4: shape .*resize_positions=True"):
        catmodel.load_published(model, published)
    report = catmodel.load_published(model, published, resize_positions=True)
    assert [line.split()[0] for line in report.resized] == [f"pos_embed{i}" for i in (1, 2, 3, 4)]
    for key, side in (("pos_embed1", 16), ("pos_embed2", 8), ("pos_embed3", 4), ("pos_embed4", 2)):
        theirs, ours = published[key][0].numpy(), model.state_dict()[key][0].numpy()
        if key == "pos_embed4":
            if not features_only:
                np.testing.assert_array_equal(ours[0], theirs[0])
                ours = ours[1:]
            theirs = theirs[1:]
        expected = resized(theirs.reshape(side, side, -1), side * 3 // 2, side * 3 // 2, "bilinear")
        np.testing.assert_allclose(ours.reshape(expected.shape), expected, rtol=0, atol=1e-6)
    others = {key: value for key, value in model.state_dict().items() if not key.startswith("pos_embed")}
    assert all(torch.equal(value, published[key]) for key, value in others.items())
