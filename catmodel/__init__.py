"""The networks, their Triton kernels and their published weights.

Importing this package imports neither torch nor timm: `create_model` imports torch, `register_timm` imports timm.
"""

import difflib
import functools
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "create_detector",
    "create_model",
    "create_segmenter",
    "least_images",
    "list_models",
    "load_published",
    "register_timm",
]

# Module -> the models it defines, each a function of that name. With this list, `list_models` need not import torch.
_FAMILIES = {
    "catmodel.cat": ("cat_tiny", "cat_small", "cat_base", "cat_nano"),
    "catmodel.pvt": ("pvt_tiny", "pvt_small", "pvt_medium", "pvt_large"),
    "catmodel.cotnet": (
        *("cotnet50", "cotnet101", "cotnext50", "cotnext101"),
        *("se_cotnetd50", "se_cotnetd101", "se_cotnetd152"),
    ),
}
_MODELS = {name: module for module, names in _FAMILIES.items() for name in names}


def list_models() -> list[str]:
    """The names that `create_model` accepts, sorted."""
    return sorted(_MODELS)


def least_images(name: str) -> int:
    """The smallest batch that the model can train on: 2 for CoTNet, whose gates normalise over the batch, else 1."""
    return 2 if _MODELS[name] == "catmodel.cotnet" else 1


def create_model(name: str, **overrides: Any) -> "nn.Module":
    """Build a network with initial weights drawn from torch's default generator.

    overrides: arguments of the model's class, e.g. num_classes, drop_path_rate, features_only.

    Raises ValueError for unknown names and overrides, with the closest match, and for settings that contradict each
    other.
    """
    if name not in _MODELS:
        close = difflib.get_close_matches(name, _MODELS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"unknown model {name!r}: {hint}Models: {', '.join(list_models())}")
    return getattr(importlib.import_module(_MODELS[name]), name)(**overrides)


def create_segmenter(name: str, num_classes: int, **options: Any) -> "nn.Module":
    """Build Semantic FPN on the backbone `name`; see `catmodel.semantic_fpn.create_segmenter`."""
    from catmodel import semantic_fpn

    return semantic_fpn.create_segmenter(name, num_classes, **options)


def create_detector(kind: str, name: str, num_classes: int, **options: Any) -> "nn.Module":
    """Build RetinaNet, FCOS or ATSS on the backbone `name`; see `catmodel.detection.detector.create_detector`."""
    from catmodel.detection import detector

    return detector.create_detector(kind, name, num_classes, **options)


def load_published(model: "nn.Module", source: Any, **options: Any) -> Any:
    """Load a released checkpoint (a file or a state dict) into `model`; see `catmodel.pretrained.load_published`."""
    from catmodel import pretrained

    return pretrained.load_published(model, source, **options)


@functools.cache
def register_timm() -> None:
    """Register all models with timm, so that `timm.create_model` builds them. Repeated calls do nothing."""
    from catmodel import timm_registry

    timm_registry.register(list_models(), create_model)
