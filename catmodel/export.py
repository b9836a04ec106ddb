"""Export of a model to safetensors, ONNX, torch.export's .pt2, or a folder for timm and the Hugging Face Hub.

A file is written under a temporary name and compared with the model on random images of several batch sizes (and, for
dense maps, segmentation and detection, of several image sizes). It is renamed only if both agree. Everything runs in
fp32 on the CPU, without the Triton kernels.
"""

import functools
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram

TOLERANCE = 1e-4
SUFFIXES = (".safetensors", ".onnx", ".pt2")
SMALLEST = 64  # pixels: the shortest side of images of any size
METADATA = "catmodel"  # the metadata key of the model's description
THRESHOLD = "score_threshold"  # of a detector: a buffer, and an initializer of its graph
HOMELESS = {"create_segmenter": "segmentation", "create_detector": "detection"}  # in folders for timm and the Hub

# (height, width) of images of any size: of the traced example, whose map needs padding to whole patches; and, for
# the comparison, odd sides, the smallest sides, and whole patches.
EXAMPLE = (240, 264)
SIZES = (EXAMPLE, (97, 131), (SMALLEST, SMALLEST), (224, 224))
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
        raise CannotExport(f"{to}: needs onnx, onnxscript and onnxruntime: pip install -e '.[export]'")


def is_hub(to: str) -> bool:
    """Whether the target is a folder for timm and the Hub."""
    return to.endswith("/")


def export(model: "nn.Module", to: str, about: dict[str, Any]) -> float:
    """Write `model` to a file, or to a folder if `to` ends in "/". Returns the largest difference from the model.

    about: {"model": {"name": ..., arguments of catmodel.create_model or, for a SemanticFPN, of create_segmenter, for a
        Detector, of create_detector}, "classes": names, "mean": [3], "std": [3], ...}. It is stored in the file as
        JSON, under the metadata key "catmodel". For a Detector also "detect": arguments of detection.OneImage, whose
        graph .onnx and .pt2 hold.

    A difference is relative to the largest output, if that is above 1. The batch size stays free, but of a detector it
    is 1; so do height and width (64 pixels or more) for features_only models, segmentation and detection.

    Raises ExportError if the difference exceeds 1e-4, CannotExport if the format cannot hold the model.
    """
    import torch

    if is_hub(to) and (task := HOMELESS.get(_form(model).create)):
        raise CannotExport(f"{to}: timm and the Hub have no place for {task}; name a file of another format")
    model.eval().requires_grad_(False)
    if hasattr(model, "set_kernels"):
        model.set_kernels(False)
    path = Path(to)
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        if _form(model).create == "create_detector" and path.suffix != ".safetensors":
            difference = _export_detector(model, temporary, about)
        else:
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
    sizes = SIZES if _form(model).any_size else [_image_size(settings)] * len(BATCHES)
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


def _export_detector(model: "nn.Module", path: Path, about: dict[str, Any]) -> float:
    """Write OneImage of `model`, and return the largest difference between its objects and the file's.

    They are compared at a threshold above which something is found in random images.
    """
    import torch

    from catmodel.detection.exported import OneImage, largest_difference, telling_threshold

    generator = torch.Generator().manual_seed(0)
    channels = about["model"].get("in_chans", 3)
    smallest = _form(model).smallest
    sizes = [[max(side, smallest) for side in size] for size in SIZES]
    images = [torch.randn(1, channels, *size, generator=generator) for size in sizes]
    whole = OneImage(model, **about["detect"]).eval()
    run = _WRITERS[path.suffix](whole, path, about)
    threshold = telling_threshold(model, images)
    whole.score_threshold.fill_(threshold)
    return max(largest_difference(whole(image), run(image, threshold)) for image in images)


@dataclass(frozen=True)
class _Form:
    """What a kind of network takes and gives. create: the function of catmodel that builds it again. outputs: their
    names in a graph. any_size: height and width of images stay free, from `smallest` pixels on; one_image: the batch
    size does not.
    """

    create: str
    outputs: tuple[str, ...]
    any_size: bool = True
    one_image: bool = False
    smallest: int = SMALLEST


def _form(model: "nn.Module") -> _Form:
    from catmodel.detection import Detector
    from catmodel.detection.exported import OneImage
    from catmodel.semantic_fpn import SemanticFPN

    if isinstance(model, SemanticFPN):
        return _Form("create_segmenter", ("logits",))
    if isinstance(model, Detector | OneImage):
        # A map of one place has memory in another order, which torch.export would make a condition of the graph.
        last = (model.detector if isinstance(model, OneImage) else model).strides[-1]
        outputs = ("boxes", "scores", "classes")
        return _Form("create_detector", outputs, one_image=True, smallest=max(SMALLEST, last + 1))
    if model.features_only:
        return _Form("create_model", tuple(f"map{i}" for i in model.out_indices))
    return _Form("create_model", ("logits",), any_size=False)


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
    again = getattr(catmodel, _form(model).create)(**about["model"]).eval()
    again.load_state_dict(load_file(path))
    return lambda images: _outputs(again(images))


