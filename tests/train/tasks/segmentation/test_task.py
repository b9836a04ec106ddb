"""Inputs, loss and first weights of segmentation."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import catmodel
from data_pipeline.augment import normalise
from data_pipeline.manifest import open_manifest
from data_pipeline.order import Order
from train.config import ConfigError, load_config
from train.tasks.base import build_task, training_batches, unnormalised
from train.tasks.segmentation.task import Segmentation, clear_outside, pixel_loss

CLASSES = ("background", "disk", "square", "triangle", "ring", "cross")


def task_of(config, *settings: str) -> Segmentation:
    return build_task(load_config(config, settings), CLASSES)


def batches(config, *settings: str, rank: int = 0, world: int = 1, steps: int = 1) -> list:
    """A rank's micro-batches of the first steps, with their inputs for the network."""
    task = task_of(config, *settings)
    split = open_manifest(task.config.data.path).split("train")
    sizes = task.config.train
    order = Order(sizes.seed, split.samples, sizes.global_batch, sizes.micro_batch, "full", 1)
    count = steps * sizes.global_batch // sizes.micro_batch // world
    with training_batches(task, split, order, rank, world, 0) as loader:
        found = [next(loader) for _ in range(count)]
        return [(batch, task.inputs(batch, order.epoch_of(batch.step), torch.device("cpu"))) for batch in found]


def test_the_loss_is_the_cross_entropy_over_all_pixels(segment_config):
    """Ignored pixels add nothing to the sum but count in the mean; the gradient is PyTorch's."""
    torch.manual_seed(0)
    logits = torch.randn(2, 6, 16, 24, dtype=torch.float64).requires_grad_()
    labels = torch.randint(0, 6, (2, 64, 96), dtype=torch.uint8)
    labels[0, :40] = 255
    loss = pixel_loss(logits.float(), labels, 255)
    large = F.interpolate(logits, size=(64, 96), mode="bilinear").log_softmax(1)
    total = 0.0
    for image, row, column in np.argwhere(labels.numpy() != 255):
        total = total - large[image, labels[image, row, column].long(), row, column]
    expected = total / labels.numel()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    (found,), (wanted,) = torch.autograd.grad(loss, [logits]), torch.autograd.grad(expected, [logits])
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-9)


def test_a_micro_batch_without_a_labelled_pixel_has_a_loss_of_zero():
    logits = torch.randn(1, 3, 8, 8, requires_grad=True)
    loss = pixel_loss(logits, torch.full((1, 32, 32), 255, dtype=torch.uint8), 255)
    loss.backward()
    assert loss.item() == 0.0 and not logits.grad.any()


def test_padding_has_the_mean_colour(segment_config):
    images = clear_outside(torch.ones(2, 3, 8, 8), torch.tensor([[0, 0, 8, 5], [3, 1, 8, 8]], dtype=torch.int32))
    expected = torch.zeros(2, 3, 8, 8)
    expected[0, :, :5], expected[1, :, 1:, 3:] = 1, 1
    assert torch.equal(images, expected)
    found = batches(segment_config, "task.scale_range=[0.4,0.5]")
    inputs = [inputs for _, inputs in found]
    outside = torch.cat([each["labels"] for each in inputs]) == 255
    images = torch.cat([each["images"] for each in inputs])
    assert outside.float().mean() > 0.3
    edges_aside = F.max_pool2d((~outside).float()[:, None], 3, 1, 1)[:, 0] == 0
    assert edges_aside.any() and not images.movedim(1, -1)[edges_aside].any()
    assert (images.movedim(1, -1)[~outside] != 0).float().mean() > 0.9


def test_images_and_labels_are_the_same_on_any_number_of_ranks(segment_config):
    """Ids, windows, flips, distortion, labels: everything that a step learns from, to the last bit."""
    alone = {(batch.step, batch.index): (batch, inputs) for batch, inputs in batches(segment_config, steps=3)}
    assert len(alone) == 12
    for world in (2, 4):
        taken = [pair for rank in range(world) for pair in batches(segment_config, rank=rank, world=world, steps=3)]
        assert len(taken) == 12
        for batch, inputs in taken:
            other, expected = alone[batch.step, batch.index]
            assert torch.equal(batch.ids, other.ids) and np.array_equal(batch.draws, other.draws)
            assert torch.equal(inputs["images"], expected["images"])
            assert torch.equal(inputs["labels"], expected["labels"])


def test_an_evaluation_reads_images_at_the_largest_ratio(segment_config):
    task = task_of(segment_config, "task.test_scale=[96,64]", "task.test_ratios=[0.5,1.5,1.0]")
    _, shapes = task.views().evaluation(np.array([96]), np.array([64]))
    assert shapes.tolist() == [[96, 144]]


