"""What the task exports: its weights, and graphs from an image of any size to its objects."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import catmodel
from catmodel.detection.exported import OneImage, largest_difference, telling_threshold
from catmodel.export import CannotExport, ExportError, export
from catmodel.pretrained import about
from train.config import load_config
from train.tasks.base import build_task

CLASSES = ("disk", "square", "triangle", "ring", "cross")


FOUR_STAGES = ("model.depths=[1,1,1,1]", "model.num_heads=[2,4,4,4]")  # strides as published: 8 to 128


def task_of(box_config, detector: str, *settings: str):
    settings = [f"task.detector={detector}", "task.before_nms=200", *settings]
    return build_task(load_config(box_config, settings), CLASSES)


def state_of(task) -> dict[str, torch.Tensor]:
    """Weights whose scores differ as much as those of a trained network."""
    model = task.initial_model()
    nn.init.normal_(model.head.conv_cls.weight, std=0.2)
    return model.state_dict()


def test_weights_are_built_again(box_config, tmp_path):
    task = task_of(box_config, "fcos")
    state = state_of(task)
    model, description = task.export(state, False)
    assert export(model, str(tmp_path / "m.safetensors"), description) == 0
    described = about(tmp_path / "m.safetensors")
    again = catmodel.create_detector(**described["model"]).eval()
    again.load_state_dict(load_file(tmp_path / "m.safetensors"))
    images = torch.randn(1, 3, 70, 101)
    with torch.no_grad():
        assert all(map(torch.equal, again(images), model(images)))
    assert described["classes"] == list(CLASSES) and described["bgr"] is False and described["scale"] == [64, 64]
    assert OneImage(again, **described["detect"]).score_threshold == pytest.approx(0.005)
    with pytest.raises(CannotExport, match="have no place for detection"):
        export(model, f"{tmp_path}/folder/", description)


def test_features_are_the_backbones(box_config, tmp_path):
    task = task_of(box_config, "retinanet")
    network = task.initial_model().eval()
    model, description = task.export(network.state_dict(), True)
    assert export(model, str(tmp_path / "m.safetensors"), description) == 0
    images = torch.randn(1, 3, 70, 101)
    with torch.no_grad():
        assert all(map(torch.equal, model(images), network.backbone(images)))


def test_objects_are_those_of_an_evaluation(box_config):
    """Of an image that has no padding, as the tally finds them."""
    from train.tasks.detection.inference import Inference, evaluation_targets

    task = task_of(box_config, "atss")
    model, description = task.export(state_of(task), False)
    image = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    targets = evaluation_targets(np.array([[0, 0, 192, 128, 0]]), np.array([[192, 128]]), (64, 96))
    with torch.no_grad():
        (found,) = Inference(task)(model, image, targets, [0])
        boxes, scores, labels = OneImage(model, **description["detect"])(task.pixels(image, targets["inside"]))
    assert len(found) > 20 and np.array_equal(found["score"], scores.numpy().astype(np.float64))
    assert np.array_equal(found["label"], labels.numpy())
    assert np.allclose(found["x"] + found["width"], 2 * boxes[:, 2].numpy(), rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("detector", "suffix", "settings", "sizes"),
    [
        ("fcos", "pt2", FOUR_STAGES, ((129, 203), (300, 140))),
        ("retinanet", "onnx", (), ((66, 203), (300, 64))),
        *(pytest.param("atss", end, (), ((66, 203), (300, 64)), marks=pytest.mark.long) for end in ("pt2", "onnx")),
        pytest.param("retinanet", "onnx", FOUR_STAGES, ((129, 203), (300, 140)), marks=pytest.mark.long),
    ],
)
def test_graphs_of_any_size_find_the_same_objects(box_config, tmp_path, detector, suffix, settings, sizes):
    """Suppression included. The file's own threshold holds, too."""
    task = task_of(box_config, detector, *settings)
    model, description = task.export(state_of(task), False)
    description["detect"]["score_threshold"] = 0.02
    path = tmp_path / f"m.{suffix}"
    assert export(model, str(path), description) < 1e-4
    if suffix == "pt2":
        run = torch.export.load(path).module()
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        assert [output.name for output in session.get_outputs()] == ["boxes", "scores", "classes"]

        def run(image):
            return [torch.from_numpy(array) for array in session.run(None, {"images": image.numpy()})]

    whole = OneImage(model, **description["detect"])
    with torch.no_grad():
        for size in sizes:
            image = torch.randn(1, 3, *size)
            expected = whole(image)
            assert len(expected[1]) == 100 and largest_difference(expected, run(image)) < 1e-4


def test_a_file_that_finds_something_else_is_refused(box_config, tmp_path, monkeypatch):
    """Here one of another threshold of suppression."""
    task = task_of(box_config, "retinanet")
    model, description = task.export(state_of(task), False)

    def write_other(whole, path, described):
        other = OneImage(model, **{**described["detect"], "nms": 0.1})

        def run(image, threshold):
            other.score_threshold.fill_(threshold)
            return other(image)

        return run

    monkeypatch.setitem(export.__globals__["_WRITERS"], ".pt2", write_other)
    with pytest.raises(ExportError, match="its outputs differ by"):
        export(model, str(tmp_path / "m.pt2"), description)


def test_differences_between_lists_of_objects():
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40]])
    scores, classes = torch.tensor([0.9, 0.8]), torch.tensor([1, 2])
    found = boxes, scores, classes
    turned = tuple(part.flip(0) for part in found)
    assert largest_difference(found, turned) == 0
    assert largest_difference(found, (boxes + torch.tensor([0, 0, 0.4, 0]), scores, classes)) == pytest.approx(
        0.01, rel=1e-4
    )
    assert largest_difference(found, (boxes, scores - 0.05, classes)) == pytest.approx(0.05, rel=1e-4)
    nothing = tuple(part[:0] for part in found)
    for other in ((boxes, scores, classes + 1), tuple(part[:1] for part in found), nothing):
        assert largest_difference(found, other) == largest_difference(other, found) == float("inf")
    assert largest_difference(nothing, nothing) == 0


def test_a_threshold_finds_a_few_objects(box_config):
    task = task_of(box_config, "retinanet")
    model, _ = task.export(state_of(task), False)
    images = [torch.randn(1, 3, 64, side) for side in (64, 96, 128)]
    with torch.no_grad():
        threshold = telling_threshold(model, images)
        above = [int((model(image)[0].sigmoid() > threshold).sum()) for image in images]
    assert 30 <= sum(above) <= 60
