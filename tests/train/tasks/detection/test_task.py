"""Inputs, losses and first weights of detection."""

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou, generalized_box_iou_loss, sigmoid_focal_loss

import catmodel
from catmodel.detection import detect
from data_pipeline.manifest import open_manifest
from data_pipeline.objects import ObjectTable
from train.config import ConfigError, load_config
from train.tasks.base import build_task, training_batches
from train.tasks.detection.losses import focal_loss, giou_loss, iou_loss
from train.tasks.detection.task import Detection

CLASSES = ("circle", "square", "triangle", "cross", "ring")
DETECTORS = ("retinanet", "fcos", "atss")


def task_of(config, *settings: str) -> Detection:
    settings = load_config(config, settings)
    return build_task(settings, open_manifest(settings.data.path).classes)


def batches(config, *settings: str, rank: int = 0, world: int = 1, steps: int = 1) -> list:
    """A rank's micro-batches of the first steps, with their inputs for the network."""
    task = task_of(config, *settings)
    split = open_manifest(task.config.data.path).split("train")
    order, sizes = task.config.order(split), task.config.train
    count = steps * sizes.global_batch // sizes.micro_batch // world
    with training_batches(task, split, order, rank, world, 0) as loader:
        found = [next(loader) for _ in range(count)]
        return [(batch, task.inputs(batch, order.epoch_of(batch.step), torch.device("cpu"))) for batch in found]


@pytest.mark.parametrize("detector", DETECTORS)
def test_inputs_are_the_same_on_any_number_of_ranks(box_config, detector):
    """Ids, scales, crops, flips, boxes, targets: everything that a step learns from, to the last bit."""
    more = f"task.detector={detector}"
    alone = {(batch.step, batch.index): (batch, inputs) for batch, inputs in batches(box_config, more, steps=3)}
    assert len(alone) == 12
    assert len({inputs["images"].shape for _, inputs in alone.values()}) > 2
    for world in (2, 4):
        taken = [pair for rank in range(world) for pair in batches(box_config, more, rank=rank, world=world, steps=3)]
        assert len(taken) == 12
        for batch, inputs in taken:
            other, expected = alone[batch.step, batch.index]
            assert torch.equal(batch.ids, other.ids) and np.array_equal(batch.draws, other.draws)
            assert batch.targets.keys() == other.targets.keys() and inputs.keys() == expected.keys()
            assert all(torch.equal(batch.targets[name], other.targets[name]) for name in other.targets)
            assert all(torch.equal(inputs[name], expected[name]) for name in expected)


@pytest.mark.parametrize("detector", DETECTORS)
def test_all_boxes_are_learned(box_config, detector):
    """Each of a micro-batch's boxes by some place, with its class; places learn no other boxes."""
    found = batches(box_config, f"task.detector={detector}", steps=5)
    learned = total = 0
    for batch, inputs in found:
        for row in range(2):
            real = batch.targets["labels"][row] >= 0
            columns = [batch.targets["boxes"][row][real], batch.targets["labels"][row][real, None]]
            objects = {tuple(line) for line in torch.cat(columns, 1).tolist()}
            learns = (inputs["classes"][row] >= 0) & (inputs["classes"][row] < 5)
            columns = [inputs["boxes"][row][learns], inputs["classes"][row][learns, None]]
            taken = {tuple(line) for line in torch.cat(columns, 1).tolist()}
            assert taken <= objects
            learned, total = learned + len(taken), total + len(objects)
    assert total > 60 and learned > (0.99 if detector == "retinanet" else 0.85) * total


def test_every_box_of_the_dataset_is_in_its_place(box_config):
    """Without scaling, cropping or flipping a box is the annotation's."""
    settings = ["task.scales=[[160,160]]", "task.crop_scales=null", "task.crop_range=[384,600]", "augment.flip=0"]
    table = ObjectTable(open_manifest(load_config(box_config).data.path).split("train"))
    count = 0
    for batch, _ in batches(box_config, *settings, steps=5):
        for row, number in enumerate(batch.ids.tolist()):
            objects = table.of(number)
            expected = np.stack([objects[name] for name in ("x", "y", "width", "height")], 1)
            expected[:, 2:] += expected[:, :2]
            assert tuple(batch.targets["inside"][row, 2:].tolist()) in ((160, 160), (160, 120), (120, 160))
            found = batch.targets["boxes"][row][: len(objects)].double().numpy()
            assert np.allclose(found, expected, atol=1e-4)
            assert batch.targets["labels"][row].tolist()[: len(objects)] == objects["label"].tolist()
            count += len(objects)
    assert count > 60


