"""Settings of segmentation, and mistakes in them: one sentence, before torch is imported."""

import subprocess
import sys

import pytest

from data_pipeline.manifest import open_manifest
from tests.runs import ROOT
from train.config import ConfigError, dump_config, load_config, parse_config

MISTAKES = [
    (["task.crop=[500,512]"], "task.crop.0: input should be a multiple of 32"),
    (["task.crop=[32,512]"], "task.crop.0: input should be greater than or equal to 64"),
    (["task.scale=[512,2048]"], "are (long side, short side), not [512, 2048]"),
    (["task.scale_range=[2.0,0.5]"], "task.scale_range [2.0, 0.5] is no range"),
    (["task.test_ratios=[]"], "task.test_ratios: "),
    (["task.window=[64,64]"], "task.window and task.stride belong to task.test=slide"),
    (["task.test=slide", "task.window=[64,64]", "task.stride=[64,96]"], "task.stride [64, 96] leaves out pixels"),
    (["task.test=slide", "zero.stage=3"], "task.test=slide needs zero.stage 0, 1 or 2"),
    (["task.crops=[64,64]"], "unknown key task.crops"),
    (["augment.mixup=0.8"], "augment.mixup does nothing with task.name=segmentation"),
    (["augment.cutmix=1.0"], "augment.cutmix does nothing"),
    (["augment.rand_augment=rand-m9-n2"], "augment.rand_augment does nothing"),
    (["augment.color_jitter=0.4"], "augment.color_jitter does nothing"),
    (["augment.erasing=0.25"], "augment.erasing does nothing"),
    (["augment.label_smoothing=0.1"], "augment.label_smoothing does nothing"),
    (["augment.crop=none"], "augment.crop does nothing"),
    (["data.eval_crop=1.0"], "data.eval_crop does nothing"),
    (["data.image_size=128"], "data.image_size does nothing"),
    (["model.name=cotnet50", "train.micro_batch=1"], "too small for cotnet50"),
]


@pytest.mark.parametrize(("settings", "sentence"), MISTAKES, ids=[" ".join(settings) for settings, _ in MISTAKES])
def test_a_mistake_is_one_sentence(tmp_path, settings, sentence):
    path = tmp_path / "config.yaml"
    path.write_text("{task: {name: segmentation}, model: {name: cat_nano}, data: {path: nowhere}}")
    with pytest.raises(ConfigError) as error:
        load_config(path, settings)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_what_segmentation_uses_can_be_set_and_is_kept(segment_config):
    settings = ["augment.flip=0.25", "augment.mean=[0,0,0]", "task.test=slide", "task.window=[64,96]"]
    config = load_config(segment_config, settings)
    assert config.task.strides == (42, 64) and config.task.window_sides == (64, 96)
    assert parse_config(config.model_dump(mode="json"), "again") == config
    assert "crop:\n  - 64\n  - 96" in dump_config(config)


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        ("segmentation", "it has no label maps, from which task.name=segmentation learns"),
        ("classification", "its images have label maps in place of classes: give task.name=segmentation"),
    ],
)
def test_a_dataset_of_the_other_task_is_refused(
    segment_config, tiny_config, tiny_dataset, segments, tmp_path, task, sentence
):
    """By train, before torch is imported."""
    config, data = (segment_config, tiny_dataset) if task == "segmentation" else (tiny_config, segments)
    code = "import sys; sys.path.insert(0, '.'); import train; from train.config import ConfigError\n"
    code += f"try: train.run({str(config)!r}, ['data.path={data}'], output={str(tmp_path)!r})\n"
    code += "except ConfigError as error: print(error, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert f"data.path {data} does not fit: {sentence}" in done.stdout, done.stderr
    assert done.stdout.rstrip().endswith("False")
    assert open_manifest(data).classes


def test_a_command_refuses_it_with_the_code_of_a_bad_config(segment_config, tiny_dataset):
    command = ["launch/plan.py", "--config", str(segment_config), f"data.path={tiny_dataset}", "--nodes", "1"]
    command += ["--gpus-per-node", "1", "--images-per-second", "10"]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 78 and done.stderr.startswith("error: data.path") and "Traceback" not in done.stderr
