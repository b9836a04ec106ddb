"""Published checkpoints into our models. Never runs code from the file, and never leaves out a weight in silence."""

import math
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
_HEADS = ("head.", "fc.")  # what the families call their heads


@dataclass(frozen=True)
class LoadReport:
    """What `load_published` did beyond the one-to-one match.

    left_out: keys of the file that the model has no use for, by design or as it keeps its own head. fresh: the model's own weights that
    keep their initial values. resized: the position tables that were interpolated, and between which grids.
    """

    left_out: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)


class DoesNotFit(ValueError):
    """The weights and the model do not belong together; `problems` has a line for every key."""

    def __init__(self, where: str, problems: list[str]):
        super().__init__(f"{where} does not fit the model, nothing was loaded:\n  " + "\n  ".join(problems))
        self.problems = problems


def load_published(
    model: nn.Module,
    source: str | Path | Mapping[str, Tensor],
    rename: Mapping[str, str] | None = None,
    resize_positions: bool = False,
    fresh_head: bool = False,
) -> LoadReport:
    """Loads a released checkpoint of CAT, PVT or CoTNet into `model`, every weight of both or none.

    source: a .pth file as `torch.save` writes it (the released ones: a dict with the weights under "model"), a .safetensors file, or a
        state dict.
    rename: {dotted part of a key: its name here}, for checkpoints with older module names, e.g. {"ipsa_1": "pre_ipsa_blocks"}.
    resize_positions: where the model was built for another img_size, interpolate the position tables: CAT's bicubically, PVT's bilinearly,
        as the released detectors do (a class token's entry stays as it is).
    fresh_head: leave the file's head out; the model keeps its own, for other classes.

    A prefix that all keys share (module., model., backbone., encoder.) is removed. The index buffers of the file must equal the model's.
    Into a features_only model go the weights without the class token, the final norm, the head and the stages that it does not have; its
    own norms stay as they are.

    Raises DoesNotFit, a ValueError that names every key which is missing, left over or of the wrong shape, or ValueError for a file that
    cannot be read; the model is then unchanged.
    """
    where = "the state dict" if isinstance(source, Mapping) else str(source)
    published = _rename(published_weights(source), rename or {})
    own = model.state_dict()
    _check_patch_size(published, own, model, where)

    report = LoadReport()
    if getattr(model, "features_only", False):
        report.left_out.extend(sorted(key for key in published if _is_beyond_features(key, model)))
        report.fresh.extend(key for key in own if re.match(r"norm\d+\.", key) and key not in published)
    elif fresh_head:
        report.left_out.extend(sorted(key for key in published if key.startswith(_HEADS)))
        report.fresh.extend(key for key in own if key.startswith(_HEADS))
    left_out, fresh = set(report.left_out), set(report.fresh)
    weights = {key: value for key, value in published.items() if key not in left_out}
    for key, (grid, mode) in _position_tables(model).items():
        if key in weights and isinstance(weights[key], Tensor):
            weights[key], resized = _fit_positions(
                weights[key], own[key], grid, mode if resize_positions else None, class_token="cls_token" in published
            )
            if resized:
                report.resized.append(f"{key} {_by(resized)} -> {_by(grid)}")

    problems = [f"missing: {key}" for key in own if key not in weights and key not in fresh]
    problems += [f"not in the model: {key}" for key in weights if key not in own]
    for key in own.keys() & weights.keys():
        value, expected = weights[key], own[key]
        if not isinstance(value, Tensor):
            problems.append(f"{key}: not a tensor but {type(value).__name__}")
        elif value.shape != expected.shape:
            problems.append(f"{key}: shape {list(value.shape)}, the model's is {list(expected.shape)}{_remedy(key)}")
        elif key.endswith("relative_position_index") and not torch.equal(value, expected.to(value.device)):
            problems.append(f"{key}: other values than the model computes, so its weights belong to another layout")
    if problems:
        raise DoesNotFit(where, sorted(problems))

    model.load_state_dict({**{key: own[key] for key in fresh}, **weights})
    return report


