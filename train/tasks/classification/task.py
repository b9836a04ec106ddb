"""Image classification with soft targets (mixup, cutmix, label smoothing)."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import catmodel
from data_pipeline.augment import augment, normalise, sample_keys
from data_pipeline.loader import Loader, MicroBatch, build_loader, evaluation_batches
from data_pipeline.manifest import Manifest
from data_pipeline.mix import mix
from data_pipeline.order import Order
from data_pipeline.randomness import Stream, make_key
from train.config import Config, ConfigError
from train.engine.deepspeed_engine import Engine
from train.engine.runtime import Runtime
from train.tasks.classification.scores import Details, Scores, evaluate, write_details


class Classification:
    """Classification of the dataset's classes. `has_validation` is false where there is no `val` split: nothing is evaluated then."""

    def __init__(self, config: Config, manifest: Manifest, order: Order, runtime: Runtime):
        self.config, self.manifest, self.order, self.runtime = config, manifest, order, runtime
        self.classes = len(manifest.classes)
        self.has_validation = "val" in manifest.splits

    def build_model(self) -> nn.Module:
        """The model with its initial weights: a function of the seed alone. Raises ConfigError for arguments that do not fit."""
        torch.manual_seed(make_key(self.config.train.seed, Stream.INIT))
        return build_model(self.config, self.classes)

    def flops_per_image(self, model: nn.Module) -> float:
        """FLOPs of one image, forward and backward (backward counted as twice the forward)."""
        from train.engine.flops import flops_per_image

        return flops_per_image(copy.deepcopy(model).to("meta"), self.config.data.image_size, training=True)

    def batches(self, start_step: int) -> Loader:
        """This rank's micro-batches from step `start_step` on, without end."""
        split, runtime = self.manifest.split("train"), self.runtime
        return build_loader(
            self.config.data, self.config.augment, split, self.order, rank=runtime.rank, world=runtime.world, start_step=start_step
        )

    def inputs(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """A micro-batch on the device, augmented and mixed: images float [m, 3, S, S], targets float [m, classes]."""
        seed, settings, device = self.config.train.seed, self.config.augment, self.runtime.device
        keys = sample_keys(seed, self.order.epoch_of(batch.step), batch.draws)
        images = augment(_on(device, batch), keys, settings)
        labels = batch.labels.to(device, non_blocking=True)
        return mix(images, labels, make_key(seed, Stream.MIX, batch.step, batch.index), self.classes, settings)

    def loss(self, engine: Engine, batch: MicroBatch, images: Tensor, targets: Tensor) -> Tensor:
        """Mean soft-target cross-entropy of one micro-batch. The model's dropout is a function of (seed, step, micro-batch index)."""
        torch.manual_seed(make_key(self.config.train.seed, Stream.MODEL, batch.step, batch.index))
        return nn.functional.cross_entropy(engine(images).float(), targets)

    def evaluate(self, engine: Engine, meet: Callable[[MicroBatch], None], record: Path, step: int) -> Scores:
        """Scores of the engine's present weights on the whole `val` split; `meet` is given every batch, of this rank, before it is scored.

        record: the file that gets what they are made of (evaluate.write_details), in place of what it had; `step`: steps done.
        """
        with engine.evaluating():
            scores, details = evaluate_split(engine, self.config, self.manifest, self.runtime, meet)
        if self.runtime.is_main:
            write_details(record, step, self.manifest.classes, self.manifest.split("val").fingerprint, details)
        return scores


def build_model(config: Config, classes: int) -> nn.Module:
    """The config's model for `classes` classes, with activation checkpointing and kernels set as the config says."""
    try:
        model = catmodel.create_model(config.model.name, img_size=config.data.image_size, num_classes=classes, **config.model.overrides())
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error
    model.set_grad_checkpointing(config.train.activation_checkpointing)
    model.set_kernels(config.train.kernels)
    return model


def evaluate_split(
    model, config: Config, manifest: Manifest, runtime: Runtime, meet: Callable[[MicroBatch], None]
) -> tuple[Scores, Details]:
    """Scores of `model` (normalised images → logits) on `manifest`'s `val` split; every rank calls.

    A sample that cannot be read is left out; `meet` is given every batch, and finds it there.
    """
    split, size, device = manifest.split("val"), config.train.micro_batch, runtime.device

    def normalised() -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        for slot, batch in evaluation_batches(config.data, split, size, rank=runtime.rank, world=runtime.world):
            meet(batch)
            ids, labels = (column.to(device, non_blocking=True) for column in (batch.ids, batch.labels))
            yield slot, ids, normalise(_on(device, batch), config.augment), labels

    return evaluate(model, normalised(), -(-split.samples // size), len(manifest.classes), device)


def _on(device: torch.device, batch: MicroBatch) -> Tensor:
    """The images of a micro-batch on the device."""
    if batch.images.is_cuda:  # written there by the loader, on a stream of its own
        batch.images.record_stream(torch.cuda.current_stream())
    return batch.images.to(device, non_blocking=True)
