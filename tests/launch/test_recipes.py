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
from train.engine.optimizer import parameter_groups
from train.engine.schedule import learning_rate
from train.tasks.base import build_task

PHOTOGRAPHS = ROOT.parent / "shared" / "data" / "imagenet_sample.tar"
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
IMAGES = {"imagenet": 1_281_167, "ade20k": 20_210, "coco": 117_266}  # of datasets


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_recipe_builds_its_network_and_its_schedule_fits(path):
    config = load_config(path)
    with torch.device("meta"):
        model = build_task(config, [""] * 1000).build_model()
    named = path.stem.split("_advanced")[0].replace("_320", "")
    if path.parent.name == "configs" and named in catmodel.list_models():
        assert config.model.name == named
    parameter_groups(model, config.optimizer.weight_decay, no_decay=config.optimizer.no_decay)
    steps = IMAGES.get(config.data.path.removeprefix("datasets/"), 50_000) // config.train.global_batch
    warm, last = round(config.warmup_steps(steps)), config.total_steps(steps) - 1
    assert learning_rate(config, 0, steps) == (config.schedule.warmup_lr if warm else config.optimizer.lr)
    assert config.schedule.warmup_lr < config.optimizer.lr
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


def test_every_row_of_segmentation_is_a_recipe():
    """The papers' iterations, batches and rates; those of both papers see as many images."""
    found = {}
    for path in (ROOT / "configs/segmentation").glob("*.yaml"):
        config = load_config(path)
        train, optimizer = config.train, config.optimizer
        assert config.task.name == "segmentation" and config.task.crop == (512, 512) and config.ema.decay == 0
        assert train.micro_batch == train.global_batch, "batch norm takes its statistics from the whole batch"
        found[path.stem] = (config.model.name, train.steps, train.global_batch, optimizer.lr, optimizer.weight_decay)
    cat, pvt = (6e-5, 0.05), (2e-4, 1e-4)
    rows = {f"cat_{size[0]}_80k": (f"cat_{size}", 80_000, 16, *cat) for size in ("small", "base")}
    rows |= {f"cat_{size[0]}_160k": (f"cat_{size}", 160_000, 16, *cat) for size in ("small", "base")}
    rows |= {f"pvt_{size}_40k": (f"pvt_{size}", 40_000, 32, *pvt) for size in ("tiny", "small", "medium", "large")}
    rows |= {f"cat_s_80k_no_{what}": rows["cat_s_80k"] for what in ("attention_dropout", "absolute_position")}
    assert found == rows


def test_every_one_stage_row_of_detection_is_a_recipe():
    """The papers' epochs, batches, rates and scales."""
    found = {}
    for path in (ROOT / "configs/detection").glob("*.yaml"):
        config = load_config(path)
        task, train, optimizer = config.task, config.train, config.optimizer
        assert task.name == "detection" and task.divisor == 32 and config.ema.decay == 0
        assert config.schedule.warmup_lr == pytest.approx(optimizer.lr / 1000) and config.schedule.warmup_steps == 500
        assert task.bgr == (task.detector == "fcos"), "as released"
        decays, rate = config.schedule.decay_epochs, config.model.drop_path_rate
        length = (train.epochs, decays, task.scales, task.scale_mode)
        found[path.stem] = (config.model.name, length, train.global_batch, optimizer.lr, optimizer.weight_decay, rate)
    once = (12, (8, 11), ((1333, 800),), "value")
    thrice = (36, (27, 33), ((1333, 640), (1333, 800)), "range")
    rows = {}
    for detector in ("retinanet", "fcos", "atss"):
        rows |= {
            f"{detector}_cat_{size[0]}_1x": (f"cat_{size}", once, 16, 1e-4, 0.05, 0.2) for size in ("small", "base")
        }
    for what in ("attention_dropout", "absolute_position"):
        rows[f"fcos_cat_s_1x_no_{what}"] = rows["fcos_cat_s_1x"]
    for size, drop_path in (("tiny", 0.1), ("small", 0.1), ("medium", 0.0), ("large", 0.0)):
        batch, lr = (8, 7.142857e-5) if size == "large" else (16, 1e-4)
        for name, length in (("1x", once), ("3x", thrice)):
            rows[f"retinanet_pvt_{size}_{name}"] = (f"pvt_{size}", length, batch, lr, 1e-4, drop_path)
    small = (12, (8, 11), ((1066, 640),), "value")
    rows["retinanet_pvt_small_640_1x"] = ("pvt_small", small, *rows["retinanet_pvt_small_1x"][2:])
    rows["retinanet_pvt_small_wide_1x"] = rows["retinanet_pvt_small_1x"]
    assert found == rows


def test_the_wide_pvt_has_the_papers_parameters():
    """Table 9 of PVT's paper: 46.8M."""
    config = load_config(ROOT / "configs/detection/retinanet_pvt_small_wide_1x.yaml")
    with torch.device("meta"):
        model = catmodel.create_model(config.model.name, embed_dims=config.model.embed_dims)
    assert round(sum(weight.numel() for weight in model.parameters()) / 1e6, 1) == 46.8


def test_decay_is_off_by_the_names_that_cat_released():
    """Positions, all biases and the head's group norms decay."""
    config = load_config(ROOT / "configs/detection/fcos_cat_s_1x.yaml")
    with torch.device("meta"):
        model = build_task(config, [""] * 80).build_model()
    groups = parameter_groups(model, config.optimizer.weight_decay, no_decay=config.optimizer.no_decay)
    decays = {id(parameter): group["weight_decay"] > 0 for group in groups for parameter in group["params"]}
    bare = {name for name, parameter in model.named_parameters() if not decays[id(parameter)]}
    assert "backbone.ape" not in bare and "head.cls_convs.0.gn.weight" not in bare and "head.scales" not in bare
    assert bare == {
        name
        for name, _ in model.named_parameters()
        if name.startswith("backbone.") and ("norm" in name or "relative_position_bias_table" in name)
    }


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
