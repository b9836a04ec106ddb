"""Exported files compute the same as the run's model, for any batch size and, for dense maps, any image size."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import catmodel
from catmodel.export import CannotExport, ExportError, export
from catmodel.pretrained import about
from tests.catmodel.small import jitter
from tests.runs import ROOT, run, start_command
from train.checkpoint.trained_model import read_trained

# Of each family a small network with every kind of layer. Few blocks: torch.export thinks for seconds about each.
SMALL = {
    "cat_nano": dict(img_size=16, embed_dim=16, depths=(0, 1), num_heads=(2, 4), num_classes=10),
    "pvt_tiny": dict(
        img_size=32,
        embed_dims=(8, 16),
        depths=(1, 1),
        num_heads=(1, 2),
        mlp_ratios=(2, 2),
        sr_ratios=(2, 1),
        num_classes=10,
    ),
    "cotnet50": dict(img_size=32, depths=(0, 1), width=0.25, num_classes=10),
}


def small_model(name: str, **more) -> tuple[torch.nn.Module, dict]:
    """A model whose outputs depend on every weight, and its description."""
    settings = {"name": name, **SMALL[name], **more}
    torch.manual_seed(0)
    model = catmodel.create_model(**settings).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    about = {"model": settings, "classes": [f"class {i}" for i in range(10)], "mean": [0.5] * 3, "std": [0.2] * 3}
    return model, {**about, "interpolation": "bicubic", "eval_crop": 0.875}


@pytest.fixture(scope="module")
def tiny_run(tiny_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run(tiny_config, folder, "train.max_steps=4", "train.evaluate_every=0")
    return folder


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere", "--to", "m.pt2"], "nowhere is neither a run's folder nor a checkpoint"),
        ([".", "--to", "m.pth"], "--to m.pth: must end in .safetensors, .onnx, .pt2, or in /"),
        ([".", "--to", "m/", "--features"], "--to m/: a folder for timm holds the classifier"),
        ([".", "--to", "LICENSE/m.pt2"], "--to LICENSE/m.pt2 cannot be written (Not a directory)"),
    ],
)
def test_a_mistake(arguments, sentence):
    result = subprocess.run(
        [sys.executable, "launch/export.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 78 and sentence in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr


@pytest.mark.slow
def test_a_run_as_onnx(tiny_run, tmp_path):
    """The weights are the run's EMA, and the file contains the classes and the normalisation."""
    onnxruntime = pytest.importorskip("onnxruntime")
    job = start_command("export", tmp_path, str(tiny_run), "--to", str(tmp_path / "m.onnx"))
    assert job.wait() == [0], job.text()
    assert "(ema), within " in job.text()
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    assert session.get_inputs()[0].shape == ["batch", 3, 16, 16] and session.get_outputs()[0].shape == ["batch", 10]
    about = json.loads(session.get_modelmeta().custom_metadata_map["catmodel"])
    assert about["classes"] == [f"class_{i}" for i in range(10)] and about["std"] == [0.229, 0.224, 0.225]
    images = torch.randn(3, 3, 16, 16)
    [logits] = session.run(["logits"], {"images": images.numpy()})
    with torch.no_grad():
        assert np.abs(logits - read_trained(tiny_run, "ema").model()(images).numpy()).max() < 1e-4
        assert np.abs(logits - read_trained(tiny_run, "model").model()(images).numpy()).max() > 1e-4


@pytest.mark.slow
def test_a_run_as_safetensors(tiny_run, tmp_path):
    from safetensors import safe_open

    job = start_command(
        "export", tmp_path, str(tiny_run), "--to", str(tmp_path / "m.safetensors"), "--weights", "model"
    )
    assert job.wait() == [0], job.text()
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        model = catmodel.create_model(**json.loads(file.metadata()["catmodel"])["model"])
        model.load_state_dict({key: file.get_tensor(key) for key in file.keys()})
    expected = read_trained(tiny_run, "model")
    assert model.state_dict().keys() == expected.state.keys()
    assert all(torch.equal(value, expected.state[key]) for key, value in model.state_dict().items())
    assert (tmp_path / "m.safetensors").stat().st_mode & 0o077 == (
        tiny_run / "model.safetensors"
    ).stat().st_mode & 0o077


