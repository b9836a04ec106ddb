"""A model into files that need none of this project's code: safetensors, ONNX, torch.export's .pt2, and a folder for timm and the Hub.

A file is written under a temporary name, held against the model itself on random images of several batch sizes (of dense maps: of
several image sizes too), and gets its name only where both agree. All of it in fp32, on the CPU, by the plain path without kernels.
"""

import importlib.util
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

TOLERANCE = 1e-4
SUFFIXES = (".safetensors", ".onnx", ".pt2")
SMALLEST = 64  # pixels of a side, of images for dense maps
METADATA = "catmodel"  # the key under which a file says what it is

# Of images for dense maps, (height, width), as parts of the example's: no multiple of anything; the smallest; and whole patches.
EXAMPLE = (240, 264)
SIZES = ((97, 131), (SMALLEST, SMALLEST), (224, 224))
BATCHES = (1, 2, 5)


class ExportError(Exception):
    """The file does not compute what the model computes."""

    exit_code = 70


class CannotExport(ValueError):
    """What was asked for cannot be exported; the message says why, and the remedy."""

    exit_code = 78


def check_target(to: str, features_only: bool) -> None:
    """Raises CannotExport, before torch is imported, for a target that `export` does not know or has not the libraries for."""
    if not is_hub(to) and Path(to).suffix not in SUFFIXES:
        raise CannotExport(f"--to {to}: must end in {', '.join(SUFFIXES)}, or in / for a folder that timm and the Hugging Face Hub read")
    if is_hub(to) and features_only:
        raise CannotExport("a folder for timm holds the classifier, and timm takes the maps from it: create_model(…, features_only=True)")
    if Path(to).suffix == ".onnx" and any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")):
        raise CannotExport(f"--to {to} needs onnx, onnxscript and onnxruntime: pip install 'cat-training[export]'")


def is_hub(to: str) -> bool:
    return to.endswith("/")


def export(model: "nn.Module", to: str, about: dict[str, Any]) -> float:
    """Write `model` to the file `to`, or, where that ends in "/", the folder. Returns the largest difference from the model.

    about: {"model": {"name": …, the arguments of catmodel.create_model}, "classes": names, "mean": [3], "std": [3], "interpolation",
    "eval_crop"}; goes into the file (JSON, under "catmodel"). A difference is relative to the largest output, where that is above 1.
    The batch size is free; so are, for features_only models, height and width from 64 pixels on.
    Raises ExportError where the difference is above 1e-4, CannotExport for a model that its format cannot hold.
    """
    import torch

    model.eval().requires_grad_(False)
    if hasattr(model, "set_kernels"):
        model.set_kernels(False)
    path = Path(to)
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        run = _HOW[path.suffix if not is_hub(to) else "/"](model, temporary, about)
        difference = _largest_difference(model, run, about["model"])
        if not difference <= TOLERANCE:
            raise ExportError(f"{to} was not written: its outputs differ by {difference:.1e} from the model's, more than {TOLERANCE:.0e}")
        if temporary.is_dir():
            path.mkdir(exist_ok=True)
            for file in temporary.iterdir():
                os.replace(file, path / file.name)
        else:
            os.replace(temporary, path)
    return difference


def _largest_difference(model: "nn.Module", run: Callable[["Tensor"], Sequence["Tensor"]], settings: dict) -> float:
    import torch

    generator = torch.Generator().manual_seed(0)
    sizes = [EXAMPLE, *SIZES] if model.features_only else [_image_size(settings)] * len(BATCHES)
    largest = 0.0
    for number, size in enumerate(sizes):
        images = torch.randn(BATCHES[number % len(BATCHES)], settings.get("in_chans", 3), *size, generator=generator)
        expected, found = _outputs(model(images)), run(images)
        for want, have in zip(expected, found, strict=True):
            if want.shape != have.shape:
                raise ExportError(f"for images of {list(images.shape)} the file gives {list(have.shape)}, the model {list(want.shape)}")
            error = ((want - have).abs().max() / want.abs().max().clamp(min=1)).item()
            largest = error if error != error else max(largest, error)  # a NaN is no small difference
            if largest != largest:
                return largest
    return largest


