"""Tests of every model: published sizes, and its behaviour in training, saving and exporting.

Sizes and names are tested with the full models on PyTorch's meta device, everything else with small models
(`small.py`).
"""

import functools
import io
import math
import re

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import catmodel
from tests.catmodel.golden import released_shapes
from tests.catmodel.small import ARCHITECTURES, images, jitter, settings, small

# Parameters and 10^9 multiply-accumulates at 224 x 224 (CoTNet: without aggregation), from the papers and their code.
PUBLISHED = {
    "cat_tiny": (16_870_996, 2.7705),
    "cat_small": (37_294_258, 6.0632),
    "cat_base": (51_531_922, 8.9281),
    "cat_nano": (1_283_190, 0.0371),  # not published; at 32 x 32
    "pvt_tiny": (13_229_288, 1.933),
    "pvt_small": (24_485_864, 3.816),
    "pvt_medium": (44_208_104, 6.659),
    "pvt_large": (61_369_320, 9.814),
    "cotnet50": (22_222_416, 3.231),
    "cotnet101": (38_272_048, 6.030),
    "cotnext50": (30_046_276, 4.236),
    "cotnext101": (53_346_068, 8.043),
    "se_cotnetd50": (23_107_784, 4.046),
    "se_cotnetd101": (40_912_392, 8.430),
    "se_cotnetd152": (55_783_688, 12.89),
}
RELEASED = {  # model -> its file in tests/golden/keys
    **{name: name for name in ("cat_tiny", "pvt_tiny", "pvt_large", "cotnet50", "cotnet101")},
    **{f"cotnext{n}": f"cotnext{n}_2x48d" for n in (50, 101)},
    **{f"se_cotnetd{n}": f"se_cotnetd_{n}" for n in (50, 101, 152)},
}

every_model = pytest.mark.parametrize("name", catmodel.list_models())
every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)
# Models that differ in their operations, because tracing takes seconds. Two stages (SE-CoTNetD: three) contain them
# all.
every_trace = pytest.mark.parametrize("name", ["cat_tiny", "pvt_tiny", "cotnet50", "cotnext50", "se_cotnetd152"])


@functools.cache
def shapes_of(name: str) -> nn.Module:
    with torch.device("meta"):
        return catmodel.create_model(name).eval()


@functools.cache
def small_shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return shapes(catmodel.create_model(name, **settings(name)))


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@every_model
def test_published_parameters_and_multiplications(name: str):
    model, side = shapes_of(name), 32 if name == "cat_nano" else 224
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        logits = model(torch.empty(2, 3, side, side, device="meta"))
    parameters, gmacs = PUBLISHED[name]
    assert logits.shape == (2, 10 if name == "cat_nano" else 1000)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert counter.get_total_flops() / 2 / 2e9 == pytest.approx(gmacs, rel=1e-3)


@every_architecture
def test_least_images_train_and_fewer_do_not(name: str):
    model, least = small(name).train(), catmodel.least_images(name)
    model(images(name, least))
    if least > 1:
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            model(images(name, least - 1))


@pytest.mark.parametrize(
    ("name", "setting", "sentence"),
    [
        (
            "cotnet50",
            {"width": 0.1},
            "gives a stage's CoT 6 channels: they must be a multiple of 8 * groups, 8, and of",
        ),
        ("cotnet50", {"width": 0.3}, "19 channels: they must be a multiple of 8 * groups, 8, and of key_groups, 4"),
        ("cotnet50", {"groups": 3}, "16 channels: they must be a multiple of 8 * groups, 24"),
        ("cotnet50", {"key_groups": 3}, "16 channels: they must be a multiple of 8 * groups, 8, and of key_groups, 3"),
        ("cat_tiny", {"mlp_ratio": 0.01}, "mlp_ratio 0.01 of 32 channels gives no hidden ones"),
    ],
)
def test_channels_that_cannot_be_divided_are_named(name: str, setting: dict, sentence: str):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        small(name, **setting)


@pytest.mark.parametrize("name", RELEASED)
def test_names_and_shapes_are_the_released_ones(name: str):
    assert {key: str(shape) for key, shape in shapes(shapes_of(name)).items()} == released_shapes(RELEASED[name])


@every_model
def test_a_small_model_has_the_same_architecture(name: str):
    """Every model has the architecture of a small model, so that the tests of small models below cover all of them."""
    assert any(small_shapes_of(name) == small_shapes_of(other) for other in ARCHITECTURES)


@every_model
def test_settings_without_decay_and_without_head(name: str):
    with torch.device("meta"):
        headless = catmodel.create_model(name, **{**settings(name), "num_classes": 0})
        model = catmodel.create_model(name, **settings(name))
    parameters = dict(model.named_parameters())
    assert all(parameters[other].ndim > 1 for other in model.no_weight_decay())
    missing = shapes(model).keys() - shapes(headless).keys()
    assert missing in ({"head.weight", "head.bias"}, {"fc.weight", "fc.bias"})
    side = model.img_size[0] if hasattr(model, "img_size") else 64
    assert headless(torch.empty(2, 3, side, side, device="meta")).shape == (2, model.num_features)


