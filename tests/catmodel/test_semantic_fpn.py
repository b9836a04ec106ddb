"""Semantic FPN: sizes and values as published, dropout, layers, first weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import catmodel
from catmodel.pretrained import DoesNotFit
from catmodel.semantic_fpn import SemanticFPN, at_image_size, create_segmenter
from tests.catmodel.small import ARCHITECTURES, images, jitter, settings, small

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)
FAMILIES = pytest.mark.parametrize("name", ["cat_tiny", "pvt_tiny", "cotnet50"])

# Counted from the released configurations, for ADE20K's 150 classes. PVT's code keeps a position of the class token in
# its last stage, which no map uses: 512 parameters.
PUBLISHED = {
    "cat_small": 40_899_744,
    "cat_base": 55_137_408,
    "pvt_tiny": 16_981_398 - 512,
    "pvt_small": 28_237_974 - 512,
    "pvt_medium": 47_960_214 - 512,
    "pvt_large": 65_121_430 - 512,
}


def segmenter(name: str, classes: int = 5, **options) -> SemanticFPN:
    """A small one whose neck and head have few channels."""
    backbone = small(name, features_only=True, **options)
    return SemanticFPN(backbone, classes, dropout=0.1, neck_channels=24, channels=16)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_models(name):
    with torch.device("meta"):
        model = create_segmenter(name, 150)
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]


def reference(model: SemanticFPN, image: Tensor) -> Tensor:
    """Neck and head in evaluation, written out with PyTorch's functions; everything is resized by size."""
    weights = model.state_dict()

    def conv(x: Tensor, name: str) -> Tensor:
        weight = weights[f"{name}.weight"]
        return F.conv2d(x, weight, weights.get(f"{name}.bias"), padding=weight.shape[-1] // 2)

    def norm(x: Tensor, name: str) -> Tensor:
        parts = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(weights[f"{name}.{part}"] for part in parts))

    laterals = [conv(x, f"neck.lateral_convs.{i}") for i, x in enumerate(model.backbone(image))]
    for i in reversed(range(len(laterals) - 1)):
        laterals[i] = laterals[i] + F.interpolate(laterals[i + 1], laterals[i].shape[2:], mode="nearest")
    total = torch.zeros(())
    for i, x in enumerate(laterals):
        x = conv(x, f"neck.fpn_convs.{i}")
        for j in range(max(i, 1)):
            place = f"head.scale_heads.{i}.{j}"
            x = norm(conv(x, f"{place}.conv"), f"{place}.bn").relu()
            if i:
                x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        total = total + F.interpolate(x, laterals[0].shape[2:], mode="bilinear", align_corners=False)
    return conv(total, "head.conv_seg")


