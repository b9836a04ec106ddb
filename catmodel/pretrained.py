"""Published checkpoints into our models. Never runs code from the file, and never leaves out a weight in silence."""

import pickle
import re
import types
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_WRAPPERS = ("model", "state_dict")  # where training scripts keep the weights in their checkpoint
_PREFIXES = ("module.", "model.", "backbone.", "encoder.")  # what wrapper modules put before every key


@dataclass(frozen=True)
class LoadReport:
    """What `load_published` did beyond the one-to-one match, in features_only models.

    left_out: keys of the file that such a model has no use for. fresh: the model's own norms, which keep their initial values.
    """

    left_out: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)


def load_published(
    model: nn.Module,
    source: str | Path | Mapping[str, Tensor],
    rename: Mapping[str, str] | None = None,
    resize_ape: bool = False,
) -> LoadReport:
    """Loads a released checkpoint into `model`, every weight of both or none.

    source: a .pth file as `torch.save` writes it (the released ones: a dict with the weights under "model"), a .safetensors file, or a
        state dict.
    rename: {dotted part of a key: its name here}, for checkpoints with older module names, e.g. {"ipsa_1": "pre_ipsa_blocks"}.
    resize_ape: resize the absolute position bicubically where the model was built for another img_size.

    A prefix that all keys share (module., model., backbone., encoder.) is removed. The index buffers of the file must equal the model's.
    Into a features_only model go the weights without the final norm, the head and the stages that it does not have; its own norms stay
    as they are.

    Raises ValueError that names every key which is missing, left over or of the wrong shape; the model is then unchanged.
    """
    published = source if isinstance(source, Mapping) else read_checkpoint(Path(source))
    published = _strip_prefixes(_weights(published))
    published = _rename(published, rename or {})
    features_only = getattr(model, "features_only", False)
    own = model.state_dict()

    report = LoadReport()
    if features_only:
        report.left_out.extend(sorted(key for key in published if _is_beyond_features(key, model)))
        report.fresh.extend(key for key in own if re.match(r"norm\d+\.", key) and key not in published)
    left_out, fresh = set(report.left_out), set(report.fresh)
    weights = {key: value for key, value in published.items() if key not in left_out}
    if "ape" in weights and "ape" in own:
        weights["ape"] = _fit_ape(weights["ape"], own["ape"], resize_ape)

    problems = [f"missing: {key}" for key in own if key not in weights and key not in fresh]
    problems += [f"not in the model: {key}" for key in weights if key not in own]
    for key in own.keys() & weights.keys():
        value, expected = weights[key], own[key]
        if not isinstance(value, Tensor):
            problems.append(f"{key}: not a tensor but {type(value).__name__}")
        elif value.shape != expected.shape:
            problems.append(f"{key}: shape {list(value.shape)}, the model's is {list(expected.shape)}{_remedy(key)}")
        elif not expected.is_floating_point() and not torch.equal(value, expected.to(value.device)):
            problems.append(f"{key}: other values than the model computes, so its weights belong to another layout")
    if problems:
        where = "the state dict" if isinstance(source, Mapping) else str(source)
        raise ValueError(f"{where} does not fit the model, nothing was loaded:\n  " + "\n  ".join(sorted(problems)))

    model.load_state_dict({**{key: own[key] for key in fresh}, **weights})
    return report


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The dict in a .safetensors file, or in a .pth file of the zip format.

    Of the latter, all but tensors and plain containers becomes inert stubs.
    Raises ValueError for a file that is missing, damaged or of another format.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path}: neither a .safetensors file nor a zip file as torch.save writes it since PyTorch 1.6: "
            "it is damaged, or must be saved again with a newer PyTorch"
        )
    # weights_only=True refuses the released files, whose `config` is a pickled yacs CfgNode. Hence our own unpickler, which runs nothing
    # and skips what it does not know. torch.load takes it as a module, and subclasses its Unpickler to find the storages.
    inert_pickle = types.SimpleNamespace(__name__="inert_pickle", Unpickler=_InertUnpickler)
    try:
        checkpoint = torch.load(path, map_location="cpu", pickle_module=inert_pickle, weights_only=False)
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"{path}: not a readable checkpoint ({type(error).__name__}: {error})") from error
    if not isinstance(checkpoint, dict) or isinstance(checkpoint, _Stub):
        raise ValueError(f"{path}: holds a {type(checkpoint).__name__}, not a dict of weights")
    return checkpoint


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_hooks_and_flags: Any) -> Tensor:
    return torch._utils._rebuild_tensor(storage, offset, size, stride)


