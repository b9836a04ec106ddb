"""The public behaviour of CAT models: sizes, options, randomness, errors."""

import pytest
import torch
from torch import nn

import catmodel
from catmodel.layers import DropPathAdd, draw_block_scales, draw_scales


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def nano(**overrides) -> nn.Module:
    torch.manual_seed(0)
    return catmodel.create_model("cat_nano", **overrides)


def images(n: int = 2, size: int = 32) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def jitter(model: nn.Module) -> nn.Module:
    """Move the weights far from the initial ones, which are so small that attention is nearly uniform."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return model


@pytest.mark.parametrize(
    "name, backbone, drop_path",
    [("cat_tiny", None, 0.1), ("cat_small", 36_526_602, 0.2), ("cat_base", 50_764_266, 0.3)],
)
def test_published_rates_and_backbones(name: str, backbone: int | None, drop_path: float):
    with torch.device("meta"):
        model, dense = catmodel.create_model(name), catmodel.create_model(name, features_only=True)
    assert backbone is None or count(dense) == backbone
    assert model.layers[0].pre_ipsa_blocks[0].add.rate == 0.0
    assert model.layers[-1].post_ipsa_blocks[-1].add.rate == pytest.approx(drop_path)
    assert model.layers[0].cpsa_blocks[0].attn.dropout == 0.2


def test_drop_path_grows_by_cab_and_is_shared_inside_one():
    model = nano(depths=(1, 2, 1), drop_path_rate=0.3)
    rates = [
        [block.add.rate for block in cab]
        for stage in model.layers
        for cab in zip(stage.pre_ipsa_blocks, stage.cpsa_blocks, stage.post_ipsa_blocks, strict=True)
    ]
    assert rates == [pytest.approx([r] * 3) for r in (0.0, 0.1, 0.2, 0.3)]


def test_nano_trains_and_has_the_promised_size():
    model = nano()
    assert 1_000_000 < count(model) < 2_000_000
    x, y = images(8), torch.arange(8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert all(p.grad is not None for p in model.parameters())


def test_initial_positions_are_as_published():
    torch.manual_seed(0)
    model = catmodel.create_model("cat_tiny", depths=(1, 1, 1, 1))
    positions = {name: p for name, p in model.named_parameters() if name == "ape" or name.endswith("bias_table")}
    assert len(positions) == 9
    for name, p in positions.items():
        assert abs(p.std().item() - 0.02) < 0.02 * 4 / (2 * p.numel()) ** 0.5, name
        assert abs(p.mean().item()) < 0.02 * 5 / p.numel() ** 0.5, name


def test_drop_path_is_drawn_per_sample_and_keeps_the_mean():
    add = DropPathAdd(0.25).train()
    x, branch = torch.zeros(4000, 3, 2), torch.ones(4000, 3, 2)
    torch.manual_seed(0)
    out = add(x, branch, *draw_scales([add], x))
    assert torch.equal(out, out[:, :1, :1].expand_as(out)), "a sample's branch is kept or dropped as a whole"
    values = out[:, 0, 0]
    assert torch.all((values == 0) | (values == 1 / 0.75))
    assert abs((values == 0).float().mean().item() - 0.25) < 0.03
    assert draw_scales([add.eval()], x) == [None] and torch.equal(add(x, branch, None), branch)


def test_drop_path_draws_attention_and_mlp_independently():
    model = nano(depths=(1,), num_heads=(2,), drop_path_rate=0.0).train()
    block = model.layers[0].pre_ipsa_blocks[0]
    block.add.rate = 0.5
    block.attn.forward = lambda x: torch.ones_like(x)
    block.mlp.forward = lambda x, fused: torch.full_like(x, 10.0)
    x = torch.zeros(400, 16, 32)
    out = block(x, *draw_block_scales([block], x))[:, 0, 0]
    assert set(out.tolist()) == {0.0, 2.0, 20.0, 22.0}


def test_randomness_follows_the_default_generator_and_stops_in_eval():
    model, x = jitter(nano(drop_path_rate=0.5, cpsa_drop=0.2)), images(4)
    torch.manual_seed(3)
    first, other = model(x), model(x)
    torch.manual_seed(3)
    assert torch.equal(first, model(x)) and not torch.equal(first, other)
    model.eval()
    assert torch.equal(model(x), model(x))


def test_activation_checkpointing_of_a_backbone_changes_no_gradient():
    model, grads = jitter(nano(features_only=True, cpsa_drop=0.3)).train(), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(5)
        sum(out.square().sum() for out in model(images(1, 37))).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    "overrides, changes_parameters",
    [
        ({"patch_embed": "slice"}, False),
        ({"cpsa_num_heads": 4}, False),
        ({"shifted_windows": True}, False),
        ({"ape": False}, True),
    ],
)
def test_ablations_compute_something_else(overrides: dict, changes_parameters: bool):
    plain, ablated = nano().eval(), nano(**overrides).eval()
    assert (count(plain) != count(ablated)) == changes_parameters
    jitter(plain)
    state = {
        k: v.reshape(ablated.state_dict()[k].shape) for k, v in plain.state_dict().items() if k in ablated.state_dict()
    }
    ablated.load_state_dict(state)
    x = images()
    assert not torch.allclose(plain(x), ablated(x), atol=1e-3)
    ablated.train()(x).sum().backward()
    assert all(p.grad is not None for p in ablated.parameters())


def test_slicing_is_the_convolution_with_reordered_weights():
    conv, slices = jitter(nano()).eval(), nano(patch_embed="slice").eval()
    state = conv.state_dict()
    state["patch_embed.proj.weight"] = (
        state["patch_embed.proj.weight"].permute(0, 3, 2, 1).flatten(1)
    )  # [C, in, dy, dx] -> [C, (dx dy in)]
    slices.load_state_dict(state)
    torch.testing.assert_close(conv(images()), slices(images()))


def test_shift_is_in_the_second_ipsa_alone():
    stage = nano(shifted_windows=True).layers[0]
    assert stage.pre_ipsa_blocks[0].attn.shift == 0
    assert stage.post_ipsa_blocks[0].attn.shift == 2


def test_dense_maps_at_the_training_size_are_the_classifiers():
    classifier, dense = jitter(nano()).eval(), nano(features_only=True).eval()
    catmodel.load_published(dense, classifier.state_dict())
    dense.norm2.load_state_dict(classifier.norm.state_dict())
    x = images()
    torch.testing.assert_close(dense(x)[-1], classifier.forward_features(x).permute(0, 3, 1, 2), rtol=0, atol=1e-5)


def test_padding_is_zero_after_the_norm():
    """A map padded by the model differs from an image padded beforehand, whose padding the norm's bias changes."""
    model = jitter(nano(features_only=True, depths=(1,), num_heads=(2,))).eval()
    x = images(1)[..., :30]
    assert not torch.allclose(model(x)[0], model(nn.functional.pad(x, (0, 2)))[0][..., :15], atol=1e-3)


