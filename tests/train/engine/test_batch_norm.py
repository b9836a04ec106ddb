"""The running statistics of batch norm are equal on any number of ranks."""

import json

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.catmodel.small import ARCHITECTURES, images, small
from tests.runs import metrics, run, start_command
from tests.train.test_families import TINY, statistics, with_model
from train.engine.batch_norm import RunningStatistics, accept_low_precision


@pytest.mark.slow
def test_running_statistics_and_evaluation_are_the_same_on_1_2_and_4_ranks(tiny_config, tmp_path):
    """On 4 ranks activations are recomputed, which calls every norm twice.

    The learning rate is small, because steps amplify the differences that ReLUs make of rounding errors.
    """
    config = with_model(tiny_config, tmp_path, TINY["cotnet"])
    sizes = ["train.global_batch=64", "train.micro_batch=16"]  # an epoch of 4 steps
    for world in (1, 2, 4):
        extra = [f"train.activation_checkpointing={world == 4}", "optimizer.lr=1e-3", *sizes, "train.max_steps=4"]
        run(config, tmp_path / f"{world}", *extra, world=world)
    for weights in ("model", "ema"):
        reference, *others = (statistics(tmp_path / f"{world}", 4, weights) for world in (1, 2, 4))
        for other in others:
            torch.testing.assert_close(other, reference, rtol=1e-4, atol=1e-5)
        reference, *others = (
            line for world in (1, 2, 4) for line in metrics(tmp_path / f"{world}", "eval") if line["weights"] == weights
        )
        for other in others:
            assert (other["loss"], other["count"]) == (pytest.approx(reference["loss"], rel=1e-5), 101)
    job = start_command("evaluate", tmp_path / "alone", str(tmp_path / "4"), "--weights", "ema", "--json")
    assert job.wait() == [0], job.text()
    assert json.loads(job.text().splitlines()[-1])["loss"] == other["loss"]  # the checkpoint has them, too


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def step(
    model: nn.Module, tracker: RunningStatistics, batches: list[torch.Tensor], skipped: bool | torch.Tensor = False
) -> None:
    tracker.begin()
    for batch in batches:
        model(batch)
        tracker.add()
    tracker.finish(skipped)


def test_a_step_moves_them_by_the_momentum_towards_the_average_of_its_micro_batches(alone):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, momentum=0.4))
    tracker = RunningStatistics(model)
    batches = [3 * torch.randn(8, 3, 5, 5) + 2 for _ in range(4)]
    step(model, tracker, batches)
    means = torch.stack([batch.mean((0, 2, 3)) for batch in batches])
    variances = torch.stack([batch.transpose(0, 1).flatten(1).var(1) for batch in batches])  # unbiased, as PyTorch's
    torch.testing.assert_close(model[0].running_mean, 0.1 * means.mean(0))
    torch.testing.assert_close(model[0].running_var, 0.9 + 0.1 * variances.mean(0))
    # The second norm's inputs are normalised.
    torch.testing.assert_close(model[1].running_var, torch.full((3,), 0.6 + 0.4 * 1.0), rtol=0.01, atol=0)
    assert model[0].num_batches_tracked == 1
    before = model[0].running_mean.clone()
    step(model, tracker, batches)
    torch.testing.assert_close(model[0].running_mean, 0.9 * before + 0.1 * means.mean(0))


@pytest.mark.parametrize("skipped", [True, torch.tensor(1.0)])
def test_a_skipped_step_leaves_them_as_they_were(alone, skipped):
    model = nn.BatchNorm2d(3)
    tracker = RunningStatistics(model)
    step(model, tracker, [torch.randn(8, 3, 5, 5)])
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    step(model, tracker, [torch.full((8, 3, 5, 5), torch.inf), torch.randn(8, 3, 5, 5)], skipped)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    step(model, tracker, [torch.randn(8, 3, 5, 5)])
    assert model.running_mean.isfinite().all() and not torch.equal(model.running_mean, before["running_mean"])


def test_frozen_norms_and_models_without_any_are_left_alone(alone):
    model = nn.Sequential(nn.BatchNorm2d(3).eval(), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model[0].running_mean += 0.3
    step(model, RunningStatistics(model), [torch.randn(8, 3, 5, 5)])
    assert torch.equal(model[0].running_mean, torch.full((3,), 0.3)) and model[2].num_batches_tracked == 1
    plain = nn.Linear(2, 2)
    tracker = RunningStatistics(plain)
    assert not tracker.enabled
    step(plain, tracker, [torch.randn(2, 2)])


def test_bf16_weights_keep_fp32_statistics(alone):
    torch.manual_seed(0)
    low, high = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    for parameter in low.parameters():
        parameter.data = parameter.data.bfloat16()
    accept_low_precision(low)
    batches = [(torch.randn(8, 3, 5, 5) + 2).bfloat16() for _ in range(2)]
    step(low, RunningStatistics(low), batches)
    step(high, RunningStatistics(high), [batch.float() for batch in batches])
    assert low.running_var.dtype == torch.float32
    torch.testing.assert_close(low.running_var, high.running_var, rtol=1e-5, atol=0)
    y = low.eval()(batches[0])
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), high.eval()(batches[0].float()), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_runs_with_weights_in_bf16_and_buffers_in_fp32(name):
    model = small(name)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    accept_low_precision(model)
    model(images(name).bfloat16()).sum().backward()
    assert all(parameter.grad.dtype == torch.bfloat16 for parameter in model.parameters())
