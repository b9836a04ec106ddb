"""The tally: a network that knows the objects, detections against pycocotools on the source, pictures, damage."""

import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data_pipeline.loader import MicroBatch
from data_pipeline.manifest import open_manifest
from data_pipeline.objects import ObjectTable
from data_pipeline.split import DataError
from tests.train.tasks.detection.coco_cases import pycocotools_of
from train.config import load_config
from train.tasks.base import build_task, evaluate
from train.tasks.detection.coco import BOX, columns
from train.tasks.detection.scores import KEPT, KEPT_MISTAKES, METRICS, DetectionTally

CLASSES = ("disk", "square", "triangle", "ring", "cross")
CPU = torch.device("cpu")


class Given(nn.Module):
    """A stand-in for a network. `meet` gives it a batch; it returns that batch's objects.

    At the best free anchor of each object there are its class and its box. wrong: {sample id: what is done to the
    label, the box and the score's logit of its first object}.
    """

    def __init__(self, task, split, wrong=()):
        super().__init__()
        self._task, self._table, self._wrong = task, ObjectTable(split), dict(wrong)

    def meet(self, batch: MicroBatch) -> None:
        self._batch = batch

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        grid, detector = self._task.grid(images), self._task.detector
        classes = torch.full((len(images), len(grid), len(self._task.classes)), -9.0)
        boxes = grid.anchors.expand(len(images), -1, -1).clone()
        for row, number in enumerate(self._batch.ids.tolist()):
            objects, free = self._table.of(number), np.ones(len(grid), bool)
            for place, thing in enumerate(objects):
                label, box, logit = int(thing["label"]), np.array([thing[name] for name in BOX]), 5.0 - 0.01 * place
                if place == 0 and number in self._wrong:
                    label, box, logit = self._wrong[number](label, box, logit)
                corners = np.concatenate([box[:2], box[:2] + box[2:]])
                corners *= np.tile(self._batch.targets["factors"][row].numpy(), 2)
                anchor = np.where(free, -np.abs(grid.anchors.numpy() - corners).sum(axis=1), -np.inf).argmax()
                free[anchor] = False
                boxes[row, anchor] = torch.tensor(corners, dtype=torch.float32)
                classes[row, anchor, label] = logit
        return classes, detector.encode(grid, boxes)


def evaluated(box_config, *settings: str, model=None, wrong=()) -> tuple[DetectionTally, object, dict]:
    """(the tally, the scores, the details) of the val split, by `Given` or by the network `model`(task)."""
    task = build_task(load_config(box_config, settings), CLASSES)
    split = open_manifest(task.config.data.path).split("val")
    tally = task.tally(CPU, split)
    network = model(task) if model else Given(task, split, wrong)
    meet = network.meet if isinstance(network, Given) else lambda batch: None
    with torch.no_grad():
        return tally, *evaluate(task, network, split, CPU, meet, tally=tally)


def source(box_scenes) -> dict:
    return json.loads((box_scenes / "annotations/instances_val.json").read_text())


def test_a_network_that_knows_the_objects_is_found_perfect(box_config, box_scenes):
    _, scores, details = evaluated(box_config)
    assert scores.count == 101 and scores.values["ap"] == pytest.approx(100, abs=1e-6)
    assert {kind: count for kind, (count, _) in details["errors"].items()} == dict.fromkeys(details["errors"], 0)
    assert details["mistakes"] == [] and len(details["pictures"]) == KEPT
    objects = source(box_scenes)["annotations"]
    assert sum(details["objects"]) == len(objects) == sum(details["sizes"].values())
    assert details["objects"][3] == sum(each["category_id"] == 4 for each in objects)
    for shown in details["pictures"]:
        rows = [[[*row[:5]] for row in shown[part]] for part in ("truth", "found")]
        assert np.abs(np.array(rows[0]) - np.array(rows[1])).max(initial=0.0) <= 0.11  # tenths of a pixel


