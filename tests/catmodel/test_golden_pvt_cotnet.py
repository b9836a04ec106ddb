"""PVT and CoTNet against values that the published models computed (../shared/golden, skipped where it is absent)."""

import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import catmodel

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
FILES = {"pvt_tiny": "pvt_tiny", "cotnet50": "cotnet50", "cotnext50": "cotnext50_2x48d", "se_cotnetd50": "se_cotnetd_50"}
pytestmark = pytest.mark.skipif(not (GOLDEN / "pvt_tiny.npz").exists(), reason=f"golden values are not in {GOLDEN}")


def filled(name: str) -> nn.Module:
    """The model with the weights of golden/README.md."""
    with torch.device("meta"):
        model = catmodel.create_model(name)
    state = {}
    for key, tensor in model.state_dict().items():
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(0)
            continue
        z = np.random.RandomState(zlib.crc32(key.encode()) & 0xFFFFFFFF).standard_normal(tuple(tensor.shape))
        if key.startswith("pos_embed") or key == "cls_token":
            z = 0.2 * z
        elif key.endswith("running_mean"):
            z = 0.1 * z
        elif key.endswith("running_var"):
            z = 1 + 0.5 * abs(z)
        elif key.endswith(".bias"):
            z = 0.05 * z
        elif z.ndim == 1:
            z = 1 + 0.1 * z
        else:
            z = z / math.sqrt(np.prod(z.shape[1:]))
        state[key] = torch.from_numpy(z.astype(np.float32))
    model.load_state_dict(state, assign=True)
    return model.eval()


def stage_outputs(model: nn.Module) -> dict[int, torch.Tensor]:
    """Stage (from 1) -> what its last block gives, once the model has run."""
    outputs: dict[int, torch.Tensor] = {}
    for number in range(1, 5):
        last = getattr(model, model.feature_info[number - 1]["module"])[-1]
        last.register_forward_hook(lambda _, __, out, number=number: outputs.__setitem__(number, out))
    return outputs


def images() -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(1234).standard_normal((2, 3, 224, 224)).astype(np.float32))


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
    golden = np.load(GOLDEN / f"{FILES[name]}.npz")
    model = filled(name)
    assert sum(p.numel() for p in model.parameters()) == golden["n_params"]
    outputs = stage_outputs(model)
    np.testing.assert_allclose(model(images()).numpy(), golden["logits_f32"], rtol=0, atol=2e-5)
    assert_stages(outputs, golden, rtol=1e-5, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name, training", [("pvt_tiny", False), ("se_cotnetd50", True)])
@torch.no_grad()
def test_float64_logits(name: str, training: bool):
    """training: with the batch's statistics in the batch norms, in the net that has both CoT and split attention."""
    golden = np.load(GOLDEN / f"{FILES[name]}.npz")
    model = filled(name).double().train(training)
    expected = golden["train_logits_f64" if training else "logits_f64"]
    np.testing.assert_allclose(model(images().double()).numpy(), expected, rtol=0, atol=1e-9)
