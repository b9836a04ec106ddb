"""The recipe by kernels against the plain path, its launches, and what the compiler makes of the kernels."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from data_pipeline import recipe
from data_pipeline.augment import augment, sample_keys
from data_pipeline.config import AugmentConfig
from data_pipeline.mix import mix
from data_pipeline.recipe.program import CUTMIX, MIXUP, program_of
from tests.data_pipeline.recipe.interpreter import DEVICE
from train.config import load_config

ROOT = Path(__file__).parents[3]
USUAL = AugmentConfig(rand_augment="rand-m9-mstd0.5-inc1", erasing=0.25, mixup=0.8, cutmix=1.0, label_smoothing=0.1)
EVERYTHING = AugmentConfig(
    rand_augment="rand-m9-n3-mstd0.5-p0.7-inc1",
    color_jitter=0.4,
    erasing=0.5,
    mixup=0.8,
    cutmix=1.0,
    label_smoothing=0.1,
)
KERNELS = ("count_levels", "make_tables", "apply_round", "finish_images", "finish_targets")


def batch(count: int, size: int = 32, classes: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """Channels-last images and labels, as from the loader."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, size, size, 3), generator=generator, dtype=torch.uint8)
    return images.permute(0, 3, 1, 2), torch.randint(0, classes, (count,), generator=generator)


def keys_of(count: int, epoch: int = 0) -> np.ndarray:
    return sample_keys(0, epoch, np.arange(count))


def by_kernels(images, labels, keys, mix_key, classes, config):
    from data_pipeline.recipe.launch import run_program

    program = program_of(keys, mix_key, images.shape[3], config)
    return run_program(images.to(DEVICE), labels.to(DEVICE), program, classes, config)


def compare(images, labels, keys, mix_key, classes, config) -> None:
    """Equal up to the last bits of noise and mixture; on a GPU, a geometric operation may change a value by 1 of 255,
    which changes an image's other values only if another operation counts levels.
    """
    found = by_kernels(images, labels, keys, mix_key, classes, config)
    expected = mix(augment(images, keys, config), labels, mix_key, classes, config)
    assert found[0].is_contiguous() and found[0].dtype == found[1].dtype == torch.float32
    far = (found[0].cpu() - expected[0]).abs() > 2e-6
    assert far.float().mean() <= (0.01 if DEVICE.type == "cuda" else 0)
    torch.testing.assert_close(found[1].cpu(), expected[1], rtol=1e-6, atol=1e-7)


def recipes() -> dict[str, AugmentConfig]:
    """The different recipes of configs/, by the first file that has each."""
    found: dict[str, AugmentConfig] = {}
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        config = load_config(path).augment
        if config not in found.values():
            found[path.stem] = config
    return found


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_of_the_configs(name):
    images, labels = batch(14)
    for number in range(2):
        compare(images, labels, keys_of(14, number), number, 1000, recipes()[name])


@pytest.mark.parametrize(("count", "size", "classes"), [(5, 33, 7), (1, 8, 1), (6, 17, 1030)])
@pytest.mark.parametrize("mode", ["pixel", "const"])
def test_everything_at_other_sizes(count, size, classes, mode):
    images, labels = batch(count, size, classes)
    config = EVERYTHING.model_copy(update={"erasing_mode": mode, "erasing": 1.0})
    for number in range(2):
        compare(images, labels, keys_of(count, number), number, classes, config)


def test_mixup_cutmix_and_no_mixing_all_occur():
    images, labels = batch(6, 16)
    config = USUAL.model_copy(update={"rand_augment": None, "mix_probability": 0.7})
    kinds = set()
    for number in range(12):
        compare(images, labels, keys_of(6, number), number, 10, config)
        kinds.add(int(program_of(keys_of(6), number, 16, config).mixing[0]))
    assert kinds == {0, MIXUP, CUTMIX}


def test_a_sample_does_not_depend_on_its_neighbours_or_memory_layout():
    images, labels = batch(8, 17)
    config, keys = EVERYTHING.model_copy(update={"mixup": 0.0, "cutmix": 0.0}), keys_of(8)
    before = images.clone()
    whole, targets = by_kernels(images, labels, keys, 0, 10, config)
    assert torch.equal(images, before)
    order = np.random.default_rng(0).permutation(8)
    found = by_kernels(images[order].contiguous(), labels[order], keys[order], 0, 10, config)
    assert torch.equal(found[0], whole[order]) and torch.equal(found[1], targets[order])
    assert torch.equal(by_kernels(images[3:4], labels[3:4], keys[3:4], 0, 10, config)[0], whole[3:4])


@pytest.mark.parametrize(("config", "most"), [(USUAL, 8), (EVERYTHING, 20), (AugmentConfig(), 2)])
def test_launches(config, most, monkeypatch):
    """At most 20, and between them no operator of PyTorch but the allocation of results and views."""
    from data_pipeline.recipe import launch

    launches, operators = [], set()

    class Counted:
        """Stands for a kernel, so that only the host's own operators are seen."""

        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            launches.append(self.name)
            return lambda *_, **__: None

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
            operators.add(function.overloadpacket.__name__)
            return function(*arguments, **(kwargs or {}))

    images, labels = (tensor.to(DEVICE) for tensor in batch(4, 16))
    program = program_of(keys_of(4), 0, 16, config)
    values = launch.to_device(program, DEVICE)
    for name in KERNELS:
        monkeypatch.setattr(launch, name, Counted(name))
    with Operators():
        found = launch.apply_rounds(images, values, program, config)
        launch.finish(found, labels, values, program, 10, config)
    assert len(launches) == 3 * program.rounds + 2 <= most
    assert set(launches) == set(KERNELS if program.rounds else KERNELS[-2:])
    assert operators <= {"empty", "slice", "unbind"}, operators


def test_on_a_cpu_the_plain_path_runs():
    images, labels = batch(8)
    found = recipe.prepare(images, labels, keys_of(8), 3, 10, EVERYTHING)
    expected = mix(augment(images, keys_of(8), EVERYTHING), labels, 3, 10, EVERYTHING)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert not recipe.has_kernels(torch.device("cpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_host_waits_for_nothing_and_the_bits_repeat():
    images, labels = (tensor.cuda() for tensor in batch(64))
    first = recipe.prepare(images, labels, keys_of(64), 3, 10, EVERYTHING)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = recipe.prepare(images, labels, keys_of(64), 3, 10, EVERYTHING)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.slow
def test_kernels_compile_for_ampere_and_hopper_without_spills():
    command = [sys.executable, "-m", "tests.data_pipeline.recipe.compiled"]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {(row["name"].split(",")[0], row["capability"]) for row in rows} == {
        (name, capability) for name in KERNELS for capability in (80, 90)
    }
    for row in rows:
        # In Triton 3.6, sine and cosine of large angles use 32 bytes; these are not spilled registers.
        assert row["stack"] <= (32 if "finish_images" in row["name"] else 0) and row["local"] == 0, row
        assert row["warps_per_sm"] >= 32, row
