"""Registration of our models with timm. Imports timm, which takes seconds and which training does not need."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from timm.models import FeatureInfo, register_model

from catmodel.pretrained import load_published


def register(names: Sequence[str], create_model: Callable[..., Any]) -> None:
    """Register the named models, which create_model(name, **overrides) builds, with timm."""
    for name in names:
        register_model(_entry_point(name, create_model))


def _entry_point(name: str, create_model: Callable[..., Any]) -> Callable[..., Any]:
    # The named arguments are those of timm.create_model. For local-dir: and hf-hub:, pretrained_cfg is config.json.
    def build(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Any = None,
        cache_dir: Any = None,
        pretrained_model_args: Any = None,
        **overrides: Any,
    ) -> Any:
        exported = isinstance(pretrained_cfg, dict) and pretrained_cfg.get("source") in ("local-dir", "hf-hub")
        if pretrained and not exported:
            raise ValueError(
                f"{name}: no weights can be downloaded; get a published file and use "
                "catmodel.load_published(model, file)"
            )
        if exported:
            overrides.setdefault("num_classes", pretrained_cfg["num_classes"])
        model = create_model(name, **overrides)
        if exported:
            model.pretrained_cfg = model.default_cfg = {**pretrained_cfg, **(pretrained_cfg_overlay or {})}
        if pretrained:
            _load_exported(model, pretrained_cfg, cache_dir)
        if getattr(model, "features_only", False):
            # As in timm's own backbones, for calls such as model.feature_info.channels().
            model.feature_info = FeatureInfo(model.feature_info, model.out_indices)
        return model

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"catmodel's {name}; see catmodel.create_model."
    return build


def _load_exported(model: Any, config: dict[str, Any], cache_dir: Any) -> None:
    """Load the weights written by `catmodel.export`, without the head if the number of classes differs."""
    if config["source"] == "local-dir":
        file = Path(config["file"]) / "model.safetensors"
    else:
        from timm.models._hub import download_from_hf

        file = Path(download_from_hf(config["hf_hub_id"], "model.safetensors", cache_dir))
    others = getattr(model, "num_classes", config["num_classes"]) != config["num_classes"]
    load_published(model, file, resize_positions=True, fresh_head=others)
