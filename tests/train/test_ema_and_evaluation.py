"""EMA and evaluation at every ZeRO stage, compared with plain implementations."""

import json

import pytest
import torch

from tests.runs import losses, metrics, run, start_command
from train.checkpoint.format import read_weights
from train.checkpoint.info import checkpoint_path
from train.config import load_config
from train.tasks.base import build_task


def initial_weights(config_path) -> dict[str, torch.Tensor]:
    from data_pipeline.randomness import Stream, make_key

    config = load_config(config_path)
    torch.manual_seed(make_key(config.train.seed, Stream.INIT))
    model = build_task(config, [""] * 10).build_model()
    return {name: parameter.detach().double() for name, parameter in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_ema_equals_a_full_precision_reference(tiny_config, tmp_path, stage, precision):
    """The float64 average of the weights of a checkpoint per step equals the run's own average within 1e-7."""
    settings = [f"zero.stage={stage}", f"train.precision={precision}", "train.evaluate_every=0"]
    run(tiny_config, tmp_path, *settings, "train.max_steps=5", "checkpoint.every_steps=1", "checkpoint.keep=9", world=2)
    average = initial_weights(tiny_config)
    for step in range(5):
        weights = read_weights(checkpoint_path(tmp_path / "checkpoints", step + 1), "model")
        decay = min(0.9, (1 + step) / (10 + step))
        average = {name: decay * value + (1 - decay) * weights[name].double() for name, value in average.items()}
    ema = read_weights(checkpoint_path(tmp_path / "checkpoints", 5), "ema")
    moved = max((average[name] - value).abs().max() for name, value in initial_weights(tiny_config).items())
    assert moved > 1e-5
    worst = max((average[name] - ema[name].double()).abs().max() for name in average)
    assert worst < 1e-7


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_evaluation_during_training_is_that_of_the_checkpoint(tiny_config, tmp_path, stage):
    """Evaluation of model and EMA under ZeRO on 4 ranks (101 samples, 13 batches) equals that of a single process."""
    run(tiny_config, tmp_path / "run", f"zero.stage={stage}", world=4)
    scores = {line["weights"]: line for line in metrics(tmp_path / "run", "eval") if line["step"] == 16}
    assert scores["model"]["count"] == scores["ema"]["count"] == 101
    assert scores["model"]["loss"] != scores["ema"]["loss"]
    for weights, line in scores.items():
        alone = _evaluate(tmp_path / "run", weights, tmp_path / f"alone_{weights}", world=1)
        assert {key: line[key] for key in ("top1", "top5", "loss", "count")} == {
            key: alone[key] for key in ("top1", "top5", "loss", "count")
        }


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_evaluating_ema_leaves_the_weights_as_they_were(tiny_config, tmp_path, stage):
    settings = [f"zero.stage={stage}", "train.max_steps=12"]
    run(tiny_config, tmp_path / "with", *settings, world=2)  # evaluates after step 8
    run(tiny_config, tmp_path / "without", *settings, "train.evaluate_every=0", world=2)
    assert losses(tmp_path / "with") == losses(tmp_path / "without")


@pytest.mark.slow
def test_evaluating_101_samples_on_4_ranks_equals_1_rank_exactly(tiny_config, tmp_path):
    run(tiny_config, tmp_path / "run", "train.max_steps=8", world=1)
    results = [_evaluate(tmp_path / "run", "ema", tmp_path / f"world_{world}", world) for world in (1, 2, 4)]
    assert results[0] == results[1] == results[2]
    assert results[0]["count"] == 101


def _evaluate(run_folder, weights, output, world) -> dict:
    job = start_command("evaluate", output, str(run_folder), "--weights", weights, "--json", world=world)
    assert job.wait() == [0] * world, job.text()
    return json.loads(job.text().splitlines()[-1])
