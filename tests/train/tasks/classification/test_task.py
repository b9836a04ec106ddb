"""The inputs of classification (which part of a micro-batch's place changes what), its loss and its network."""

import dataclasses

import numpy as np
import pytest
import torch

from data_pipeline.augment import sample_keys
from data_pipeline.loader import MicroBatch
from data_pipeline.randomness import Stream, make_key
from data_pipeline.recipe import prepare
from train.config import load_config
from train.tasks.base import build_task

CPU = torch.device("cpu")
IMAGES = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
BATCH = MicroBatch(5, 2, torch.arange(8), np.arange(8), IMAGES, torch.ones(8, dtype=torch.bool), torch.arange(8))
PLACES = {
    "epoch": (BATCH, 1, 0),
    "step": (dataclasses.replace(BATCH, step=6), 0, 0),
    "index": (dataclasses.replace(BATCH, index=3), 0, 0),
    "copy": (dataclasses.replace(BATCH, draws=np.arange(8) + 100), 0, 0),
    "seed": (BATCH, 0, 1),
}
AUGMENTED = ["augment.mixup=0", "augment.cutmix=0", "augment.erasing=1"]
MIXED = ["augment.mixup=0.8", "augment.cutmix=0", "augment.erasing=0"]


@pytest.mark.parametrize(
    ("settings", "changing"), [(AUGMENTED, {"epoch", "copy", "seed"}), (MIXED, {"step", "index", "seed"})]
)
def test_augmentation_is_of_epoch_and_draw_and_mixing_of_step_and_micro_batch(tiny_config, settings, changing):
    def inputs(batch: MicroBatch, epoch: int, seed: int) -> torch.Tensor:
        task = build_task(load_config(tiny_config, [*settings, f"train.seed={seed}"]), [""] * 10)
        return task.inputs(batch, epoch, CPU)[0]

    reference = inputs(BATCH, 0, 0)
    assert not torch.equal(reference, inputs(BATCH, 0, 2))
    assert {name for name, place in PLACES.items() if not torch.equal(inputs(*place), reference)} == changing


def test_the_keys_of_an_input(tiny_config):
    task = build_task(load_config(tiny_config, ["train.seed=3"]), [""] * 10)
    keys = sample_keys(3, 1, BATCH.draws), make_key(3, Stream.MIX, 5, 2)
    expected = prepare(IMAGES, BATCH.targets, *keys, 10, task.config.augment)
    assert all(map(torch.equal, task.inputs(BATCH, 1, CPU), expected))


def test_an_image_is_augmented_in_any_company(tiny_config):
    task = build_task(load_config(tiny_config, AUGMENTED), [""] * 10)
    half = {name: getattr(BATCH, name)[4:] for name in ("ids", "draws", "images", "counted", "targets")}
    found = task.inputs(dataclasses.replace(BATCH, **half), 0, CPU)
    assert all(torch.equal(part, whole[4:]) for part, whole in zip(found, task.inputs(BATCH, 0, CPU), strict=True))


def test_the_loss_is_the_mean_cross_entropy_with_soft_targets_in_fp32(tiny_config):
    torch.manual_seed(0)
    logits, targets = torch.randn(8, 10).bfloat16(), torch.randn(8, 10).softmax(1)
    loss = build_task(load_config(tiny_config), [""] * 10).loss(lambda images: logits, (None, targets))["loss"]
    expected = -(targets.double() * logits.double().log_softmax(1)).sum(1).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("on", [True, False])
def test_the_network_is_told_of_activation_checkpointing_and_kernels(tiny_config, on):
    config = load_config(tiny_config, [f"train.activation_checkpointing={on}", f"train.kernels={on}"])
    model = build_task(config, [""] * 10).initial_model()
    assert {(stage.grad_checkpointing, stage.kernels) for stage in model.layers} == {(on, on)}