@pytest.mark.parametrize("detector", DETECTORS)
def test_outputs_that_are_as_wanted_find_every_object(box_config, detector):
    """Wide, tall and square inputs: each object is learned by some place, decoded, and not lost by the suppression.

    ATSS alone teaches some to no place: those whose overlaps with all anchors near are about the same, because their
    size lies between two levels' anchors. None exceeds the mean by the standard deviation.
    """
    anchor_scale = 2 if detector == "retinanet" else "null"
    settings = [f"task.detector={detector}", f"task.anchor_scale={anchor_scale}", "task.scales=[[160,160]]"]
    settings += ["task.crop_scales=null", "task.crop_range=[384,600]"]
    model = task_of(box_config, *settings).detector
    shapes, found, total = set(), 0, 0
    for batch, inputs in batches(box_config, *settings, steps=5):
        grid = model.grid(*inputs["images"].shape[2:])
        logits = 16.0 * torch.nn.functional.one_hot(inputs["classes"].clamp(min=0), 6)[..., :5] - 8.0
        logits[inputs["classes"] < 0] = -8.0
        outputs = [logits, model.encode(grid, inputs["boxes"])]
        if "centerness" in inputs:
            outputs.append(inputs["centerness"].logit(eps=1e-6))
        for row, (boxes, _, labels) in enumerate(detect(model, outputs, grid, batch.targets["inside"])):
            real = batch.targets["labels"][row] >= 0
            wanted, classes = batch.targets["boxes"][row][real], batch.targets["labels"][row][real]
            same = (box_iou(wanted, boxes) > 0.999) & (classes[:, None] == labels)
            assert same.sum(dim=0).eq(1).all()  # each detection is an object
            assert same.sum(dim=1).le(1).all()  # and no object is found twice
            found, total = found + int(same.sum()), total + len(wanted)
        shapes.add(tuple(inputs["images"].shape[2:]))
    assert shapes == {(160, 160), (160, 128), (128, 160)} and total > 100
    assert found > 0.9 * total if detector == "atss" else found == total


