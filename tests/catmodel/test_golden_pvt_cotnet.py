"""PVT and CoTNet against values computed by the published models (tests/golden)."""

import numpy as np
import pytest
import torch
from torch import nn

import catmodel
from tests.catmodel.golden import filled, golden_images, load

FILES = {
    "pvt_tiny": "pvt_tiny",
    "cotnet50": "cotnet50",
    "cotnext50": "cotnext50_2x48d",
    "se_cotnetd50": "se_cotnetd_50",
}


def build(name: str) -> nn.Module:
    with torch.device("meta"):
        model = catmodel.create_model(name)
    return filled(model)


def stage_outputs(model: nn.Module) -> dict[int, torch.Tensor]:
    """Stage, from 1, -> the output of its last block. Filled by the model's forward pass."""
    outputs: dict[int, torch.Tensor] = {}
    for number in range(1, 5):
        last = getattr(model, model.feature_info[number - 1]["module"])[-1]
        last.register_forward_hook(lambda _, __, out, number=number: outputs.__setitem__(number, out))
    return outputs


def assert_stages(outputs: dict[int, torch.Tensor], golden, rtol: float, atol: float) -> None:
    for number in range(1, 5):
        assert tuple(outputs[number].shape) == tuple(golden[f"stage{number}_shape"])
        flat = outputs[number].double().numpy().ravel()
        statistics = [flat.mean(), flat.std(), np.linalg.norm(flat), abs(flat).max()]
        np.testing.assert_allclose(statistics, golden[f"stage{number}_stat"], rtol, atol, err_msg=f"stage {number}")
        samples = golden[f"stage{number}_samp"]
        ours = flat[:: flat.size // len(samples)][: len(samples)]
        np.testing.assert_allclose(ours, samples, rtol, atol, err_msg=f"stage {number}")


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
@torch.no_grad()
def test_float32_logits_and_stages(name: str):
    golden = load(FILES[name])
    model = build(name)
    assert sum(p.numel() for p in model.parameters()) == golden["n_params"]
    outputs = stage_outputs(model)
    np.testing.assert_allclose(model(golden_images()).numpy(), golden["logits_f32"], rtol=0, atol=2e-5)
    assert_stages(outputs, golden, rtol=1e-5, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name, training", [("pvt_tiny", False), ("se_cotnetd50", True)])
@torch.no_grad()
def test_float64_logits(name: str, training: bool):
    """training: use the batch's statistics, in the network that has both CoT and split attention."""
    golden = load(FILES[name])
    model = build(name).double().train(training)
    expected = golden["train_logits_f64" if training else "logits_f64"]
    np.testing.assert_allclose(model(golden_images().double()).numpy(), expected, rtol=0, atol=1e-9)