@pytest.mark.slow
def test_a_run_as_a_folder_for_timm(tiny_run, tmp_path):
    import timm

    catmodel.register_timm()
    job = start_command("export", tmp_path, str(tiny_run), "--to", f"{tmp_path}/hub/")
    assert job.wait() == [0], job.text()
    source, images = f"local-dir:{tmp_path}/hub", torch.randn(2, 3, 16, 16)
    model = timm.create_model(source, pretrained=True).eval()
    with torch.no_grad():
        assert torch.allclose(model(images), read_trained(tiny_run).model()(images), atol=1e-6)
        fresh = timm.create_model(source, pretrained=False).eval()
        assert fresh.num_classes == 10 and not torch.allclose(fresh(images), model(images), atol=1e-2)
    data = timm.data.resolve_model_data_config(model)
    assert (data["input_size"], data["crop_pct"], data["mean"]) == ((3, 16, 16), 0.875, [0.485, 0.456, 0.406])
    assert tuple(model.pretrained_cfg["label_names"]) == tuple(f"class_{i}" for i in range(10))
    other = timm.create_model(source, pretrained=True, num_classes=3)
    assert other.head.out_features == 3 and torch.equal(other.patch_embed.proj.weight, model.patch_embed.proj.weight)
    maps = timm.create_model(source, pretrained=True, features_only=True)
    larger = timm.create_model(source, pretrained=True, img_size=32).eval()
    assert larger.ape.shape == (1, 256, 16) and larger(torch.randn(1, 3, 32, 32)).shape == (1, 10)
    assert maps.feature_info.channels() == [16, 32] and torch.equal(
        maps.patch_embed.proj.weight, model.patch_embed.proj.weight
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_torch_export_takes_any_batch(name, tmp_path):
    model, about = small_model(name)
    path = tmp_path / "m.pt2"
    assert export(model, str(path), about) <= 1e-4
    metadata = {"catmodel": ""}
    module = torch.export.load(path, extra_files=metadata).module()
    images = torch.randn(7, 3, *[SMALL[name]["img_size"]] * 2)
    with torch.no_grad():
        assert torch.allclose(module(images), model(images), atol=1e-4)
    assert json.loads(metadata["catmodel"])["classes"][3] == "class 3"


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_onnx_maps_of_any_size(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, about = small_model(name, features_only=True)
    assert export(model, str(tmp_path / "m.onnx"), about) <= 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    for shape in ((1, 3, 64, 65), (2, 3, 113, 90), (1, 3, 112, 336)):
        images = torch.randn(shape)
        with torch.no_grad():
            expected = model(images)
        for found, want in zip(session.run(["map0", "map1"], {"images": images.numpy()}), expected, strict=True):
            assert np.abs(found - want.numpy()).max() < 1e-4 * max(1, want.abs().max())


@pytest.mark.slow
def test_a_file_that_differs_from_the_model_is_not_left_there(tmp_path):
    """A model that draws random numbers is refused; an existing file is kept."""

    class Random(torch.nn.Module):
        features_only = False

        def forward(self, image):
            return image.mean((2, 3)) + torch.rand(3)

    (tmp_path / "m.pt2").write_text("an earlier one")
    with pytest.raises(ExportError, match=r"differ by .* more than 1e-04"):
        export(Random(), str(tmp_path / "m.pt2"), {"model": {"img_size": 16}})
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt2"] and (
        tmp_path / "m.pt2"
    ).read_text() == "an earlier one"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "suffix"), [*((name, ".onnx") for name in SMALL), ("cat_nano", ".pt2"), ("cat_nano", ".safetensors")]
)
def test_a_segmenter_takes_images_of_any_size(name, suffix, tmp_path):
    """The file gives logits of the image's size."""
    settings = {"name": name, **SMALL[name], "num_classes": 5, "neck_channels": 8, "channels": 8, "full_size": True}
    if name == "cotnet50":
        settings["depths"] = (1, 1)
    model = jitter(catmodel.create_segmenter(**settings)).eval()
    path = tmp_path / f"m{suffix}"
    assert export(model, str(path), {"model": settings, "classes": list("abcde")}) <= 1e-4
    if suffix == ".onnx":
        session = pytest.importorskip("onnxruntime").InferenceSession(path)

        def compute(images):
            return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

    elif suffix == ".pt2":
        compute = torch.export.load(path).module()
    else:
        metadata = about(path)
        compute = catmodel.create_segmenter(**metadata["model"]).eval()
        compute.load_state_dict(load_file(path))
        assert metadata["classes"] == list("abcde")
    with torch.no_grad():
        for shape in ((1, 3, 64, 65), (2, 3, 113, 90), (1, 3, 112, 336)):
            images = torch.randn(shape)
            expected = model(images)
            assert expected.shape == (shape[0], 5, *shape[2:]) and expected.std(dim=(2, 3)).min() > 0.01
            assert (compute(images) - expected).abs().max() < 1e-4 * max(1, expected.abs().max())


def test_a_segmenter_is_no_model_of_timm(tmp_path):
    settings = {"name": "cat_nano", **SMALL["cat_nano"], "num_classes": 5, "channels": 8}
    with pytest.raises(CannotExport, match="timm and the Hub have no place for segmentation"):
        export(catmodel.create_segmenter(**settings), f"{tmp_path}/m/", {"model": settings})
