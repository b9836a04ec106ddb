"""The classes of image files outside of a dataset: decoded, cropped and normalised as in an evaluation."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_pipeline.augment import normalise
from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.crop import evaluation_windows
from data_pipeline.decode import decode_batch
from train.tasks.image_files import ahead, read_image
from train.telemetry.formatting import printable

AHEAD = 3  # batches that are decoded while the model has one


@dataclass(frozen=True)
class ImageClasses:
    """The most probable classes of an image and their probabilities 0..1, best first; or why the image could not be
    read.
    """

    path: Path
    classes: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    problem: str | None = None

    def text(self) -> str:
        pairs = zip(self.classes, self.probabilities, strict=True)
        return "\n".join(
            [str(self.path), *(f"  {100 * probability:5.1f} %  {printable(name)}" for name, probability in pairs)]
        )

    def json(self) -> dict[str, Any]:
        pairs = zip(self.classes, self.probabilities, strict=True)
        return {
            "image": str(self.path),
            "top": [{"class": name, "probability": probability} for name, probability in pairs],
        }


@torch.no_grad()
def predict(
    model: nn.Module,
    paths: Sequence[Path],
    data: DataConfig,
    augment: AugmentConfig,
    names: Sequence[str],
    device: torch.device,
    batch: int,
    top: int,
) -> Iterator[ImageClasses]:
    """The `top` classes, of those that `names` lists, of each path, in their order.

    `model`: in evaluation mode, on `device`.

    Threads decode a few batches ahead of the model; results are returned while later images are still read.
    """

    def read(path: Path) -> tuple[Path, np.ndarray, str | None]:
        pixels = np.zeros((data.image_size, data.image_size, 3), np.uint8)
        return path, pixels, read_image(path, lambda encoded, size: _decode(encoded, size, pixels, data))

    found = ahead(read, paths, AHEAD * batch)
    while images := list(islice(found, batch)):
        pixels = torch.from_numpy(np.stack([pixels for _, pixels, _ in images])).permute(0, 3, 1, 2).to(device)
        probabilities, classes = _best(model(normalise(pixels, augment)), top)
        for (path, _, problem), numbers, shares in zip(images, classes.tolist(), probabilities.tolist(), strict=True):
            if problem:
                yield ImageClasses(path, problem=problem)
            else:
                yield ImageClasses(path, tuple(names[number] for number in numbers), tuple(shares))


def _best(logits: Tensor, top: int) -> tuple[Tensor, Tensor]:
    best = logits.float().softmax(dim=1).topk(min(top, logits.shape[1]), dim=1)
    return best.values.cpu(), best.indices.cpu()


def _decode(encoded: bytes, size: tuple[int, int], pixels: np.ndarray, data: DataConfig) -> str | None:
    """Decode one image into `pixels`, uint8 [S, S, 3]. Returns why it cannot be decoded, or None."""
    dimensions = np.array([size])
    windows = evaluation_windows(*dimensions.T, data.eval_crop)
    return decode_batch([encoded], dimensions, windows, pixels.shape[:2], data.interpolation, pixels[None]).get(0)
