"""The class of every pixel of image files outside of a dataset: decoded, resized and normalised as in an evaluation."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from data_pipeline.decode import decode_batch
from data_pipeline.label_maps import ignored_value
from data_pipeline.views import ScaledCrops
from train.tasks.drawing import with_legend
from train.tasks.image_files import ahead, check_names, read_image
from train.tasks.segmentation.colours import lay_over
from train.tasks.segmentation.inference import Inference, views_of
from train.telemetry.formatting import printable

if TYPE_CHECKING:
    from train.config import Config

AHEAD = 3  # images that are decoded while the model has one


@dataclass(frozen=True)
class ImageMap:
    """The classes found in an image with their shares of its pixels 0..1, the largest first; or why the image could not
    be read. written: files about it.
    """

    path: Path
    shares: dict[str, float] = field(default_factory=dict)
    written: tuple[Path, ...] = ()
    problem: str | None = None

    def text(self) -> str:
        lines = [f"  {100 * share:5.1f} %  {printable(name)}" for name, share in self.shares.items()]
        return "\n".join([str(self.path), *lines, *(f"  → {file}" for file in self.written)])

    def json(self) -> dict[str, Any]:
        return {"image": str(self.path), "shares": self.shares, "written": [str(file) for file in self.written]}


class ReadImage:
    """An image file, decoded for the network (`pixels`, uint8 [H, W, 3]) and, if it is to be drawn on, in its own size
    (`photograph`); `problem`: why it cannot be.
    """

    def __init__(self, path: Path, views: ScaledCrops, interpolation: str, to_draw_on: bool):
        self.path, self._views, self._interpolation, self._to_draw_on = path, views, interpolation, to_draw_on
        self.problem = read_image(path, self._decode)

    def _decode(self, encoded: bytes, size: tuple[int, int]) -> str | None:
        dimensions = np.array([size])
        windows, shapes = self._views.evaluation(*dimensions.T)
        self.size = size[::-1]
        self.pixels = np.zeros((*shapes[0].tolist(), 3), np.uint8)
        self.photograph = np.zeros((*self.size, 3) if self._to_draw_on else (0, 0, 3), np.uint8)
        for pixels in (self.pixels, self.photograph):
            if pixels.size:
                shape = pixels.shape[:2]
                found = decode_batch([encoded], dimensions, windows, shape, self._interpolation, pixels[None])
                if found:
                    return found[0]
        return None


@torch.no_grad()
def predict(
    model: nn.Module,
    paths: Sequence[Path],
    config: "Config",
    classes: Sequence[str],
    device: torch.device,
    output: Path | None,
) -> Iterator[ImageMap]:
    """The classes of each path's pixels, in the order of `paths`.

    `model`: in evaluation mode, on `device`. output: a folder for `<name>_overlay.jpg`, the photograph under the
    classes' colours with a legend, and `<name>_labels.png`, a gray image of the classes' numbers. Raises ConfigError if
    two images would have the same files.
    """
    if output:
        check_names(paths, "_labels.png")
        output.mkdir(parents=True, exist_ok=True)
    views = views_of(config.task, config.augment, max(config.task.test_ratios))
    inference = Inference(config)

    def read(path: Path) -> ReadImage:
        return ReadImage(path, views, config.data.interpolation, output is not None)

    for image in ahead(read, paths, AHEAD):
        if image.problem:
            yield ImageMap(image.path, problem=image.problem)
            continue
        pixels = torch.from_numpy(image.pixels).permute(2, 0, 1)[None].to(device)
        labels = inference(model, pixels, image.size)[0].cpu().numpy()
        written = _write(output, image, labels, classes) if output else ()
        yield ImageMap(image.path, _shares(labels, classes), written)


def _shares(labels: np.ndarray, classes: Sequence[str]) -> dict[str, float]:
    counts = np.bincount(labels.ravel(), minlength=len(classes))
    order = np.argsort(-counts, kind="stable")
    return {classes[number]: float(counts[number] / labels.size) for number in order if counts[number]}


def _write(output: Path, image: ReadImage, labels: np.ndarray, classes: Sequence[str]) -> tuple[Path, Path]:
    overlay, indices = (output / f"{image.path.stem}_{kind}" for kind in ("overlay.jpg", "labels.png"))
    found = [number for number in range(len(classes)) if (labels == number).any()]
    picture = with_legend(lay_over(image.photograph, labels, len(classes)), found, classes)
    Image.fromarray(picture).save(overlay, quality=92, subsampling=0)
    Image.fromarray(labels.astype(np.uint8 if ignored_value(len(classes)) == 255 else np.uint16)).save(indices)
    return overlay, indices
