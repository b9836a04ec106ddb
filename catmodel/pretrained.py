"""Published checkpoints into our models. Never runs code from the file, and never leaves out a weight in silence."""

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
        as the released detectors do (a class token's entry stays as it is). A table [1, L, C] is taken to be a square
        image's, unless it comes from a state_dict() of this package's models, or a file of one: those name its size.
    fresh_head: leave the file's head out; the model keeps its own, for other classes.

    A prefix that all keys share (module., model., backbone., encoder.) is removed. The index buffers of the file must equal the model's.
    Into a features_only model go the weights without the class token, the final norm, the head and the stages that it does not have; its
    own norms stay as they are.

    Raises DoesNotFit, a ValueError that names every key which is missing, left over or of the wrong shape, or ValueError for a file that
    cannot be read; the model is then unchanged.
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
    tables = _place_positions(weights, own, model, size, last if "cls_token" in published else None, resize_positions, report)
    problems += tables.values()
    for key in (own.keys() & weights.keys()) - tables.keys():
        value, expected = weights[key], own[key]
        if not isinstance(value, Tensor):
            problems.append(f"{key}: not a tensor but {type(value).__name__}")
        elif value.shape != expected.shape:
            problems.append(f"{key}: shape {list(value.shape)}, the model's is {list(expected.shape)}{_remedy(key)}")
        elif value.is_complex() or value.is_floating_point() != expected.is_floating_point():
            problems.append(f"{key}: numbers of type {value.dtype}, the model's are {expected.dtype}")
        elif key.endswith("relative_position_index") and not torch.equal(value.to(expected), expected):
            problems.append(f"{key}: other values than the model computes, so its weights belong to another layout")
    if problems:
        raise DoesNotFit(where, sorted(problems))

    model.load_state_dict({**{key: own[key] for key in fresh}, **weights})
    return report


def published_weights(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """The state dict in a file or in what was read from one, without the prefixes that all its keys share."""
    found = _weights(source if isinstance(source, Mapping) else read_checkpoint(Path(source)))
    weights = OrderedDict(_strip_prefixes(found))
    weights._metadata = getattr(found, "_metadata", None)  # as of a module's state_dict()
    return weights


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The dict in a .safetensors file, or in a .pth file of the zip format, of which `weight_file` runs nothing.

    Raises ValueError for a file that is missing, damaged or of another format.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
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
    """What `catmodel.export`, or a run at its end, has written about a model into its .safetensors file; otherwise {}.

    {"model": {"name": …, "img_size": …, …}, "classes": names, …}; either may be missing. Raises ValueError for others.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get("catmodel", "{}")
    try:
        found = json.loads(text)
        model, classes = found.get("model", {}), found.get("classes", [])
        sound = isinstance(model, dict) and isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    except (ValueError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise ValueError(f"{path}: its metadata 'catmodel' is not what this project writes there")
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
    """Whether a classifier's key belongs to what a features_only model does without by design."""
    stages = model.out_indices[-1] + 1
    if stage := re.match(r"layers\.(\d+)\.(downsample\.)?", key):  # CAT counts its stages from 0
        return int(stage[1]) >= stages or (int(stage[1]) == stages - 1 and stage[2] is not None)
    if stage := re.match(r"(?:layer|block|patch_embed|pos_embed)(\d+)", key):  # PVT and CoTNet from 1
        return int(stage[1]) > stages
    return key.startswith((*_HEADS, "norm.", "cls_token"))


def _image_size(weights: Mapping[str, Any]) -> tuple[int, int] | None:
    """The size of the images that weights are for, where they name it: state dicts of our models do (`variants.Staged`)."""
    metadata = getattr(weights, "_metadata", None)
    for entry in metadata.values() if isinstance(metadata, dict) else ():
        size = entry.get("img_size") if isinstance(entry, dict) else None
        if isinstance(size, list | tuple) and len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size):
            return tuple(size)
    return None


def _position_tables(model: nn.Module, size: tuple[int, int]) -> dict[str, tuple[tuple[int, int], str]]:
    """The position tables of a model for images of this size: {key: (its grid, how it is interpolated)}."""
    if hasattr(model, "grids"):  # PVT
        return {f"pos_embed{i + 1}": ((size[0] // 2 ** (i + 2), size[1] // 2 ** (i + 2)), "bilinear") for i in range(len(model.grids))}
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
    """Puts the position tables of `weights` into the form of `own`. Returns {key: problem} of those that do not fit.

    size: of the images that the weights are for, where they name it. with_class: the table that begins with a class
    token's entry. resize: interpolate. report: gets what was interpolated.
    """
    problems = {}
    theirs = {key: grid for key, (grid, _) in _position_tables(model, size).items()} if size else {}
    for key, (grid, mode) in _position_tables(model, model.img_size).items() if hasattr(model, "img_size") else ():
        table = weights.get(key)
        if not isinstance(table, Tensor) or not table.is_floating_point() or table.dim() not in (3, 4) or not table.numel():
            continue  # load_published names it
        before = int(key == with_class)
        found = _grid_of(table, before, theirs.get(key), grid)
        shape = f"{key}: shape {list(table.shape)}"
        if found is None:
            problems[key] = (
                f"{shape}, of neither a square grid nor one that the file names: fill a model for images of its size by load_state_dict, "
                "and give load_published that model's state_dict(), which names it"
            )
        elif found != grid and not resize:
            ours = f"the model's is {list(own[key].shape)} of {_by(grid)} (resize_positions=True resizes it)"
            problems[key] = f"{shape} of {_by(found)} positions, {ours}"
        else:
            weights[key] = _fit_positions(table, before, found, own[key], grid, mode)
            if found != grid:
                report.resized.append(f"{key} {_by(found)} -> {_by(grid)}")
    return problems


def _grid_of(table: Tensor, before: int, named: tuple[int, int] | None, ours: tuple[int, int]) -> tuple[int, int] | None:
    """The grid of a position table [1, before + L, C] or [1, C, H, W]; None: not known.

    The former has no shape of its own. It is the one that its file names; or square, as all released ones are; or, where
    L is no square number but as large as the model's, the model's.
    """
    if table.dim() == 4:
        return tuple(table.shape[2:])
    length = table.shape[1] - before
    if named:
        return named if math.prod(named) == length else None
    side = math.isqrt(max(length, 0))
    return (side, side) if side**2 == length else ours if math.prod(ours) == length else None


def _fit_positions(table: Tensor, before: int, found: tuple[int, int], own: Tensor, grid: tuple[int, int], mode: str) -> Tensor:
    """A position table of the grid `found`, behind `before` entries, in the form of `own`, whose grid is `grid`."""
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
    """Raises DoesNotFit, with one sentence in place of a line for every weight, where CAT's attention patches have another size."""
    for key in own:
        if key.endswith("relative_position_bias_table") and getattr(published.get(key), "ndim", 0):
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
    if key.startswith(_HEADS):
        return " (fresh_head=True leaves it out, for other classes)"
    return ""
