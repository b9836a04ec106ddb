"""Loading of published checkpoints: accepted files, refused files with the reason, and files that try to run code."""

import contextlib
import copy
import os
import sys
import types
from ast import literal_eval
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import catmodel
from tests.catmodel.golden import released_shapes
from tests.catmodel.small import assert_loaded, nano, small, small_pvt


@pytest.fixture(scope="module")
def published() -> dict[str, torch.Tensor]:
    """A classifier's state dict that differs from that of a new model."""
    return nano(seed=1).state_dict()


@pytest.fixture
def config_node():
    """A class like yacs.CfgNode: a dict with state, from a module that cannot be imported when the file is read."""
    module = types.ModuleType("gone_config")

    class Node(dict):
        def __init__(self, values):
            super().__init__(values)
            self.__dict__["frozen"] = True

    Node.__module__, Node.__qualname__ = "gone_config", "Node"
    module.Node = Node
    sys.modules["gone_config"] = module
    yield Node
    sys.modules.pop("gone_config", None)


def test_released_file_with_a_config_of_an_unknown_class(tmp_path: Path, published, config_node):
    file = tmp_path / "cat.pth"
    optimizer = {
        "state": {0: {"step": 3, "exp_avg": torch.ones(2)}},
        "param_groups": [{"betas": (0.9, 0.999), "params": {0}}],
    }
    config = config_node({"MODEL": config_node({"NAME": "cat"}), "list": [1, 2]})
    torch.save(
        {
            "model": published,
            "optimizer": optimizer,
            "lr_scheduler": {},
            "max_accuracy": 80.3,
            "epoch": 299,
            "config": config,
        },
        file,
    )
    del sys.modules["gone_config"]
    with pytest.raises(Exception, match="weights_only|gone_config|Unsupported"):
        torch.load(file, weights_only=True)
    model = nano()
    report = catmodel.load_published(model, file)
    assert_loaded(model, published)
    assert report.left_out == report.fresh == []
    assert "gone_config" not in sys.modules


class RunsCode:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class Evaluates(RunsCode):
    def __reduce__(self):
        return eval, (f"open({str(self.path)!r}, 'w')",)


@pytest.mark.parametrize("kind", [RunsCode, Evaluates])
def test_a_file_cannot_run_code(tmp_path: Path, published, kind):
    file, trace = tmp_path / "evil.pth", tmp_path / "trace"
    torch.save({"model": published, "config": kind(trace)}, file)
    torch.load(file, weights_only=False)
    assert trace.exists(), "the file is meant to be dangerous"
    trace.unlink()
    model = nano()
    catmodel.load_published(model, file)
    assert not trace.exists()
    assert_loaded(model, published)


def test_a_stub_in_place_of_a_weight_is_refused(tmp_path: Path, published):
    file, trace = tmp_path / "evil.pth", tmp_path / "trace"
    torch.save({"model": {**published, "ape": RunsCode(trace)}}, file)
    with pytest.raises(ValueError, match="ape: not a tensor"):
        catmodel.load_published(nano(), file)
    assert not trace.exists()


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.encoder."])
def test_shared_prefixes_are_removed(published, prefix: str):
    model = nano()
    catmodel.load_published(model, {prefix + key: value for key, value in published.items()})
    assert_loaded(model, published)


def test_parameters_and_other_dtypes_and_safetensors(tmp_path: Path, published):
    half = {key: nn.Parameter(value.half()) if value.is_floating_point() else value for key, value in published.items()}
    torch.save({"state_dict": half}, tmp_path / "half.pth")
    model = nano()
    catmodel.load_published(model, tmp_path / "half.pth")
    torch.testing.assert_close(model.ape, published["ape"], rtol=0, atol=1e-4)
    assert model.ape.dtype == torch.float32
    save_file(published, tmp_path / "cat.safetensors")
    catmodel.load_published(model, tmp_path / "cat.safetensors")
    assert_loaded(model, published)


