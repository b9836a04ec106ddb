"""What tasks with a network on a backbone (`catmodel.dense.Dense`) share: first weights, and export of the backbone."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

import catmodel
from train.config import Config, ConfigError


def load_whole(
    model: nn.Module,
    weights: dict[str, Tensor],
    source: str,
    *,
    network: str,
    last: str,
    others: bool,
) -> None:
    """Fill a network with the weights of another one of its kind, from the file or folder `source`.

    network: its name, for sentences. last: prefix of the layer that classifies, which keeps its initial weights if
    `others` (the weights are of other classes). Raises ConfigError if the weights are another network's.
    """
    own = model.state_dict()
    if others:
        weights = weights | {name: own[name] for name in own if name.startswith(last)}
    different = [
        name
        for name in own.keys() | weights.keys()
        if name not in own or name not in weights or own[name].shape != weights[name].shape
    ]
    if different:
        raise ConfigError(f"model.init_from: {source} has other weights than this {network}: {min(different)}")
    model.load_state_dict(weights)


def load_classifier(model: nn.Module, weights: dict[str, Tensor], config: Config, source: str) -> list[str]:
    """Fill the backbone with a classifier's weights; position tables are interpolated to the network's grid. Returns
    sentences for the log. Raises ConfigError if they do not fit.
    """
    from catmodel.pretrained import DoesNotFit

    try:
        return model.load_classifier(weights)
    except DoesNotFit as error:
        more = f" (and {len(error.problems) - 1} more)" if len(error.problems) > 1 else ""
        raise ConfigError(
            f"model.init_from: {source} does not fit this {config.model.name}: {error.problems[0]}{more}"
        ) from error


def is_classifier(weights: dict[str, Tensor]) -> bool:
    """Whether they are a classifier's, and not those of a network on a backbone."""
    return not any(name.startswith("backbone.") for name in weights)


def other_classes(count: int, own: Sequence[str], about: dict[str, Any]) -> bool:
    """Whether weights for `count` classes, which `about` names if they are known, are of others than `own`."""
    return count != len(own) or tuple(about.get("classes", own)) != tuple(own)


def backbone_of(
    config: Config, settings: dict[str, Any], state: dict[str, Tensor]
) -> tuple[nn.Module, dict[str, Any], dict[str, Tensor]]:
    """The backbone of a network with these `settings` and weights: it, its own settings, and its weights."""
    names = {"name", "img_size", *config.model.overrides()}
    own = {key: value for key, value in settings.items() if key in names} | {"features_only": True}
    prefix = "backbone."
    weights = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    return catmodel.create_model(**own), own, weights
