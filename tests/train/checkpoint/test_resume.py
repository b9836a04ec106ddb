"""From which checkpoint a start goes on, by manifests alone. In real runs: test_resume_elsewhere.py, a folder above."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from data_pipeline.order import Order
from train.checkpoint.info import CheckpointInfo, checkpoint_path, write_manifest
from train.checkpoint.init_from import check_source
from train.checkpoint.resume import Restored, _choose, lost_steps
from train.checkpoint.resume_point import Resume
from train.config import Config, ConfigError, load_config

MANIFEST = SimpleNamespace(split=lambda name: SimpleNamespace(identity="data"))
MISSING = {"shard_00000.safetensors": "0" * 64}


@pytest.fixture
def config(tiny_config) -> Config:
    return load_config(tiny_config)


def save(run: Path, step: int, config: Config, *, dataset: str = "data", score: float | None = None, **more) -> Path:
    path = checkpoint_path(run / "checkpoints", step)
    path.mkdir(parents=True)
    settings = config.model_dump(mode="json")
    write_manifest(path, CheckpointInfo(step, score, dataset, ["a"], settings, step, {}, {}, {}, 1, **more))
    return path


def choose(run: Path, config: Config, resume: object = "auto", batch: int = 32, changes: bool = False) -> Restored:
    """256 samples: 8 steps of 32 in an epoch."""
    return _choose(Resume.decide(run, str(resume), changes), config, MANIFEST, Order(0, 256, batch, 8))


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_other_images_or_labels_are_a_change(config, tmp_path):
    save(tmp_path, 8, config, dataset="others", steps_per_epoch=8)
    with pytest.raises(ConfigError, match=r"data.path \(.* → .*: other images or labels\); set them back"):
        choose(tmp_path, config)
    assert "other images or labels" in choose(tmp_path, config, changes=True).notes[0]


def test_a_checkpoint_that_cannot_be_used_is_not_the_best(config, tmp_path):
    """A later one that is better than its score is saved."""
    path = save(tmp_path, 8, config, score=50.0, steps_per_epoch=8)
    save(tmp_path, 16, config, score=90.0, steps_per_epoch=8, shards=MISSING)
    found = choose(tmp_path, config)
    assert (found.path, found.step, found.best) == (path, 8, 50.0)
    assert [note.partition(":")[0] for note in found.notes] == [
        "skipped a damaged checkpoint",
        f"going back to {path} instead costs 8 steps",
    ]


def test_a_checkpoint_that_does_not_say_how_many_steps_an_epoch_had(config, tmp_path):
    path = save(tmp_path / "old", 8, config)
    found = choose(tmp_path / "old", config)
    assert (found.step, found.notes) == (8, [])
    found = choose(tmp_path / "new", config, path, batch=64)
    assert found.step == 4 and found.notes == ["step 8, the end of epoch 1, is step 4 from here on"]
    path = save(tmp_path / "others", 8, config, dataset="others")
    with pytest.raises(ConfigError, match="does not say how many steps an epoch had: take it as model.init_from"):
        choose(tmp_path / "new", config, path, changes=True)


def test_the_runs_own_checkpoint_may_be_named_by_any_path(config, tmp_path, monkeypatch):
    """What lies beside it, and cannot be read, is set aside with the later ones."""
    run = tmp_path / "run"
    for step in (8, 16, 24):
        path = save(run, step, config, steps_per_epoch=8)
    (path / "manifest.json").write_text("{")
    (tmp_path / "link").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    found = choose(run, config, "link/checkpoints/step_00000008")
    assert (found.step, found.began, found.elsewhere) == (8, "step_00000008", False)
    assert names(run) == ["step_00000008", "superseded_step_00000016", "superseded_step_00000024"]
    path = save(run, 16, config, steps_per_epoch=8, began="step_00000008")
    found = choose(Path("link"), config, run / "checkpoints/step_00000008")
    assert (found.step, found.began) == (16, "step_00000008") and len(names(run)) == 4


def test_another_runs_checkpoint_is_remembered_by_its_whole_path(tiny_config, config, tmp_path, monkeypatch):
    other = save(tmp_path / "other", 8, config, steps_per_epoch=8)
    monkeypatch.chdir(tmp_path)
    found = choose(tmp_path / "run", config, "other/checkpoints/step_00000008")
    assert (found.began, found.elsewhere) == (str(other), True)
    config = load_config(tiny_config, ["model.init_from=missing"])  # the run does not read it
    check_source(config, Resume.decide(tmp_path / "run", str(other), False))
    check_source(config, Resume.decide(tmp_path / "other", "auto", False))
    with pytest.raises(ConfigError, match="model.init_from: there is no missing"):
        check_source(config, Resume.decide(tmp_path / "run", "auto", False))


def test_lost_steps_are_those_of_the_last_whole_line(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    assert lost_steps(metrics, 5) == 0
    line = {"kind": "train", "step": 1, "text": "x" * 1000}
    lines = [*(json.dumps({**line, "step": step}) for step in range(1, 1501)), json.dumps({"kind": "event", "step": 9})]
    metrics.write_text("\n".join(lines) + '\n{"kind": "train", "st')
    assert lost_steps(metrics, 1490) == 10 and lost_steps(metrics, 1600) == 0