def test_every_problem_is_named_and_nothing_is_loaded(published):
    broken = dict(published)
    del broken["norm.bias"], broken["layers.1.cpsa_blocks.0.attn.qkv.weight"]
    broken["layers.0.extra"] = torch.zeros(1)
    broken["head.weight"] = torch.zeros(1000, 128)
    broken["layers.0.pre_ipsa_blocks.0.attn.relative_position_index"] = published[
        "layers.0.pre_ipsa_blocks.0.attn.relative_position_index"
    ].T.contiguous()
    model = nano()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        catmodel.load_published(model, broken)
    for part in (
        "missing: norm.bias",
        "missing: layers.1.cpsa_blocks.0.attn.qkv.weight",
        "not in the model: layers.0.extra",
        "head.weight: shape [1000, 128], the model's is [10, 128] (fresh_head=True leaves it out",
        "layers.0.pre_ipsa_blocks.0.attn.relative_position_index: other values",
    ):
        assert part in str(error.value)
    assert_loaded(model, before)


def test_rename_table(published):
    old = {
        key.replace(".pre_ipsa_blocks.", ".ipsa_1.").replace("patch_embed.proj", "patch_embed.projection"): v
        for key, v in published.items()
    }
    model = nano()
    catmodel.load_published(
        model, old, rename={"ipsa_1": "pre_ipsa_blocks", "patch_embed.projection": "patch_embed.proj"}
    )
    assert_loaded(model, published)
    with pytest.raises(ValueError, match="'ipsa' -> 'x': matches no key"):
        catmodel.load_published(model, old, rename={"ipsa": "x"})
    with pytest.raises(ValueError, match="two keys the same name"):
        catmodel.load_published(model, published, rename={"norm1": "norm2"})


@pytest.mark.parametrize("out_indices", [None, (0, 1)])
def test_a_classifier_into_a_dense_model(published, out_indices):
    model = nano(features_only=True, out_indices=out_indices)
    report = catmodel.load_published(model, published)
    assert {"norm.weight", "norm.bias", "head.weight", "head.bias"} <= set(report.left_out)
    assert ("layers.2.cpsa_blocks.0.norm1.weight" in report.left_out) == (out_indices is not None)
    assert set(report.fresh) == {f"norm{i}.{part}" for i in model.out_indices for part in ("weight", "bias")}
    ape = published["ape"]  # [1, 16 * 16, 32]
    assert model.ape.shape == (1, 32, 16, 16)
    assert torch.equal(model.ape[0, :, 3, 5], ape[0, 3 * 16 + 5])
    for key, value in model.state_dict().items():
        assert key == "ape" or key in report.fresh or torch.equal(value, published[key])
    with pytest.raises(ValueError, match="missing: layers.0.pre_ipsa_blocks.0.norm1.weight"):
        catmodel.load_published(
            model, {k: v for k, v in published.items() if k != "layers.0.pre_ipsa_blocks.0.norm1.weight"}
        )


@pytest.mark.parametrize("name", ["cat_nano", "pvt_tiny", "cotnet50"])
def test_any_value_in_place_of_a_weight_is_loaded_or_reported(name: str):
    model = small(name, stages=2)
    published = copy.deepcopy(model.state_dict())
    odd = [
        torch.ones(()),
        torch.ones(0),
        torch.ones(1, 0, 3),
        torch.ones(1, 3, 0, 0),
        torch.ones(2, 3, 4, 5),
        None,
        "x",
        {},
        [1],
        3,
    ]
    for key, weight in published.items():
        for value in (*odd, weight.to(torch.complex64), weight.bool(), weight[None], weight.double()):
            with contextlib.suppress(ValueError):
                catmodel.load_published(model, {**published, key: value}, resize_positions=True)
        with pytest.raises(ValueError, match=f"{key}: dtype torch.complex64"):
            catmodel.load_published(model, {**published, key: weight.to(torch.complex64)})
    with pytest.raises(ValueError, match="no weights by their names"):
        catmodel.load_published(model, {**published, 3: torch.ones(1)})


