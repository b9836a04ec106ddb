"""The config tree, and the messages about mistakes in it."""

import re
from pathlib import Path

import pytest
import yaml

from tests.runs import ROOT
from train.config import ConfigError, differences, dump_config, load_config

SMALL = "model: {name: cat_nano}\ndata: {path: somewhere}\n"


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "config.yaml") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_opens_with_its_command(path):
    load_config(path)
    comment = path.read_text().split("\n\n")[0]
    assert comment.startswith("#") and f"--config configs/{path.name}" in path.read_text()


def test_base_is_below_and_overrides_are_above(write):
    write(SMALL + "train: {epochs: 7, seed: 5}\nschedule: {warmup_epochs: 1}\n", "base.yaml")
    config = load_config(
        write("base: base.yaml\ntrain: {epochs: 9}\n"), ["train.micro_batch=32", "optimizer.betas=[0.8, 0.9]"]
    )
    assert (config.train.epochs, config.train.seed, config.train.micro_batch) == (9, 5, 32)
    assert config.optimizer.betas == (0.8, 0.9)


def test_resolved_config_reads_back_the_same(write):
    config = load_config(write(SMALL), ["optimizer.lr=1e-3", "model.depths=[1,2]"])
    assert load_config(write(dump_config(config), "resolved.yaml")) == config


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.epoch=3", "unknown key train.epoch; did you mean train.epochs?"),
        ("trian.epochs=3", "unknown key trian; did you mean train?"),
        ("optimizer.learning_rate=3", "unknown key optimizer.learning_rate; known here: optimizer.name"),
        ("train.epochs=many", "train.epochs: input should be a valid integer"),
        ("train.precision=fp8", "train.precision: input should be 'bf16', 'fp16' or 'fp32', not 'fp8'"),
        ("train.micro_batch=0", "train.micro_batch: input should be greater than or equal to 1, or 'auto', not 0"),
        ("train.cuda_graphs=maybe", "train.cuda_graphs: input should be a valid boolean, unable to interpret"),
        ("augment.crop_scale=[0.5, 0.1]", "augment.crop_scale: must be a range, two numbers above 0 and the smaller"),
        ("augment.std=[1, 0, 1]", "augment.std: must be above 0 in every channel, not [1.0, 0.0, 1.0]"),
        ("guard.timeout.stp=3", "unknown key guard.timeout.stp; did you mean guard.timeout.step?"),
        ("guard.timeout.hours=3", "unknown key guard.timeout.hours; known here: guard.timeout.startup"),
        ("task={name: detection, detectr: fcos}", "unknown key task.detectr; did you mean task.detector?"),
        ("task={name: segmentation, xyz: 3}", "unknown key task.xyz; known here: task.name, task.crop, task.scale,"),
        ("task.neck=3", "unknown key task.neck; known here: task.name"),
        ("zero.stage=4", "zero.stage: input should be 0, 1, 2 or 3"),
        ("train.global_batch=100", "train.global_batch 100 is not a multiple of train.micro_batch 128"),
        ("schedule.warmup_epochs=300", "schedule.warmup_epochs 300 leaves nothing of train.epochs 300"),
        ("model.name=cat_nono", "there is no model 'cat_nono'; did you mean cat_nano?"),
        ("model.embed_dims=[16]", "model.embed_dims is no setting of cat_nano; did you mean model.embed_dim?"),
        ("model.depths=[]", "model.depths: "),
        ("model.blur=true", "model.blur is no setting of cat_nano; it takes depths, drop_path_rate"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas.1: input should be less than 1, not 1.0"),
        ("optimizer={name: sgd, nesterov: true, momentum: 0}", "optimizer.nesterov needs optimizer.momentum above 0"),
        ("optimizer.lr=.inf", "optimizer.lr: input should be a finite number, not inf"),
        ("augment.mean=[0, .nan, 0]", "augment.mean.1: input should be a finite number, not nan"),
        ("guard.timeout.step=.inf", "guard.timeout.step: input should be a finite number, not inf"),
        ("train.epochs", "override 'train.epochs' is not of the form section.key=value"),
        ("train.epochs=[", "the value is not YAML"),
    ],
)
def test_mistakes_are_named_with_the_remedy(write, override, sentence):
    with pytest.raises(ConfigError) as raised:
        load_config(write(SMALL), [override])
    assert sentence in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["schedule.warmup_epochs=3"], "schedule.warmup_epochs does nothing beside schedule.warmup_steps=5: set sche"),
        (
            ["schedule={warmup_epochs: 3}"],
            "schedule.warmup_epochs does nothing beside schedule.warmup_steps=5: set sche",
        ),
        (["checkpoint.every_epochs=2"], "beside checkpoint.every_steps=7: set checkpoint.every_steps=null too"),
        (["train.evaluate_every=2"], "beside train.evaluate_every_steps=9: set train.evaluate_every_steps=null too"),
        (
            ["train.evaluate_every_steps=2", "train.evaluate_every=0"],
            "train.evaluate_every=0: set train.evaluate_every=1",
        ),
    ],
)
def test_an_override_that_would_do_nothing_is_refused(write, overrides, sentence):
    keys = "schedule: {warmup_epochs: 1, warmup_steps: 5}\ncheckpoint: {every_epochs: 1, every_steps: 7}\n"
    config = write(SMALL + keys + "train: {evaluate_every: 1, evaluate_every_steps: 9}\n")
    load_config(config, ["train.evaluate_every=0"])
    load_config(config, ["checkpoint.every_steps=null", "checkpoint.every_epochs=2", "schedule.warmup_steps=6"])
    with pytest.raises(ConfigError) as raised:
        load_config(config, overrides)
    assert sentence in str(raised.value)


