"""What is checked before torch is imported, by a run, the doctor and submit."""

import pytest

from tests.launch.test_submit import submit
from train.checkpoint.info import CheckpointInfo, write_manifest
from train.checkpoint.resume_point import Resume
from train.checks import check_start
from train.config import ConfigError, load_config


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
    check(changed, with_changes=True)
    with pytest.raises(ConfigError, match=r"step_00000004 was trained with other settings: train.seed \(0 → 1\); set"):
        check(changed)
    with pytest.raises(ConfigError, match="already has checkpoints; resume them"):
        check(config, "never")
    write_checkpoint(tmp_path, changed, 8)
    check(changed)
    (tmp_path / "checkpoints/step_00000008/manifest.json").write_text("{")  # damaged: the older one counts
    with pytest.raises(ConfigError, match="step_00000004 was trained with other settings"):
        check(changed)


def test_submit_refuses_it_before_the_job_waits_in_a_queue(tiny_config, tmp_path):
    write_checkpoint(tmp_path, load_config(tiny_config), 4)
    arguments = ["--config", str(tiny_config), "--dry-run", "--gpus-per-node=2", "--output", str(tmp_path)]
    assert submit(*arguments).returncode == 0
    result = submit(*arguments, "train.seed=1")
    assert result.returncode == 78, result.stderr
    assert "was trained with other settings: train.seed (0 → 1)" in result.stderr and result.stderr.count("\n") == 1
    assert submit(*arguments, "--resume-with-changes", "train.seed=1").returncode == 0