def _image_size(settings: dict) -> tuple[int, int]:
    size = settings["img_size"]
    return (size, size) if isinstance(size, int) else tuple(size)


def _outputs(found: Any) -> list["Tensor"]:
    return list(found) if isinstance(found, list | tuple) else [found]


# --- formats ---------------------------------------------------------------------------------------------------------------------------


def _to_safetensors(model: "nn.Module", path: Path, about: dict) -> Callable:
    from safetensors.torch import load_file, save

    import catmodel

    # Not by save_file, whose files only their owner can read.
    path.write_bytes(save({name: value.contiguous() for name, value in model.state_dict().items()}, {METADATA: json.dumps(about)}))
    again = catmodel.create_model(**about["model"]).eval()
    again.load_state_dict(load_file(path))
    return lambda images: _outputs(again(images))


def _to_pt2(model: "nn.Module", path: Path, about: dict) -> Callable:
    import torch

    torch.export.save(_program(model, about), path, extra_files={METADATA: json.dumps(about)})
    module = torch.export.load(path).module()
    return lambda images: _outputs(module(images))


def _to_onnx(model: "nn.Module", path: Path, about: dict) -> Callable:
    import operator

    import torch
    from onnxscript import INT64, opset18

    def floor_divide(dividend: INT64, divisor: INT64) -> INT64:
        """As Python does it: sizes are rounded up by -(-length // multiple), and ONNX's Div, to which torch translates //, cuts off."""
        return opset18.Div(opset18.Sub(dividend, opset18.Mod(dividend, divisor)), divisor)

    program = _program(model, about)
    names = [f"map{i}" for i in model.out_indices] if model.features_only else ["logits"]
    onnx = torch.onnx.export(
        program,
        input_names=["images"],
        output_names=names,
        external_data=False,
        verbose=False,
        custom_translation_table={operator.floordiv: floor_divide},
    )
    onnx.model.metadata_props[METADATA] = json.dumps(about)
    onnx.save(path)

    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(array) for array in session.run(None, {"images": images.numpy()})]


def _program(model: "nn.Module", about: dict):
    """The model as torch.export's graph, with the batch size left open, and for dense maps height and width."""
    import torch
    from torch.export import Dim

    settings = about["model"]
    if model.features_only and settings.get("shifted_windows"):
        raise CannotExport("shifted windows shift where an image has more than one patch: a graph for any image size cannot hold both")
    dims = {0: Dim("batch")}
    if model.features_only:
        dims |= {2: Dim("height", min=SMALLEST), 3: Dim("width", min=SMALLEST)}
    images = torch.randn(2, settings.get("in_chans", 3), *(EXAMPLE if model.features_only else _image_size(settings)))
    program = torch.export.export(model, (images,), dynamic_shapes=(dims,), prefer_deferred_runtime_asserts_over_guards=True)
    if model.features_only:
        # What is asserted of the example's size is how its tensors lie in memory (whether a reshape copies), which changes no value.
        # `export` holds the graph against the model at sizes for which it is otherwise.
        for node in list(program.graph.nodes):
            if node.target is torch.ops.aten._assert_scalar.default:
                program.graph.erase_node(node)
        program.graph.eliminate_dead_code()
        program.graph_module.recompile()
    return program


def _to_hub(model: "nn.Module", folder: Path, about: dict) -> Callable:
    """config.json and model.safetensors, as timm writes and reads them; see `timm_registry`."""
    folder.mkdir()
    settings = dict(about["model"])
    _to_safetensors(model, folder / "model.safetensors", about)
    name = settings.pop("name")
    config = {
        "architecture": name,
        "num_classes": len(about["classes"]),
        "num_features": model.num_features,
        "label_names": about["classes"],
        "model_args": {key: value for key, value in settings.items() if key != "num_classes"},
        "pretrained_cfg": {
            "input_size": [settings.get("in_chans", 3), *_image_size(settings)],
            "fixed_input_size": True,
            "interpolation": about["interpolation"],
            "crop_pct": about["eval_crop"],
            "mean": about["mean"],
            "std": about["std"],
            "num_classes": len(about["classes"]),
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    import timm

    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return lambda images: [again(images)]


_HOW = {".safetensors": _to_safetensors, ".pt2": _to_pt2, ".onnx": _to_onnx, "/": _to_hub}