def test_every_number_is_pycocotools_on_the_source(box_config, box_scenes, tmp_path):
    """Of a random network's detections, over the results file; in batches of another size too."""
    found = {}
    for size in (1, 4):
        settings = [f"train.micro_batch={size}", "task.score_threshold=0.0101"]
        tally, scores, details = evaluated(box_config, *settings, model=lambda task: task.initial_model().eval())
        tally.write_results(tmp_path / "results.json")
        results = json.loads((tmp_path / "results.json").read_text())
        assert len(results) > 1000
        stats = pycocotools_of(source(box_scenes), results).stats
        expected = dict(zip(details["scores"], stats.tolist(), strict=True))
        for name in METRICS:
            assert scores.values[name] == (
                100 * expected[name] if expected[name] >= 0 else pytest.approx(np.nan, nan_ok=True)
            )
        assert scores.values["ap50"] > 0
        found[size] = details
    assert [shown["id"] for shown in found[1]["pictures"]] == [shown["id"] for shown in found[4]["pictures"]]


def test_mistakes_are_kept_the_most_confident_first(box_config):
    """Of 30 images each with one; at equal scores by the images' ids. The last ten are more confident."""
    wrong = {number: lambda label, box, logit: ((label + 1) % 5, box, logit) for number in range(70, 90)}
    wrong |= {number: lambda label, box, logit: ((label + 1) % 5, box, logit + 1) for number in range(90, 100)}
    wrong[72] = lambda label, box, logit: (label, box + [0, 0.6 * box[3], 0, 0], logit)
    _, scores, details = evaluated(box_config, wrong=wrong)
    mistakes = details["mistakes"]
    assert len(mistakes) == KEPT_MISTAKES and scores.values["ap"] < 100
    assert [mistake["shown"]["id"] for mistake in mistakes] == [*range(90, 100), *range(70, 60 + KEPT_MISTAKES)]
    kinds = {mistake["shown"]["id"]: mistake["kind"] for mistake in mistakes}
    assert kinds.pop(72) in ("place", "both") and set(kinds.values()) == {"class"}
    for mistake in mistakes:
        (found,), truth = mistake["shown"]["found"], mistake["shown"]["truth"]
        if mistake["kind"] == "class":
            assert mistake["other"] == truth[0][4] == (found[4] - 1) % 5 and mistake["iou"] > 0.99
            assert found[:4] == pytest.approx(truth[0][:4], abs=0.11)


def test_images_that_cannot_be_read_count_neither_objects_nor_detections(box_config):
    task = build_task(load_config(box_config, ["train.micro_batch=4"]), CLASSES)
    split = open_manifest(task.config.data.path).split("val")
    given, table = Given(task, split), ObjectTable(split)
    tally, left_out = task.tally(CPU, split), 17

    def meet(batch: MicroBatch) -> None:
        """Mark `left_out` as the loader marks a damaged image."""
        given.meet(batch)
        batch.counted[batch.ids == left_out] = False

    with torch.no_grad():
        scores, details = evaluate(task, given, split, CPU, meet, tally=tally)
    assert scores.count == 100 and scores.values["ap"] == pytest.approx(100, abs=1e-6)
    assert sum(details["objects"]) == len(table.objects) - len(table.of(left_out)) < len(table.objects)


def test_detections_lie_inside_their_image(box_config):
    """In pixels of the stored image, whatever the network predicts."""

    def wild(task):
        model = task.initial_model().eval()
        nn.init.normal_(model.head.conv_reg.weight, std=2.0)
        return model

    tally, _, _ = evaluated(box_config, "task.score_threshold=0.0101", model=wild)
    split = open_manifest(load_config(box_config, []).data.path).split("val")
    _, detections = tally._results
    boxes, records = columns(detections, BOX), split.records[detections["image"]]
    size = np.stack([records["width"], records["height"]], axis=1)
    assert len(boxes) > 100 and (boxes >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= size + 1e-9).all()
    assert np.isclose(boxes[:, 0] + boxes[:, 2], size[:, 0], rtol=0, atol=1e-6).any()


def test_a_split_without_objects_is_named(box_config):
    task = build_task(load_config(box_config, []), CLASSES)
    split = open_manifest(task.config.data.path).split("val")
    with pytest.raises(DataError, match="not one image of the val split that has objects can be read"):
        task.tally(CPU, split).finish([0.0])