def _parameter(data: Tensor, *_hooks_and_flags: Any) -> Tensor:
    return data


# All that a file may name: how torch.save describes a tensor, and containers that cannot do anything.
# Whole pairs, so that no attribute of an allowed object is in reach; our own functions, so that a file can change nothing in torch.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("torch", "Size"): torch.Size,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    **{("torch", str(dtype).removeprefix("torch.")): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)},
}


class _Stub(dict):
    """Stands for an object whose class we do not load. Takes whatever a pickle may do to an object, and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()

    __hash__ = object.__hash__  # may be the key of a dict

    def __setstate__(self, state: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass

    def add(self, item: Any) -> None:
        pass


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # A fresh class for each name: it reads well in an error, and what one pickle does to it cannot reach another.
        return _ALLOWED.get((module, name)) or type(f"{module}.{name}", (_Stub,), {})


def _weights(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in _WRAPPERS:
        if isinstance(checkpoint.get(key), Mapping):
            return checkpoint[key]
    return checkpoint


def _strip_prefixes(weights: Mapping[str, Any]) -> dict[str, Any]:
    weights = dict(weights)
    if not weights:
        raise ValueError("the checkpoint holds no weights")
    while shared := next((prefix for prefix in _PREFIXES if all(str(key).startswith(prefix) for key in weights)), None):
        weights = {key.removeprefix(shared): value for key, value in weights.items()}
    return weights


def _rename(weights: Mapping[str, Any], table: Mapping[str, str]) -> dict[str, Any]:
    for old, new in table.items():
        pattern = re.compile(rf"(?<![^.]){re.escape(old)}(?![^.])")  # whole dotted parts only
        renamed = {pattern.sub(lambda _, new=new: new, key): value for key, value in weights.items()}
        if len(renamed) < len(weights):
            raise ValueError(f"rename {old!r} -> {new!r}: gives two keys the same name")
        if renamed.keys() == weights.keys():
            raise ValueError(f"rename {old!r} -> {new!r}: matches no key")
        weights = renamed
    return dict(weights)


def _is_beyond_features(key: str, model: nn.Module) -> bool:
    """Whether a classifier's key belongs to what a features_only model does without by design."""
    stages = len(model.layers)
    stage = re.match(r"layers\.(\d+)\.(downsample\.)?", key)
    if stage:
        return int(stage[1]) >= stages or (int(stage[1]) == stages - 1 and stage[2] is not None)
    return key.startswith(("norm.", "head."))


def _fit_ape(ape: Tensor, own: Tensor, resize: bool) -> Tensor:
    """A published position table [1, L, C] (or [1, C, H, W]) in the shape of `own`; unchanged where it cannot be."""
    if not isinstance(ape, Tensor):
        return ape
    if ape.dim() == 3 and (own.dim() == 4 or resize):  # the published ones are of square images
        side = int(ape.shape[1] ** 0.5)
        if side * side != ape.shape[1]:
            return ape
        ape = ape.transpose(1, 2).unflatten(2, (side, side))
    if resize and ape.dim() == 4:
        side = int(own.shape[1] ** 0.5)
        size = own.shape[2:] if own.dim() == 4 else (side, side)
        if tuple(ape.shape[2:]) != tuple(size):
            ape = F.interpolate(ape, size=size, mode="bicubic", align_corners=False)
    return ape.flatten(2).transpose(1, 2) if own.dim() == 3 and ape.dim() == 4 else ape


def _remedy(key: str) -> str:
    if key == "ape":
        return " (resize_ape=True resizes it)"
    if key.startswith("head."):
        return " (create the model with the checkpoint's num_classes, load, then model.reset_classifier)"
    return ""
