"""Makes our models known to timm, without importing it: that takes 7 seconds, and training does not need timm.

If timm is there already, the models are registered at once. Otherwise a finder on sys.meta_path waits for `import timm` and registers
them right after.
"""

import importlib.machinery
import sys
from typing import Any


def register(names: list[str]) -> None:
    """Lets `timm.create_model` build the named models, now or as soon as timm is imported."""
    if "timm" in sys.modules:
        _register_now(names)
    else:
        sys.meta_path.insert(0, _TimmWatcher(names))


class _TimmWatcher:
    """Finds nothing itself: has the finders behind it find timm, and adds our registration to the end of its import."""

    def __init__(self, names: list[str]):
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != "timm":
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next((spec for finder in others if (spec := finder.find_spec(name, path, target)) is not None), None)
        if spec is None or spec.loader is None:
            return spec  # not installed, or not yet
        execute = spec.loader.exec_module

        def execute_and_register(module: Any) -> None:
            # Only now, for a spec is also looked up by those who merely ask whether timm is installed.
            del spec.loader.exec_module
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            execute(module)
            _register_now(self.names)

        spec.loader.exec_module = execute_and_register
        return spec


def _register_now(names: list[str]) -> None:
    from timm.models import register_model

    for name in names:
        register_model(_entry_point(name))


def _entry_point(name: str) -> Any:
    # The named arguments are those of timm.create_model, which passes a folder's or repository's config.json as pretrained_cfg.
    def build(
        pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, pretrained_model_args=None, **overrides: Any
    ) -> Any:
        import catmodel

        exported = isinstance(pretrained_cfg, dict) and pretrained_cfg.get("source") in ("local-dir", "hf-hub")
        if pretrained and not exported:
            raise ValueError(f"{name}: no weights can be downloaded; get a published file and use catmodel.load_published(model, file)")
        if exported:
            overrides.setdefault("num_classes", pretrained_cfg["num_classes"])
        model = catmodel.create_model(name, **overrides)
        if exported:
            model.pretrained_cfg = model.default_cfg = {**pretrained_cfg, **(pretrained_cfg_overlay or {})}
        if pretrained:
            _load_exported(model, pretrained_cfg, cache_dir)
        if getattr(model, "features_only", False):
            from timm.models import FeatureInfo

            # What timm's own backbones have, for callers of model.feature_info.channels().
            model.feature_info = FeatureInfo(model.feature_info, model.out_indices)
        return model

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"catmodel's {name}; see catmodel.create_model."
    return build


def _load_exported(model: Any, config: dict[str, Any], cache_dir: Any) -> None:
    """The weights that `catmodel.export` wrote beside a config.json; at another number of classes without the head, as timm does it."""
    from pathlib import Path

    from catmodel import pretrained

    if config["source"] == "local-dir":
        file = Path(config["file"]) / "model.safetensors"
    else:
        from timm.models._hub import download_from_hf

        file = Path(download_from_hf(config["hf_hub_id"], "model.safetensors", cache_dir))
    others = getattr(model, "num_classes", config["num_classes"]) != config["num_classes"]
    pretrained.load_published(model, file, resize_positions=True, fresh_head=others)
