"""The networks, their kernels and their published weights. Importing this is cheap: torch is imported with the first model, timm never."""

import difflib
import importlib
from typing import TYPE_CHECKING, Any

from catmodel import timm_registry

if TYPE_CHECKING:
    from torch import nn

__all__ = ["create_model", "least_images", "list_models", "load_published"]

# Model name -> the module that has a function of this name. Kept here so that the list needs no torch.
_FAMILIES = {
    "catmodel.cat": ("cat_tiny", "cat_small", "cat_base", "cat_nano"),
    "catmodel.pvt": ("pvt_tiny", "pvt_small", "pvt_medium", "pvt_large"),
    "catmodel.cotnet": ("cotnet50", "cotnet101", "cotnext50", "cotnext101", "se_cotnetd50", "se_cotnetd101", "se_cotnetd152"),
}
_MODELS = {name: module for module, names in _FAMILIES.items() for name in names}


def list_models() -> list[str]:
    """The names that `create_model` takes."""
    return sorted(_MODELS)


def least_images(name: str) -> int:
    """How many images a training step of this model needs: CoTNet's gates normalise pooled images over the batch."""
    return 2 if _MODELS[name] == "catmodel.cotnet" else 1


def create_model(name: str, **overrides: Any) -> "nn.Module":
    """A freshly initialised network. Overrides are the arguments of its class, e.g. num_classes, drop_path_rate, features_only.

    Raises ValueError, naming what would be right, for an unknown name or override and for settings that do not fit together.
    """
    if name not in _MODELS:
        close = difflib.get_close_matches(name, _MODELS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"unknown model {name!r}: {hint}Models: {', '.join(list_models())}")
    return getattr(importlib.import_module(_MODELS[name]), name)(**overrides)


def load_published(model: "nn.Module", source: Any, **options: Any) -> Any:
    """Loads a released checkpoint (file or state dict) into `model`: see `catmodel.pretrained.load_published`."""
    from catmodel import pretrained

    return pretrained.load_published(model, source, **options)


timm_registry.register(list_models())