@every_architecture
@pytest.mark.parametrize("size", [(64, 96), (97, 131), (70, 33)])
def test_logits_of_any_image_size(name, size):
    model, x = jitter(segmenter(name)).eval(), images(name, 2, size)
    stride = 2 if name == "cat_nano" else 4
    with torch.no_grad():
        logits = model(x)
        torch.testing.assert_close(logits, reference(model, x), rtol=1e-4, atol=1e-4)
    assert model.stride == stride and logits.shape == (2, 5, -(-size[0] // stride), -(-size[1] // stride))
    assert at_image_size(logits, size).shape == (2, 5, *size)


@FAMILIES
@pytest.mark.parametrize("size", [(64, 32), (70, 33)])
def test_training_computes_what_evaluation_does(name, size):
    """Apart from dropout and the batch norms' statistics; and every parameter has a gradient."""
    model = jitter(segmenter(name)).train()
    model.head.dropout.rate = 0.0
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    x = images(name, 2, size)
    logits = model(x)
    with torch.no_grad():
        torch.testing.assert_close(logits.detach(), model.eval()(x), rtol=1e-4, atol=1e-4)
    logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@FAMILIES
def test_recomputed_activations_give_the_same_gradients(name):
    gradients = []
    for recompute in (False, True):
        model = segmenter(name, drop_path_rate=0.3).train()
        model.set_grad_checkpointing(recompute)
        torch.manual_seed(3)
        model(images(name)).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(map(torch.equal, *gradients))


def test_dropout_zeroes_channels_and_follows_the_seed():
    head = segmenter("cotnet50").head
    head.dropout.rate = 0.25
    x = torch.ones(64, 16, 2, 3)
    torch.manual_seed(1)
    first, second = head.dropout(x), head.dropout(x)
    torch.manual_seed(1)
    assert torch.equal(head.dropout(x), first) and not torch.equal(first, second)
    assert set(first.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert (first == first[:, :, :1, :1]).all(), "whole channels"
    assert (first == 0).float().mean().item() == pytest.approx(0.25, abs=0.05)
    assert torch.equal(head.eval().dropout(x), x)


@every_architecture
def test_layers_and_weight_decay_are_the_backbones(name):
    model = segmenter(name)
    layers = {key: model.layer_of(key) for key, _ in model.named_parameters()}
    head = {layer for key, layer in layers.items() if not key.startswith("backbone.")}
    blocks = {layer for key, layer in layers.items() if key.startswith("backbone.") and ".norm" not in key[:14]}
    assert head == {max(blocks) + 1} and blocks == set(range(max(blocks) + 1))
    assert model.no_weight_decay() == {f"backbone.{key}" for key in model.backbone.no_weight_decay()}


def test_initial_weights():
    torch.manual_seed(0)
    model = create_segmenter("cotnet50", 21)
    neck, head = model.neck, model.head
    assert neck.lateral_convs[0].weight.abs().max().item() == pytest.approx((6 / (256 + 256)) ** 0.5, rel=0.01)
    assert neck.fpn_convs[0].weight.abs().max().item() == pytest.approx((6 / (2 * 9 * 256)) ** 0.5, rel=0.01)
    assert head.scale_heads[3][1].conv.weight.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)
    assert head.conv_seg.weight.std().item() == pytest.approx(0.01, rel=0.05)
    convolutions = [module for module in (*neck.modules(), head.conv_seg) if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 9 and not any(module.bias.any() for module in convolutions)


@FAMILIES
def test_a_classifiers_weights_fill_the_backbone(name):
    """With other image sizes, its position tables are interpolated."""
    classifier = jitter(small(name))
    torch.manual_seed(1)
    model = SemanticFPN(
        catmodel.create_model(name, **{**settings(name), "img_size": 128}, features_only=True), 5, neck_channels=8
    )
    before = {key: value.clone() for key, value in model.state_dict().items()}
    sentences = model.load_classifier(classifier.state_dict())
    weights = classifier.state_dict()
    for key, value in model.state_dict().items():
        own = key.removeprefix("backbone.")
        if own == key or own not in weights:
            assert torch.equal(value, before[key])
        elif value.shape == weights[own].shape:
            assert torch.equal(value, weights[own])
        else:
            assert key == "backbone.ape" or "pos_embed" in key
    resized = dict(cat_tiny=["ape 16 x 16 -> 32 x 32"], pvt_tiny=[f"pos_embed{i + 1} " for i in range(4)], cotnet50=[])
    assert all(entry in sentences[0] for entry in resized[name])
    norms = "norm0, norm1, norm2, norm3, " if name == "cat_tiny" else ""
    assert sentences[-1] == f"fresh: {norms}neck, head" and len(sentences) == 1 + bool(resized[name])


def test_weights_that_do_not_fit_change_nothing():
    model = segmenter("pvt_tiny")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(DoesNotFit, match="does not fit"):
        model.load_classifier(small("cotnet50").state_dict())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_mistake_is_named():
    with pytest.raises(ValueError, match=r"dropout 1.0 must be in \[0, 1\)"):
        create_segmenter("pvt_tiny", 5, dropout=1.0)
    with pytest.raises(ValueError, match="did you mean 'depths'"):
        catmodel.create_segmenter("pvt_tiny", 5, depth=(1, 1))