def _to_pt2(model: "nn.Module", path: Path, about: dict) -> Callable:
    import torch

    torch.export.save(_program(model, about), path, extra_files={METADATA: json.dumps(about)})
    module = torch.export.load(path).module()

    def run(images: "Tensor", threshold: float | None = None) -> list["Tensor"]:
        if threshold is not None:
            module.get_buffer(THRESHOLD).fill_(threshold)
        return _outputs(module(images))

    return run


def _to_onnx(model: "nn.Module", path: Path, about: dict) -> Callable:
    import operator

    import numpy as np
    import onnx
    import onnxruntime
    import torch
    from onnx import numpy_helper
    from onnxscript import DOUBLE, FLOAT, INT64, opset18

    def floor_divide(dividend: INT64, divisor: INT64) -> INT64:
        """Round down, as Python does. ONNX's Div, which torch uses for //, truncates; padding uses -(-a // b)."""
        return opset18.Div(opset18.Sub(dividend, opset18.Mod(dividend, divisor)), divisor)

    def stable_sort(
        values: FLOAT, *, stable: bool = False, dim: int = -1, descending: bool = False
    ) -> tuple[FLOAT, INT64]:
        """By TopK of all, which puts the lower index first among equal values."""
        size = opset18.Gather(opset18.Shape(values), opset18.Constant(value_ints=[dim]), axis=0)
        return opset18.TopK(values, size, axis=dim, largest=int(descending), sorted=1)

    def suppress(boxes: DOUBLE, scores: DOUBLE, iou_threshold: float) -> INT64:
        """torchvision's nms. ONNX's operator takes float32, which rounds the boxes of high classes."""
        boxes = opset18.Unsqueeze(opset18.Cast(boxes, to=FLOAT.dtype), opset18.Constant(value_ints=[0]))
        scores = opset18.Unsqueeze(opset18.Cast(scores, to=FLOAT.dtype), opset18.Constant(value_ints=[0, 1]))
        most = opset18.Constant(value_ints=[sys.maxsize])
        threshold = opset18.Constant(value_floats=[iou_threshold])
        kept = opset18.NonMaxSuppression(boxes, scores, most, threshold)  # rows of (image, class, box)
        return opset18.Gather(kept, opset18.Constant(value_int=2), axis=1)

    translations = {operator.floordiv: floor_divide, torch.ops.aten.sort.stable: stable_sort}
    form = _form(model)
    if form.one_image:
        import torchvision  # noqa: F401 - which defines the operator

        translations[torch.ops.torchvision.nms.default] = suppress
    names = {} if form.one_image else {0: "batch"}
    names |= {2: "height", 3: "width"} if form.any_size else {}
    written = torch.onnx.export(
        _program(model, about),
        dynamic_shapes=(names,),  # else they are called s40 and the like
        input_names=["images"],
        output_names=list(form.outputs),
        external_data=False,
        verbose=False,
        custom_translation_table=translations,
    )
    written.model.metadata_props[METADATA] = json.dumps(about)
    written.save(path)
    if form.one_image:
        # The sizes of intermediate results are those of the example where the graph keeps the best of a level; ONNX
        # Runtime would take them as promises.
        graph = onnx.load(path)
        del graph.graph.value_info[:]
        onnx.save(graph, path)

    @functools.cache
    def session(threshold: float | None) -> onnxruntime.InferenceSession:
        graph = onnx.load(path)
        if threshold is not None:
            initializer = next(one for one in graph.graph.initializer if one.name == THRESHOLD)
            initializer.CopyFrom(numpy_helper.from_array(np.array(threshold, np.float32), THRESHOLD))
        return onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])

    def run(images: "Tensor", threshold: float | None = None) -> list["Tensor"]:
        return [torch.from_numpy(array) for array in session(threshold).run(None, {"images": images.numpy()})]

    return run


def _program(model: "nn.Module", about: dict) -> "ExportedProgram":
    """Trace the model with torch.export. The batch size stays symbolic; so do the sides of images of any size."""
    import torch
    from torch.export import Dim

    settings, form = about["model"], _form(model)
    any_size = form.any_size
    if any_size and settings.get("shifted_windows"):
        raise CannotExport(
            "shifted_windows shifts only if an image has more than one patch: "
            "a graph for any image size cannot hold both cases"
        )
    dims = {} if form.one_image else {0: Dim("batch")}
    if any_size:
        dims |= {2: Dim("height", min=form.smallest), 3: Dim("width", min=form.smallest)}
    size = EXAMPLE if any_size else _image_size(settings)
    images = torch.randn(1 if form.one_image else 2, settings.get("in_chans", 3), *size)
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
