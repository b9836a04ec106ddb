"""CAT, PVT and CoTNet on two ranks: 20 steps, bitwise the same if resumed in between."""

import shutil

import pytest
import torch

import catmodel
from tests.oracle import assert_same_state, state
from tests.runs import losses, run
from train.checkpoint.format import read_weights
from train.checkpoint.info import checkpoint_path

SGD = "optimizer: {name: sgd, lr: 0.05, nesterov: true, weight_decay: 4.0e-5, clip_grad: null}\n"
TINY = {
    "cotnet": "model: {name: cotnet50, depths: [1, 1], width: 0.25, drop_rate: 0.2, drop_path_rate: 0.2}\n" + SGD,
    "pvt": (
        "model: {name: pvt_tiny, depths: [1, 1], embed_dims: [16, 32], num_heads: [1, 2], mlp_ratios: [2, 2], "
        "sr_ratios: [2, 1]}\n"
    ),
}


def with_model(tiny_config, folder, text: str):
    """A config of 24 steps with `text` as its model."""
    head, tail = tiny_config.read_text().split("model: {name: cat_nano")
    path = folder / "config.yaml"
    path.write_text(head + text + tail.partition("\n")[2].replace("epochs: 2", "epochs: 3"))
    return path


def assert_trains_20_steps_and_resumes_bitwise(config, folder, *settings: str) -> dict[str, dict[str, torch.Tensor]]:
    """Returns the running statistics of batch norms at the end, by kind of weights."""
    whole, resumed = folder / "whole", folder / "resumed"
    settings = (*settings, "train.max_steps=20", "train.evaluate_every=0", "checkpoint.every_steps=13")
    run(config, whole, *settings, world=2, timeout=900)
    resumed.mkdir()
    (resumed / "checkpoints").mkdir()
    shutil.copytree(checkpoint_path(whole / "checkpoints", 13), checkpoint_path(resumed / "checkpoints", 13))
    job = run(config, resumed, *settings, world=2, timeout=900)
    assert "step 13 of 20" in job.text()
    assert sorted(losses(whole)) == list(range(1, 21))
    assert losses(resumed) == {step: loss for step, loss in losses(whole).items() if step > 13}
    kinds = ("model", "ema", "exp_avg", "exp_avg_sq", "momentum_buffer")
    assert_same_state(state(resumed, 20, kinds), state(whole, 20, kinds))
    both = [{kind: statistics(output, 20, kind) for kind in ("model", "ema")} for output in (resumed, whole)]
    for kind in ("model", "ema"):
        assert_same_state(both[0][kind], both[1][kind])
    return both[0]


def statistics(output, step, weights="model") -> dict[str, torch.Tensor]:
    """The running statistics of batch norms in a checkpoint."""
    found = read_weights(checkpoint_path(output / "checkpoints", step), weights)
    return {name: tensor for name, tensor in found.items() if "running" in name or "tracked" in name}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "stage", "precision"),
    [("cotnet", 1, "bf16"), ("cotnet", 3, "fp32"), ("pvt", 1, "fp32"), ("pvt", 3, "bf16")],
)
def test_small_networks_in_both_precisions(tiny_config, tmp_path, family, stage, precision):
    config = with_model(tiny_config, tmp_path, TINY[family])
    found = assert_trains_20_steps_and_resumes_bitwise(
        config, tmp_path, f"zero.stage={stage}", f"train.precision={precision}"
    )
    for running in found.values():
        assert bool(running) == (family == "cotnet")
        if running:  # in fp32, whatever the precision of the weights
            assert not torch.equal(running["bn1.running_var"], running["bn1.running_var"].bfloat16().float())


@pytest.mark.long
@pytest.mark.timeout(2000)
@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("name", catmodel.list_models())
def test_every_model_at_its_full_width_and_depth(tiny_config, tmp_path, name, stage):
    """At the smallest image size that the stages divide: 224 pixels for CAT's patches of 7 tokens, 64 for others."""
    family = name.split("_")[0]
    text = f"model: {{name: {name}, drop_path_rate: 0.2}}\n" + (SGD if "cot" in name else "")
    size = {"cat_nano": 32}.get(name, {"cat": 224}.get(family, 64))
    sizes = [f"data.image_size={size}", "train.global_batch=4", "train.micro_batch=2"]
    assert_trains_20_steps_and_resumes_bitwise(
        with_model(tiny_config, tmp_path, text), tmp_path, f"zero.stage={stage}", *sizes
    )
