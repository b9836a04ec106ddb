"""Settings of detection, and mistakes in them: one sentence, before torch is imported."""

import subprocess
import sys

import pytest

from data_pipeline.manifest import open_manifest
from tests.data_pipeline.boxes import change, document_of, make_coco
from tests.data_pipeline.images import run
from tests.runs import ROOT
from train.config import ConfigError, dump_config, load_config, parse_config
from train.tasks.detection import check_dataset

MISTAKES = [
    (["task.detector=detr"], "task.detector: input should be 'retinanet', 'fcos' or 'atss'"),
    (["task.scales=[]"], "task.scales: "),
    (["task.scales=[[800,1333]]"], "a scale of task is (long side, short side), not [800, 1333]"),
    (["task.crop_scales=[[4200,400],[500,4200]]"], "(long side, short side), not [500, 4200]"),
    (["task.test_scale=[800,1333]"], "(long side, short side), not [800, 1333]"),
    (["task.scale_mode=range"], "task.scale_mode=range needs two of task.scales"),
    (["task.scale_mode=range", "task.scales=[[1333,640],[1000,800]]"], "give all of task.scales one long side"),
    (["task.crop_range=[300,600]"], "task.crop_range belongs to task.crop_scales"),
    (["task.crop_scales=[[4200,400]]", "task.crop_range=[600,384]"], "task.crop_range [600, 384] is no range"),
    (["task.divisor=48"], "task.divisor: input should be a multiple of 32"),
    (["task.detector=fcos", "task.anchor_scale=4"], "task.anchor_scale belongs to task.detector=retinanet and atss"),
    (["task.detector=atss", "task.head_channels=48"], "task.head_channels 48 of atss must be a multiple of 32"),
    (
        ["task.detector=fcos", "task.head_channels=32"],
        "32 of fcos must be a multiple of 32, and more",
    ),
    (["task.nms=0"], "task.nms: input should be greater than 0"),
    (["task.score_threshold=1.5"], "task.score_threshold: input should be less than or equal to 1"),
    (["task.scale=[1333,800]"], "unknown key task.scale"),
    (["task.frozen_stages=1"], "task.frozen_stages keeps first weights as they are: name a file of them"),
    (["task.frozen_stages=1", "zero.stage=3"], "task.frozen_stages needs zero.stage 0, 1 or 2"),
    (["data.repeats=2"], "data.repeats=1: set them, or task.aspect_groups=false"),
    (["data.shuffle=block"], "micro-batches of one orientation need data.shuffle=full"),
    (["augment.mixup=0.8"], "augment.mixup does nothing with task.name=detection"),
    (["augment.color_jitter=0.4"], "augment.color_jitter does nothing"),
    (["augment.crop=none"], "augment.crop does nothing"),
    (["data.eval_crop=1.0"], "data.eval_crop does nothing"),
    (["data.image_size=128"], "data.image_size does nothing"),
]


@pytest.mark.parametrize(("settings", "sentence"), MISTAKES, ids=[" ".join(settings) for settings, _ in MISTAKES])
def test_a_mistake_is_one_sentence(tmp_path, settings, sentence):
    path = tmp_path / "config.yaml"
    path.write_text("{task: {name: detection}, model: {name: cat_nano}, data: {path: nowhere}}")
    with pytest.raises(ConfigError) as error:
        load_config(path, settings)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_what_is_given_is_kept(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("{task: {name: detection}, model: {name: cat_nano}, data: {path: nowhere}}")
    scales = ["task.scales=[[1333,480],[1333,800]]", "task.crop_scales=[[4200,400]]"]
    config = load_config(path, ["task.detector=atss", *scales, "augment.flip=0.25", "augment.mean=[0,0,0]"])
    assert config.task.scale_of_tests == (1333, 800) and config.task.nms is None
    assert parse_config(config.model_dump(mode="json"), "again") == config
    assert "crop_scales:\n  - - 4200\n    - 400" in dump_config(config)
    assert load_config(path, ["task.scales=[[1333,800],[1333,480]]"]).task.scale_of_tests == (1333, 800)
    assert load_config(path, [*scales, "task.test_scale=[640,640]"]).task.scale_of_tests == (640, 640)


def test_a_val_split_without_objects_is_refused(tmp_path):
    make_coco(tmp_path / "zoo")
    document = document_of(tmp_path / "zoo", "val")
    change(tmp_path / "zoo", "val", {**document, "annotations": []})
    run(tmp_path / "zoo", tmp_path / "set")
    with pytest.raises(ValueError, match="its val split has no object but crowds: prepare it with objects to find"):
        check_dataset(open_manifest(tmp_path / "set"))


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        ("detection", "it has no boxes, from which task.name=detection learns"),
        ("classification", "its images have boxes in place of classes: give task.name=detection"),
    ],
)
def test_a_dataset_of_the_other_task_is_refused(box_config, tiny_config, tiny_dataset, boxes, tmp_path, task, sentence):
    """By train, before torch is imported."""
    config, data = (box_config, tiny_dataset) if task == "detection" else (tiny_config, boxes)
    code = "import sys; sys.path.insert(0, '.'); import train; from train.config import ConfigError\n"
    code += f"try: train.run({str(config)!r}, ['data.path={data}'], output={str(tmp_path)!r})\n"
    code += "except ConfigError as error: print(error, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert f"data.path {data} does not fit: {sentence}" in done.stdout, done.stderr
    assert done.stdout.rstrip().endswith("False")
