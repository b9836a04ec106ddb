"""Object detection: boxes with classes, by RetinaNet, FCOS or ATSS."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import catmodel
from catmodel.detection import Detector, Grid
from catmodel.detection.boxes import decode_distances, decode_offsets, encode_offsets
from catmodel.detection.kinds import KINDS
from data_pipeline.augment import clear_outside, normalise
from data_pipeline.loader import MicroBatch
from data_pipeline.object_targets import ObjectTargets
from data_pipeline.scaled_boxes import ScaledBoxes
from data_pipeline.split import Split
from train.config import Config, ConfigError
from train.tasks.base import Model, Task, build_network, on_device, unnormalised
from train.tasks.dense import is_classifier, load_classifier, load_whole, other_classes
from train.tasks.detection.assign import by_overlap, by_range, by_statistics, learned
from train.tasks.detection.export import exported
from train.tasks.detection.losses import centerness, centerness_loss, focal_loss, giou_loss, iou_loss
from train.tasks.detection.pictures import draw_boxes, evaluation_picture, evaluation_tables
from train.tasks.detection.predict import LEAST, ImageObjects, predict
from train.tasks.detection.scores import DetectionTally
from train.tasks.drawing import palette
from train.telemetry.metrics import Metric

CLASS_LAYER = "head.conv_cls."


class Detection(Task):
    """Boxes of the dataset's classes, by a detector on a backbone of catmodel."""

    metrics = (
        Metric("ap", "AP", "%", "higher"),
        Metric("ap50", "AP50", "%", "higher"),
        Metric("ap75", "AP75", "%", "higher"),
        Metric("aps", "AP small", "%", "higher"),
        Metric("apm", "AP medium", "%", "higher"),
        Metric("apl", "AP large", "%", "higher"),
        Metric("ar100", "AR100", "%", "higher"),
    )
    one_shape = False
    has_results = True
    evaluation_settings = ("task.divisor",)

    def __init__(self, config: Config, classes: Sequence[str]):
        super().__init__(config, classes)
        self._kind = KINDS[config.task.detector]
        self.losses = ("cls", "box", "centerness") if self._kind.centerness else ("cls", "box")

    # --- the network ---

    def build_model(self) -> Detector:
        model = build_network(self.config, catmodel.create_detector, self.model_settings())
        if stages := self.config.task.frozen_stages:
            try:
                model.freeze(stages)
            except ValueError as error:
                raise ConfigError(f"task.frozen_stages: {error}") from error
        return model

    def model_settings(self) -> dict[str, Any]:
        """Arguments of `catmodel.create_detector`.

        Position tables have the grid of the classifier's image size, and are resized for each map.
        """
        config, task = self.config, self.config.task
        return {
            "kind": task.detector,
            "name": config.model.name,
            "num_classes": len(self.classes),
            "neck_channels": task.neck_channels,
            "head_channels": task.head_channels,
            "head_convs": task.head_convs,
            "anchor_scale": task.anchor_scale,
            **config.model.overrides(),
        }

    @cached_property
    def detector(self) -> Detector:
        """The network without weights: its grid, and how it encodes boxes."""
        with torch.device("meta"):
            return self.build_model()

    def grid(self, images: Tensor) -> Grid:
        """The places of inputs of these images' size, on their device."""
        return self.detector.grid(*images.shape[2:], images.device)

    def example(self, count: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Images [count, 3, height, width], as large as any in training."""
        return torch.zeros(count, 3, *self.views().shape, device=device, dtype=dtype)

    def example_loss(self, output: Sequence[Tensor]) -> Tensor:
        """Of images of `example` without objects."""
        logits = output[0]
        classes = torch.full(logits.shape[:2], len(self.classes), device=logits.device)
        grid = self.detector.grid(*self.views().shape, logits.device)
        targets = self._regression_targets(grid, classes, torch.zeros_like(output[1]))
        return sum(self._losses(output, {"classes": classes, **targets}).values())

    def load_weights(
        self, model: nn.Module, weights: dict[str, Tensor], about: dict[str, Any], source: str
    ) -> list[str]:
        """A classifier's weights fill the backbone; position tables are interpolated to the network's grid.

        Of a detector of the same kind all weights are taken, but the layer that classifies keeps its initial ones if
        the classes differ.
        """
        if is_classifier(weights):
            return load_classifier(model, weights, self.config, source)
        notes = self._differences(about, source)
        per_class = len(model.state_dict()[f"{CLASS_LAYER}bias"]) // len(self.classes)
        count = len(weights.get(f"{CLASS_LAYER}bias", ())) // per_class
        others = other_classes(count, self.classes, about)
        network = f"{self.config.task.detector} on {self.config.model.name}"
        load_whole(model, weights, source, network=network, last=CLASS_LAYER, others=others)
        fresh = [f"the layer that classifies: {count} -> {len(self.classes)} classes, fresh"] if others else []
        return notes + fresh

    def _differences(self, about: dict[str, Any], source: str) -> list[str]:
        """Sentences on settings of the detector that `about` describes by which its outputs mean something else.

        Raises ConfigError if it is of another kind; the names and shapes of the weights do not tell all kinds apart.
        """
        own, model = self.config.task, about.get("model", {})
        exported = {"detector": model.get("kind"), "anchor_scale": model.get("anchor_scale"), "bgr": about.get("bgr")}
        theirs = about.get("task") or exported
        kind = theirs.get("detector")
        if kind is None:  # the file does not say it
            return []
        if kind != own.detector:
            raise ConfigError(
                f"model.init_from: {source} was trained with task.detector={kind!r}, whose outputs mean other boxes "
                f"than those of {own.detector}: give a detector of the same kind, or a classifier"
            )
        published = self._kind.anchor_scale
        pairs = (
            ("anchor_scale", theirs.get("anchor_scale") or published, own.anchor_scale or published),
            ("bgr", bool(theirs.get("bgr")), own.bgr),
        )
        return [f"task.{key} was {old!r} for {source}, and is {new} here" for key, old, new in pairs if old != new]

    # --- training ---

    def views(self) -> ScaledBoxes:
        task = self.config.task
        return ScaledBoxes(
            scales=task.scales,
            test_scale=task.scale_of_tests,
            divisor=task.divisor,
            mode=task.scale_mode,
            crop_scales=task.crop_scales or (),
            crop_range=task.crop_range,
            flip=self.config.augment.flip,
            grouped=task.aspect_groups,
        )

    def targets(self, split: Split, training: bool) -> ObjectTargets:
        return ObjectTargets(split, training)

    def inputs(self, batch: MicroBatch, epoch: int, device: torch.device) -> dict[str, Tensor]:
        """Images, and what each of the A places of their grid learns.

        "images" float [m, 3, H, W], whose padding has the mean colour; "classes" int64 [m, A], -1: ignored, K:
        background; "boxes" [m, A, 4], x1 y1 x2 y2 in pixels of the input, of places that learn no box one whose
        encoding is zero; "places" [A, 4] or [A, 2], the anchors or points; "centerness" [m, A] (not retinanet).
        """
        boxes, labels, inside = (
            batch.targets[name].to(device, non_blocking=True) for name in ("boxes", "labels", "inside")
        )
        images = self.pixels(on_device(batch, device), inside)
        grid = self.grid(images)
        match = torch.stack([self._assign(grid, *one) for one in zip(boxes, labels >= 0, inside, strict=True)])
        classes, found = learned(match, boxes, labels, len(self.classes))
        return {"images": images, "classes": classes, **self._regression_targets(grid, classes, found)}

    def pixels(self, images: Tensor, inside: Tensor) -> Tensor:
        """uint8 [m, 3, H, W] -> the network's input, with the mean colour outside of `inside`, int32 [m, 4] (left, top,
        right, bottom).
        """
        images = clear_outside(normalise(images, self.config.augment), inside)
        return images.flip(1) if self.config.task.bgr else images

    def _assign(self, grid: Grid, boxes: Tensor, real: Tensor, inside: Tensor) -> Tensor:
        """The box of one image that each place learns; see assign.py."""
        if grid.anchors is None:
            return by_range(boxes, real, grid.points, grid.strides)
        # As mmdetection, places beyond the image's own padding learn nothing, not even that there is nothing.
        divisor = self.config.task.divisor
        width, height = (-(-side // divisor) * divisor for side in inside[2:])
        valid = (grid.points[:, 0] < width) & (grid.points[:, 1] < height)
        if self.config.task.detector == "retinanet":
            return by_overlap(boxes, real, grid.anchors, valid)
        return by_statistics(boxes, real, grid.anchors, valid, grid.starts)

    def _regression_targets(self, grid: Grid, classes: Tensor, boxes: Tensor) -> dict[str, Tensor]:
        """ "places", "boxes" and "centerness" of `inputs`. Places that learn no box get one whose encoding is zero."""
        learns = self._learns(classes)
        if grid.anchors is None:
            places, nothing = grid.points, torch.cat([grid.points - 1, grid.points + 1], dim=1)
        else:
            places = nothing = grid.anchors
        boxes = torch.where(learns[..., None], boxes, nothing)
        targets = {"places": places, "boxes": boxes}
        if self._kind.centerness:
            targets["centerness"] = centerness(grid.points, boxes) * learns
        return targets

    def _learns(self, classes: Tensor) -> Tensor:
        """Whether places learn a box, bool [m, A]."""
        return (classes >= 0) & (classes < len(self.classes))

    def loss(self, model: Model, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums over the places of the micro-batch, divided by the number of those that learn a box, or for the boxes of
        fcos and atss by the sum of their centerness.

        As mmdetection, it divides by at least 1, an image without such a place counts as one with anchors, and the sum
        of centerness has no such limit for fcos.
        """
        return self._losses(model(inputs["images"]), inputs)

    def _losses(self, output: Sequence[Tensor], targets: dict[str, Tensor]) -> dict[str, Tensor]:
        logits, raw, *central = (part.float() for part in output)
        learns = self._learns(targets["classes"])
        is_fcos = self.config.task.detector == "fcos"
        count = (learns.sum() if is_fcos else learns.sum(dim=1).clamp(min=1).sum()).clamp(min=1)
        losses = {"cls": focal_loss(logits, targets["classes"]) / count}
        raw = torch.where(learns[..., None], raw, 0.0)  # so that boxes of places that learn none are finite
        places = targets["places"]  # in a CUDA graph these must be its inputs, not the detector's
        if not central:
            wanted = encode_offsets(places, targets["boxes"], self._kind.deltas_std)
            return losses | {"box": (raw - wanted).abs().sum() / count}
        boxes, weights = self._decoded(places, raw), targets["centerness"]
        if is_fcos:
            distance = iou_loss(boxes, targets["boxes"])
        else:
            distance = 2 * giou_loss(boxes, targets["boxes"])
        losses["box"] = (distance * weights).sum() / weights.sum().clamp(min=1e-6 if is_fcos else 1)
        losses["centerness"] = centerness_loss(central[0], weights, learns) / count
        return losses

    def preview(self, inputs: dict[str, Tensor], count: int) -> Tensor:
        """With the boxes that some place learns, in the colours of their classes."""
        colours = palette(len(self.classes))
        images = inputs["images"][:count]
        images = unnormalised(images.flip(1) if self.config.task.bgr else images, self.config.augment)
        pixels = (255 * images).round().byte().permute(0, 2, 3, 1).numpy()
        drawn = []
        for picture, classes, boxes in zip(pixels, inputs["classes"].cpu(), inputs["boxes"].cpu(), strict=False):
            learns = self._learns(classes)
            objects = torch.cat([boxes[learns], classes[learns, None]], dim=1).unique(dim=0).numpy()
            labels = objects[:, 4].astype(int)
            edges = np.concatenate([objects[:, :2], objects[:, 2:4] - objects[:, :2]], axis=1)
            drawn.append(draw_boxes(picture, edges, [self.classes[label] for label in labels], colours[labels]))
        return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2) / 255

    def _decoded(self, places: Tensor, raw: Tensor) -> Tensor:
        if self._kind.anchor_scale is None:
            return decode_distances(places, raw)
        return decode_offsets(places, raw, self._kind.deltas_std)

    # --- evaluation and use ---

    def tally(self, device: torch.device, split: Split) -> DetectionTally:
        return DetectionTally(self, split, device)

    def evaluation_picture(self, details: dict) -> Tensor | None:
        """Photographs with their objects, beside them with what was found."""
        return torch.from_numpy(evaluation_picture(details)).permute(2, 0, 1) / 255

    def evaluation_text(self, details: dict) -> str:
        """AP by class and by size, and the errors."""
        return evaluation_tables(details)

    def predict(
        self,
        model: nn.Module,
        paths: Sequence[Path],
        device: torch.device,
        batch: int,
        output: Path | None = None,
        min_score: float = LEAST,
    ) -> Iterator[ImageObjects]:
        """The objects in each image, one image at a time, because they have different sizes.

        output: a folder for `<name>_boxes.jpg`. min_score: objects with a lower score are left out.
        """
        return predict(self, model, paths, device, output, min_score)

    def export(self, state: dict[str, Tensor], features: bool) -> tuple[nn.Module, dict[str, Any]]:
        """The detector, of which catmodel.export makes a graph from an image to its objects; or its backbone."""
        return exported(self, state, features)
