"""Runs that begin from given weights (bitwise), layer-wise learning rates, and which weights are refused."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import catmodel
from tests.interpolation import resized
from tests.oracle import assert_same_state, loss_by_hand, state
from tests.runs import losses, run, start
from train.checkpoint.format import read_weights
from train.checkpoint.info import checkpoint_path
from train.checkpoint.init_from import read_source
from train.config import load_config
from train.config_sections import OptimizerConfig
from train.engine.optimizer import build_optimizer, parameter_groups
from train.tasks.base import build_task

SMALL = {
    "cat_nano": dict(img_size=16, embed_dim=16, depths=(1, 2), num_heads=(2, 4)),
    "pvt_tiny": dict(img_size=64, embed_dims=(8, 16, 24, 32), depths=(1, 2, 1, 1), num_heads=(1, 2, 3, 4)),
    "cotnet50": dict(depths=(1, 2, 1, 1)),
}
# Layers of some parameters: stem, first block, second stage, last stage, final norm and head.
LAYERS = {
    "cat_nano": {
        "ape": 0,
        "patch_embed.norm.weight": 0,
        "layers.0.post_ipsa_blocks.0.mlp.fc1.weight": 1,
        "layers.0.downsample.reduction.weight": 2,
        "layers.1.cpsa_blocks.0.attn.qkv.weight": 2,
        "layers.1.pre_ipsa_blocks.1.attn.relative_position_bias_table": 3,
        "norm.weight": 4,
        "head.bias": 4,
    },
    "pvt_tiny": {
        "pos_embed1": 0,
        "patch_embed1.proj.weight": 0,
        "block1.0.attn.sr.weight": 1,
        "patch_embed2.proj.weight": 2,
        "block2.0.mlp.fc1.weight": 2,
        "block2.1.mlp.fc1.weight": 3,
        "block3.0.norm1.bias": 4,
        "cls_token": 5,
        "pos_embed4": 5,
        "block4.0.attn.kv.weight": 5,
        "norm.bias": 6,
        "head.weight": 6,
    },
    "cotnet50": {
        "conv1.weight": 0,
        "bn1.bias": 0,
        "layer1.0.downsample.0.weight": 1,
        "layer2.0.conv2.embed.0.weight": 2,
        "layer2.1.bn3.weight": 3,
        "layer4.0.conv1.weight": 5,
        "fc.weight": 6,
    },
}


@pytest.mark.parametrize("name", SMALL)
def test_layer_groups_hold_every_parameter_once_at_the_rate_of_its_layer(name):
    model = catmodel.create_model(name, **SMALL[name])
    groups = parameter_groups(model, weight_decay=0.05, layer_decay=0.5)
    group_of = {parameter: group for group in groups for parameter in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(group_of) == len(list(model.parameters()))
    last = max(LAYERS[name].values())
    for key, layer in LAYERS[name].items():
        assert group_of[model.get_parameter(key)]["lr_scale"] == 0.5 ** (last - layer), key
    assert {group["lr_scale"] for group in groups} == {0.5**power for power in range(last + 1)}
    alike = parameter_groups(model, weight_decay=0.05)
    assert len(alike) == 2
    decays = {parameter: group["weight_decay"] for group in alike for parameter in group["params"]}
    assert decays == {parameter: group["weight_decay"] for parameter, group in group_of.items()}


def test_muon_keeps_its_matrices_under_layer_decay():
    model = catmodel.create_model("cat_nano", **SMALL["cat_nano"])
    groups = build_optimizer(model, OptimizerConfig(name="muon", layer_decay=0.5)).param_groups
    found = {parameter: group for group in groups for parameter in group["params"]}
    assert found.keys() == set(model.parameters())
    linears = {name: layer.weight for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    matrices = {parameter for parameter, group in found.items() if group["matrices"]}
    assert matrices == {weight for name, weight in linears.items() if name != "head"}
    assert found[linears["layers.1.cpsa_blocks.1.attn.qkv"]]["lr_scale"] == 0.5


@pytest.fixture(scope="module")
def trained(tiny_config, tmp_path_factory):
    """The folder of a run of two steps at 16 x 16 pixels."""
    output = tmp_path_factory.mktemp("trained") / "run"
    run(tiny_config, output, "train.max_steps=2", "train.evaluate_every=0")
    return output


@pytest.fixture
def released(trained, tmp_path):
    """The run's weights in the form of a published file, with a head of 7 classes."""
    weights = read_weights(checkpoint_path(trained / "checkpoints", 2), "ema")
    weights |= {"head.weight": torch.ones(7, 32), "head.bias": torch.ones(7)}
    torch.save({"model": weights, "epoch": 299, "max_accuracy": 80.3}, tmp_path / "released.pth")
    return tmp_path / "released.pth"


