"""Image classification with soft targets (mixup, cutmix, label smoothing)."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import catmodel
from data_pipeline.augment import sample_keys
from data_pipeline.loader import MicroBatch
from data_pipeline.randomness import Stream, make_key
from data_pipeline.recipe import prepare
from data_pipeline.split import Split
from train.config import ConfigError
from train.tasks.base import Model, Task, build_network, on_device, unnormalised
from train.tasks.classification.predict import ImageClasses, predict
from train.tasks.classification.scores import ClassificationTally
from train.telemetry.metrics import Metric


class Classification(Task):
    """Classification of the dataset's classes by a network of catmodel."""

    metrics = (
        Metric("top1", "top-1", "%", "higher"),
        Metric("top5", "top-5", "%", "higher"),
        Metric("loss", "loss", "", "lower"),
    )

    def build_model(self) -> nn.Module:
        return build_network(self.config, catmodel.create_model, self._model_settings())

    def _model_settings(self) -> dict[str, Any]:
        """Arguments of `catmodel.create_model`."""
        config = self.config
        sizes = {"img_size": config.data.image_size, "num_classes": len(self.classes)}
        return {"name": config.model.name, **sizes, **config.model.overrides()}

    def example(self, count: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Images [count, 3, S, S]."""
        side = self.config.data.image_size
        return torch.zeros(count, 3, side, side, device=device, dtype=dtype)

    def example_loss(self, output: Tensor) -> Tensor:
        return F.cross_entropy(output.float(), torch.zeros(len(output), dtype=torch.int64, device=output.device))

    def load_weights(
        self, model: nn.Module, weights: dict[str, Tensor], about: dict[str, Any], source: str
    ) -> list[str]:
        """Position tables are interpolated to the model's image size.

        The head keeps its initial weights if the classes differ.
        """
        from catmodel.pretrained import DoesNotFit, load_published

        count = next(
            (len(head) for head in map(weights.get, ("head.weight", "fc.weight")) if getattr(head, "ndim", 0)), 0
        )
        others = count != len(self.classes) or tuple(about.get("classes", self.classes)) != self.classes
        try:
            report = load_published(model, weights, resize_positions=True, fresh_head=others)
        except DoesNotFit as error:
            more = f" (and {len(error.problems) - 1} more)" if len(error.problems) > 1 else ""
            raise ConfigError(
                f"model.init_from: {source} does not fit this {self.config.model.name}: {error.problems[0]}{more}"
            ) from error
        sentences = [f"position tables interpolated: {', '.join(report.resized)}"] if report.resized else []
        if others:
            sentences.append(f"head: {count} -> {len(self.classes)} classes, fresh")
        return sentences

    def inputs(self, batch: MicroBatch, epoch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Augmented and mixed: images float [m, 3, S, S], targets float [m, classes]."""
        seed, settings = self.config.train.seed, self.config.augment
        keys, mix_key = sample_keys(seed, epoch, batch.draws), make_key(seed, Stream.MIX, batch.step, batch.index)
        labels = batch.targets.to(device, non_blocking=True)
        return prepare(on_device(batch, device), labels, keys, mix_key, len(self.classes), settings)

    def loss(self, model: Model, inputs: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Mean cross-entropy with soft targets."""
        images, targets = inputs
        return {"loss": F.cross_entropy(model(images).float(), targets)}

    def preview(self, inputs: tuple[Tensor, Tensor], count: int) -> Tensor:
        return unnormalised(inputs[0][:count], self.config.augment)

    def tally(self, device: torch.device, split: Split) -> ClassificationTally:
        return ClassificationTally(self.config.augment, self.classes, device)

    def predict(
        self, model: nn.Module, paths: Sequence[Path], device: torch.device, batch: int, top: int = 5
    ) -> Iterator[ImageClasses]:
        """The `top` most probable classes of each image."""
        return predict(model, paths, self.config.data, self.config.augment, self.classes, device, batch, top)

    def export(self, state: dict[str, Tensor], features: bool) -> tuple[nn.Module, dict[str, Any]]:
        """The classifier, or the same network with features_only; CAT's norms of the maps are as initialised then."""
        settings = self._model_settings() | ({"features_only": True} if features else {})
        if features:
            model = catmodel.create_model(**settings)
            catmodel.load_published(model, state)
        else:
            model = self.build_model()
            model.load_state_dict(state)
        augment = self.config.augment
        about = {
            "model": settings,
            "classes": list(self.classes),
            "mean": list(augment.mean),
            "std": list(augment.std),
            "interpolation": self.config.data.interpolation,
            "eval_crop": self.config.data.eval_crop,
        }
        return model.eval(), about
