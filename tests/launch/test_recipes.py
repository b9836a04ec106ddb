"""The published recipes: every one builds its network; one trains on real photographs, as a user starts it."""

import inspect
import re
import subprocess
import sys

import pytest
import torch

import catmodel
from tests.runs import ROOT, metrics
from train.config import load_config
from train.config_sections import FAMILY_KEYS, family_of
from train.engine.schedule import learning_rate
from train.tasks.base import build_task

PHOTOGRAPHS = ROOT.parent / "shared" / "data" / "imagenet_sample.tar"
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
IMAGENET = 1_281_167  # images


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_recipe_builds_its_network_and_its_schedule_fits(path):
    config = load_config(path)
    with torch.device("meta"):
        model = build_task(config, [""] * 1000).build_model()
    named = path.stem.split("_advanced")[0].replace("_320", "")
    if path.parent.name == "configs" and named in catmodel.list_models():
        assert config.model.name == named
    steps = IMAGENET // config.train.global_batch
    warm, last = round(config.schedule.warmup_epochs * steps), config.train.epochs * steps - 1
    assert learning_rate(config, 0, steps) == config.schedule.warmup_lr < config.optimizer.lr
    assert 0.9 * config.optimizer.lr < learning_rate(config, warm, steps) <= config.optimizer.lr
    assert learning_rate(config, last, steps) < 1.01 * config.schedule.min_lr + 1e-6
    if "imagenet" in config.data.path and config.model.init_from is None:  # the papers' rules, and a batch for 8 GPUs
        per_image = 0.1 / 256 if config.optimizer.name == "sgd" else 5e-4 / 512
        assert config.optimizer.lr == pytest.approx(per_image * config.train.global_batch)
        assert config.train.global_batch // config.train.micro_batch % 8 == 0
        assert sum(parameter.numel() for parameter in model.parameters()) > 1e7


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_commands_in_a_recipe_train_that_recipe(path):
    commands = re.findall(r"^# +deepspeed .*launch/train.py --config (\S+)([^#\n]*)", path.read_text(), re.MULTILINE)
    assert commands
    for config, overrides in commands:
        assert ROOT / config == path
        load_config(path, overrides.split())


@pytest.mark.parametrize("name", ["cat_tiny", "pvt_tiny", "cotnet50"])
def test_every_argument_of_a_network_can_be_set(name):
    """Except those that the run sets: the image size, the classes, and the options of a backbone."""
    decided = {"img_size", "in_chans", "num_classes", "features_only", "out_indices"}
    with torch.device("meta"):
        model = catmodel.create_model(name)
    assert set(inspect.signature(type(model)).parameters) - decided == set(FAMILY_KEYS[family_of(name)])


@pytest.mark.parametrize(
    ("recipe", "count", "kind"),
    [
        ("ablations/slice_embedding", 37_294_258, "PatchSlice"),
        ("ablations/no_absolute_position", 37_294_258 - 56 * 56 * 96, None),
        ("cat_t_v2", 35_830_000, None),
    ],
)
def test_an_ablation_changes_the_network(recipe, count, kind):
    with torch.device("meta"):
        model = build_task(load_config(ROOT / "configs" / f"{recipe}.yaml"), [""] * 1000).build_model()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == pytest.approx(count, rel=0 if "t_v2" not in recipe else 1e-3)
    assert kind is None or any(type(module).__name__ == kind for module in model.modules())


@pytest.mark.slow
@pytest.mark.skipif(
    not PHOTOGRAPHS.exists(), reason="needs ../shared/data/imagenet_sample.tar: 800 ImageNet photographs"
)
def test_cat_b_takes_steps_on_full_size_photographs(tmp_path):
    """configs/cat_b.yaml with another dataset, batch sizes and number of steps, and without compilation and bf16."""
    dataset, run = tmp_path / "dataset", tmp_path / "run"
    subprocess.run(
        [sys.executable, "launch/prepare.py", str(PHOTOGRAPHS), str(dataset)], cwd=ROOT, check=True, capture_output=True
    )
    settings = [f"data.path={dataset}", "train.global_batch=4", "train.micro_batch=2", "train.max_steps=2"]
    settings += ["train.compile=false", "train.precision=fp32"]
    command = [sys.executable, "launch/train.py", "--config", "configs/cat_b.yaml", "--output", str(run), *settings]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = metrics(run, "train")
    assert [line["step"] for line in lines] == [1, 2]
    assert all(6 < line["loss"] < 8 for line in lines)  # 800 classes, the first two steps: about log(800) = 6.7
    assert (run / "model.safetensors").stat().st_size > 4 * 51e6
