"""Loading of published checkpoints. No code of a file is run, and every weight that is left out is reported."""

import json
import math
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from catmodel import weight_file

_WRAPPERS = ("model", "state_dict")  # keys under which training scripts store the weights
_PREFIXES = ("module.", "model.", "backbone.", "encoder.")  # prefixes that wrapper modules add to every key
_HEADS = ("head.", "fc.")  # prefixes of the heads' parameters


@dataclass(frozen=True)
class LoadReport:
    """Deviations of `load_published` from a one-to-one match.

    left_out: keys of the file that were not used, because the model has no such part or keeps its own head.
    fresh: keys of the model that keep their initial values.
    resized: the interpolated position tables, with the grids, e.g. "ape 56 x 56 -> 112 x 112".
    """

    left_out: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)


class DoesNotFit(ValueError):
    """The weights do not fit the model. `problems` has a line for each key."""

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
    """Load a released checkpoint of CAT, PVT or CoTNet into `model`: all weights, or none if they do not fit.

    source: a .pth file written by `torch.save` (a released file is a dict with the weights under "model"), a
        .safetensors file, or a state dict.
    rename: {dotted part of a key: new name}, for older module names, e.g. {"ipsa_1": "pre_ipsa_blocks"}.
    resize_positions: interpolate the position tables if the model was built for another img_size: CAT's bicubically,
        PVT's bilinearly, as in the released detectors. The class token's entry is not changed. A table [1, L, C] is
        assumed to be for a square image unless it comes from a state_dict() of this package or a file of one: these
        record the image size.
    fresh_head: leave out the file's head; the model keeps its own, for other classes.

    A prefix shared by all keys (module., model., backbone., encoder.) is removed. The file's index buffers must equal
    the model's. A features_only model takes no class token, final norm, head or stages that it does not have, and keeps
    its own norms.

    Raises DoesNotFit, a ValueError that names every key that is missing, unknown or has the wrong shape, and ValueError
    for a file that cannot be read. The model is then unchanged.
    """
    where = "the state dict" if isinstance(source, Mapping) else str(source)
    published = published_weights(source)
    size = _image_size(published)
    published = _rename(published, rename or {})
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
    problems = [f"missing: {key}" for key in own if key not in weights and key not in fresh]
    problems += [f"not in the model: {key}" for key in weights if key not in own]
    last = max((key for key in published if re.fullmatch(r"pos_embed\d", key)), default=None)
    with_class = last if "cls_token" in published else None
    tables = _place_positions(weights, own, model, size, with_class, resize_positions, report)
    problems += tables.values()
    for key in (own.keys() & weights.keys()) - tables.keys():
        value, expected = weights[key], own[key]
        if not isinstance(value, Tensor):
            problems.append(f"{key}: not a tensor but {type(value).__name__}")
        elif value.shape != expected.shape:
            problems.append(f"{key}: shape {list(value.shape)}, the model's is {list(expected.shape)}{_remedy(key)}")
        elif value.is_complex() or value.is_floating_point() != expected.is_floating_point():
            problems.append(f"{key}: dtype {value.dtype}, the model's is {expected.dtype}")
        elif key.endswith("relative_position_index") and not torch.equal(value.to(expected), expected):
            problems.append(f"{key}: other values than the model computes: the weights belong to another layout")
    if problems:
        raise DoesNotFit(where, sorted(problems))

    model.load_state_dict({**{key: own[key] for key in fresh}, **weights})
    return report


