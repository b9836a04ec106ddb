"""Which parameters weight decay applies to."""

import pytest
import torch

import catmodel
from train.config import ConfigError
from train.config_sections import OptimizerConfig
from train.engine.optimizer import build_optimizer


def without_decay(model: torch.nn.Module, **settings) -> set[str]:
    """Names of the parameters without decay, of an optimizer with a decay of 0.1."""
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.1, **settings))
    decays = {value: group["weight_decay"] for group in optimizer.param_groups for value in group["params"]}
    assert decays.keys() == set(model.parameters()) and set(decays.values()) <= {0.0, 0.1}
    return {name for name, value in model.named_parameters() if not decays[value]}


@pytest.fixture
def model():
    return catmodel.create_segmenter("cat_nano", 5)


def test_without_the_setting_the_models_rule_holds(model):
    names = dict(model.named_parameters())
    expected = {name for name, value in names.items() if value.ndim == 1} | model.no_weight_decay()
    assert without_decay(model) == expected == without_decay(model, layer_decay=0.5)
    assert {"head.conv_seg.bias", "head.scale_heads.0.0.bn.weight", "backbone.ape"} <= expected


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_the_setting_replaces_it(model, layer_decay):
    """CAT's published recipe for segmentation: biases, absolute position and the head's batch norms decay."""
    found = without_decay(model, no_decay=["norm", "relative_position_bias_table"], layer_decay=layer_decay)
    names = [name for name, _ in model.named_parameters()]
    tables = {name for name in names if name.endswith("relative_position_bias_table")}
    norms = {name for name in names if name.rsplit(".", 2)[1].startswith("norm")}
    assert tables and norms and found == tables | norms
    assert not without_decay(model, no_decay=[], layer_decay=layer_decay)


def test_a_fragment_of_no_name_is_refused(model):
    with pytest.raises(ConfigError, match="no parameter's name contains 'nrom'; leave it out"):
        without_decay(model, no_decay=["norm", "nrom"])
