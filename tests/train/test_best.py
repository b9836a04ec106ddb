"""The best checkpoint is saved when an evaluation finds it, remembered after a restart, and found by `--best`."""

import json
import shutil
import signal
import subprocess
import sys

import pytest

from tests.faults import SignalIn
from tests.oracle import scores
from tests.runs import ROOT, events, metrics, run, start, start_command
from train.checkpoint.info import checkpoint_path, evaluated, list_checkpoints, read_info, step_of, validate
from train.telemetry.metrics import Evaluation, Metric, Scores

# Saves do not coincide with ends of epochs, as with 1,251 steps an epoch and a checkpoint every 500.
SETTINGS = ["train.epochs=4", "checkpoint.every_steps=5", "checkpoint.keep=1"]


def top1(output) -> dict[int, float]:
    return {step: values[0] for (step, weights), values in scores(output).items() if weights == "ema"}


def improvements(found: dict[int, float]) -> list[int]:
    """Steps whose top-1 is above that of all earlier steps."""
    steps = sorted(found)
    return [step for index, step in enumerate(steps) if all(found[step] > found[before] for before in steps[:index])]


def saved(output) -> list[int]:
    return [line["step"] for line in events(output, "checkpoint")]


@pytest.fixture(scope="module")
def finished(tiny_config, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished") / "run"
    run(tiny_config, output, *SETTINGS, "optimizer.lr=0.01", world=2)
    return output


@pytest.mark.slow
def test_every_evaluation_above_the_best_is_saved_and_the_best_is_kept(finished):
    found = top1(finished)
    better = improvements(found)
    assert sorted(found) == [8, 16, 24, 32] and better[0] == 8
    assert saved(finished) == sorted({5, 10, 15, 20, 25, 30, 32} | set(better))
    best = better[-1]
    assert [step_of(path) for path in list_checkpoints(finished / "checkpoints")] == sorted({32, best}, reverse=True)
    assert validate(checkpoint_path(finished / "checkpoints", best)).score == found[best]


@pytest.mark.slow
def test_evaluate_takes_the_best(finished, tmp_path):
    (path, expected), *_ = evaluated(finished / "checkpoints")
    job = start_command("evaluate", tmp_path, str(finished), "--best", "--json")
    assert job.wait() == [0], job.text()
    found = json.loads(job.text().splitlines()[-1])
    assert (found["checkpoint"], found["weights"], found["top1"]) == (str(path), "ema", expected)


@pytest.mark.slow
def test_a_best_that_is_damaged_is_named_and_passed_over(finished, tmp_path):
    from train.checkpoint.trained_model import read_trained

    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    newest = list_checkpoints(copy / "checkpoints")[0]
    better = copy / "checkpoints/step_00000001"
    shutil.copytree(newest, better)
    document = json.loads((better / "manifest.json").read_text())
    (better / "manifest.json").write_text(json.dumps({**document, "step": 1, "score": 99.5}))
    assert read_trained(copy, best=True).checkpoint == better
    (better / "shard_00001.safetensors").unlink()
    trained = read_trained(copy, best=True)
    assert trained.checkpoint == copy / "checkpoints" / evaluated(finished / "checkpoints")[0][0].name
    assert trained.notes == [f"passed over: {better / 'shard_00001.safetensors'} is missing"]


@pytest.mark.slow
def test_ties_and_restarts_keep_the_earlier_one(tiny_config, tmp_path):
    """With a learning rate of 0 all scores are equal: only the first one is saved, also after a restart."""
    still = ["optimizer.lr=1e-30", "schedule.warmup_lr=0", "schedule.min_lr=0", "ema.decay=0"]
    settings = [*still, "train.epochs=4", "checkpoint.every_steps=100", "checkpoint.keep=1"]
    run(tiny_config, tmp_path, *settings, "train.max_steps=20")
    assert saved(tmp_path) == [8, 20]
    run(tiny_config, tmp_path, *settings)
    assert len(set(line["top1"] for line in metrics(tmp_path, "eval"))) == 1 and len(metrics(tmp_path, "eval")) == 4
    assert saved(tmp_path) == [8, 20, 32]
    assert [step_of(path) for path in list_checkpoints(tmp_path / "checkpoints")] == [32, 8]


@pytest.mark.slow
def test_a_stop_at_an_epochs_end_loses_no_evaluation_and_keeps_no_old_score(tiny_config, tmp_path):
    """Stopped after step 16, before its evaluation: the checkpoint has no score until the next start evaluates it."""
    job = start(tiny_config, tmp_path, "train.epochs=3", world=2, before=SignalIn(0, signal.SIGTERM, "step", 14))
    assert job.wait() == [75, 75]
    assert [line["step"] for line in events(tmp_path, "preempted")] == [16]
    path = checkpoint_path(tmp_path / "checkpoints", 16)
    assert sorted(top1(tmp_path)) == [8] and read_info(path).score is None
    run(tiny_config, tmp_path, "train.epochs=3", world=2)
    found = top1(tmp_path)
    assert sorted(found) == [8, 16, 24] and validate(path).score == found[16]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["evaluate", "predict", "export"])
def test_what_best_cannot_mean_is_said(finished, tmp_path, name):
    rest = {"evaluate": [], "predict": ["x.jpg"], "export": ["--to", "m.onnx"]}[name]
    target = {"predict": ["--run"]}.get(name, [])
    (tmp_path / "x.jpg").write_bytes(b"")

    def said(folder) -> str:
        command = [sys.executable, str(ROOT / f"launch/{name}.py"), *rest, *target, str(folder), "--best"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 78 and done.stderr.count("\n") == 1, done.stderr
        return done.stderr

    checkpoint = list_checkpoints(finished / "checkpoints")[0]
    assert (
        said(checkpoint)
        == f"error: --best chooses among a run's checkpoints, and {checkpoint} is no run's folder; leave it out\n"
    )
    if name == "export":  # equal for all of them
        copy = tmp_path / "run"
        shutil.copytree(checkpoint, copy / "checkpoints" / checkpoint.name)
        document = json.loads((copy / "checkpoints" / checkpoint.name / "manifest.json").read_text())
        (copy / "checkpoints" / checkpoint.name / "manifest.json").write_text(json.dumps({**document, "score": None}))
        assert (
            said(copy)
            == f"error: {copy / 'checkpoints'} has no sound checkpoint that was evaluated; leave out --best\n"
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e16])
def test_a_value_that_is_no_score_is_not_saved_as_one(value):
    """A manifest with such a score could not be read again."""
    metric = Metric("error", "error", "", "lower")
    assert Evaluation(8, {"model": Scores({"error": value}, 1)}).score(8, metric) is None
    assert Evaluation(8, {"model": Scores({"error": 0.5}, 1)}).score(8, metric) == 0.5


@pytest.mark.parametrize(("better", "best"), [("higher", 0.6), ("lower", 0.4)])
def test_a_score_improves_on_none_and_on_a_worse_one(better, best):
    metric = Metric("error", "error", "", better)
    assert metric.improves(0.5, None)
    assert [metric.improves(value, 0.5) for value in (best, 0.5, 1 - best)] == [True, False, False]