def test_no_weight_decay_names_positions_only():
    model = nano()
    names = model.no_weight_decay()
    assert names <= dict(model.named_parameters()).keys()
    assert "ape" in names and len(names) == 1 + 2 * sum((1, 1, 2))


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"img_size": 40}, r"multiples of 32.*Nearest: \(32, 32\).*features_only"),
        ({"img_size": (32, 0)}, r"Nearest: \(32, 32\)"),
        ({"num_heads": (2, 4)}, "one number per stage"),
        ({"num_heads": (3, 4, 8)}, "num_heads 3 does not divide the 32 channels"),
        ({"cpsa_num_heads": 3}, "cpsa_num_heads 3"),
        ({"patch_embed": "fold"}, "must be 'conv' or 'slice'"),
        ({"drop_path_rate": 1.0}, r"must be in \[0, 1\)"),
        ({"out_indices": (0,)}, "needs features_only"),
        ({"features_only": True, "out_indices": (5,)}, "stages of 0 to 2"),
        ({"drop_pth_rate": 0.1}, "did you mean 'drop_path_rate'"),
        ({"xyz": 1}, "CAT takes img_size"),
    ],
)
def test_wrong_settings_are_named(overrides: dict, message: str):
    with pytest.raises(ValueError, match=message):
        nano(**overrides)


def test_wrong_names_and_images_are_named():
    with pytest.raises(ValueError, match="did you mean 'cat_tiny'.*cat_base"):
        catmodel.create_model("cat_tny")
    with pytest.raises(ValueError, match="built for .32, 32."):
        nano()(images(1, 64))
    assert nano(img_size=64)(images(1, 64)).shape == (1, 10)
    assert {"cat_tiny", "cat_small", "cat_base", "cat_nano"} <= set(catmodel.list_models())
