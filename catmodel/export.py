"""Export of a model to safetensors, ONNX, torch.export's .pt2, or a folder for timm and the Hugging Face Hub.

A file is written under a temporary name and compared with the model on random images of several batch sizes (and, for
dense maps and segmentation, of several image sizes). It is renamed only if both agree. Everything runs in fp32 on the
CPU, without the Triton kernels.
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
    from torch.export import ExportedProgram

TOLERANCE = 1e-4
SUFFIXES = (".safetensors", ".onnx", ".pt2")
SMALLEST = 64  # pixels: the shortest side of images of any size
METADATA = "catmodel"  # the metadata key of the model's description

# (height, width) of images of any size: of the traced example, whose map needs padding to whole patches; and, for
# the comparison, odd sides, the smallest sides, and whole patches.
EXAMPLE = (240, 264)
SIZES = ((97, 131), (SMALLEST, SMALLEST), (224, 224))
BATCHES = (1, 2, 5)


class ExportError(Exception):
    """The exported file does not compute what the model computes."""


class CannotExport(ValueError):
    """The request cannot be exported. The message gives the reason and the remedy."""


def check_target(to: str, features_only: bool) -> None:
    """Check the target of `export` without importing torch.

    Raises CannotExport if the format is unknown, cannot hold dense maps, or needs libraries that are not installed.
    """
    if not is_hub(to) and Path(to).suffix not in SUFFIXES:
        raise CannotExport(
            f"{to}: must end in {', '.join(SUFFIXES)}, or in / for a folder that timm and the Hugging Face Hub read"
        )
    if is_hub(to) and features_only:
        raise CannotExport(
            f"{to}: a folder for timm holds the classifier, from which timm.create_model(..., features_only=True) "
            "takes the maps"
        )
    if Path(to).suffix == ".onnx" and any(
        importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")
    ):
        raise CannotExport(f"{to}: needs onnx, onnxscript and onnxruntime: pip install 'cat-training[export]'")


def is_hub(to: str) -> bool:
    """Whether the target is a folder for timm and the Hub."""
    return to.endswith("/")


def export(model: "nn.Module", to: str, about: dict[str, Any]) -> float:
    """Write `model` to a file, or to a folder if `to` ends in "/". Returns the largest difference from the model.

    about: {"model": {"name": ..., arguments of catmodel.create_model or, for a SemanticFPN, of create_segmenter},
        "classes": names, "mean": [3], "std": [3], ...}. It is stored in the file as JSON, under the metadata key
        "catmodel".

    A difference is relative to the largest output, if that is above 1. The batch size stays free; so do height and
    width (64 pixels or more) for features_only models and for segmentation.

    Raises ExportError if the difference exceeds 1e-4, CannotExport if the format cannot hold the model.
    """
    import torch

    if is_hub(to) and _segments(model):
        raise CannotExport(f"{to}: timm and the Hub have no place for segmentation; name a file of another format")
    model.eval().requires_grad_(False)
    if hasattr(model, "set_kernels"):
        model.set_kernels(False)
    path = Path(to)
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        run = _WRITERS[path.suffix if not is_hub(to) else "/"](model, temporary, about)
        difference = _largest_difference(model, run, about["model"])
        if not difference <= TOLERANCE:
            raise ExportError(
                f"{to} was not written: its outputs differ by {difference:.1e} from the model's, "
                f"more than {TOLERANCE:.0e}"
            )
        if temporary.is_dir():
            path.mkdir(exist_ok=True)
            for file in temporary.iterdir():
                os.replace(file, path / file.name)
        else:
            os.replace(temporary, path)
    return difference


def _largest_difference(model: "nn.Module", run: Callable[["Tensor"], Sequence["Tensor"]], settings: dict) -> float:
    """The largest relative difference of `run` from `model` on random images; NaN if there is one."""
    import torch

    generator = torch.Generator().manual_seed(0)
    sizes = [EXAMPLE, *SIZES] if _takes_any_size(model) else [_image_size(settings)] * len(BATCHES)
    largest = 0.0
    for number, size in enumerate(sizes):
        images = torch.randn(BATCHES[number % len(BATCHES)], settings.get("in_chans", 3), *size, generator=generator)
        expected, found = _outputs(model(images)), run(images)
        for want, have in zip(expected, found, strict=True):
            if want.shape != have.shape:
                raise ExportError(
                    f"for images of shape {list(images.shape)} the file gives {list(have.shape)}, "
                    f"the model {list(want.shape)}"
                )
            error = ((want - have).abs().max() / want.abs().max().clamp(min=1)).item()
            largest = error if error != error else max(largest, error)  # max would drop a NaN
            if largest != largest:
                return largest
    return largest


def _segments(model: "nn.Module") -> bool:
    from catmodel.semantic_fpn import SemanticFPN

    return isinstance(model, SemanticFPN)


def _takes_any_size(model: "nn.Module") -> bool:
    return _segments(model) or model.features_only


def _image_size(settings: dict) -> tuple[int, int]:
    size = settings["img_size"]
    return (size, size) if isinstance(size, int) else tuple(size)


def _outputs(found: Any) -> list["Tensor"]:
    return list(found) if isinstance(found, list | tuple) else [found]


# -------------------------------------------------------------------------------------------------------------- formats


def _to_safetensors(model: "nn.Module", path: Path, about: dict) -> Callable:
    from safetensors.torch import load_file, save

    import catmodel

    # Not save_file: only the owner can read the files that it writes.
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    path.write_bytes(save(weights, {METADATA: json.dumps(about)}))
    create = catmodel.create_segmenter if _segments(model) else catmodel.create_model
    again = create(**about["model"]).eval()
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
        """Round down, as Python does. ONNX's Div, which torch uses for //, truncates; padding uses -(-a // b)."""
        return opset18.Div(opset18.Sub(dividend, opset18.Mod(dividend, divisor)), divisor)

    program = _program(model, about)
    names = ["logits"] if _segments(model) or not model.features_only else [f"map{i}" for i in model.out_indices]
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


def _program(model: "nn.Module", about: dict) -> "ExportedProgram":
    """Trace the model with torch.export. The batch size stays symbolic; so do the sides of images of any size."""
    import torch
    from torch.export import Dim

    settings, any_size = about["model"], _takes_any_size(model)
    if any_size and settings.get("shifted_windows"):
        raise CannotExport(
            "shifted_windows shifts only if an image has more than one patch: "
            "a graph for any image size cannot hold both cases"
        )
    dims = {0: Dim("batch")}
    if any_size:
        dims |= {2: Dim("height", min=SMALLEST), 3: Dim("width", min=SMALLEST)}
    images = torch.randn(2, settings.get("in_chans", 3), *(EXAMPLE if any_size else _image_size(settings)))
    program = torch.export.export(
        model, (images,), dynamic_shapes=(dims,), prefer_deferred_runtime_asserts_over_guards=True
    )
    if any_size:
        # These assertions hold for the example's size only. They concern memory layout (whether a reshape copies), not
        # values; `export` compares the graph with the model at sizes that violate them.
        for node in list(program.graph.nodes):
            if node.target is torch.ops.aten._assert_scalar.default:
                program.graph.erase_node(node)
        program.graph.eliminate_dead_code()
        program.graph_module.recompile()
    return program


def _to_hub(model: "nn.Module", folder: Path, about: dict) -> Callable:
    """Write config.json and model.safetensors in timm's format; `timm_registry` reads them."""
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

    import catmodel

    catmodel.register_timm()
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return lambda images: [again(images)]


_WRITERS = {".safetensors": _to_safetensors, ".pt2": _to_pt2, ".onnx": _to_onnx, "/": _to_hub}
