"""Losses of detection against torchvision's and against finite differences of plain formulas."""

import math

import pytest
import torch
import torchvision.ops

from train.tasks.detection.losses import centerness, centerness_loss, focal_loss, giou_loss, iou_loss


def boxes(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    start, sides = (torch.rand(count, 2, generator=generator, dtype=torch.float64) * 20 for _ in range(2))
    return torch.cat([start, start + sides + 1], 1)


def test_focal_loss_is_torchvisions_without_ignored_places():
    torch.manual_seed(0)
    logits = (3 * torch.randn(2, 50, 4, dtype=torch.float64)).requires_grad_()
    classes = torch.randint(-1, 5, (2, 50))
    kept = classes >= 0
    one_hot = torch.nn.functional.one_hot(classes[kept], 5)[:, :4].double()
    expected = torchvision.ops.sigmoid_focal_loss(logits[kept], one_hot, alpha=0.25, gamma=2, reduction="sum")
    found = focal_loss(logits, classes)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    (mine,), (theirs,) = torch.autograd.grad(found, [logits]), torch.autograd.grad(expected, [logits])
    assert torch.allclose(mine, theirs, rtol=1e-12, atol=0) and not mine[~kept].any()


def test_focal_loss_of_one_place():
    """Written out: -0.25 (1 - p)² log p of the class, -0.75 p² log(1 - p) of the others."""
    logits = torch.tensor([[[0.3, -1.2]]], dtype=torch.float64)
    p, q = (1 / (1 + math.exp(-x)) for x in (0.3, -1.2))
    expected = -0.25 * (1 - p) ** 2 * math.log(p) - 0.75 * q**2 * math.log(1 - q)
    assert focal_loss(logits, torch.tensor([[0]])).item() == pytest.approx(expected, rel=1e-9)


def test_giou_is_torchvisions():
    found, wanted = boxes(200, 0).requires_grad_(), boxes(200, 1)
    expected = torchvision.ops.generalized_box_iou_loss(found, wanted, reduction="none")
    loss = giou_loss(found, wanted)
    assert torch.allclose(loss, expected, rtol=1e-12, atol=0) and (loss > 1).any() and (loss < 1).any()
    (mine,), (theirs,) = (torch.autograd.grad(each.sum(), [found]) for each in (loss, expected))
    assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-15)


def test_iou_loss_is_minus_the_logarithm():
    found, wanted = boxes(200, 2), boxes(200, 3)
    overlap = torchvision.ops.box_iou(found, wanted).diagonal()
    loss = iou_loss(found, wanted)
    assert torch.allclose(loss, -overlap.clamp(min=1e-6).log(), rtol=1e-12)
    assert (overlap == 0).any() and loss[overlap == 0].unique().item() == pytest.approx(13.8155, rel=1e-5)
    assert iou_loss(wanted, wanted).abs().max() < 1e-12


@pytest.mark.parametrize("loss", [iou_loss, giou_loss])
def test_gradients_are_finite_differences(loss):
    found, wanted = boxes(60, 4), boxes(60, 5)
    near = torchvision.ops.box_iou(found, wanted).diagonal() > 0.01  # there the losses are smooth
    assert near.sum() > 10
    assert torch.autograd.gradcheck(lambda x: loss(x, wanted[near]), [found[near].requires_grad_()], eps=1e-6)


def test_centerness_is_one_in_the_middle_and_zero_at_the_edge():
    box = torch.tensor([10.0, 20.0, 30.0, 60.0])
    points = torch.tensor([[20.0, 40.0], [15.0, 40.0], [15.0, 30.0], [10.0, 40.0], [5.0, 40.0]])
    expected = [1.0, math.sqrt(5 / 15), math.sqrt(5 / 15 * 10 / 30), 0.0, 0.0]
    assert centerness(points, box).tolist() == pytest.approx(expected)


def test_centerness_is_learned_where_a_box_is_learned():
    logits = torch.tensor([[0.5, -0.5, 3.0]], requires_grad=True)
    targets, learns = torch.tensor([[0.7, 0.2, 0.9]]), torch.tensor([[True, True, False]])
    loss = centerness_loss(logits, targets, learns)
    p = [1 / (1 + math.exp(-x)) for x in (0.5, -0.5)]
    expected = -sum(t * math.log(q) + (1 - t) * math.log(1 - q) for t, q in zip((0.7, 0.2), p, strict=True))
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    loss.backward()
    assert logits.grad[0, 2] == 0 and logits.grad[0, 0] != 0
