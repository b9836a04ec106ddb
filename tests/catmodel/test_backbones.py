"""Models as backbones: maps for any image size, feature_info, frozen stages."""

import copy

import pytest
import torch
from torch import nn

from tests.catmodel.small import ARCHITECTURES, images, jitter, small

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def strides(name: str) -> tuple[int, ...]:
    return (2, 4, 8) if name == "cat_nano" else (4, 8, 16, 32)


@every_architecture
@pytest.mark.parametrize("size", [(64, 96), (33, 47), (7, 90), (1, 1)])
def test_maps_for_any_image_size(name: str, size: tuple[int, int]):
    model = jitter(small(name, features_only=True)).eval()
    with torch.no_grad():
        maps = model(images(name, 2, size))
    channels = [info["num_chs"] for info in model.feature_info]
    assert [info["reduction"] for info in model.feature_info] == list(strides(name))
    expected = [
        (2, c, -(-size[0] // stride), -(-size[1] // stride)) for c, stride in zip(channels, strides(name), strict=True)
    ]
    assert [tuple(out.shape) for out in maps] == expected
    assert all(out.isfinite().all() for out in maps)


@every_architecture
def test_out_indices_select_maps_and_later_stages_are_not_built(name: str):
    whole = jitter(small(name, features_only=True)).eval()
    some = small(
        name, features_only=True, out_indices=(1, -2)
    ).eval()  # -2 is stage 2 of 4, and stage 1 of cat_nano's 3
    asked = [1] if name == "cat_nano" else [1, 2]
    assert list(some.out_indices) == asked and len(some.feature_info) == asked[-1] + 1
    weights = whole.state_dict()
    assert some.state_dict().keys() < weights.keys()
    some.load_state_dict({key: weights[key] for key in some.state_dict()})
    x = images(name, 2, (50, 39))
    maps = some.train()(x)
    sum(out.square().sum() for out in maps).backward()
    assert all(p.grad is not None for p in some.parameters()), (
        "a parameter without gradient stops data-parallel training"
    )
    some.load_state_dict({key: weights[key] for key in some.state_dict()})  # training has updated the batch norms
    expected = whole(x)
    for index, out in zip(asked, some.eval()(x), strict=True):
        torch.testing.assert_close(out, expected[index], rtol=1e-5, atol=1e-5)


@every_architecture
def test_feature_info_names_the_module_that_makes_the_map(name: str):
    model = small(name, features_only=True)
    assert all(info["module"] in dict(model.named_modules()) for info in model.feature_info)


@every_architecture
def test_frozen_stages_stay_as_they_are(name: str):
    """Weights and running statistics do not change while a surrounding detector trains."""
    later = {
        "cat": ("layers.2.", "layers.3.", "norm"),
        "pvt": ("patch_embed3", "pos_embed3", "block3", "patch_embed4", "pos_embed4", "block4"),
        "cot": ("layer3.", "layer4."),
    }["cot" if "cot" in name else name[:3]]
    model = jitter(small(name, features_only=True))
    model.freeze(2)
    nn.ModuleDict({"backbone": model}).train()
    assert {key for key, p in model.named_parameters() if p.requires_grad} == {
        k for k, _ in model.named_parameters() if k.startswith(later)
    }
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)  # would decay any parameter with a gradient
    sum(out.square().sum() for out in model(images(name, 4))).backward()
    optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed and all(key.startswith(later) for key in changed)
    statistics = {key for key in before if key.startswith(later) and key.endswith("running_mean")}
    assert statistics <= changed and bool(statistics) == ("cot" in name)


@every_architecture
def test_nothing_is_drawn_in_frozen_stages(name: str):
    rates = {"drop_path_rate": 0.9, **({"cpsa_drop": 0.5} if name.startswith("cat") else {})}
    model, x = jitter(small(name, features_only=True, **rates)).train(), images(name, 8)
    torch.manual_seed(3)
    drawn, again = model(x), model(x)
    assert not torch.equal(drawn[1], again[1])
    model.freeze(2)
    frozen, again = model.train()(x), model(x)
    assert torch.equal(frozen[1], again[1]) and not torch.equal(frozen[2], again[2])


def test_freezing_fewer_stages_trains_the_others_again():
    model = small("cotnet50").train()
    model.freeze(4)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"fc.weight", "fc.bias"}
    model.freeze(0)
    assert not any(p.requires_grad for p in model.bn1.parameters()) and not model.bn1.training
    assert all(p.requires_grad for p in model.layer1.parameters()) and model.layer1[0].bn1.training
    with pytest.raises(ValueError, match=r"freeze\(5\): must be between 0 .* and 4 "):
        model.freeze(5)


def test_a_copy_of_a_frozen_model_is_frozen():
    model = small("cotnet50", stages=1)
    model.freeze(0)
    model = copy.deepcopy(model).train()
    assert not model.bn1.training and not model.bn1.weight.requires_grad
