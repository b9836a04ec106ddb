"""RetinaNet, FCOS and ATSS: sizes and values as published, layers, first weights, frozen stages."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import catmodel
from catmodel.detection import Detector, create_detector
from catmodel.detection.kinds import KINDS
from catmodel.fpn import FPN
from catmodel.pretrained import DoesNotFit
from tests.catmodel.detection.small_detector import small_detector
from tests.catmodel.small import ARCHITECTURES, images, jitter, small

every_kind = pytest.mark.parametrize("kind", KINDS)

# Counted from the released configurations, for COCO's 80 classes. PVT's code keeps a position of the class token in its
# last stage, which no map uses: 512 parameters.
PUBLISHED = {
    ("retinanet", "cat_small"): 47_464_702,
    ("retinanet", "cat_base"): 61_702_366,
    ("fcos", "cat_small"): 44_740_452,
    ("fcos", "cat_base"): 58_978_116,
    ("atss", "cat_small"): 44_740_452,
    ("atss", "cat_base"): 58_978_116,
    ("retinanet", "pvt_tiny"): 22_964_724 - 512,
    ("retinanet", "pvt_small"): 34_221_300 - 512,
    ("retinanet", "pvt_medium"): 53_943_540 - 512,
    ("retinanet", "pvt_large"): 71_104_756 - 512,
}


@pytest.mark.parametrize(("kind", "name"), PUBLISHED)
def test_parameters_are_the_published_models(kind, name):
    with torch.device("meta"):
        model = create_detector(kind, name, 80)
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[kind, name]
    assert model.strides == (8, 16, 32, 64, 128)


def reference(model: Detector, image: Tensor) -> list[Tensor]:
    """Neck and head, written out with PyTorch's functions."""
    weights, kind = model.state_dict(), model.kind

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = weights[f"{name}.weight"]
        return F.conv2d(x, weight, weights.get(f"{name}.bias"), stride, padding=weight.shape[-1] // 2)

    def tower(x: Tensor, name: str) -> Tensor:
        for j in range(2):
            x = conv(x, f"{name}.{j}.conv")
            if kind != "retinanet":
                x = F.group_norm(x, 32, weights[f"{name}.{j}.gn.weight"], weights[f"{name}.{j}.gn.bias"])
            x = x.clamp(min=0)
        return x

    inputs = model.backbone(image)[1:]
    sums = [conv(x, f"neck.lateral_convs.{i}") for i, x in enumerate(inputs)]
    for i in reversed(range(len(sums) - 1)):
        sums[i] = sums[i] + F.interpolate(sums[i + 1], sums[i].shape[2:], mode="nearest")
    maps, used = [conv(x, f"neck.fpn_convs.{i}") for i, x in enumerate(sums)], len(sums)
    maps.append(conv(inputs[-1] if kind == "retinanet" else maps[-1], f"neck.fpn_convs.{used}", 2))
    maps.append(conv(maps[-1].clamp(min=0) if kind == "fcos" else maps[-1], f"neck.fpn_convs.{used + 1}", 2))

    classes, boxes, centerness = [], [], []
    for i, x in enumerate(maps):
        for_classes, for_boxes = tower(x, "head.cls_convs"), tower(x, "head.reg_convs")
        box = conv(for_boxes, "head.conv_reg")
        if kind != "retinanet":
            box = box * weights["head.scales"][i]
            centre = conv(for_classes if kind == "fcos" else for_boxes, "head.conv_centerness")
            centerness.append(centre.flatten(1))
        for found, y, count in ((classes, conv(for_classes, "head.conv_cls"), 5), (boxes, box, 4)):
            found.append(torch.stack([y[:, :, r, c].reshape(len(y), -1, count) for r, c in pixels(y)], 1).flatten(1, 2))
    return [torch.cat(parts, 1) for parts in (classes, boxes, centerness) if parts]


def pixels(x: Tensor) -> list[tuple[int, int]]:
    return [(row, column) for row in range(x.shape[2]) for column in range(x.shape[3])]


@pytest.mark.parametrize(("kind", "name"), [*((kind, "cat_tiny") for kind in KINDS), ("atss", "cat_nano")])
@pytest.mark.parametrize("size", [(64, 96), (97, 131)])
def test_outputs_of_any_image_size(kind, name, size):
    model, x = jitter(small_detector(kind, name)).eval(), images(name, 2, size)
    with torch.no_grad():
        found = model(x)
        torch.testing.assert_close(list(found), reference(model, x), rtol=1e-4, atol=1e-4)
    assert found[0].shape == (2, len(model.grid(*size)), 5)
    assert model.strides[0] == (4 if name == "cat_nano" else 8)


@every_kind
@pytest.mark.parametrize("name", ["pvt_tiny", "cotnet50", "se_cotnetd50"])
def test_other_backbones(kind, name):
    """Every parameter has a gradient."""
    model = small_detector(kind, name).train()
    outputs = model(images(name, 2, (96, 64)))
    assert all(output.shape[1] == len(model.grid(96, 64)) for output in outputs)
    sum(output.square().mean() for output in outputs).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_first_stage_is_not_used():
    """As published, CAT has a norm for its map nevertheless."""
    model = small_detector("fcos", "cat_tiny")
    sum(output.mean() for output in model(images("cat_tiny"))).backward()
    unused = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert unused == {"backbone.norm0.weight", "backbone.norm0.bias"}


@pytest.mark.parametrize("name", ["cat_tiny", "pvt_tiny", "cotnet50"])
def test_recomputed_activations_give_the_same_gradients(name):
    gradients = []
    for recompute in (False, True):
        model = small_detector("atss", name, drop_path_rate=0.3).train()
        model.set_grad_checkpointing(recompute)
        torch.manual_seed(3)
        sum(output.square().mean() for output in model(images(name))).backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert all(map(torch.equal, *gradients))


@every_kind
def test_initial_weights(kind):
    """The towers' and the last convolutions' deviations are 0.01, and every class has a probability of 1 %."""
    model = small_detector(kind, "cotnet50", neck_channels=256, head_channels=128)
    head, convolutions = model.head, [model.head.conv_cls, model.head.conv_reg, model.head.reg_convs[1].conv]
    convolutions += [head.conv_centerness] if kind != "retinanet" else []
    assert all(layer.weight.std().item() == pytest.approx(0.01, rel=0.05) for layer in convolutions)
    assert head.conv_cls.bias.sigmoid().tolist() == pytest.approx([0.01] * len(head.conv_cls.bias))
    others = [layer.bias for layer in convolutions[1:] if layer.bias is not None]
    assert others and not any(bias.any() for bias in others)
    extra = model.neck.fpn_convs[-1].weight
    assert extra.shape == (256, 256, 3, 3)
    assert extra.abs().max().item() == pytest.approx((6 / (2 * 9 * 256)) ** 0.5, rel=0.01)
    assert kind == "retinanet" or head.scales.tolist() == [1.0] * 5


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layers_and_weight_decay_are_the_backbones(name):
    model = small_detector("fcos", name)
    layers = {key: model.layer_of(key) for key, _ in model.named_parameters()}
    head = {layer for key, layer in layers.items() if not key.startswith("backbone.")}
    blocks = {layer for key, layer in layers.items() if key.startswith("backbone.") and ".norm" not in key[:14]}
    assert head == {max(blocks) + 1} and blocks == set(range(max(blocks) + 1))
    assert model.no_weight_decay() == {f"backbone.{key}" for key in model.backbone.no_weight_decay()}


def test_the_heads_norms_are_not_called_norm():
    """CAT's recipes exempt parameters from weight decay by name, and as published the head's are not exempt."""
    names = [name for name, _ in small_detector("fcos").named_parameters() if not name.startswith("backbone.")]
    assert any(".gn." in name for name in names) and not any("norm" in name for name in names)


def test_frozen_stages_have_no_gradient_and_no_dropout():
    model = small_detector("retinanet", "cotnet50").train()
    model.freeze(1)
    model.train()
    frozen = {name.split(".")[1] for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"conv1", "bn1", "layer1"}
    assert not model.backbone.layer1.training and model.backbone.layer2.training and model.head.training
    before = model.backbone.bn1.running_mean.clone()
    sum(output.mean() for output in model(images("cotnet50"))).backward()
    assert torch.equal(model.backbone.bn1.running_mean, before)
    assert all((parameter.grad is None) == (not parameter.requires_grad) for parameter in model.parameters())


def test_a_classifiers_weights_fill_the_backbone():
    model, classifier = small_detector("atss", "cat_tiny", img_size=128), jitter(small("cat_tiny"))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    sentences, weights = model.load_classifier(classifier.state_dict()), classifier.state_dict()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    own = {f"backbone.{key}" for key in weights if f"backbone.{key}" in before and not key.endswith("_index")}
    assert changed == own and len(changed) > 50
    assert "ape 16 x 16 -> 32 x 32" in sentences[0]
    assert sentences[1] == "fresh: norm0, norm1, norm2, norm3, neck, head"
    with pytest.raises(DoesNotFit, match="does not fit"):
        model.load_classifier(small("cotnet50").state_dict())


def test_a_map_of_one_pixel_teaches_nothing_to_weights_that_meet_its_padding_alone():
    """In bf16, where that gradient was once what an earlier tensor had left in memory: here NaN."""
    neck = FPN([16], 16, extra=1).bfloat16()
    for _ in range(5):
        left = [torch.full((count * 16 * 16 * 9,), torch.nan, dtype=torch.bfloat16) for count in range(1, 9)]
        del left
        _, coarser = neck([torch.randn(3, 16, 1, 1).bfloat16()])
        (gradient,) = torch.autograd.grad(coarser.float().sum(), neck.fpn_convs[1].weight)
        assert gradient[:, :, 1, 1].abs().sum() > 0
        gradient[:, :, 1, 1] = 0
        assert (gradient == 0).all()


def test_fcos_predicts_logarithms_in_float32():
    """Also in bf16, whose 8 bits would leave errors of a percent in a box of 300 pixels."""
    for kind, dtype in (("fcos", torch.float32), ("retinanet", torch.bfloat16)):
        model = small_detector(kind).bfloat16()
        _, boxes, *_ = model(torch.randn(2, 3, 64, 64).bfloat16())
        assert boxes.dtype == dtype
    model = small_detector("fcos").bfloat16()
    with torch.no_grad():
        model.head.conv_reg.bias.fill_(5.7)
    model(torch.randn(2, 3, 64, 64).bfloat16())[1].sum().backward()
    assert model.head.conv_reg.weight.grad.dtype == torch.bfloat16
    assert (boxes := model(torch.randn(2, 3, 64, 64).bfloat16())[1]).bfloat16().float().ne(boxes).any()


def test_a_mistake_is_named():
    with pytest.raises(ValueError, match="unknown detector 'yolo': known are retinanet, fcos, atss"):
        catmodel.create_detector("yolo", "cat_tiny", 5)
    with pytest.raises(ValueError, match="head_channels 48 must be a multiple of 32"):
        catmodel.create_detector("fcos", "cat_tiny", 5, head_channels=48)
    with pytest.raises(ValueError, match="did you mean 'depths'"):
        catmodel.create_detector("atss", "cat_tiny", 5, depth=(1, 1))
    with pytest.raises(ValueError, match="all stages but the first: give depths two numbers or more"):
        small_detector("retinanet", "cotnet50", depths=(1,))


@every_kind
def test_raw_boxes_are_inverted(kind):
    """encode and decode, with an anchor's or point's own neighbourhood as the box."""
    model = small_detector(kind)
    grid, generator = model.grid(96, 160), torch.Generator().manual_seed(4)
    spread = torch.rand(2, len(grid), 4, generator=generator).mul(2).add(0.5) * grid.strides[:, None]
    boxes = grid.points.repeat(1, 2) + spread * torch.tensor([-1.0, -1.0, 1.0, 1.0])
    raw = model.encode(grid, boxes)
    assert raw.isfinite().all() and raw.abs().max() < 40
    torch.testing.assert_close(model.decode(grid, raw), boxes, rtol=1e-5, atol=1e-3)
    if kind == "fcos":
        torch.testing.assert_close(raw, spread.log())
    else:
        model = small_detector(kind, anchor_scale=2.0)
        assert model.grid(96, 160).anchors[0, 2] == pytest.approx(8 * (2**0.5 if kind == "retinanet" else 1))


def test_sides_of_decoded_boxes_are_limited():
    """By a factor of 62.5, as mmdetection does (wh_ratio_clip 16 / 1000)."""
    model = small_detector("retinanet")
    grid = model.grid(64, 64)
    decoded = model.decode(grid, torch.tensor([0.0, 0.0, 100.0, -100.0]).expand(1, len(grid), 4))[0]
    sides, own = decoded[:, 2:] - decoded[:, :2], grid.anchors[:, 2:] - grid.anchors[:, :2]
    torch.testing.assert_close(
        sides / own, torch.tensor([[1000 / 16, 16 / 1000]]).expand(len(grid), 2), rtol=1e-3, atol=1e-4
    )
    assert math.isclose(decoded[0, 0] + decoded[0, 2], 0, abs_tol=1e-3), "the centre stays"
