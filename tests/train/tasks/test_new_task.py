"""A task outside of the program's own folders does all that classification does, and no line of the program knows
it.
"""

import json
import shutil
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from data_pipeline.annotations import add_annotation
from data_pipeline.manifest import open_manifest
from tests.oracle import assert_same_state, ids_by_step, state
from tests.runs import events, metrics, run, start, start_command

SETTINGS = ["train.epochs=2", "checkpoint.every_steps=3"]


@dataclass(frozen=True)
class KnowDepth:
    """Registers the task in a rank's process."""

    def __call__(self, rank: int) -> None:
        from train.task_registry import register

        register("depth", "tests.train.tasks.depth")


@pytest.fixture(scope="module")
def dataset(tiny_dataset, tmp_path_factory):
    """The tiny dataset with a map's size and level for each image."""
    folder = tmp_path_factory.mktemp("depth") / "dataset"
    shutil.copytree(tiny_dataset, folder)
    manifest, random = open_manifest(folder), np.random.default_rng(0)
    for name, split in manifest.splits.items():
        manifest = add_annotation(manifest, name, "size", random.integers(3, 20, (split.samples, 2)))
        manifest = add_annotation(manifest, name, "level", split.records["label"].astype(np.float32) / 10)
    return folder


@pytest.fixture(scope="module")
def config(tiny_config, dataset, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "depth.yaml"
    settings = "task: {name: depth, absolute: 0.25}\naugment: {mixup: 0.0, cutmix: 0.0, label_smoothing: 0.0}\n"
    path.write_text(f"base: {tiny_config}\n{settings}data: {{path: {dataset}}}\n")
    return path


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "whole"
    run(config, output, *SETTINGS, world=2, before=KnowDepth())
    return output


@pytest.mark.slow
def test_it_is_killed_and_resumes_bitwise(config, whole, tmp_path):
    job = start(config, tmp_path, *SETTINGS, world=2, before=KnowDepth())
    job.kill_at(7)
    run(config, tmp_path, *SETTINGS, world=2, before=KnowDepth())
    assert len(events(tmp_path, "resume")) == 1
    lines, expected = metrics(tmp_path, "train"), metrics(whole, "train")
    learnt = [[line[key] for key in ("step", "loss", "squared", "absolute")] for line in lines]
    assert learnt == [[line[key] for key in ("step", "loss", "squared", "absolute")] for line in expected]
    assert all(loss == pytest.approx(squared + absolute) and absolute > 0 for _, loss, squared, absolute in learnt)
    assert learnt[-1][1] < learnt[0][1]
    assert_same_state(state(tmp_path, 16), state(whole, 16))
    assert ids_by_step(tmp_path, world=2) == ids_by_step(whole, world=2)


@pytest.mark.slow
def test_its_evaluation_is_exact_on_any_number_of_ranks(whole, tmp_path):
    (best,) = [line for line in metrics(whole, "eval") if (line["step"], line["weights"]) == (16, "ema")]
    for world in (1, 2, 4):
        job = start_command("evaluate", tmp_path / str(world), str(whole), "--json", world=world, before=KnowDepth())
        assert job.wait() == [0] * world, job.text()
        found = json.loads(job.text().splitlines()[-1])
        assert [found[key] for key in ("rmse", "mae", "count")] == [best[key] for key in ("rmse", "mae", "count")]
    assert best["count"] == 101


@pytest.mark.slow
def test_the_smaller_error_is_the_better_checkpoint(whole):
    from train.checkpoint.info import evaluated

    errors = {line["step"]: line["rmse"] for line in metrics(whole, "eval") if line["weights"] == "ema"}
    found = evaluated(whole / "checkpoints")
    assert found[0][1] == min(errors.values()) and all(errors[int(path.name[5:])] == score for path, score in found)


@pytest.mark.slow
def test_it_appears_in_watch_report_and_tensorboard(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    watch = start_command("watch", whole.parent / "watch", str(whole), "--once", before=KnowDepth())
    assert watch.wait() == [0] and "RMSE" in watch.text() and "top-1" not in watch.text()
    page = whole.parent / "report.html"
    report = start_command("report", whole.parent / "report", str(whole), "--output", str(page), before=KnowDepth())
    assert report.wait() == [0] and "RMSE" in page.read_text() and "top-1" not in page.read_text()
    board = EventAccumulator(str(whole / "tensorboard"))
    board.Reload()
    assert {"learning/squared", "evaluation/ema_rmse", "evaluation/model_mae"} <= set(board.Tags()["scalars"])


def test_an_unknown_task_and_an_unknown_setting_are_named(config, tmp_path):
    from tests.train.tasks import depth
    from train import task_registry
    from train.config import ConfigError, load_config

    with pytest.raises(ConfigError, match="task.name: there is no task 'depth'"):
        load_config(config)
    task_registry.register("depth", depth.__name__)
    try:
        assert load_config(config).task.absolute == 0.25
        with pytest.raises(ConfigError, match="unknown key task.relative"):
            load_config(config, ["task.relative=1"])
    finally:
        del task_registry._registered["depth"]


@pytest.mark.slow
def test_commands_that_it_does_not_support_name_it(whole, tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "image.jpg")
    for command in (["predict", str(tmp_path / "image.jpg"), "--run"], ["export", "--to", str(tmp_path / "x.onnx")]):
        name, *arguments = command
        job = start_command(name, tmp_path / name, *arguments, str(whole), before=KnowDepth())
        assert job.wait() == [78]
        assert (
            f"error: launch/{name}.py does not support the task depth" in job.text() and "Traceback" not in job.text()
        )
