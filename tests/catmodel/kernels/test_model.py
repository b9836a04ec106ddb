"""CAT gives the same outputs and the same training with kernels and without."""

import os
import sys

import numpy as np
import pytest
import torch

import catmodel
from tests.catmodel.golden import filled, golden_images, load
from tests.runs import losses, run
from train.checkpoint.info import checkpoint_path


def cat(**settings):
    """Two stages of 14 x 14 and 7 x 7 tokens (four patches, then one), with all kinds of dropout."""
    from catmodel.cat import CAT

    torch.manual_seed(0)
    drops = dict(drop_path_rate=0.1, ipsa_drop=0.1, cpsa_drop=0.2)
    return CAT(
        img_size=56, embed_dim=16, depths=(1, 1), num_heads=(1, 2), num_classes=5, init_std=None, **drops, **settings
    )


def outputs_and_gradients(model, images, kernels: bool) -> list[torch.Tensor]:
    model.set_kernels(kernels)
    torch.manual_seed(1)
    outputs = model(images)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    # Each element has its own weight, because the sum and the squares of a norm's output have no gradient.
    loss = sum(
        (output * torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output)).sum()
        for output in outputs
    )
    return [*outputs, *torch.autograd.grad(loss, list(model.parameters()))]


def assert_close(found, expected):
    """Equal up to rounding. Some gradients are rounding errors of zero: those of a bias that the next norm removes."""
    largest = max(reference.abs().max().item() for reference in expected)
    for value, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-4, atol=1e-6 * largest)


@pytest.mark.slow
def test_logits_and_gradients_equal_those_without_kernels(device):
    """In training. Dropout and drop-path draw the same masks, also when activations are recomputed."""
    model = cat().to(device)
    images = torch.randn(1, 3, 56, 56, device=device)
    found = outputs_and_gradients(model, images, True)
    assert_close(found, outputs_and_gradients(model, images, False))
    model.set_grad_checkpointing()
    for value, stored in zip(outputs_and_gradients(model, images, True), found, strict=True):
        assert torch.equal(value, stored)


@pytest.mark.slow
def test_dense_maps_of_any_size(device):
    model = cat(features_only=True, shifted_windows=True).to(device)
    images = torch.randn(1, 3, 45, 62, device=device)
    found = outputs_and_gradients(model, images, True)
    assert [tuple(value.shape) for value in found[:2]] == [(1, 16, 12, 16), (1, 32, 6, 8)]
    assert_close(found, outputs_and_gradients(model, images, False))


@(pytest.mark.slow if torch.cuda.is_available() else pytest.mark.long)
def test_golden_values(device):
    """CAT-T in float32, one image. The interpreter takes most of a minute."""
    model = filled(catmodel.create_model("cat_tiny")).to(device)
    with torch.no_grad():
        logits = model(golden_images()[:1].to(device)).cpu().numpy()
    np.testing.assert_allclose(logits, load("cat_tiny")["logits_f32"][:1], rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kernels", [True, False])
def test_exports(device, kernels):
    """With kernels the exported graph contains their operators; without, it runs anywhere."""
    model = cat().to(device).eval()
    model.set_kernels(kernels)
    images = torch.randn(1, 3, 56, 56, device=device)
    program = torch.export.export(model, (images,))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images), model(images))
    assert ("catmodel" in {str(node.target).split(".")[0] for node in program.graph.nodes}) == kernels


# ------------------------------------------------------------------------------------------------------------- training


def interpret(rank: int) -> None:
    """Argument `before` of tests.runs.run. The fork server has imported Triton without the interpreter."""
    os.environ["TRITON_INTERPRET"] = "1"
    for name in [name for name in sys.modules if name.split(".")[0] == "triton" and not name.startswith("triton._C")]:
        del sys.modules[name]


# One stage of four patches, and one image per rank and step.
SETTINGS = (
    "model.embed_dim=8 model.depths=[1] model.num_heads=[1] train.epochs=1 train.global_batch=2 train.micro_batch=1 "
    "train.evaluate_every=0 ema.decay=0"
).split()


@pytest.fixture(scope="module")
def interpreted_run(tiny_config, tmp_path_factory):
    """The folder of a run of 20 steps on two ranks, with kernels."""
    if torch.cuda.is_available():
        pytest.skip("with a GPU nothing is interpreted: `make gpu` trains there")
    output = tmp_path_factory.mktemp("interpreted") / "run"
    run(tiny_config, output, *SETTINGS, "train.max_steps=20", "checkpoint.every_steps=17", world=2, before=interpret)
    return output


@pytest.mark.slow
def test_training_gives_the_same_losses_without_kernels(interpreted_run, tiny_config, tmp_path):
    run(tiny_config, tmp_path / "plain", *SETTINGS, "train.max_steps=20", world=2)
    plain, found = losses(tmp_path / "plain"), losses(interpreted_run)
    assert sorted(found) == list(range(1, 21))
    assert found == pytest.approx(plain, rel=1e-4, abs=0)
    assert found != plain, "the kernels round differently: were they used?"


@pytest.mark.slow
def test_resumes_exactly(interpreted_run, tiny_config, tmp_path):
    """From the checkpoint of step 17, bit for bit."""
    checkpoint = checkpoint_path(interpreted_run / "checkpoints", 17)
    settings = [*SETTINGS, "train.max_steps=20", "--resume", str(checkpoint)]
    run(tiny_config, tmp_path / "resumed", *settings, world=2, before=interpret)
    whole = losses(interpreted_run)
    assert losses(tmp_path / "resumed") == {step: whole[step] for step in range(18, 21)}


@pytest.mark.slow
def test_one_rank_takes_the_steps_of_two(interpreted_run, tiny_config, tmp_path):
    run(tiny_config, tmp_path / "one", *SETTINGS, "train.max_steps=3", world=1, before=interpret)
    one, two = losses(tmp_path / "one"), losses(interpreted_run)
    assert sorted(one) == [1, 2, 3]
    assert one == pytest.approx({step: two[step] for step in one}, rel=1e-5, abs=0)