def test_distortion_changes_pixels_and_not_labels(segment_config):
    (_, distorted), *_ = batches(segment_config)
    (batch, plain), *_ = batches(segment_config, "task.distortion=false")
    stored = normalise(batch.images, load_config(segment_config).augment)
    assert torch.equal(plain["images"], clear_outside(stored, batch.targets["inside"]))
    assert torch.equal(distorted["labels"], plain["labels"])
    assert not torch.equal(distorted["images"], plain["images"])


def test_a_preview_shows_labels_over_the_images(segment_config):
    task = task_of(segment_config)
    (_, inputs), *_ = batches(segment_config)
    shown = task.preview(inputs, 8)
    assert shown.shape == (2, 3, 64, 96) and shown.min() >= 0 and shown.max() <= 1
    unlabelled = {**inputs, "labels": torch.full_like(inputs["labels"], 255)}
    plain = task.preview(unlabelled, 8)
    images = unnormalised(inputs["images"], task.config.augment)
    assert torch.allclose(plain, images, rtol=0, atol=0.6 / 255)
    assert torch.equal(task.preview(inputs, 1), shown[:1])
    changed = (shown != plain).any(1)
    assert torch.equal(changed & (inputs["labels"] == 255), torch.zeros_like(changed))
    assert changed[inputs["labels"] != 255].float().mean() > 0.9


def test_the_example_costs_what_a_step_costs(segment_config):
    """The estimate of memory counts the enlarged logits of the loss: every pixel of the crop in all classes."""
    from train.engine.estimate import activation_bytes

    task = task_of(segment_config, "task.crop=[128,64]")
    with torch.device("meta"):
        model = task.build_model()
    example = task.example(2, torch.device("meta"), torch.float32)
    assert example.shape == (2, 3, 128, 64)
    network = activation_bytes(model, example)
    assert activation_bytes(model, example, task.example_loss) >= network + 4 * 2 * 6 * 128 * 64


# -------------------------------------------------------------------------------------------------------- first weights

SMALL = dict(embed_dim=16, depths=(1, 1), num_heads=(2, 4))
HEAD = dict(neck_channels=32, channels=16)


def test_a_classifier_fills_the_backbone(segment_config):
    task = task_of(segment_config)
    torch.manual_seed(1)
    classifier = catmodel.create_model("cat_tiny", img_size=56, num_classes=10, **SMALL)
    model = task.initial_model()
    head = model.head.conv_seg.weight.clone()
    sentences = task.load_weights(model, classifier.state_dict(), {}, "somewhere")
    assert sentences == ["position tables interpolated: ape 14 x 14 -> 56 x 56", "fresh: norm0, norm1, neck, head"]
    weights = classifier.state_dict()
    same = [name for name in weights if name.startswith("layers.")]
    assert same and all(torch.equal(model.backbone.state_dict()[name], weights[name]) for name in same)
    assert torch.equal(model.head.conv_seg.weight, head)


def test_a_segmenter_fills_everything_but_the_classes(segment_config):
    task = task_of(segment_config)
    torch.manual_seed(1)
    size = dict(**HEAD, **SMALL)
    weights = catmodel.create_segmenter("cat_tiny", 6, **size).state_dict()
    model = task.initial_model()
    assert task.load_weights(model, weights, {"classes": list(CLASSES)}, "a run") == []
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    others = catmodel.create_segmenter("cat_tiny", 19, **size).state_dict()
    model = task.initial_model()
    own = model.head.conv_seg.weight.clone()
    assert task.load_weights(model, others, {}, "a run") == ["last convolution: 19 -> 6 classes, fresh"]
    assert torch.equal(model.head.conv_seg.weight, own)
    assert torch.equal(model.neck.state_dict()[name := next(iter(model.neck.state_dict()))], others[f"neck.{name}"])


def test_weights_that_do_not_fit_are_named(segment_config):
    task = task_of(segment_config)
    classifier = catmodel.create_model("cat_tiny", num_classes=10, embed_dim=32).state_dict()
    with pytest.raises(ConfigError, match=r"model.init_from: a file does not fit this cat_tiny: "):
        task.load_weights(task.initial_model(), classifier, {}, "a file")
    larger = catmodel.create_segmenter("cat_tiny", 6, **{**HEAD, "neck_channels": 64}, **SMALL).state_dict()
    with pytest.raises(ConfigError, match=r"other weights than this cat_tiny with its neck and head: head.scale"):
        task.load_weights(task.initial_model(), larger, {}, "a file")


def test_a_crop_that_tokens_do_not_divide_is_named(segment_config):
    with pytest.raises(ConfigError, match=r"task.crop \[64, 96\] must be a multiple of 3"):
        task_of(segment_config, "model.embed_patch_size=3").build_model()
