"""CAT-T against values computed by the published model (tests/golden)."""

import numpy as np
import pytest
import torch
from torch import nn

import catmodel
from catmodel.patches import Patches
from tests.catmodel.golden import filled, golden_images, load, released_shapes


def assert_stat_and_samples(value: torch.Tensor, stat: np.ndarray, samples: np.ndarray, what: str) -> None:
    flat = value.detach().double().contiguous().numpy().ravel()
    ours = np.array([flat.mean(), flat.std(), np.linalg.norm(flat), np.abs(flat).max()])
    np.testing.assert_allclose(ours, stat, rtol=1e-7, atol=1e-9, err_msg=what)
    step = max(flat.size // len(samples), 1)
    np.testing.assert_allclose(flat[::step][: len(samples)], samples, rtol=0, atol=1e-9, err_msg=what)


@pytest.fixture(scope="module")
def golden():
    return load("cat_tiny")


@pytest.fixture(scope="module")
def model():
    return filled(catmodel.create_model("cat_tiny"))


def test_state_dict_has_the_released_names_and_shapes(model):
    ours = {key: str(tuple(value.shape)) for key, value in model.state_dict().items()}
    assert ours == released_shapes("cat_tiny")
    assert all(
        value.dtype == torch.int64
        for key, value in model.state_dict().items()
        if key.endswith("relative_position_index")
    )


def test_float32_logits(model, golden):
    with torch.no_grad():
        logits = model(golden_images()).numpy()
    np.testing.assert_allclose(logits, golden["logits_f32"], rtol=0, atol=2e-5)


def test_float64_values_of_every_stage_and_block_and_gradients(golden):
    model = filled(catmodel.create_model("cat_tiny")).double()
    stages, blocks = {}, {}
    for s, stage in enumerate(model.layers):
        stage.register_forward_hook(lambda _, __, out, s=s: stages.__setitem__(s, out))
    for name, module in model.named_modules():
        if hasattr(module, "norm2"):

            def keep(_, args, out, name=name):
                patches: Patches = args[2]  # after the tokens and drop-path's factors
                blocks[name] = patches.map_from_tokens(out)  # the golden values are in row-by-row order

            module.register_forward_hook(keep)

    features = model.forward_features(golden_images().double())
    pooled = model.forward_head(features, pre_logits=True)
    logits = model.forward_head(features)
    np.testing.assert_allclose(logits.detach().numpy(), golden["logits_f64"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(pooled.detach().numpy(), golden["feat_f64"], rtol=0, atol=1e-9)
    for s, out in stages.items():
        assert_stat_and_samples(out, golden[f"stage{s}_stat"], golden[f"stage{s}_samp"], f"stage {s}")
    assert len(blocks) == 18
    for name, out in blocks.items():
        assert_stat_and_samples(out, golden[f"block_{name}_stat"], golden[f"block_{name}_samp"], name)

    loss = nn.functional.cross_entropy(logits, torch.tensor([3, 7]))
    np.testing.assert_allclose(loss.item(), golden["loss_f64"], rtol=0, atol=1e-9)
    loss.backward()
    parameters = dict(model.named_parameters())
    assert set(parameters) == set(golden["grad_names"].tolist())
    for name, norm, total, first in zip(
        golden["grad_names"], golden["grad_l2"], golden["grad_sum"], golden["grad_first4"], strict=True
    ):
        grad = parameters[str(name)].grad
        np.testing.assert_allclose(grad.norm().item(), norm, rtol=1e-9, atol=1e-9, err_msg=str(name))
        np.testing.assert_allclose(grad.sum().item(), total, rtol=0, atol=1e-9, err_msg=str(name))
        np.testing.assert_allclose(
            grad.flatten()[:4].numpy(), first[: grad.numel()], rtol=0, atol=1e-9, err_msg=str(name)
        )


def test_float64_dense_maps():
    golden = load("cat_tiny_det")
    model = filled(catmodel.create_model("cat_tiny", features_only=True)).double()
    with torch.no_grad():
        maps = model(golden_images(4321, (1, 3, 160, 256)).double())
    for i, out in enumerate(maps):
        assert tuple(out.shape) == tuple(golden[f"out{i}_shape"])
        assert_stat_and_samples(out, golden[f"out{i}_stat"], golden[f"out{i}_samp"], f"map {i}")