def test_batch_norm_of_pooled_images_needs_two(write):
    small = SMALL.replace("cat_nano", "cotnet50")
    with pytest.raises(ConfigError, match="train.micro_batch 1 is too small for cotnet50: its batch norms need 2"):
        load_config(write(small), ["train.micro_batch=1"])
    assert load_config(write(small), ["train.micro_batch=2"]).smallest_micro_batch == 2
    assert load_config(write(small), ["train.micro_batch=auto"]).smallest_micro_batch == 2


def test_offload_needs_a_partitioned_optimizer(write):
    with pytest.raises(ConfigError, match=r"zero\.offload needs zero\.stage 1, 2 or 3"):
        load_config(write(SMALL), ["zero.stage=0", "zero.offload=true"])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model: {name: cat_nano}\n", "data is missing"),
        ("- a list\n", "must be a mapping of sections"),
        ("model: {name: [\n", "is not YAML"),
        ("base: config.yaml\n", "is its own base"),
        ("base: nowhere.yaml\n", "nowhere.yaml cannot be read"),
        ("base: [a, b]\n", r"config.yaml: base is the name of one file, not \['a', 'b'\]"),
        ("base: 3\n", "base is the name of one file, not 3"),
        ("? [a, b]\n: 3\n", "found unhashable key"),
        (f"{SMALL}train: {{seed: 1}}\ntrain: {{seed: 2}}\n", "config.yaml: train is given twice, in lines 3 and 4"),
        ("train:\n  seed: 1\n  epochs: 2\n  seed: 3\n", "config.yaml: seed is given twice, in lines 2 and 4"),
        ("!!python/object/apply:os.system ['true']\n", "is not YAML"),
    ],
)
def test_bad_files(write, text, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load_config(write(text))


def test_a_file_that_is_not_utf8(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"# caf\xe9\n" + SMALL.encode())
    with pytest.raises(ConfigError, match="latin.yaml is not YAML in UTF-8"):
        load_config(tmp_path / "latin.yaml")


def test_differences_tell_identity_from_free_keys(write):
    config = load_config(write(SMALL))
    other = load_config(write(SMALL), ["train.seed=1", "zero.stage=3", "data.workers=9", "augment.mixup=0.5"])
    old, new = config.model_dump(mode="json"), other.model_dump(mode="json")
    assert differences(old, new, free=False) == ["augment.mixup (0.0 → 0.5)", "train.seed (0 → 1)"]
    assert differences(old, new, free=True) == ["data.workers (4 → 9)", "zero.stage (1 → 3)"]


def test_differences_are_in_the_form_that_an_override_takes(write):
    settings = ["train.max_steps=146", "train.compile=true", "data.path='a: [b, é'", "optimizer.lr=1.0e-5"]
    config, other = load_config(write(SMALL)), load_config(write(SMALL), settings)
    old, new = config.model_dump(mode="json"), other.model_dump(mode="json")
    sentences = differences(old, new, free=True) + differences(old, new, free=False)
    assert "train.max_steps (null → 146)" in sentences and "train.compile (false → true)" in sentences
    parts = [re.fullmatch(r"(\S+) \((.*) → (.*)\)", sentence).groups() for sentence in sentences]
    assert load_config(write(SMALL), [f"{key}={value}" for key, _, value in parts]) == other
    assert load_config(write(SMALL), [*settings, *(f"{key}={value}" for key, value, _ in parts)]) == config


def test_a_dumped_config_has_the_same_values_for_any_yaml_reader():
    """YAML 1.1 reads 1e-3, without a point, as a string."""
    config = load_config(ROOT / "configs" / "cat_b.yaml")
    assert yaml.safe_load(dump_config(config)) == config.model_dump(mode="json")
