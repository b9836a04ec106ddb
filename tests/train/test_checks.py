"""What is checked before torch is imported, by a run, the doctor and submit."""

from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.manifest import open_manifest
from tests.launch.test_submit import submit
from train.checkpoint.info import CheckpointInfo, read_info, write_manifest
from train.checkpoint.resume_point import Resume
from train.checks import check_start
from train.config import ConfigError, load_config

DETECTION = {
    "task.test_scale": "[640,640]",
    "task.score_threshold": 0.01,
    "task.before_nms": 2000,
    "task.nms": 0.4,
    "task.detections": 300,
}
SEGMENTATION = {
    "task.test_scale": "[640,640]",
    "task.divisor": 32,
    "task.test": "slide",
    "task.window": "[256,256]",
    "task.stride": "[128,128]",
    "task.test_ratios": "[0.5,1.0]",
    "task.test_flip": True,
}


def write_checkpoint(folder, config, step: int) -> None:
    path = folder / "checkpoints" / f"step_{step:08d}"
    path.mkdir(parents=True)
    settings = config.model_dump(mode="json")
    write_manifest(path, CheckpointInfo(step, None, "", ["a"], settings, step, {}, {}, {}, 1))


def test_a_checkpoint_of_other_settings_is_refused_before_the_start(tiny_config, tmp_path):
    config = load_config(tiny_config, ["train.log_every=2"])  # a setting that may change
    write_checkpoint(tmp_path, config, 4)
    changed = load_config(tiny_config, ["train.seed=1"])

    def check(config, resume="auto", with_changes=False) -> None:
        check_start(config, 0, 1, Resume.decide(tmp_path, resume, with_changes))

    check(load_config(tiny_config))
    check(load_config(tiny_config, ["train.micro_batch=auto"]))
    check(changed, with_changes=True)
    with pytest.raises(ConfigError, match=r"step_00000004 was trained with other settings: train.seed \(0 → 1\); set"):
        check(changed)
    with pytest.raises(ConfigError, match="already has checkpoints; resume them"):
        check(config, "never")
    with pytest.raises(ConfigError, match="is a run's folder: name one of its checkpoints: /.*/checkpoints/step_N$"):
        check(config, str(tmp_path))
    write_checkpoint(tmp_path, changed, 8)
    check(changed)
    (tmp_path / "checkpoints/step_00000008/manifest.json").write_text("{")  # damaged: the older one counts
    with pytest.raises(ConfigError, match="step_00000004 was trained with other settings"):
        check(changed)


@pytest.mark.parametrize(
    ("task", "free", "fixed"),
    [
        ("detection", DETECTION, "task.divisor=64"),
        ("segmentation", SEGMENTATION, "task.dropout=0.2"),
        ("classification", {}, "data.eval_crop=0.5"),  # augment.crop=none cuts training's images by it
    ],
)
def test_settings_of_an_evaluation_alone_may_change(tmp_path, task, free, fixed):
    """Each is a change that the log will name."""
    path = tmp_path / "config.yaml"
    path.write_text(f"{{task: {{name: {task}}}, model: {{name: cat_nano}}, data: {{path: nowhere}}}}")
    old = load_config(path)
    write_checkpoint(tmp_path, old, 4)
    checkpoint = tmp_path / "checkpoints/step_00000004"
    resume, info = Resume.decide(tmp_path, "auto", False), read_info(checkpoint)
    changed = load_config(path, [f"{key}={value}" for key, value in free.items()])
    found = resume.check_settings(checkpoint, info, changed)
    assert [sentence.partition(" (")[0] for sentence in found] == sorted(free) == sorted(changed.task.evaluation_keys)
    with pytest.raises(ConfigError, match=f"trained with other settings: {fixed.partition('=')[0]} "):
        resume.check_settings(checkpoint, info, load_config(path, [fixed]))


def test_a_checkpoint_of_another_model_or_task_names_both(tiny_config, tmp_path):
    """And not their many settings; of one model at most eight."""
    config, own, other = load_config(tiny_config), tmp_path / "own", tmp_path / "other"
    for folder in (own, other):
        write_checkpoint(folder, config, 4)

    def sentence(output, resume, *settings: str) -> str:
        with pytest.raises(ConfigError) as raised:
            check_start(load_config(tiny_config, settings), 0, 1, Resume.decide(output, str(resume), False))
        return str(raised.value).removeprefix(f"{own}/checkpoints/step_00000004 ")

    path = own / "checkpoints/step_00000004"
    another = "is of a run of cat_nano, classification; this is one of cat_tiny, classification"
    assert sentence(own, "auto", "model.name=cat_tiny") == f"{another}: choose another --output"
    assert sentence(other, path, "model.name=cat_tiny") == f"{another}: take it as model.init_from"
    settings = [f"augment.{key}=0.9" for key in ("mixup", "cutmix", "erasing", "flip", "color_jitter")]
    settings += ["optimizer.lr=9", "optimizer.weight_decay=0.9", "optimizer.clip_grad=9", "model.cpsa_drop=0.9"]
    text = sentence(own, "auto", *settings, "train.seed=9")
    assert text.startswith("was trained with other settings: augment.") and text.count(" → ") == 8
    assert ") and 2 more; set them back" in text


def test_submit_refuses_it_before_the_job_waits_in_a_queue(tiny_config, tmp_path):
    write_checkpoint(tmp_path, load_config(tiny_config), 4)
    arguments = ["--config", str(tiny_config), "--dry-run", "--gpus-per-node=2", "--output", str(tmp_path)]
    assert submit(*arguments).returncode == 0
    result = submit(*arguments, "train.seed=1")
    assert result.returncode == 78, result.stderr
    assert "was trained with other settings: train.seed (0 → 1)" in result.stderr and result.stderr.count("\n") == 1
    assert submit(*arguments, "--resume-with-changes", "train.seed=1").returncode == 0


def test_a_classification_of_one_class_is_refused(tiny_config):
    """Of datasets that an earlier version prepared, or of shards that were indexed."""
    config = load_config(tiny_config)
    manifest = open_manifest(Path(config.data.path))
    config.check_dataset(manifest)
    with pytest.raises(ConfigError, match="does not fit: it has one class, so there is nothing to tell apart"):
        config.check_dataset(replace(manifest, classes=("images",)))