AT_32 = [
    "data.image_size=32",
    "train.evaluate_every=0",
    "checkpoint.every_steps=1",
    "checkpoint.keep=9",
    "schedule.warmup_epochs=0",
]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_another_size_and_other_classes_from_a_published_file(tiny_config, released, tmp_path, stage):
    """Two ranks, layer-wise rates: the first step's loss and update are those of these weights; a resume is bitwise."""
    settings = [
        *AT_32,
        f"model.init_from={released}",
        "optimizer.layer_decay=0.25",
        "optimizer.weight_decay=0",
        "train.max_steps=3",
    ]
    settings.append(f"zero.stage={stage}")
    job = run(tiny_config, tmp_path / "run", *settings, world=2)
    published = torch.load(released)["model"]
    published["ape"] = (
        torch.from_numpy(resized(published["ape"].view(8, 8, 16).numpy(), 16, 16, "bicubic")).float().view(1, 256, 16)
    )
    task = build_task(load_config(tiny_config, settings), [""] * 10)
    published |= {key: value for key, value in task.initial_model().state_dict().items() if key.startswith("head.")}
    assert losses(tmp_path / "run")[1] == pytest.approx(loss_by_hand(tiny_config, settings, published, 0), rel=1e-6)

    # Adam's first step moves a weight by the learning rate, whatever its gradient.
    after = state(tmp_path / "run", 1)
    for layer, key in (
        (0, "patch_embed.proj.weight"),
        (1, "layers.0.cpsa_blocks.0.mlp.fc1.weight"),
        (3, "head.weight"),
    ):
        moved = (after[f"model/{key}"] - published[key]).abs().max().item()
        assert moved == pytest.approx(task.config.optimizer.lr * 0.25 ** (3 - layer), rel=1e-3), key

    assert job.text().count("first weights from") == 1
    assert "position tables interpolated: ape 8 x 8 -> 16 x 16" in job.text()
    assert "head: 7 -> 10 classes, fresh" in job.text()

    released.unlink()  # a resumed run does not need it
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "run", again)
    for step in (2, 3):
        shutil.rmtree(checkpoint_path(again / "checkpoints", step))
    (again / "metrics.jsonl").unlink()
    job = run(tiny_config, again, *settings, world=2)
    assert losses(again) == {step: losses(tmp_path / "run")[step] for step in (2, 3)}
    assert_same_state(state(again, 3), state(tmp_path / "run", 3))


@pytest.mark.slow
def test_our_own_weights_are_averages_wherever_they_lie(trained, tmp_path):
    checkpoint = checkpoint_path(trained / "checkpoints", 2)
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")  # a run that has not finished yet
    for source in (trained, trained / "model.safetensors", checkpoint, tmp_path):
        weights, about = read_source(source)
        assert_same_state(weights, read_weights(checkpoint, "ema"))
        assert about["classes"] == [f"class_{i}" for i in range(10)] and about["task"] == {"name": "classification"}


@pytest.mark.slow
def test_the_head_goes_with_its_classes(tiny_config, trained, tmp_path):
    """From a run on the same ten classes, and on ten others. The learning rate of the step is 0: weights do not change.

    In bf16, which rounds none of them.
    """
    expected = read_weights(checkpoint_path(trained / "checkpoints", 2), "ema")
    about = {"model": {}, "classes": [f"kind_{i}" for i in range(10)], "step": 2}
    save_file(expected, tmp_path / "others.safetensors", {"catmodel": json.dumps(about)})
    for source, fresh in ((trained, set()), (tmp_path / "others.safetensors", {"head.weight", "head.bias"})):
        output = tmp_path / f"from_{source.stem}"
        settings = ["train.max_steps=1", "schedule.warmup_lr=0", "train.evaluate_every=0", "train.precision=bf16"]
        job = run(tiny_config, output, *settings, f"model.init_from={source}")
        weights = read_weights(checkpoint_path(output / "checkpoints", 1), "model")
        assert {key for key in expected if not torch.equal(weights[key], expected[key])} == fresh
        assert ("head: 10 -> 10 classes, fresh" in job.text()) == bool(fresh)


@pytest.mark.slow
def test_what_cannot_be_used_is_refused_in_one_sentence(tiny_config, trained, tmp_path):
    cases = {
        f"model.init_from={tmp_path}/absent.pth": r"model.init_from: there is no \S+/absent.pth; name a file",
        f"model.init_from={tmp_path}": r"model.init_from: \S+ is not a checkpoint",
        f"model.init_from={tiny_config}": r"model.init_from: \S+/tiny.yaml: neither a .safetensors file nor",
        f"model.init_from={trained} model.depths=[1,2]": (
            r"model.init_from: \S+ does not fit this cat_nano: missing: \S+ \(and \d+ more\)"
        ),
        f"model.init_from={trained} model.patch_size=2": (
            "attention patches are 4 x 4 tokens, the model's 2 x 2, .* multiple of 16"
        ),
    }
    for number, (settings, sentence) in enumerate(cases.items()):
        job = start(tiny_config, tmp_path / str(number), *settings.split(), world=2 if number == 3 else 1)
        assert set(job.wait()) == {78}, job.text()
        lines = [line for line in job.text().splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and re.search(sentence, lines[0]), job.text()
        assert "Traceback" not in job.text()
        assert not (tmp_path / str(number) / "checkpoints").exists()


@pytest.mark.slow
def test_a_checkpoint_that_was_set_aside_is_none(trained, tiny_config, tmp_path):
    """The run begins with its first weights, as if that folder were not there."""
    settings = ["train.max_steps=2", "train.evaluate_every=0"]
    for name in ("plain", "aside"):
        if name == "aside":
            shutil.copytree(
                checkpoint_path(tmp_path / "plain/checkpoints", 2), tmp_path / "aside/checkpoints/step_00000002.bad"
            )
        job = start(tiny_config, tmp_path / name, *settings, "model.init_from=missing")
        assert job.wait() == [78] and "model.init_from: there is no missing" in job.text()
        run(tiny_config, tmp_path / name, *settings, f"model.init_from={trained}")
    assert losses(tmp_path / "aside") == losses(tmp_path / "plain")