def test_another_patch_size_is_refused_in_one_sentence(published):
    model = nano(patch_size=3, img_size=24)
    with pytest.raises(
        ValueError,
        match="patches are 4 x 4 tokens, the model's 3 x 3.*patch_size=4, and an img_size that is a multiple of 32",
    ):
        catmodel.load_published(model, published, resize_positions=True)


def test_other_classes(published):
    model = nano(num_classes=3)
    own = model.head.weight.detach().clone()
    with pytest.raises(ValueError, match=r"head.bias: shape \[10\], the model's is \[3\] \(fresh_head=True"):
        catmodel.load_published(model, published)
    report = catmodel.load_published(model, published, fresh_head=True)
    assert report.left_out == report.fresh[::-1] == ["head.bias", "head.weight"]
    assert_loaded(model, {**published, "head.weight": own, "head.bias": torch.zeros(3)})


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_exported_graphs_are_not_said_to_be_damaged(tmp_path, suffix):
    (tmp_path / f"m{suffix}").write_bytes(b"a graph")
    with pytest.raises(ValueError, match=rf"m\{suffix}: weights are not read from \{suffix} files: give"):
        catmodel.load_published(nano(), tmp_path / f"m{suffix}")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_unreadable_files_are_named(tmp_path: Path, content: bytes | None, suffix: str):
    file = tmp_path / f"broken{suffix}"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=f"broken{suffix}"):
        catmodel.load_published(nano(), file)


def test_a_truncated_file_is_refused(tmp_path: Path, published):
    file = tmp_path / "cut.pth"
    torch.save({"model": published}, file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match="cut.pth"):
        catmodel.load_published(nano(), file)


# ------------------------------------------------------------------------------------------------------- PVT and CoTNet


@pytest.mark.parametrize(("name", "keys"), [("pvt_tiny", "pvt_tiny"), ("se_cotnetd50", "se_cotnetd_50")])
def test_released_names_with_wrappers_and_running_statistics(tmp_path: Path, name: str, keys: str):
    published = {key: torch.rand(literal_eval(shape)) for key, shape in released_shapes(keys).items()}
    published |= {key: torch.tensor(7) for key in published if key.endswith("num_batches_tracked")}
    torch.save(
        {"state_dict": {f"module.{key}": value for key, value in published.items()}, "epoch": 300},
        tmp_path / "released.pth.tar",
    )
    model = catmodel.create_model(name)
    report = catmodel.load_published(model, tmp_path / "released.pth.tar")
    assert_loaded(model, published)
    assert report.left_out == report.fresh == report.resized == []


def test_pvt_classifier_into_a_dense_model():
    published = small_pvt(seed=1).state_dict()
    model = small_pvt(features_only=True)
    report = catmodel.load_published(model, published)
    assert report.left_out == ["cls_token", "head.bias", "head.weight", "norm.bias", "norm.weight"]
    assert report.fresh == report.resized == []
    assert_loaded(model, {**published, "pos_embed4": published["pos_embed4"][:, 1:]})
    shallow = small_pvt(features_only=True, out_indices=(1,))
    report = catmodel.load_published(shallow, published)
    assert_loaded(shallow, published)
    assert {key for key in published if key not in shallow.state_dict()} == set(report.left_out)


def test_cotnet_classifier_into_a_dense_model():
    torch.manual_seed(1)
    published = catmodel.create_model("cotnet50", depths=(1, 1, 1, 1)).state_dict()
    model = catmodel.create_model("cotnet50", depths=(1, 1, 1, 1), features_only=True, out_indices=(0, 1))
    report = catmodel.load_published(model, published)
    assert_loaded(model, published)
    assert {key for key in published if key.startswith(("layer3.", "layer4.", "fc."))} == set(report.left_out)
    with pytest.raises(ValueError, match="missing: layer1.0.bn1.running_mean"):
        catmodel.load_published(model, {k: v for k, v in published.items() if k != "layer1.0.bn1.running_mean"})
