"""Objects in image files outside of a dataset, decoded, resized and normalised as in an evaluation."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from data_pipeline.decode import decode_batch
from train.tasks.detection.coco import BOX, FOUND, columns
from train.tasks.detection.inference import Inference, evaluation_targets
from train.tasks.detection.pictures import draw_boxes, found_name
from train.tasks.drawing import palette, with_legend
from train.tasks.image_files import ahead, check_names, read_image
from train.telemetry.formatting import printable

if TYPE_CHECKING:
    from data_pipeline.scaled_boxes import ScaledBoxes
    from train.tasks.detection.task import Detection

AHEAD = 3  # images that are decoded while the model has one
ENDING = "_boxes.jpg"  # of the file that is written for an image
LEAST = 0.3  # default of --min-score


@dataclass(frozen=True)
class ImageObjects:
    """The objects found in an image, best first; or why it could not be read.

    size: (width, height). found: coco.FOUND [n]. names: of their classes. written: a file about it.
    """

    path: Path
    size: tuple[int, int] = (0, 0)
    found: np.ndarray = field(default_factory=lambda: np.zeros(0, FOUND))
    names: tuple[str, ...] = ()
    written: Path | None = None
    problem: str | None = None

    def text(self) -> str:
        lines = [
            f"  {100 * score:5.1f} %  {printable(name)}  at {left:.0f}, {top:.0f}: {width:.0f} x {height:.0f}"
            for name, score, (left, top, width, height) in self._rows()
        ]
        return "\n".join([str(self.path), *lines, *([f"  → {self.written}"] if self.written else [])])

    def json(self) -> dict[str, Any]:
        """Boxes are (left, top, width, height) in pixels of the file's image, as in COCO's JSON."""
        return {
            "image": str(self.path),
            "width": self.size[0],
            "height": self.size[1],
            "objects": [{"class": name, "score": score, "bbox": box} for name, score, box in self._rows()],
            "written": [str(self.written)] if self.written else [],
        }

    def _rows(self) -> Iterable[tuple[str, float, list[float]]]:
        return zip(self.names, self.found["score"].tolist(), columns(self.found, BOX).tolist(), strict=True)


class ReadImage:
    """An image file, decoded for the network (`pixels`, uint8 [H, W, 3], with `targets` as an evaluation has them) and,
    if it is to be drawn on, in its own size (`photograph`); `problem`: why it cannot be.
    """

    def __init__(self, path: Path, views: "ScaledBoxes", interpolation: str, to_draw_on: bool):
        self.path, self._views, self._interpolation, self._to_draw_on = path, views, interpolation, to_draw_on
        self.photograph = None
        self.problem = read_image(path, self._decode)

    def _decode(self, encoded: bytes, size: tuple[int, int]) -> str | None:
        self.size, dimensions = size, np.array([size])
        windows, shapes = self._views.evaluation(*dimensions.T)
        shape = tuple(shapes[0].tolist())
        self.pixels = np.zeros((*shape, 3), np.uint8)
        self.targets = evaluation_targets(windows, dimensions, shape)
        whole = np.array([[0, 0, *size, 0]], np.int32)
        jobs = [(self.pixels, windows)]
        if self._to_draw_on:
            self.photograph = np.zeros((*size[::-1], 3), np.uint8)
            jobs.append((self.photograph, whole))
        for pixels, window in jobs:
            found = decode_batch([encoded], dimensions, window, pixels.shape[:2], self._interpolation, pixels[None])
            if found:
                return found[0]
        return None


@torch.no_grad()
def predict(
    task: "Detection",
    model: nn.Module,
    paths: Sequence[Path],
    device: torch.device,
    output: Path | None,
    min_score: float,
) -> Iterator[ImageObjects]:
    """The objects in each image whose score is at least `min_score`, in the order of `paths`.

    `model`: in evaluation mode, on `device`. output: a folder for `<name>_boxes.jpg`, the photograph with boxes and a
    legend. Raises ConfigError if two images would have the same file.
    """
    if output:
        check_names(paths, ENDING)
        output.mkdir(parents=True, exist_ok=True)
    inference = Inference(task, min(min_score, task.config.task.score_threshold))
    views, interpolation = task.views(), task.config.data.interpolation

    def read(path: Path) -> ReadImage:
        return ReadImage(path, views, interpolation, output is not None)

    for image in ahead(read, paths, AHEAD):
        if image.problem:
            yield ImageObjects(image.path, problem=image.problem)
            continue
        pixels = torch.from_numpy(image.pixels).permute(2, 0, 1)[None].to(device)
        found = inference(model, pixels, image.targets, [0])[0]
        found = found[found["score"] >= min_score]
        names = tuple(task.classes[label] for label in found["label"].tolist())
        written = _write(output, image, found, task.classes) if output else None
        yield ImageObjects(image.path, image.size, found, names, written)


def _write(output: Path, image: ReadImage, found: np.ndarray, classes: Sequence[str]) -> Path:
    labels, colours = found["label"].tolist(), palette(len(classes)).tolist()
    names = [found_name(classes[label], score) for label, score in zip(labels, found["score"].tolist(), strict=True)]
    picture = draw_boxes(image.photograph, columns(found, BOX), names, [colours[label] for label in labels])
    path = output / f"{image.path.stem}{ENDING}"
    Image.fromarray(with_legend(picture, sorted(set(labels)), classes)).save(path, quality=92, subsampling=0)
    return path
