"""Semantic segmentation: a class for every pixel."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import catmodel
from catmodel.fixed_order import upsample
from data_pipeline.augment import clear_outside, normalise, sample_keys
from data_pipeline.distortion import distort
from data_pipeline.label_maps import LabelMaps, ignored_value
from data_pipeline.loader import MicroBatch
from data_pipeline.split import Split
from data_pipeline.views import ScaledCrops
from train.config import ConfigError
from train.tasks.base import Model, Task, build_network, on_device, unnormalised
from train.tasks.dense import backbone_of, is_classifier, load_classifier, load_whole, other_classes
from train.tasks.segmentation.colours import lay_over
from train.tasks.segmentation.inference import views_of
from train.tasks.segmentation.pictures import evaluation_picture, iou_table
from train.tasks.segmentation.predict import ImageMap, predict
from train.tasks.segmentation.scores import SegmentationTally
from train.telemetry.metrics import Metric


class Segmentation(Task):
    """The dataset's classes for every pixel, by Semantic FPN on a backbone of catmodel."""

    metrics = (
        Metric("miou", "mIoU", "%", "higher"),
        Metric("macc", "mean accuracy", "%", "higher"),
        Metric("aacc", "pixel accuracy", "%", "higher"),
    )
    one_shape = False
    evaluation_settings = ()

    def build_model(self) -> nn.Module:
        model = build_network(self.config, catmodel.create_segmenter, self._model_settings())
        if any(side % model.stride for side in self.config.task.crop):
            raise ConfigError(
                f"task.crop {list(self.config.task.crop)} must be a multiple of {model.stride}, the side of a token "
                "(model.embed_patch_size)"
            )
        return model

    def _model_settings(self) -> dict[str, Any]:
        """Arguments of `catmodel.create_segmenter`.

        Position tables have the grid of the classifier's image size, whatever the crop, and are resized for each map.
        """
        config, task = self.config, self.config.task
        return {
            "name": config.model.name,
            "num_classes": len(self.classes),
            "dropout": task.dropout,
            "neck_channels": task.neck_channels,
            "channels": task.head_channels,
            **config.model.overrides(),
        }

    def example(self, count: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Images [count, 3, height, width] of a crop."""
        return torch.zeros(count, 3, *self.config.task.crop, device=device, dtype=dtype)

    def example_loss(self, output: Tensor) -> Tensor:
        labels = torch.zeros(len(output), *self.config.task.crop, dtype=torch.int64, device=output.device)
        return pixel_loss(output, labels, ignored_value(len(self.classes)))

    def load_weights(
        self, model: nn.Module, weights: dict[str, Tensor], about: dict[str, Any], source: str
    ) -> list[str]:
        """A classifier's weights fill the backbone; position tables are interpolated to the network's grid.

        Of a segmenter all weights are taken, but the last convolution keeps its initial ones if the classes differ.
        """
        if is_classifier(weights):
            return load_classifier(model, weights, self.config, source)
        last, network = "head.conv_seg.", f"{self.config.model.name} with its neck and head"
        count = len(weights.get(f"{last}bias", ()))
        others = other_classes(count, self.classes, about)
        load_whole(model, weights, source, network=network, last=last, others=others)
        return [f"last convolution: {count} -> {len(self.classes)} classes, fresh"] if others else []

    def views(self) -> ScaledCrops:
        """In evaluation, images at the largest of task.test_ratios; smaller ones are made on the device."""
        return views_of(self.config.task, self.config.augment, max(self.config.task.test_ratios))

    def targets(self, split: Split, training: bool) -> LabelMaps:
        settings = self.config.task
        return LabelMaps(split, len(self.classes), training, settings.cat_max_ratio)

    def inputs(self, batch: MicroBatch, epoch: int, device: torch.device) -> dict[str, Tensor]:
        """Augmented: "images" float [m, 3, H, W], whose padding has the mean colour, and "labels" [m, H, W]."""
        keys = sample_keys(self.config.train.seed, epoch, batch.draws)
        images = on_device(batch, device)
        if self.config.task.distortion:
            images = distort(images, keys)
        images = normalise(images, self.config.augment)
        labels, inside = (batch.targets[name].to(device, non_blocking=True) for name in ("labels", "inside"))
        return {"images": clear_outside(images, inside), "labels": labels}

    def loss(self, model: Model, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Cross-entropy, a mean over all pixels of the micro-batch, also over those that are ignored, as published."""
        labels = inputs["labels"]
        return {"loss": pixel_loss(model(inputs["images"]), labels, ignored_value(len(self.classes)))}

    def preview(self, inputs: dict[str, Tensor], count: int) -> Tensor:
        """The labels' colours lie over the images."""
        images = unnormalised(inputs["images"][:count], self.config.augment)
        pixels = (255 * images).round().byte().permute(0, 2, 3, 1).numpy()
        labels = inputs["labels"][:count].cpu().numpy()
        mixed = [lay_over(*pair, len(self.classes)) for pair in zip(pixels, labels, strict=True)]
        return torch.stack([torch.from_numpy(image) for image in mixed]).permute(0, 3, 1, 2) / 255

    def tally(self, device: torch.device, split: Split) -> SegmentationTally:
        return SegmentationTally(self.config, self.classes, device)

    def evaluation_picture(self, details: dict) -> Tensor | None:
        """Images, their labels and predictions, side by side."""
        return torch.from_numpy(evaluation_picture(details["pictures"])).permute(2, 0, 1) / 255

    def evaluation_text(self, details: dict) -> str:
        """IoU by class."""
        return iou_table(details)

    def predict(
        self,
        model: nn.Module,
        paths: Sequence[Path],
        device: torch.device,
        batch: int,
        output: Path | None = None,
    ) -> Iterator[ImageMap]:
        """The class of every pixel of each image, one image at a time, because they have different sizes.

        output: a folder for `<name>_overlay.jpg` and `<name>_labels.png`.
        """
        return predict(model, paths, self.config, self.classes, device, output)

    def export(self, state: dict[str, Tensor], features: bool) -> tuple[nn.Module, dict[str, Any]]:
        """The network from images to logits of their size; or its backbone, which gives the maps of all stages."""
        settings = self._model_settings()
        if features:
            model, settings, state = backbone_of(self.config, settings, state)
        else:
            settings["full_size"] = True
            model = catmodel.create_segmenter(**settings)
        model.load_state_dict(state)
        augment = self.config.augment
        about = {
            "model": settings,
            "classes": list(self.classes),
            "mean": list(augment.mean),
            "std": list(augment.std),
            "interpolation": self.config.data.interpolation,
        }
        return model.eval(), about


def pixel_loss(logits: Tensor, labels: Tensor, ignored: int) -> Tensor:
    """Cross-entropy of logits [m, C, h, w], enlarged to labels [m, H, W]: the sum over all pixels / (m · H · W).

    Pixels whose label is `ignored` add nothing to the sum. Over a flat list of pixels, of which PyTorch sums the
    gradient in a fixed order on a GPU too.
    """
    logits = upsample(logits.float(), labels.shape[1] // logits.shape[2])
    flat = logits.permute(0, 2, 3, 1).flatten(0, 2)
    total = F.cross_entropy(flat, labels.flatten().long(), ignore_index=ignored, reduction="sum")
    return total / labels.numel()