def published_weights(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """The state dict in a file or in what was read from one, without the prefixes that all its keys share."""
    return _strip_prefixes(_weights(source if isinstance(source, Mapping) else read_checkpoint(Path(source))))


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
    stages = model.out_indices[-1] + 1
    if stage := re.match(r"layers\.(\d+)\.(downsample\.)?", key):  # CAT counts its stages from 0
        return int(stage[1]) >= stages or (int(stage[1]) == stages - 1 and stage[2] is not None)
    if stage := re.match(r"(?:layer|block|patch_embed|pos_embed)(\d+)", key):  # PVT and CoTNet from 1
        return int(stage[1]) > stages
    return key.startswith((*_HEADS, "norm.", "cls_token"))


def _position_tables(model: nn.Module) -> dict[str, tuple[tuple[int, int], str]]:
    """A model's position tables: {key: (its grid in this model, how it is interpolated)}."""
    if hasattr(model, "grids"):  # PVT
        return {f"pos_embed{i + 1}": (grid, "bilinear") for i, grid in enumerate(model.grids)}
    return {"ape": (model.grid_size, "bicubic")} if getattr(model, "ape", None) is not None else {}


def _fit_positions(
    table: Tensor, own: Tensor, grid: tuple[int, int], mode: str | None, class_token: bool
) -> tuple[Tensor, tuple[int, int] | None]:
    """A published position table, [1, L, C] of a square grid or [1, C, H, W], in the shape of `own`, whose grid is `grid`.

    Also the grid that it was interpolated from, if it was (mode None: never). One that cannot be made to fit comes back as it is.
    class_token: whether there is one, which may have an entry before the others.
    """
    if table.shape == own.shape or table.dim() not in (3, 4):
        return table, None
    if table.dim() == 3:
        side = math.isqrt(table.shape[1])
        extra = table.shape[1] - side**2
        if extra > class_token:
            return table, None
        token_1eC, table_1CHW = table[:, :extra], table[:, extra:].transpose(1, 2).unflatten(2, (side, side))
    else:
        token_1eC, table_1CHW = table.new_empty(len(table), 0, table.shape[1]), table
    found = tuple(table_1CHW.shape[2:])
    if found != grid:
        if mode is None:
            return table, None
        table_1CHW = F.interpolate(table_1CHW.float(), size=grid, mode=mode, align_corners=False)
    if own.dim() == 3:
        table_1LC = table_1CHW.flatten(2).transpose(1, 2)
        classifies = own.shape[1] > math.prod(grid)  # a backbone has no class token
        table = torch.cat([token_1eC.to(table_1LC), table_1LC], 1) if classifies else table_1LC
    else:
        table = table_1CHW
    return table, found if found != grid else None


def _by(grid: tuple[int, int]) -> str:
    return f"{grid[0]} x {grid[1]}"


def _check_patch_size(published: Mapping[str, Any], own: Mapping[str, Tensor], model: nn.Module, where: str) -> None:
    """Raises DoesNotFit, with one sentence in place of a line for every weight, where CAT's attention patches have another size."""
    for key in own:
        if key.endswith("relative_position_bias_table") and isinstance(published.get(key), Tensor):
            theirs, ours = (math.isqrt(tables[key].shape[0]) // 2 + 1 for tables in (published, own))
            if theirs != ours:
                unit = theirs * model.patch_embed.patch_size * 2 ** (len(model.layers) - 1)
                sizes = "" if model.features_only else f", and an img_size that is a multiple of {unit}"
                problem = (
                    f"its attention patches are {theirs} x {theirs} tokens, the model's {ours} x {ours}, and cross-patch attention's "
                    f"weights depend on that size and cannot be interpolated: create the model with patch_size={theirs}{sizes}"
                )
                raise DoesNotFit(where, [problem])


def _remedy(key: str) -> str:
    if key == "ape" or re.match(r"pos_embed\d", key):
        return " (resize_positions=True resizes it)"
    if key.startswith(_HEADS):
        return " (fresh_head=True leaves it out, for other classes)"
    return ""