@pytest.mark.parametrize("detector", DETECTORS)
def test_losses_are_those_of_the_places_that_learn(box_config, detector):
    """By indexing, which a step avoids, and torchvision's functions."""
    task = task_of(box_config, f"task.detector={detector}")
    model = task.initial_model().eval()
    with torch.no_grad():
        model.head.conv_reg.bias.copy_(0.3 * torch.randn(len(model.head.conv_reg.bias)))
    (_, inputs), *_ = batches(box_config, f"task.detector={detector}")
    with torch.no_grad():
        found = task.loss(model, inputs)
        logits, raw, *central = model(inputs["images"])
    classes, boxes = inputs["classes"], inputs["boxes"]
    kept, learns = classes >= 0, (classes >= 0) & (classes < 5)
    count = int(learns.sum())
    one_hot = torch.nn.functional.one_hot(classes[kept], 6)[:, :5].float()
    assert found["cls"].item() == pytest.approx(
        sigmoid_focal_loss(logits[kept], one_hot, reduction="sum").item() / count, rel=1e-4
    )
    grid = model.grid(*inputs["images"].shape[2:])
    if detector == "retinanet":
        assert list(found) == ["cls", "box"]
        expected = (raw[learns] - model.encode(grid, boxes)[learns]).abs().sum() / count
        assert found["box"].item() == pytest.approx(expected.item(), rel=1e-4)
        return
    assert list(found) == ["cls", "box", "centerness"]
    decoded, weights = model.decode(grid, raw)[learns], inputs["centerness"][learns]
    if detector == "fcos":
        edges = [torch.minimum(decoded[:, i], boxes[learns][:, i]) for i in range(4)]
        others = [torch.maximum(decoded[:, i], boxes[learns][:, i]) for i in range(4)]
        common = (edges[2] - others[0]) * (edges[3] - others[1])  # a point's box and its target always meet
        areas = [(each[:, 2] - each[:, 0]) * (each[:, 3] - each[:, 1]) for each in (decoded, boxes[learns])]
        distance = -(common / (areas[0] + areas[1] - common)).log()
    else:
        distance = 2 * generalized_box_iou_loss(decoded, boxes[learns])
    expected = (distance * weights).sum() / weights.sum()
    assert found["box"].item() == pytest.approx(expected.item(), rel=1e-4)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(central[0][learns], weights)
    assert found["centerness"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert 0 < weights.min() and weights.max() <= 1


@pytest.mark.parametrize("detector", DETECTORS)
def test_a_micro_batch_without_objects_teaches_that_there_are_none(box_config, detector):
    """All losses are finite, and so are gradients, also of boxes whose exponential is not."""
    task = task_of(box_config, f"task.detector={detector}")
    model = task.initial_model()
    with torch.no_grad():
        model.head.conv_reg.bias.fill_(200.0)
    (batch, _), *_ = batches(box_config, f"task.detector={detector}")
    batch.targets["labels"].fill_(-1)
    batch.targets["boxes"].zero_()
    inputs = task.inputs(batch, 0, torch.device("cpu"))
    assert set(inputs["classes"].unique().tolist()) <= {-1, 5}
    losses = task.loss(model, inputs)
    sum(losses.values()).backward()
    assert losses["cls"] > 0 and all(losses[name] == 0 for name in losses if name != "cls")
    assert all(value.grad is None or value.grad.isfinite().all() for value in model.parameters())


@pytest.mark.parametrize(("detector", "images", "least"), [("retinanet", 2, 0), ("atss", 2, 1.0), ("fcos", 1, 0.5)])
def test_normalisers_of_few_places(box_config, detector, images, least):
    """One place of two images learns a box, with a centerness of 0.5.

    images: that count as having such a place. least: what the box's loss is divided by.
    """
    task = task_of(box_config, f"task.detector={detector}")
    boxes = torch.tensor([[8.0, 8.0, 24.0, 24.0]]).expand(2, 2, 4)
    places = boxes[0, :, :2] + 8 if detector == "fcos" else boxes[0]
    classes, weights = torch.tensor([[1, 5], [5, 5]]), torch.tensor([[0.5, 0.0], [0.0, 0.0]])
    output = [torch.zeros(2, 2, 5), torch.full((2, 2, 4), 0.1), torch.zeros(2, 2)]
    targets = {"places": places, "boxes": boxes, "classes": classes, "centerness": weights}
    losses = task._losses(output if least else output[:2], targets)
    assert losses["cls"].item() == pytest.approx(focal_loss(output[0], classes).item() / images)
    if not least:
        assert losses["box"].item() == pytest.approx(4 * 0.1 / images)
        return
    decoded = task._decoded(places, output[1])
    distance = iou_loss(decoded, boxes) if detector == "fcos" else 2 * giou_loss(decoded, boxes)
    assert losses["box"].item() == pytest.approx(0.5 * distance[0, 0].item() / least)


def test_channels_are_swapped_with_their_normalisation(box_config):
    more = ["augment.mean=[0.1,0.2,0.3]", "augment.std=[0.5,0.25,1.0]"]
    (_, plain), *_ = batches(box_config, *more)
    (_, swapped), *_ = batches(box_config, *more, "task.bgr=true")
    assert torch.equal(swapped["images"], plain["images"].flip(1))
    assert not torch.equal(swapped["images"], plain["images"])


def test_padding_has_the_mean_colour_and_anchors_beyond_it_learn_nothing(box_config):
    """Of a portrait image beside a landscape one, with a padded half."""
    found = batches(
        box_config, "task.aspect_groups=false", "task.crop_scales=null", "task.crop_range=[384,600]", steps=5
    )
    beyond = 0
    for batch, inputs in found:
        for row, (_, _, right, bottom) in enumerate(batch.targets["inside"].tolist()):
            image = inputs["images"][row]
            assert not image[:, bottom:].any() and not image[:, :, right:].any()
            own = -(-right // 32) * 32, -(-bottom // 32) * 32
            centres = (inputs["places"][:, :2] + inputs["places"][:, 2:]) / 2
            outside = (centres[:, 0] >= own[0] - 0.01) | (centres[:, 1] >= own[1] - 0.01)
            assert (inputs["classes"][row][outside] == -1).all()
            beyond += int(outside.sum())
    assert beyond > 1000


@pytest.mark.parametrize("detector", DETECTORS)
def test_a_preview_shows_the_boxes(box_config, detector):
    task = task_of(box_config, f"task.detector={detector}", "task.bgr=true")
    (batch, inputs), *_ = batches(box_config, f"task.detector={detector}", "task.bgr=true")
    shown = task.preview(inputs, 8)
    assert shown.shape == (2, 3, *batch.images.shape[2:]) and shown.min() >= 0 and shown.max() <= 1
    plain = task.preview({**inputs, "classes": torch.full_like(inputs["classes"], 5)}, 8)
    left, top, right, bottom = batch.targets["inside"][0].tolist()
    photograph = batch.images[0, :, top:bottom, left:right] / 255
    assert torch.allclose(plain[0, :, top:bottom, left:right], photograph, atol=1 / 255)
    changed = (shown != plain).any(1)
    assert changed.any((1, 2)).all() and changed.float().mean() < 0.5


@pytest.mark.parametrize("detector", DETECTORS)
def test_the_example_is_as_large_as_any_input(box_config, detector):
    from train.engine.estimate import activation_bytes

    task = task_of(box_config, f"task.detector={detector}")
    with torch.device("meta"):
        model = task.build_model()
    example = task.example(2, torch.device("meta"), torch.float32)
    shapes = [inputs["images"].shape[2:] for _, inputs in batches(box_config, f"task.detector={detector}", steps=5)]
    assert max(h for h, _ in shapes) <= example.shape[2] and max(w for _, w in shapes) <= example.shape[3]
    network = activation_bytes(model, example)
    assert activation_bytes(model, example, task.example_loss) > network
    real = task.example(2, torch.device("cpu"), torch.float32)
    assert task.example_loss(task.initial_model()(real)).isfinite()


# -------------------------------------------------------------------------------------------------------- first weights

SMALL = dict(embed_dim=16, depths=(1, 1), num_heads=(2, 4))
HEAD = dict(neck_channels=16, head_channels=64, head_convs=1)


def test_a_classifier_fills_the_backbone(box_config):
    task = task_of(box_config)
    torch.manual_seed(1)
    weights = catmodel.create_model("cat_tiny", img_size=56, num_classes=10, **SMALL).state_dict()
    model = task.initial_model()
    head = model.head.conv_cls.weight.clone()
    sentences = task.load_weights(model, weights, {}, "somewhere")
    assert sentences == ["position tables interpolated: ape 14 x 14 -> 56 x 56", "fresh: norm0, norm1, neck, head"]
    same = [name for name in weights if name.startswith("layers.")]
    assert same and all(torch.equal(model.backbone.state_dict()[name], weights[name]) for name in same)
    assert torch.equal(model.head.conv_cls.weight, head)


@pytest.mark.parametrize("detector", DETECTORS)
def test_a_detector_fills_everything_but_the_classes(box_config, detector):
    task = task_of(box_config, f"task.detector={detector}")
    torch.manual_seed(1)
    weights = catmodel.create_detector(detector, "cat_tiny", 5, **HEAD, **SMALL).state_dict()
    model = task.initial_model()
    assert task.load_weights(model, weights, {"classes": list(task.classes)}, "a run") == []
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    others = catmodel.create_detector(detector, "cat_tiny", 19, **HEAD, **SMALL).state_dict()
    model = task.initial_model()
    own = model.head.conv_cls.weight.clone()
    assert task.load_weights(model, others, {}, "a run") == ["the layer that classifies: 19 -> 5 classes, fresh"]
    assert torch.equal(model.head.conv_cls.weight, own)
    assert torch.equal(model.head.conv_reg.weight, others["head.conv_reg.weight"])


def test_weights_that_do_not_fit_are_named(box_config):
    task = task_of(box_config)
    classifier = catmodel.create_model("cat_tiny", num_classes=10, embed_dim=32).state_dict()
    with pytest.raises(ConfigError, match=r"model.init_from: a file does not fit this cat_tiny: "):
        task.load_weights(task.initial_model(), classifier, {}, "a file")
    other = catmodel.create_detector("fcos", "cat_tiny", 5, **HEAD, **SMALL).state_dict()
    with pytest.raises(ConfigError, match=r"other weights than this retinanet on cat_tiny: head"):
        task.load_weights(task.initial_model(), other, {}, "a file")


def test_a_detector_of_another_kind_is_refused_though_its_weights_have_the_same_names(box_config):
    """As a run or an export describes it; other anchors and another order of colours are said."""
    task = task_of(box_config, "task.detector=fcos")
    weights = catmodel.create_detector("atss", "cat_tiny", 5, **HEAD, **SMALL).state_dict()
    for about in ({"task": {"name": "detection", "detector": "atss"}}, {"model": {"kind": "atss"}, "bgr": False}):
        with pytest.raises(ConfigError, match=r"a run was trained with task.detector='atss', whose .* those of fcos: "):
            task.load_weights(task.initial_model(), weights, about, "a run")
    task = task_of(box_config, "task.detector=atss", "task.bgr=true")
    model = task.initial_model()
    assert task.load_weights(model, weights, {"task": {"detector": "atss", "anchor_scale": 4.0, "bgr": True}}, "x") == [
        "task.anchor_scale was 4.0 for x, and is 8.0 here"
    ]
    exported = {"model": {"kind": "atss", "anchor_scale": None}, "bgr": False}
    assert task.load_weights(model, weights, exported, "x") == ["task.bgr was False for x, and is True here"]


def test_frozen_stages_are_not_trained(box_config):
    task = task_of(box_config, "task.frozen_stages=1", "model.init_from=a file")
    model = task.initial_model()
    frozen = {name for name, value in model.named_parameters() if not value.requires_grad}
    assert frozen and all(name.startswith("backbone.") for name in frozen) and "backbone.layers.0" in "".join(frozen)
    with pytest.raises(ConfigError, match=r"task.frozen_stages: freeze\(9\)"):
        task_of(box_config, "task.frozen_stages=9", "model.init_from=a file").build_model()