@every_architecture
def test_the_head_can_be_replaced(name: str):
    model = small(name).eval()
    features = model.forward_features(images(name))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    torch.testing.assert_close(model.forward_head(features), model(images(name)))
    model.reset_classifier(4)
    assert model(images(name)).shape == (2, 4)
    model.reset_classifier(0)
    torch.testing.assert_close(model(images(name)), model.forward_head(features, pre_logits=True))


@every_architecture
def test_gradients_reach_every_parameter(name: str):
    model = jitter(small(name)).train()
    nn.functional.cross_entropy(model(images(name, 4)), torch.tensor([3, 7, 1, 1])).backward()
    for parameter, gradient in gradients(model).items():
        assert gradient.isfinite().all() and gradient.any(), parameter


@every_architecture
def test_a_sample_does_not_see_the_others(name: str):
    model, x = jitter(small(name)).eval(), images(name, 3)
    with torch.no_grad():
        alone, together = model(x[:1]), model(x)
        assert not torch.allclose(together[0], together[1], rtol=0.01), "the images give different logits"
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-5)


@every_architecture
def test_a_saved_state_dict_gives_the_same_model(name: str):
    model, file = jitter(small(name)).eval(), io.BytesIO()
    torch.save(model.state_dict(), file)
    other = small(name).eval()
    assert not torch.equal(other(images(name)), model(images(name)))
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert torch.equal(other(images(name)), model(images(name)))


@every_architecture
def test_initial_weights(name: str):
    """Linear weights 0.02 (cat_nano: LeCun), CoTNet's convolutions He-normal (fan-out), else PyTorch's defaults."""
    model = small(name)
    cotnet = "cot" in name
    for path, module in model.named_modules():
        if isinstance(module, nn.LayerNorm | nn.BatchNorm2d | nn.GroupNorm):
            ends_branch = cotnet and path.endswith("bn3")
            assert torch.equal(module.weight, torch.full_like(module.weight, 0.0 if ends_branch else 1.0)), path
            assert not module.bias.any(), path
        elif isinstance(module, nn.Linear | nn.Conv2d):
            fan_in, fan_out = module.weight[0].numel(), module.weight.numel() // module.weight.shape[1]
            if isinstance(module, nn.Conv2d) and cotnet:
                std, zero_bias = math.sqrt(2 / fan_out), True
            elif isinstance(module, nn.Conv2d) or cotnet:
                std, zero_bias = math.sqrt(1 / (3 * fan_in)), False
            else:
                std, zero_bias = fan_in**-0.5 if name == "cat_nano" else 0.02, True
            assert module.weight.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * module.weight.numel())), path
            assert abs(module.weight.mean().item()) < 5 * std / math.sqrt(module.weight.numel()), path
            if module.bias is not None:
                assert bool(module.bias.any()) != zero_bias, path


@every_architecture
def test_bfloat16_runs_and_is_close(name: str):
    """Under autocast, forward and backward, and with weights and images in bfloat16."""
    model, x = small(name).eval(), images(name)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x)
    mixed.float().square().sum().backward()
    whole = model.bfloat16()(x.bfloat16())
    assert mixed.dtype == whole.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.float(), expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(whole.float(), expected, rtol=0.05, atol=0.05)
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


@every_architecture
@pytest.mark.parametrize("dropping", [False, True])
def test_activation_checkpointing_changes_no_gradient_and_keeps_less(name: str, dropping: bool, monkeypatch):
    """Without the generator's state, which cannot be read while a CUDA graph is recorded."""
    monkeypatch.delattr(torch, "get_rng_state")
    attention = {"cpsa_drop": 0.3, "ipsa_drop": 0.1} if name.startswith("cat") else {}
    rates = {"drop_path_rate": 0.5, **attention} if dropping else {}
    found, kept = [], []
    for enable in (False, True):
        model = jitter(small(name, **rates)).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(5)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            loss = model(images(name, 3)).square().sum()
        loss.backward()
        found.append(gradients(model))
        kept.append(sum(sizes))
    assert all(torch.equal(gradient, found[1][parameter]) for parameter, gradient in found[0].items())
    assert kept[1] < kept[0] / 2


@pytest.mark.long
@pytest.mark.parametrize("name", ["cat_tiny", "pvt_tiny", "cotnext50"])
def test_compiles_as_a_whole(name: str):
    """As a single graph. Tests the compiler's front end only, because its back end does not depend on the model."""
    model, x = jitter(small(name, stages=2)).eval(), images(name)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@every_trace
def test_exports_for_any_batch(name: str):
    model = jitter(small(name, 3 if name.startswith("se") else 2)).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images(name),), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(program.module()(images(name, 5)), model(images(name, 5)), rtol=1e-4, atol=1e-5)