def published_weights(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """The state dict in a file or in its loaded contents, without the prefixes that all keys share."""
    found = _weights(source if isinstance(source, Mapping) else read_checkpoint(Path(source)))
    weights = OrderedDict(_strip_prefixes(found))
    weights._metadata = getattr(found, "_metadata", None)  # as in a module's state_dict()
    return weights


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read the dict in a .safetensors file or in a zip-format .pth file (by `weight_file`, without running code).

    Raises ValueError if the file is missing, damaged or in another format.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.suffix in (".onnx", ".pt2"):
        raise ValueError(
            f"{path}: weights are not read from {path.suffix} files: give a .safetensors or .pth file, a run or a "
            "checkpoint"
        )
    if path.suffix != ".safetensors":
        return weight_file.read(path)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = OrderedDict(load_file(path))
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
    size = about(path).get("model", {}).get("img_size")
    weights._metadata = {"": {"img_size": (size, size) if isinstance(size, int) else size}}
    return weights


def about(path: Path) -> dict[str, Any]:
    """The description that `catmodel.export` or a finished run stored in a .safetensors file; {} if there is none.

    It is {"model": {"name": ..., "img_size": ..., ...}, "classes": names, ...}, of which all keys are optional; of a
    run also "task": the section of its config. Raises ValueError for metadata of another form.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get("catmodel", "{}")
    try:
        found = json.loads(text)
        sections, classes = (found.get("model", {}), found.get("task", {})), found.get("classes", [])
        sound = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
        sound = sound and all(isinstance(section, dict) for section in sections)
    except (ValueError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise ValueError(f"{path}: its metadata 'catmodel' is not in the form that this project writes")
    return found


def _weights(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in _WRAPPERS:
        if isinstance(checkpoint.get(key), Mapping):
            return checkpoint[key]
    return checkpoint


def _strip_prefixes(weights: Mapping[str, Any]) -> dict[str, Any]:
    weights = dict(weights)
    if not weights or not all(isinstance(key, str) for key in weights):
        raise ValueError("the checkpoint holds no weights" + (" by their names" if weights else ""))
    while shared := next((prefix for prefix in _PREFIXES if all(key.startswith(prefix) for key in weights)), None):
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
    """Whether a classifier's key belongs to a part that a features_only model does not have."""
    stages = model.out_indices[-1] + 1
    if stage := re.match(r"layers\.(\d+)\.(downsample\.)?", key):  # CAT counts its stages from 0
        return int(stage[1]) >= stages or (int(stage[1]) == stages - 1 and stage[2] is not None)
    if stage := re.match(r"(?:layer|block|patch_embed|pos_embed)(\d+)", key):  # PVT and CoTNet from 1
        return int(stage[1]) > stages
    return key.startswith((*_HEADS, "norm.", "cls_token"))


def _image_size(weights: Mapping[str, Any]) -> tuple[int, int] | None:
    """The image size recorded in the weights, as state dicts of our models do (`variants.Staged`), or None."""
    metadata = getattr(weights, "_metadata", None)
    for entry in metadata.values() if isinstance(metadata, dict) else ():
        size = entry.get("img_size") if isinstance(entry, dict) else None
        if not isinstance(size, list | tuple) or len(size) != 2:
            continue
        if all(isinstance(side, int) and side > 0 for side in size):
            return tuple(size)
    return None


def _position_tables(model: nn.Module, size: tuple[int, int]) -> dict[str, tuple[tuple[int, int], str]]:
    """The position tables of a model for images of this size: {key: (grid, interpolation)}."""
    if hasattr(model, "grids"):  # PVT
        strides = {f"pos_embed{i + 1}": 2 ** (i + 2) for i in range(len(model.grids))}
        return {key: ((size[0] // stride, size[1] // stride), "bilinear") for key, stride in strides.items()}
    if getattr(model, "ape", None) is None:
        return {}
    token = model.patch_embed.patch_size
    return {"ape": ((-(-size[0] // token), -(-size[1] // token)), "bicubic")}


def _place_positions(
    weights: dict[str, Any],
    own: Mapping[str, Tensor],
    model: nn.Module,
    size: tuple[int, int] | None,
    with_class: str | None,
    resize: bool,
    report: LoadReport,
) -> dict[str, str]:
    """Convert the position tables of `weights` to the form of `own`. Returns {key: problem} for those that do not fit.

    size: image size recorded in the weights. with_class: the table that begins with the class token's entry. resize:
    interpolate tables of another grid. report: its `resized` is extended.
    """
    problems = {}
    theirs = {key: grid for key, (grid, _) in _position_tables(model, size).items()} if size else {}
    for key, (grid, mode) in _position_tables(model, model.img_size).items() if hasattr(model, "img_size") else ():
        table = weights.get(key)
        sound = isinstance(table, Tensor) and table.is_floating_point() and table.dim() in (3, 4) and table.numel() > 0
        if not sound:
            continue  # load_published reports it
        before = int(key == with_class)
        found = _grid_of(table, before, theirs.get(key), grid)
        shape = f"{key}: shape {list(table.shape)}"
        if found is None:
            problems[key] = (
                f"{shape}, which is no square grid, and the file records no image size: load it with load_state_dict "
                "into a model for images of its size, and pass that model's state_dict(), which records the size"
            )
        elif found != grid and not resize:
            ours = f"the model's is {list(own[key].shape)} of {_by(grid)} (resize_positions=True resizes it)"
            problems[key] = f"{shape} of {_by(found)} positions, {ours}"
        else:
            weights[key] = _fit_positions(table, before, found, own[key], grid, mode)
            if found != grid:
                report.resized.append(f"{key} {_by(found)} -> {_by(grid)}")
    return problems


def _grid_of(
    table: Tensor, before: int, named: tuple[int, int] | None, ours: tuple[int, int]
) -> tuple[int, int] | None:
    """The grid of a position table [1, before + L, C] or [1, C, H, W], or None if it cannot be determined.

    The first form does not determine the grid. It is the recorded one (`named`), if any; otherwise square, as in all
    released files, if L is a square number; otherwise the model's (`ours`), if it has L entries.
    """
    if table.dim() == 4:
        return tuple(table.shape[2:])
    length = table.shape[1] - before
    if named:
        return named if math.prod(named) == length else None
    side = math.isqrt(max(length, 0))
    return (side, side) if side**2 == length else ours if math.prod(ours) == length else None


def _fit_positions(
    table: Tensor, before: int, found: tuple[int, int], own: Tensor, grid: tuple[int, int], mode: str
) -> Tensor:
    """Convert a table of grid `found`, after `before` other entries, to the form of `own`, whose grid is `grid`."""
    if table.dim() == 3:
        token_1eC, table_1CHW = table[:, :before], table[:, before:].transpose(1, 2).unflatten(2, found)
    else:
        token_1eC, table_1CHW = table.new_empty(len(table), 0, table.shape[1]), table
    if found != grid:
        table_1CHW = F.interpolate(table_1CHW.float(), size=grid, mode=mode, align_corners=False)
    if own.dim() == 4:
        return table_1CHW
    table_1LC = table_1CHW.flatten(2).transpose(1, 2)
    classifies = own.shape[1] > math.prod(grid)  # a backbone has no class token
    return torch.cat([token_1eC.to(table_1LC), table_1LC], 1) if classifies else table_1LC


def _by(grid: tuple[int, int]) -> str:
    return f"{grid[0]} x {grid[1]}"


def _check_patch_size(published: Mapping[str, Any], own: Mapping[str, Tensor], model: nn.Module, where: str) -> None:
    """Raise DoesNotFit with one sentence, not a line for every weight, if CAT's attention patches have another size."""
    for key in own:
        if key.endswith("relative_position_bias_table") and getattr(published.get(key), "ndim", 0):
            theirs, ours = (math.isqrt(tables[key].shape[0]) // 2 + 1 for tables in (published, own))
            if theirs != ours:
                unit = theirs * model.patch_embed.patch_size * 2 ** (len(model.layers) - 1)
                sizes = "" if model.features_only else f", and an img_size that is a multiple of {unit}"
                problem = (
                    f"its attention patches are {theirs} x {theirs} tokens, the model's {ours} x {ours}, and weights "
                    "of cross-patch attention, which depend on that size, cannot be interpolated: create the model "
                    f"with patch_size={theirs}{sizes}"
                )
                raise DoesNotFit(where, [problem])


def _remedy(key: str) -> str:
    if key.startswith(_HEADS):
        return " (fresh_head=True leaves it out, for other classes)"
    return ""
